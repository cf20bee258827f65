"""Row splits: train/test, folds, and the three parts of label cleaning. All are fixed by the seed."""

from dataclasses import dataclass

import numpy as np

from bilevel.tuning.data import Table
from bilevel.tuning.errors import InputError


@dataclass(frozen=True)
class TuneSplit:
    """Row numbers of the training and test part, and the fold of each training row."""

    train: np.ndarray
    test: np.ndarray
    fold: np.ndarray
    num_folds: int


@dataclass(frozen=True)
class CleanSplit:
    """Row numbers of the training, trusted and test part."""

    train: np.ndarray
    trusted: np.ndarray
    test: np.ndarray


def tune_split(table: Table, folds: int, test_size: float, seed: int) -> TuneSplit:
    """A test split and folds, stratified by class where there are classes."""
    from sklearn.model_selection import KFold, StratifiedKFold

    num_rows = len(table.y)
    num_test = round(num_rows * test_size)
    num_train = num_rows - num_test
    if num_train < max(folds, 2):
        raise InputError(
            f"{table.name!r} has {num_rows} rows, {num_train} of them for training; expected at "
            f"least {max(folds, 2)} with --cv {folds} and --test-size {test_size}"
        )
    if num_test < 2:
        raise InputError(
            f"--test-size {test_size} leaves {num_test} of {num_rows} rows for the test; "
            "expected at least 2"
        )
    if table.classes is None:
        order = np.random.default_rng(seed).permutation(num_rows)
        test, train = np.sort(order[:num_test]), np.sort(order[num_test:])
        folder = KFold(folds, shuffle=True, random_state=seed)
    else:
        train, test = _stratified(table, np.arange(num_rows), num_test, seed, "--test-size")
        counts = np.bincount(table.y[train], minlength=len(table.classes))
        rarest = int(counts.argmin())
        if counts[rarest] < folds:
            raise InputError(
                f"class {str(table.classes[rarest])!r} has {counts[rarest]} training rows; expected "
                f"at least {folds} of each class with --cv {folds}"
            )
        folder = StratifiedKFold(folds, shuffle=True, random_state=seed)
    fold = np.empty(num_train, np.int64)
    for number, (_, rows) in enumerate(folder.split(train, table.y[train])):
        fold[rows] = number
    if table.classes is None:
        for number in range(folds):
            if np.ptp(table.y[train][fold != number]) == 0:
                raise InputError(
                    f"target {table.target!r} is constant outside fold {number + 1}; expected a "
                    "target that varies in every training part"
                )
    return TuneSplit(train, test, fold, folds)


def default_train(num_rows: int, trusted: int) -> int:
    """60 % of the rows that are not trusted, rounded down to two significant digits."""
    count = max(int(0.6 * (num_rows - trusted)), 1)
    unit = 10 ** max(len(str(count)) - 2, 0)
    return count // unit * unit


def clean_split(table: Table, trusted: int | None, train: int | None, seed: int) -> CleanSplit:
    """Trusted, training and test rows, stratified by class.

    `trusted` of them are drawn at random; None takes the rows that the table marks.
    """
    assert table.classes is not None
    num_rows = len(table.y)
    marked = table.trusted if trusted is None else None
    if marked is not None:
        trusted = int(marked.sum())
    assert trusted is not None
    train = default_train(num_rows, trusted) if train is None else train
    if num_rows - trusted - train < 2:
        raise InputError(
            f"{table.name!r} has {num_rows} rows; expected at least {trusted + train + 2}: "
            f"{trusted} trusted, {train} for training and 2 for the test"
        )
    if marked is None:
        rest, trusted_rows = _stratified(table, np.arange(num_rows), trusted, seed, "--trusted")
    else:
        rest, trusted_rows = np.flatnonzero(~marked), np.flatnonzero(marked)
    test, train_rows = _stratified(table, rest, train, seed, "--train")
    for rows, least, what in ((trusted_rows, 2, "trusted"), (train_rows, 1, "training")):
        counts = np.bincount(table.y[rows], minlength=len(table.classes))
        rarest = int(counts.argmin())
        if counts[rarest] < least:
            raise InputError(
                f"class {str(table.classes[rarest])!r} has {counts[rarest]} {what} rows; expected "
                f"at least {least} of each of the {len(table.classes)} classes"
            )
    return CleanSplit(train_rows, trusted_rows, test)


def _stratified(
    table: Table, rows: np.ndarray, count: int, seed: int, option: str
) -> tuple[np.ndarray, np.ndarray]:
    """The rows without, and the rows in, a stratified sample of `count` of them (both sorted)."""
    from sklearn.model_selection import train_test_split

    assert table.classes is not None
    counts = np.bincount(table.y[rows], minlength=len(table.classes))
    rarest = int(counts.argmin())
    if counts[rarest] < 2:
        raise InputError(
            f"class {str(table.classes[rarest])!r} has {counts[rarest]} rows to split; expected at "
            "least 2 of each class"
        )
    least = len(table.classes)
    if min(count, len(rows) - count) < least:
        raise InputError(
            f"{option} splits {len(rows)} rows into {count} and {len(rows) - count}; expected at "
            f"least {least} in each part, one for each class"
        )
    rest, sample = train_test_split(
        rows, test_size=count, stratify=table.y[rows], random_state=seed
    )
    return np.sort(rest), np.sort(sample)


def flip_labels(
    y: np.ndarray, num_classes: int, share: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Labels with a share of them made wrong on purpose, and which: always a different class."""
    rng = np.random.default_rng([seed, 1])
    wrong = np.zeros(len(y), bool)
    wrong[rng.permutation(len(y))[: round(share * len(y))]] = True
    shift = rng.integers(1, num_classes, len(y))
    return np.where(wrong, (y + shift) % num_classes, y), wrong
