"""What a command leaves on disk: `FILES`, never half written."""

import contextlib
import json
import math
import os
import platform
import secrets
import tempfile
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from bilevel.tuning.errors import InputError

FILES = ("result.json", "model.npz", "suspects.csv", "report.html")


class Outcome(NamedTuple):
    """What a command hands to its caller."""

    result: dict[str, Any]
    """Fields of `result.json`."""
    arrays: dict[str, np.ndarray]
    """Contents of `model.npz`."""
    text: str
    """The table."""
    target: str
    texts: Mapping[str, str] = MappingProxyType({})
    """Further text files by name."""


class OutDir:
    """An output directory that is checked, and made, before any compute."""

    def __init__(self, path: str, force: bool) -> None:
        self.path = Path(path)
        self.force = force
        self._made: list[Path] = []
        if not path:
            raise InputError("--out is empty; expected the name of a directory")
        try:
            self._check()
            self._make()
        except OSError as error:
            self.undo()
            raise InputError(
                f"cannot write to {path!r} ({error.strerror}); expected a writable directory"
            ) from error

    def _check(self) -> None:
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise InputError(f"{str(self.path)!r} is a file; expected a directory for --out")
        if not self.force and any(self.path.iterdir()):
            raise InputError(
                f"directory {str(self.path)!r} is not empty; expected a new or empty directory, "
                "or --force to replace the results in it"
            )
        for name in FILES:
            if (self.path / name).is_dir():
                raise InputError(f"{str(self.path / name)!r} is a directory; expected a file")

    def _make(self) -> None:
        missing = self.path
        chain = []
        while not missing.exists():
            chain.append(missing)
            missing = missing.parent
        for directory in reversed(chain):
            directory.mkdir()
            self._made.append(directory)
        # The only sure test of a writable directory is to write.
        with tempfile.NamedTemporaryFile(dir=self.path, prefix=".bilevel-"):
            pass

    def undo(self) -> None:
        """Remove the directories made by the check, where nothing was written to them."""
        for directory in reversed(self._made):
            with contextlib.suppress(OSError):
                directory.rmdir()

    def write(self, result: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        """Both files, the result last: where there is a `result.json`, its model is there too."""
        text = json.dumps(plain(result), indent=2, allow_nan=False) + "\n"
        # NumPy's stub takes any `**arrays` for its boolean option `allow_pickle`.
        self._put("model.npz", lambda file: np.savez_compressed(file, **arrays))  # type: ignore[arg-type]
        self._put("result.json", lambda file: file.write(text.encode()))

    def add(self, name: str, text: str) -> None:
        """One more file, after the results."""
        self._put(name, lambda file: file.write(text.encode()))

    def _put(self, name: str, write: Callable[[Any], object]) -> None:
        put(self.path / name, write, self.force)


def put(final: Path, write: Callable[[Any], object], force: bool) -> None:
    """A whole file or none; without `force`, FileExistsError where there is one of that name."""
    # Not `tempfile`, whose files nobody else may read: to ask for the umask is to set it, for all threads.
    temporary = final.parent / f".bilevel-{secrets.token_hex(8)}"
    file = temporary.open("xb")
    try:
        with file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if force:
            os.replace(temporary, final)
        else:
            # A link fails where the name exists, a rename would replace a file that appeared during
            # the run.
            _link(temporary, final)
        _sync(final.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _sync(directory: Path) -> None:
    """The new name on disk too, where the system lets a directory be opened."""
    with contextlib.suppress(OSError):
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _link(temporary: Path, final: Path) -> None:
    try:
        os.link(temporary, final)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        if final.exists():
            raise FileExistsError(17, "appeared during the run", str(final)) from None
        os.replace(temporary, final)


def plain(value: Any) -> Any:
    """JSON types only; NaN and infinities become null, since strict JSON has neither."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.ndarray) or (hasattr(value, "__array__") and not np.isscalar(value)):
        return plain(np.asarray(value).tolist())
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value


def versions() -> dict[str, str]:
    """Versions of everything that can change a number in the result."""
    found = {"python": platform.python_version()}
    for name in ("bilevel", "jax", "jaxlib", "optax", "equinox", "numpy", "scipy", "scikit-learn"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def table(header: list[str], rows: list[list[str]]) -> str:
    """A plain text table: first column left, the others right aligned."""
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    out = []
    for line in lines:
        cells = [line[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        out.append("  ".join(cells).rstrip())
    out.insert(1, "-" * len(out[0].ljust(sum(widths) + 2 * (len(widths) - 1))))
    return "\n".join(out)


def fixed(value: float | None) -> str:
    """A score in a table; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:.4f}" if value == 0 or 1e-4 <= abs(value) < 1e3 else f"{value:.5g}"


def short(value: float) -> str:
    """A penalty in a table."""
    return f"{value:.3g}"
