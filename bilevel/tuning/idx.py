"""Images and labels in IDX files, the format of MNIST and its relatives, gzipped or not.

A file is two zero bytes, a byte for the type of its numbers, a byte for the number of dimensions, each dimension
in four bytes, the most significant first, and the numbers. A directory holds pairs of files whose names end in
`-images-idx3-ubyte` and `-labels-idx1-ubyte` (`.gz` after it or not; `.idx3-ubyte` will do too).
"""

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bilevel.tuning.errors import InputError, brief

UNSIGNED_BYTE = 0x08
"""The code of the one type of numbers that these sets have."""

KIND = "a directory of IDX files"


class Images(NamedTuple):
    """Grey images and their classes."""

    X: np.ndarray
    """(num_images, rows, columns), uint8."""
    y: np.ndarray
    """(num_images,), uint8."""


def read_idx(path: str | Path, num_dimensions: int) -> np.ndarray:
    """The array of bytes in an IDX file; raises `InputError` for whatever is wrong with it."""
    try:
        raw = Path(path).read_bytes()
        if raw[:2] == b"\x1f\x8b":
            raw = gzip.decompress(raw)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(
            f"cannot read {str(path)!r} ({brief(error)}); expected a whole IDX file, gzipped or not"
        ) from error
    start = 4 + 4 * num_dimensions
    magic = bytes((0, 0, UNSIGNED_BYTE, num_dimensions))
    if raw[:4] != magic:
        raise InputError(
            f"{str(path)!r} begins with {raw[:4].hex(' ') or 'nothing'}; expected {magic.hex(' ')}, an IDX "
            f"file of bytes in {num_dimensions} dimensions"
        )
    if len(raw) < start:
        raise InputError(f"{str(path)!r} ends inside its header; expected {start} bytes of it")
    shape = struct.unpack(f">{num_dimensions}I", raw[4:start])
    if len(raw) - start != math.prod(shape):
        raise InputError(
            f"{str(path)!r} holds {len(raw) - start} bytes of data; expected {math.prod(shape)}, for "
            + " x ".join(map(str, shape))
        )
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)


def read_directory(directory: str | Path, num_classes: int = 10) -> dict[str, Images]:
    """Images and labels by the first part of their names (`train`, `t10k`); raises `InputError`."""
    pairs: dict[str, dict[str, Path]] = {}
    try:
        paths = sorted(Path(directory).iterdir())
    except OSError as error:
        raise InputError(
            f"cannot read {str(directory)!r} ({brief(error)}); expected {KIND}"
        ) from error
    for path in paths:
        name = path.name.removesuffix(".gz")
        for what, dimensions in (("images", 3), ("labels", 1)):
            for mark in "-.":
                part = name.removesuffix(f"-{what}{mark}idx{dimensions}-ubyte")
                if part != name and path.is_file():
                    pairs.setdefault(part, {}).setdefault(what, path)
    if not pairs:
        raise InputError(
            f"no file in {str(directory)!r} is called ...-images-idx3-ubyte or ...-labels-idx1-ubyte; "
            f"expected {KIND}"
        )
    return {part: _pair(directory, part, found, num_classes) for part, found in pairs.items()}


def _pair(directory: str | Path, part: str, paths: dict[str, Path], num_classes: int) -> Images:
    for what, other in (("images", "labels"), ("labels", "images")):
        if what not in paths:
            raise InputError(
                f"{str(directory)!r} has {other} but no {what} of {part!r}; expected both files"
            )
    X, y = read_idx(paths["images"], 3), read_idx(paths["labels"], 1)
    if len(X) != len(y):
        raise InputError(
            f"{str(directory)!r} has {len(X)} images but {len(y)} labels of {part!r}; expected as many of both"
        )
    if X.size == 0:
        raise InputError(
            f"the images of {part!r} in {str(directory)!r} are empty; expected at least one"
        )
    if y.max() >= num_classes:
        row = int(np.argmax(y >= num_classes))
        raise InputError(
            f"label {y[row]} of image {row} of {part!r} in {str(directory)!r} is out of range; expected 0 to "
            f"{num_classes - 1}"
        )
    return Images(X, y)


def read_frame(directory: str) -> Any:
    """All images of a directory as a data frame: the columns `pixel_0`, `pixel_1`, ... and `target`."""
    import pandas as pd

    parts = read_directory(directory)
    shapes = {images.X.shape[1:] for images in parts.values()}
    if len(shapes) > 1:
        raise InputError(
            f"the images in {directory!r} have {len(shapes)} different sizes; expected one"
        )
    X = np.concatenate([images.X.reshape(len(images.X), -1) for images in parts.values()])
    frame = pd.DataFrame(X, columns=[f"pixel_{i}" for i in range(X.shape[1])])
    frame["target"] = np.concatenate([images.y for images in parts.values()])
    return frame
