"""Reading back what a command wrote: `result.json` and `model.npz`, checked before they are used."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bilevel.tuning.errors import InputError, brief
from bilevel.tuning.files import load_arrays


class Saved(NamedTuple):
    """The contents of an output directory."""

    result: dict[str, Any]
    arrays: dict[str, np.ndarray]
    """At least `coef` (d, C), `intercept` (C,) and `features` (d,); see `check_model`."""


def load_results(directory: str) -> Saved:
    """Both files of a directory; raises `InputError` where one is missing or damaged."""
    folder = Path(directory)
    if not folder.is_dir():
        raise InputError(f"no directory {directory!r}; expected the --out of an earlier run")
    for name in ("result.json", "model.npz"):
        if not (folder / name).is_file():
            raise InputError(f"no {name} in {directory!r}; expected the --out of an earlier run")
    path = folder / "result.json"
    try:
        result = json.loads(path.read_bytes().decode(), parse_constant=_refuse)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"cannot read {str(path)!r} ({brief(error)}); expected JSON") from error
    if not isinstance(result, dict) or not isinstance(result.get("target"), str):
        raise InputError(f"{str(path)!r} holds no result; expected what tune or clean wrote")
    arrays = load_arrays(folder / "model.npz")
    check_model(arrays, str(folder / "model.npz"))
    return Saved(result, arrays)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON number")


def check_model(arrays: dict[str, np.ndarray], path: str) -> None:
    """Refuse arrays that are no linear model."""
    missing = [name for name in ("coef", "intercept", "features") if name not in arrays]
    if missing:
        raise InputError(f"{path!r} has no array {missing[0]!r}; expected a model of tune or clean")
    coef, intercept, features = (arrays[name] for name in ("coef", "intercept", "features"))
    classes = arrays.get("classes")
    num_outputs = coef.shape[-1] if coef.ndim == 2 else 0
    fits = (
        coef.dtype.kind == intercept.dtype.kind == "f"
        and features.dtype.kind == "U"
        and num_outputs > 0
        and intercept.shape == (num_outputs,)
        and features.shape == coef.shape[:1]
        and (num_outputs == 1 if classes is None else _fits_classes(classes, num_outputs))
    )
    if not fits:
        raise InputError(
            f"the arrays of {path!r} do not fit together; expected a model of tune or clean"
        )
    if not (np.isfinite(coef).all() and np.isfinite(intercept).all()):
        raise InputError(f"{path!r} holds NaN or infinities; expected a finite model")


def _fits_classes(classes: np.ndarray, num_outputs: int) -> bool:
    known = classes.ndim == 1 and classes.dtype.kind in "biufU" and len(classes) >= 2
    return known and num_outputs in ({1, 2} if len(classes) == 2 else {len(classes)})
