"""Reading a table from a file: CSV, Parquet or npz, told apart by the suffix.

An npz file holds arrays of one length: one-dimensional ones are columns by their name, and a
two-dimensional `X` is the columns `X_0`, `X_1`, ... Pickled objects are never loaded.
"""

import os
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from bilevel.tuning.errors import InputError, brief

KINDS = "a CSV, Parquet or npz file"


def read_file(path: str) -> Any:
    """The data frame in a file; raises `InputError` for whatever is wrong with it."""
    check_file(path)
    suffix = Path(path).suffix.lower()
    reader = {".parquet": _read_parquet, ".npz": _read_npz}.get(suffix, _read_csv)
    frame = reader(path)
    names = [str(name).strip() for name in frame.columns]
    if len(names) < 2:
        raise InputError(f"{path!r} has one column; expected a target and at least one feature")
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise InputError(
            f"{path!r} has more than one column {repeated[0]!r}; expected distinct column names"
        )
    frame.columns = names
    return frame


def check_file(path: str) -> None:
    """Refuse what is not a readable file with something in it, before any package is loaded."""
    if not os.path.isfile(path):
        what = "is not a regular file" if os.path.exists(path) else "does not exist"
        raise InputError(f"{path!r} {what}; expected {KINDS}")
    try:
        with open(path, "rb") as file:
            head = file.read(4096)
    except OSError as error:
        raise InputError(f"cannot read {path!r} ({error.strerror}); expected {KINDS}") from error
    if not head.strip():
        raise InputError(f"{path!r} is empty; expected {KINDS} with at least 2 rows")


def _read_csv(path: str) -> Any:
    import pandas as pd

    with open(path, "rb") as file:
        if b"\0" in file.read():
            raise InputError(f"{path!r} looks binary; expected a text file in CSV format")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # pandas only warns when it drops fields of a row that is too long.
            warnings.simplefilter("error", pd.errors.ParserWarning)
            header = pd.read_csv(path, header=None, nrows=1, dtype=str, compression=None)
            frame = pd.read_csv(path, index_col=False, low_memory=False, compression=None)
    except Exception as error:  # whatever a parser throws at a broken file is bad input
        raise InputError(
            f"cannot parse {path!r} ({brief(error)}); expected comma-separated values with a header row"
        ) from error
    # From the header as it stands: pandas renames columns that appear twice.
    names = [str(value) for value in header.iloc[0]]
    if all(_is_number(name) for name in names):
        raise InputError(
            f"the first row of {path!r} holds numbers; expected a header row with column names"
        )
    frame.columns = names
    return frame


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _read_parquet(path: str) -> Any:
    import pandas as pd

    try:
        frame = pd.read_parquet(path, engine="pyarrow")
    except Exception as error:
        raise InputError(
            f"cannot parse {path!r} ({brief(error)}); expected a Parquet file"
        ) from error
    return frame.reset_index(drop=True)


def _read_npz(path: str) -> Any:
    import pandas as pd

    columns: dict[str, np.ndarray] = {}
    for name, array in load_arrays(path).items():
        if array.ndim == 2 and name == "X":
            columns |= {f"X_{i}": array[:, i] for i in range(array.shape[1])}
        elif array.ndim == 1:
            columns[name] = array
        else:
            raise InputError(
                f"array {name!r} in {path!r} has shape {array.shape}; expected one-dimensional "
                "arrays, and a two-dimensional one only if its name is 'X'"
            )
    for name, column in columns.items():
        if column.dtype.kind not in "bifuU":
            raise InputError(
                f"array {name!r} in {path!r} has type {column.dtype}; expected numbers or text"
            )
    lengths = {len(column) for column in columns.values()}
    if len(lengths) != 1:
        raise InputError(
            f"the arrays in {path!r} have {len(lengths)} different lengths; expected one length"
        )
    return pd.DataFrame(columns)


def load_arrays(path: str | Path) -> dict[str, np.ndarray]:
    """All arrays of an npz file, without pickles; raises `InputError`."""
    try:
        with zipfile.ZipFile(path) as archive:  # np.load would take a bare .npy or a pickle too
            names = archive.namelist()
        if len(names) != len(set(names)):
            raise ValueError("an array appears twice")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with np.load(path, allow_pickle=False) as arrays:
                found = {name: arrays[name] for name in arrays.files}
        if not all(isinstance(array, np.ndarray) for array in found.values()):
            raise ValueError("a member is no array")
    except Exception as error:
        raise InputError(
            f"cannot read {str(path)!r} ({brief(error)}); expected an npz file of plain arrays"
        ) from error
    return found
