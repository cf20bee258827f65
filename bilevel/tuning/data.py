"""Loading a table (CSV file or bundled scikit-learn set) and checking it before any compute."""

import os
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np

from bilevel.tuning.errors import InputError, require_tune_extra

BUNDLED = ("breast_cancer", "diabetes", "digits", "iris", "wine")
"""Names of scikit-learn's bundled single-target sets; their target column is called `target`."""

MAX_CLASSES = 20
"""A numeric target with more distinct values than this is a regression target."""


@dataclass(frozen=True)
class Table:
    """Numeric features and one target."""

    name: str
    X: np.ndarray
    """Features, (n_samples, n_features), float64."""
    y: np.ndarray
    """Class index (int64) where `classes` is set, else the target value (float64)."""
    classes: np.ndarray | None
    """The labels by class index; None for regression."""
    features: tuple[str, ...]
    target: str
    trusted: np.ndarray | None = None
    """Which rows a column marks as trusted, (n_samples,), bool; None where no column was named."""

    @property
    def task(self) -> str:
        """The model the target asks for: ridge, logistic or softmax."""
        if self.classes is None:
            return "ridge"
        return "logistic" if len(self.classes) == 2 else "softmax"


def load_table(source: str, target: str | None, trusted: str | None = None) -> Table:
    """The table behind a path or a bundled name, checked; raises `InputError`.

    `trusted` names a column that is no feature but marks rows. A bundled name wins over a file of that
    name (write `./digits` for the file).
    """
    bundled = source in BUNDLED
    if not bundled:
        _check_file(source)
        if target is None:
            raise InputError(f"no target for {source!r}; expected --target COLUMN")
    require_tune_extra()
    frame = _load_bundled(source) if bundled else _read_csv(source)
    return check_table(frame, source, "target" if target is None else target, trusted)


def _check_file(path: str) -> None:
    if not os.path.exists(path):
        raise InputError(
            f"no file and no bundled data set {path!r}; expected a CSV file or one of "
            + ", ".join(BUNDLED)
        )
    if not os.path.isfile(path):
        raise InputError(f"{path!r} is not a regular file; expected a CSV file")
    try:
        with open(path, "rb") as file:
            head = file.read(4096)
    except OSError as error:
        raise InputError(f"cannot read {path!r} ({error.strerror}); expected a CSV file") from error
    if not head.strip():
        raise InputError(f"{path!r} is empty; expected a CSV file with a header row")
    if b"\0" in head:
        raise InputError(f"{path!r} looks binary; expected a text file in CSV format")


def _load_bundled(name: str) -> Any:
    import sklearn.datasets

    return getattr(sklearn.datasets, f"load_{name}")(as_frame=True).frame


def _read_csv(path: str) -> Any:
    import pandas as pd

    try:
        with warnings.catch_warnings():
            # pandas only warns when it drops fields of a row that is too long.
            warnings.simplefilter("error", pd.errors.ParserWarning)
            header = pd.read_csv(path, header=None, nrows=1, dtype=str, compression=None)
            frame = pd.read_csv(path, index_col=False, low_memory=False, compression=None)
    except Exception as error:  # whatever a parser throws at a broken file is bad input
        raise InputError(
            f"cannot parse {path!r} ({error}); expected comma-separated values with a header row"
        ) from error
    names = [str(value).strip() for value in header.iloc[0]]
    if len(names) < 2:
        raise InputError(
            f"{path!r} has one column; expected a target and at least one feature, "
            "separated by commas"
        )
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise InputError(
            f"{path!r} has more than one column {repeated[0]!r}; expected distinct column names"
        )
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


