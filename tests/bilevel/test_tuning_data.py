"""Tables, splits and label noise: what they hold, and that the seed fixes them."""

import numpy as np
import pytest

from bilevel.tuning.data import BUNDLED, load_table
from bilevel.tuning.errors import InputError
from bilevel.tuning.splits import clean_split, default_train, flip_labels, tune_split


@pytest.mark.parametrize(
    ("name", "task", "shape"),
    [
        ("breast_cancer", "logistic", (569, 30)),
        ("diabetes", "ridge", (442, 10)),
        ("digits", "softmax", (1797, 64)),
        ("iris", "softmax", (150, 4)),
        ("wine", "softmax", (178, 13)),
    ],
)
def test_bundled_sets(name, task, shape):
    table = load_table(name, None)
    assert (table.task, table.X.shape, table.target) == (task, shape, "target")
    assert len(table.features) == shape[1]
    assert name in BUNDLED


@pytest.mark.parametrize(
    ("values", "task", "classes"),
    [
        (["no", "yes"] * 10, "logistic", ["no", "yes"]),
        (["True", "False"] * 10, "logistic", ["False", "True"]),
        ([1, 5, 3, 3] * 5, "softmax", [1, 3, 5]),
        ([0.0, 1.0] * 10, "logistic", [0, 1]),
        ([0.5, 1.0] * 10, "ridge", None),
        (list(range(21)), "ridge", None),
        (list(range(20)), "softmax", list(range(20))),
    ],
)
def test_target_decides_the_model(tmp_path, values, task, classes):
    path = tmp_path / "table.csv"
    path.write_text("a,y\n" + "".join(f"{i},{value}\n" for i, value in enumerate(values)))
    table = load_table(str(path), "y")
    assert table.task == task
    if classes is None:
        assert table.classes is None
        np.testing.assert_array_equal(table.y, values)
    else:
        assert table.classes.tolist() == classes
        assert [str(c) for c in table.classes[table.y]] == [
            str(int(v)) if isinstance(v, float) else str(v) for v in values
        ]


def test_path_wins_over_a_bundled_name_only_with_a_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "iris").write_text("a,target\n1,0.5\n2,1.5\n3,2.5\n")
    assert load_table("iris", None).X.shape == (150, 4)
    assert load_table("./iris", "target").X.shape == (3, 1)


def test_tune_split_is_stratified_and_fixed_by_the_seed():
    table = load_table("digits", None)
    split = tune_split(table, 5, 0.25, 3)
    again = tune_split(table, 5, 0.25, 3)
    other = tune_split(table, 5, 0.25, 4)
    np.testing.assert_array_equal(split.train, again.train)
    np.testing.assert_array_equal(split.fold, again.fold)
    assert not np.array_equal(split.test, other.test)
    together = np.sort(np.concatenate([split.train, split.test]))
    np.testing.assert_array_equal(together, np.arange(1797))
    sizes = np.bincount(split.fold)
    assert sizes.max() - sizes.min() <= 1
    for fold in range(5):
        counts = np.bincount(table.y[split.train][split.fold == fold], minlength=10)
        assert counts.max() - counts.min() <= 4


def test_clean_split_sizes():
    table = load_table("digits", None)
    split = clean_split(table, 100, None, 0)
    assert (len(split.train), len(split.trusted), len(split.test)) == (1000, 100, 697)
    rows = np.sort(np.concatenate([split.train, split.trusted, split.test]))
    np.testing.assert_array_equal(rows, np.arange(1797))
    assert np.bincount(table.y[split.trusted]).min() >= 9
    assert len(clean_split(table, 100, 500, 0).train) == 500
    assert default_train(569, 100) == 280


@pytest.mark.parametrize("num_classes", [2, 3, 10])
def test_a_flipped_label_is_a_different_class(num_classes):
    y = np.arange(200) % num_classes
    noisy, wrong = flip_labels(y, num_classes, 0.3, 7)
    assert wrong.sum() == 60
    np.testing.assert_array_equal(noisy != y, wrong)
    assert noisy.min() >= 0
    assert noisy.max() < num_classes
    np.testing.assert_array_equal(flip_labels(y, num_classes, 0.3, 7)[0], noisy)


def test_messages_are_one_printable_line():
    message = str(InputError("a\nb\x00c " + "x" * 1000))
    assert message.isprintable()
    assert message.startswith("a b c x")
    assert len(message) <= 400
