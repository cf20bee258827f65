"""The history of a run as it grows: a file of JSON lines, and scalars for a writer such as TensorBoard's."""

import errno
import json
import math
import os
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

from bilevel.result import History, RunState
from bilevel.tuning.output import put
from solvers import Status


class Log:
    """One line for each outer step, in `path`: the fields of History by name, `step`, and `time` (Unix, seconds).

    Statuses are names; what is not finite is null. None as path is a log that nobody wants. What cannot be
    written is a warning, once: no run ends for it.
    """

    def __init__(self, path: str | os.PathLike[str] | None) -> None:
        self.path = None if path is None else Path(path)
        self._file: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def start(self, begin: int, pieces: Sequence[History], resume: bool) -> None:
        """Go on after `pieces`, the history from step `begin` on: no step is there twice, and none is missing.

        Lines of later steps go, as those steps come again, and so does one that was cut short. Raises ValueError
        for a file that cannot be written, and, unless `resume`, for one that holds these steps.
        """
        if self.path is None:
            return
        end = begin + sum(len(rows.status) for rows in pieces)
        try:
            lines = self._lines()
            if not resume and any(step >= begin for step in lines):
                raise ValueError(
                    f"{str(self.path)!r} is the log of an earlier run (up to step {max(lines)}); expected "
                    "resume=True to go on with it, or another file."
                )
            step = begin
            for rows in pieces:
                for line in _rows(step, rows):
                    lines.setdefault(step, line)
                    step += 1
            kept = "".join(lines[step] for step in sorted(lines) if step < end)
            put(self.path, lambda file: file.write(kept.encode()), force=True)
            self._file = self.path.open("ab", buffering=0)
        except OSError as error:
            raise ValueError(
                f"cannot write log {str(self.path)!r} ({error.strerror}); expected a file in a writable "
                "directory."
            ) from error

    def _lines(self) -> dict[int, str]:
        """Whole lines by step. Raises ValueError for a file of another kind."""
        assert self.path is not None
        found: dict[int, str] = {}
        if not self.path.exists():
            return found
        for line in self.path.read_text(errors="replace").splitlines(keepends=True):
            if not line.endswith("\n"):  # the process was killed while writing
                break
            try:
                found[int(json.loads(line)["step"])] = line
            except (ValueError, KeyError, TypeError):
                raise ValueError(
                    f"{str(self.path)!r} is no log of a run: {line[:40]!r}; expected another file."
                ) from None
        return found

    def write(self, end: int, rows: History) -> None:
        """A chunk that ends before step `end`."""
        if self._file is None:
            return
        lines = "".join(_rows(end - len(rows.status), rows)).encode()
        try:
            if self._file.write(lines) < len(lines):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self._file.close()
            self._file = None
            warnings.warn(
                f"could not write to {str(self.path)!r} ({error.strerror}); the run goes on without a log.",
                RuntimeWarning,
                stacklevel=3,
            )


def scalars(writer: Any, prefix: str = "bilevel") -> Callable[[RunState, History], None]:
    """A callback for `run` that gives each step's history to `writer.add_scalar(tag, value, step)`.

    TensorBoard's writers have that method, as `SummaryWriter(folder)` of `tensorboardX` and
    `torch.utils.tensorboard` do. What is not finite is left out.
    """

    def callback(state: RunState, rows: History) -> None:
        first = int(state.step) - len(rows.status)
        for name, column in rows._asdict().items():
            for i, value in enumerate(column.tolist()):
                if math.isfinite(value):
                    writer.add_scalar(f"{prefix}/{name}", value, first + i)

    return callback


def _rows(step: int, rows: History) -> list[str]:
    now = round(time.time(), 3)
    columns = {name: column.tolist() for name, column in rows._asdict().items()}
    lines = []
    for i in range(len(rows.status)):
        row = {name: _plain(name, values[i]) for name, values in columns.items()}
        lines.append(json.dumps({"step": step + i, **row, "time": now}) + "\n")
    return lines


def _plain(name: str, value: Any) -> Any:
    if name == "status":
        return Status(value).name
    return value if math.isfinite(value) else None