def check_table(frame: Any, name: str, target: str, trusted: str | None = None) -> Table:
    """Features, target and trusted rows of a data frame, or `InputError` naming what is at fault."""
    names = [str(column) for column in frame.columns]
    shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    if target not in names:
        raise InputError(
            f"no column {target!r} in {name!r}; expected --target to be one of {shown}"
        )
    if trusted is not None and trusted not in names:
        raise InputError(
            f"no column {trusted!r} in {name!r}; expected --trusted to be a number of rows or one of "
            + shown
        )
    if trusted == target:
        raise InputError(f"--trusted and --target are both {target!r}; expected two columns")
    if len(frame) < 2:
        raise InputError(f"{name!r} has {len(frame)} rows; expected at least 2")
    features = [column for column in names if column not in (target, trusted)]
    if not features:
        raise InputError(f"{name!r} has no column beside {target!r}; expected at least one feature")
    marks = None if trusted is None else _marks(frame.iloc[:, names.index(trusted)], trusted)
    y, classes = _target(frame.iloc[:, names.index(target)], target)
    columns = [_numbers(frame.iloc[:, names.index(c)], f"column {c!r}") for c in features]
    X = np.stack(columns, axis=1)
    if not np.any(np.ptp(X, axis=0) > 0):
        raise InputError(f"every feature of {name!r} is constant; expected one that varies")
    return Table(name, X, y, classes, tuple(features), target, marks)


MARKS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
"""What a column of trusted rows may hold, in any case."""


def _marks(column: Any, name: str) -> np.ndarray:
    """Marked rows, refused with the row (counted from 1) of the first value that is no mark."""
    values = [MARKS.get(str(value).strip().lower().removesuffix(".0")) for value in column]
    if None in values:
        row = values.index(None)
        raise InputError(
            f"column {name!r} holds {str(column.iloc[row])[:40]!r} in row {row + 1}; expected true or "
            "false, yes or no, 1 or 0 in every row"
        )
    return np.asarray(values, bool)


def _numbers(column: Any, what: str) -> np.ndarray:
    """One column as finite float64, refused with the row (counted from 1) of the first bad value."""
    import pandas as pd

    missing = column.isna().to_numpy()
    if missing.any():
        raise InputError(
            f"{what} has {missing.sum()} missing values (first in row {missing.argmax() + 1}); "
            "expected a number in every row"
        )
    if not pd.api.types.is_numeric_dtype(column):
        parsed = pd.to_numeric(column, errors="coerce").isna().to_numpy()
        example = column.iloc[int(parsed.argmax())]
        raise InputError(f"{what} holds text ({str(example)[:40]!r}); expected numbers")
    values = column.to_numpy(dtype=np.float64)
    infinite = ~np.isfinite(values)
    if infinite.any():
        raise InputError(
            f"{what} has {infinite.sum()} infinite values (first in row {infinite.argmax() + 1}); "
            "expected finite numbers"
        )
    with np.errstate(over="ignore"):
        if not np.isfinite(np.square(values).sum()):
            raise InputError(f"{what} is too large to square; expected numbers below 1e150")
    return values


def _target(column: Any, name: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Class indices and labels, or target values and None.

    Text, booleans and whole numbers with at most `MAX_CLASSES` distinct values are classes.
    """
    import pandas as pd

    what = f"target {name!r}"
    missing = column.isna().to_numpy()
    if missing.any():
        raise InputError(
            f"{what} has {missing.sum()} missing values (first in row {missing.argmax() + 1}); "
            "expected a value in every row"
        )
    if pd.api.types.is_bool_dtype(column) or not pd.api.types.is_numeric_dtype(column):
        classes, y = np.unique(column.astype(str).to_numpy(dtype=str), return_inverse=True)
    else:
        values = _numbers(column, what)
        classes, y = np.unique(values, return_inverse=True)
        whole = bool(np.all(values == np.round(values))) and float(np.abs(values).max()) < 2**53
        if len(classes) > 1 and not (whole and len(classes) <= MAX_CLASSES):
            return values, None
        if whole:
            classes = classes.astype(np.int64)
    if len(classes) < 2:
        raise InputError(
            f"{what} is constant ({str(classes[0])[:40]!r} in every row); expected at least two "
            "classes or varying numbers"
        )
    return y.astype(np.int64), classes
