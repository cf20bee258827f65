"""The rows of label cleaning: digits, a directory of IDX files, or MNIST by way of scikit-learn."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from bilevel.tuning import idx
from bilevel.tuning.splits import flip_labels


class Pool(NamedTuple):
    """Rows to draw from, features in [0, 1] and a column of ones; the test rows where they are apart."""

    X: np.ndarray
    y: np.ndarray
    test_X: np.ndarray | None
    test_y: np.ndarray | None


class Rows(NamedTuple):
    """One draw: batches for the losses, and what is known of the training labels."""

    train: dict[str, np.ndarray]
    trusted: dict[str, np.ndarray]
    test: dict[str, np.ndarray]
    truth: np.ndarray
    wrong: np.ndarray


def load(source: str) -> Pool:
    """`digits`, `mnist` (scikit-learn downloads it), or a directory of IDX files."""
    if source == "digits":
        from sklearn.datasets import load_digits

        X, y = load_digits(return_X_y=True)
        return Pool(_features(X, 16), np.int32(y), None, None)
    if source == "mnist":
        from sklearn.datasets import fetch_openml

        X, y = fetch_openml("mnist_784", version=1, return_X_y=True, as_frame=False)
        X, y = _features(X, 255), y.astype(np.int32)
        return Pool(X[:60_000], y[:60_000], X[60_000:], y[60_000:])
    if not Path(source).is_dir():
        raise idx.InputError(
            f"no directory {source!r}; expected digits, mnist (downloaded) or {idx.KIND}"
        )
    parts = idx.read_directory(source)
    if set(parts) != {"train", "t10k"}:
        raise idx.InputError(f"{source!r} has {', '.join(parts)}; expected train and t10k files")
    (X, y), (test_X, test_y) = parts["train"], parts["t10k"]
    return Pool(_features(X, 255), np.int32(y), _features(test_X, 255), np.int32(test_y))


def _features(X: np.ndarray, most: int) -> np.ndarray:
    X = X.reshape(len(X), -1).astype(np.float32) / most
    return np.concatenate([X, np.ones((len(X), 1), np.float32)], axis=1)


def draw(pool: Pool, train: int, trusted: int, flip: float, seed: int, validate: bool) -> Rows:
    """Training, trusted and test rows at random; `validate` holds out trusted rows as the test."""
    order = np.random.default_rng(seed).permutation(len(pool.y))
    if train + trusted + (pool.test_y is None) > len(order):
        raise idx.InputError(f"{len(order)} rows; expected more than {train} + {trusted} of them")
    ours, theirs, rest = np.split(order, [train, train + trusted])
    test = {"X": pool.X[rest], "y": pool.y[rest]}
    if pool.test_X is not None and pool.test_y is not None:
        test = {"X": pool.test_X, "y": pool.test_y}
    if validate:
        theirs, judges = np.split(theirs, [trusted - trusted // 5])
        test = {"X": pool.X[judges], "y": pool.y[judges]}
    truth = pool.y[ours]
    labels, wrong = flip_labels(truth, 10, flip, seed)
    return Rows(
        {"X": pool.X[ours], "y": np.int32(labels), "i": np.arange(train, dtype=np.int32)},
        {"X": pool.X[theirs], "y": pool.y[theirs]},
        test,
        truth,
        wrong,
    )
