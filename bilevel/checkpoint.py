"""Checkpoints of a run: a directory of npz files, each of them whole, and each enough to go on from."""

import contextlib
import os
import re
import signal
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from bilevel import checkpoint_file
from bilevel.checkpoint_file import Content, Marks, Saved
from bilevel.processes import Team
from bilevel.result import History

try:
    import fcntl
except ImportError:  # Windows: nothing then stops two runs from using one directory
    fcntl = None

KEEP = 3
"""Checkpoints kept, newest first; each holds the best pair as well."""


class Store:
    """Checkpoints in `directory`, under a lock. Usable only within `opened`.

    A save takes the arrays to the host; a thread writes them while the next chunk runs, one checkpoint at a time.
    What comes meanwhile waits, the newest of it alone, and so does a save that would cost the run, and a processor,
    more than a twentieth of the time. `finish` writes what waits.
    """

    slack = 20
    """Time from one save to the next over the cost of one."""

    def __init__(self, directory: Path, identity: dict[str, str], team: Team) -> None:
        self.directory = directory
        self.team = team
        self.identity = identity
        self.terminated = False
        self.notes: dict[str, Any] = {}
        """What was settled by measurement, and has to be the same after a break."""
        self.computed: dict[str, str] = {}
        """Digests of what the problem computes (`bilevel.fingerprint`); to be set before `load`."""
        self.thread = ThreadPoolExecutor(1)
        self._writing: tuple[int, Future[None]] | None = None
        """The step that the thread writes."""
        self._due: Saved | None = None
        self._last: Saved | None = None
        self._cost, self._began = 0.0, -np.inf
        self._found: tuple[list[str], tuple[Path, Content] | None] | None = None

    def look(self) -> None:
        """Read the newest checkpoint that can be read, for its notes and for `load`."""
        reasons: list[str] = []
        self._found = (reasons, None)
        for path in self.files():
            try:
                found = checkpoint_file.read(path)
            except ValueError as error:
                reasons.append(f"{path.name}: {error}")
                continue
            self.notes |= found.meta.get("notes", {})
            self._found = (reasons, (path, found))
            break
        newest = self._found[1]
        if not self.team.same(-1 if newest is None else int(newest[0].stem[5:])):
            raise ValueError(
                f"processes see different checkpoints in {str(self.directory)!r}; expected a directory that "
                "they share."
            )

    def files(self) -> list[Path]:
        """Checkpoints, newest first."""
        found = self.directory.glob("step-*.npz")
        return sorted(filter(lambda p: re.fullmatch(r"step-\d{12}", p.stem), found), reverse=True)

    def load(self, state: Any, history: History) -> Saved | None:
        """The newest checkpoint that can be read, None where there are none.

        The arguments give structure, shapes and dtypes. Raises ValueError for those of another problem,
        and where no file can be read.
        """
        if self._found is None:
            self.look()
        assert self._found is not None
        (reasons, newest), self._found = self._found, None  # the arrays are large
        if newest is not None:
            path, found = newest
            saved = checkpoint_file.restored(path, found, self._marks(), state, history)
            if reasons:
                warnings.warn(
                    f"resuming from {path.name}, as newer checkpoints cannot be read: "
                    + "; ".join(reasons),
                    RuntimeWarning,
                    stacklevel=3,
                )
            return saved
        if reasons:
            raise ValueError(
                f"no checkpoint in {str(self.directory)!r} can be read ({'; '.join(reasons)}); "
                "expected at least one whole file, or another directory for a new run."
            )
        return None

    def save(self, saved: Saved) -> None:
        """Have a checkpoint written, now or later.

        That an earlier one failed is told here: a warning for a disk that is full or read-only, any other error as
        it is.
        """
        if not saved.history or saved is self._last:
            return
        self._due = self._last = saved
        if self._writing is not None and self._writing[1].done():
            self._settle()
        cheap = time.perf_counter() - self._began >= self.slack * self._cost
        if self.team.chosen(self._writing is None and cheap):
            self._begin()

    def finish(self) -> None:
        """Write what waits, and return when it is on disk, with the errors of `save`."""
        self._settle()
        if self.team.anywhere(self._due is not None):
            self._begin()
            self._settle()

    def _begin(self) -> None:
        self._began = time.perf_counter()
        saved = self._last
        assert saved is not None
        found = checkpoint_file.content(saved, self._marks())
        if self.team.first:
            step, held = int(saved.state.step), time.perf_counter() - self._began
            self._writing = step, self.thread.submit(self._write, step, found, held)
        self._due = None

    def _write(self, step: int, found: Content, held: float) -> None:
        """In the thread. The run waited `held` seconds for the arrays."""
        began = time.thread_time()
        try:
            checkpoint_file.write(self.directory / f"step-{step:012d}.npz", found)
            for path in self.files()[KEEP:]:
                path.unlink()
        finally:
            self._cost = held + time.thread_time() - began  # not the time that it waits for a disk

    def _settle(self) -> None:
        """Wait for the thread. Where it failed, the newest state is due again; older checkpoints are as they were."""
        if self._writing is None:
            return
        step, write = self._writing
        error = write.exception()
        if error is not None:
            self._due = self._last
        self._writing = None
        if isinstance(error, OSError):
            kept = self.files()
            warnings.warn(
                f"could not save step {step} to {str(self.directory)!r} ({error.strerror}); the run goes "
                f"on, and the last checkpoint is {kept[0].name if kept else 'none'}.",
                RuntimeWarning,
                stacklevel=4,
            )
        elif error is not None:
            raise error

    def _marks(self) -> Marks:
        return Marks(self.identity, self.computed, self.notes)


