"""IDX files: what a test writes is read back, and every fault is named."""

import gzip
import struct

import numpy as np
import pytest

from bilevel import cli
from bilevel.tuning.data import load_table
from bilevel.tuning.errors import InputError
from bilevel.tuning.idx import read_directory, read_idx

IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


def idx(array: np.ndarray) -> bytes:
    """The format as its description has it, written without the reader's help."""
    head = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    return head + array.astype(np.uint8).tobytes()


@pytest.fixture(scope="module")
def digits():
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (12, 2, 3)), np.arange(12) % 4


@pytest.fixture
def folder(tmp_path, digits):
    X, y = digits
    (tmp_path / IMAGES).write_bytes(idx(X))
    (tmp_path / f"{LABELS}.gz").write_bytes(gzip.compress(idx(y)))
    (tmp_path / "readme.txt").write_text("no IDX file")
    return tmp_path


def test_gzipped_or_not(folder, digits):
    found = read_directory(folder)
    assert list(found) == ["train"]
    np.testing.assert_array_equal(found["train"].X, digits[0])
    np.testing.assert_array_equal(found["train"].y, digits[1])


def test_a_directory_is_a_table(folder, digits):
    X, y = digits
    (folder / "t10k-images.idx3-ubyte").write_bytes(idx(X[:5]))
    (folder / "t10k-labels.idx1-ubyte").write_bytes(idx(y[:5]))
    table = load_table(str(folder), None)
    assert table.task == "softmax" and table.features[-1] == "pixel_5"
    # The parts in the order of their names: t10k, train.
    np.testing.assert_array_equal(table.X, np.concatenate([X[:5], X]).reshape(17, 6))
    np.testing.assert_array_equal(table.y, np.concatenate([y[:5], y]))


def test_images_of_two_sizes_are_no_table(folder, digits):
    (folder / "t10k-images-idx3-ubyte").write_bytes(idx(digits[0][:, :1]))
    (folder / "t10k-labels-idx1-ubyte").write_bytes(idx(digits[1]))
    with pytest.raises(InputError, match="2 different sizes; expected one"):
        load_table(str(folder), None)


def faults(X, y):
    whole = idx(X)
    late = y.copy()
    late[7] = 10
    yield IMAGES, whole[:-1], "71 bytes of data; expected 72, for 12 x 2 x 3"
    yield IMAGES, whole + b"\0", "73 bytes of data; expected 72"
    yield IMAGES, whole[:9], "ends inside its header; expected 16 bytes"
    yield IMAGES, b"", "begins with nothing; expected 00 00 08 03"
    yield IMAGES, idx(X.reshape(12, 6)), "begins with 00 00 08 02; expected 00 00 08 03"
    yield IMAGES, whole[:2] + b"\x0d" + whole[3:], "begins with 00 00 0d 03; expected 00 00 08 03"
    yield IMAGES, gzip.compress(whole)[:-9], "cannot read .*; expected a whole IDX file"
    yield IMAGES, idx(X[:11]), "11 images but 12 labels of 'train'"
    yield IMAGES, idx(X[:, :0]), "are empty"
    yield f"{LABELS}.gz", idx(late), "label 10 of image 7 of 'train' .* expected 0 to 9"
    yield f"{LABELS}.gz", None, "has images but no labels of 'train'"
    yield IMAGES, None, "has labels but no images of 'train'"


def test_faults_are_named(folder, digits):
    for name, content, text in faults(*digits):
        before = (folder / name).read_bytes()
        if content is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(content)
        with pytest.raises(InputError, match=text):
            read_directory(folder)
        (folder / name).write_bytes(before)
    read_directory(folder)


def test_a_missing_file_and_an_empty_directory(tmp_path):
    with pytest.raises(InputError, match="cannot read .*No such file"):
        read_idx(tmp_path / "none", 1)
    with pytest.raises(InputError, match="expected a directory of IDX files"):
        read_directory(tmp_path)
    with pytest.raises(InputError, match="cannot read .*expected a directory of IDX files"):
        read_directory(tmp_path / "none")


def test_commands_end_in_one_line(folder, capsys):
    (folder / IMAGES).write_bytes(b"\0\0\x08\x03")
    assert cli.main(["clean", str(folder), "--trusted", "4"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "ends inside its header" in error