@contextlib.contextmanager
def opened(
    directory: Any, resume: bool, team: Team | None = None, **identity: Any
) -> Iterator[Store | None]:
    """The store of a run, None without a directory.

    Leaving it, also by an exception, writes what is due and waits until it is on disk. Until then SIGTERM only sets
    `terminated`. Of several processes the first writes, and all of them read, in a directory that they share.
    Raises ValueError where the directory cannot be written, is in use, or, unless `resume`, holds
    checkpoints.
    """
    if directory is None:
        if resume:
            raise ValueError("resume=True needs checkpoint=..., the directory to resume from.")
        yield None
        return
    folder, team = Path(directory), team or Team()
    with contextlib.ExitStack() as stack:
        refusal = None
        try:
            if team.first:
                _prepare(folder, stack)
        except ValueError as error:
            refusal = error
        if team.anywhere(refusal is not None):
            raise refusal or ValueError(f"the first process cannot write to {str(folder)!r}.")
        store = Store(
            folder, {name: checkpoint_file.digest(value) for name, value in identity.items()}, team
        )
        files = store.files()
        if files and not resume:
            raise ValueError(
                f"{str(folder)!r} holds checkpoints of an earlier run (up to {files[0].name}); expected "
                "resume=True to go on with it, or another directory."
            )
        store.look()

        def leave(kind: Any, *_: Any) -> None:
            if kind is None or not team.several:  # arrays are gathered by all processes or none
                store.finish()

        stack.enter_context(store.thread)  # under the lock until it has ended
        stack.push(leave)
        stack.enter_context(_on_sigterm(store))
        yield store


def _prepare(folder: Path, stack: contextlib.ExitStack) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = stack.enter_context((folder / "lock").open("a+"))
        _lock(folder, lock)
        # The only sure test of a writable directory is to write.
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".bilevel-"):
            pass
        for path in folder.glob(".bilevel-*"):  # of a save that was killed
            path.unlink()
    except OSError as error:
        raise ValueError(
            f"cannot write checkpoints to {str(folder)!r} ({error.strerror}); expected a writable "
            "directory."
        ) from error


def _lock(folder: Path, lock: Any) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process, however that ends
    except BlockingIOError:
        lock.seek(0)
        raise ValueError(
            f"another run (process {lock.read() or '?'}) writes to {str(folder)!r}; expected another "
            "directory, or that it ends first."
        ) from None
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()


@contextlib.contextmanager
def _on_sigterm(store: Store) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def note(signum: int, frame: Any) -> None:
        store.terminated = True

    before = signal.signal(signal.SIGTERM, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)
