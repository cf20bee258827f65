"""Checkpoints of a run: a directory of npz files, each of them whole, and each enough to go on from."""

import contextlib
import hashlib
import json
import os
import re
import signal
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from bilevel import processes
from bilevel.processes import Team
from bilevel.result import History, RunState, join
from bilevel.tuning.files import load_arrays
from bilevel.tuning.output import put, versions

try:
    import fcntl
except ImportError:  # Windows: nothing then stops two runs from using one directory
    fcntl = None

FORMAT = 2
KEEP = 3
"""Checkpoints kept, newest first; each holds the best pair as well."""


class Saved(NamedTuple):
    """What a checkpoint holds."""

    state: Any
    """A RunState, or another tree with a `step`."""
    history: tuple[History, ...]
    """Of the chunks, in order."""
    begin: int
    """Outer step at which the run began."""
    estimated: int
    """Steps done at the last error estimate."""


class Store:
    """Checkpoints in `directory`, under a lock. Usable only within `opened`.

    A save that would take more than a twentieth of the time since the last one is put off, so that short
    chunks cost little; `finish` writes what is due.
    """

    slack = 20
    """Time between saves over the time of one."""

    def __init__(self, directory: Path, identity: dict[str, str], team: Team) -> None:
        self.directory = directory
        self.team = team
        self.identity = identity
        self.terminated = False
        self.notes: dict[str, Any] = {}
        """What was settled by measurement, and has to be the same after a break."""
        self.computed: dict[str, str] = {}
        """Digests of what the problem computes (`bilevel.fingerprint`); to be set before `load`."""
        self._due: Saved | None = None
        self._last: Saved | None = None
        self._cost, self._ended = 0.0, -np.inf
        self._found: tuple[list[str], Any] | None = None

    def look(self) -> None:
        """Read the newest checkpoint that can be read, for its notes and for `load`."""
        reasons: list[str] = []
        self._found = (reasons, None)
        for path in self.files():
            try:
                meta, arrays = _read(path)
            except ValueError as error:
                reasons.append(f"{path.name}: {error}")
                continue
            self.notes |= meta.get("notes", {})
            self._found = (reasons, (path, meta, arrays))
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
            path, meta, arrays = newest
            saved = self._restore(path, meta, arrays, state, history)
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

    def _restore(
        self, path: Path, meta: dict[str, Any], arrays: list[np.ndarray], state: Any, history: Any
    ) -> Saved:
        leaves, treedef = jax.tree.flatten((state, history))
        where = f"{str(path)!r} is of another run: "
        _same(where, meta["leaves"], _describe((state, history)), "or another directory")
        for name, digest in self.identity.items():
            if meta["identity"].get(name) != digest:
                raise ValueError(
                    f"{where}the {name} has other values; expected the same {name}, or another directory."
                )
        there, here = meta["versions"], _versions()
        changed = [f"{n} {there.get(n)} -> {here[n]}" for n in here if there.get(n) != here[n]]
        if changed:
            warnings.warn(
                f"{path.name} was saved with other versions ({', '.join(changed)}): numbers may "
                "differ in rounding from those of a run without a break.",
                RuntimeWarning,
                stacklevel=4,
            )
        was, now = meta.get("computed", {}), self.computed
        others = [name for name in was if name in now and was[name] != now[name]]
        if others and not changed:  # another version may trace the same loss to another program
            warnings.warn(
                f"other than when {path.name} was saved: {', '.join(others)}. The run goes on with what is there now.",
                RuntimeWarning,
                stacklevel=4,
            )
        values = [
            _from_host(array, leaf, impl)
            for array, leaf, impl in zip(arrays, leaves, meta["keys"], strict=True)
        ]
        new_state, rows = jax.tree.unflatten(treedef, values)
        rows = jax.tree.map(np.asarray, rows)
        return Saved(new_state, (rows,), int(meta["begin"]), int(meta["estimated"]))

    def save(self, saved: Saved) -> None:
        """Write a checkpoint now, or later where that would slow the run down."""
        if not saved.history or saved is self._last:
            return
        self._due = self._last = saved
        if self.team.chosen(time.perf_counter() - self._ended >= self.slack * self._cost):
            self.finish()

    def finish(self) -> None:
        """Write what is due. A failure (a full disk) is a warning: older checkpoints are not touched."""
        if not self.team.anywhere(self._due is not None):
            return
        started = time.perf_counter()
        saved = self._last
        assert saved is not None
        step = int(saved.state.step)
        tree = (saved.state, join(saved.history, lambda: saved.history[0]))
        leaves = jax.tree.leaves(tree)
        meta = {
            "format": FORMAT,
            "versions": _versions(),
            "leaves": _describe(tree),
            "keys": [str(jax.random.key_impl(x)) if _is_key(x) else "" for x in leaves],
            "identity": self.identity,
            "computed": self.computed,
            "notes": self.notes,
            "begin": saved.begin,
            "estimated": saved.estimated,
        }
        arrays = {f"leaf_{i}": processes.whole(leaf) for i, leaf in enumerate(leaves)}
        arrays["meta"] = np.asarray(json.dumps(meta))
        if not self.team.first:
            self._due = None
            return
        # NumPy's stub takes any `**arrays` for its boolean option `allow_pickle`.
        write = lambda file: np.savez(file, **arrays)  # type: ignore[arg-type]
        try:
            put(self.directory / f"step-{step:012d}.npz", write, force=True)
            for path in self.files()[KEEP:]:
                path.unlink()
            self._due = None
        except OSError as error:
            kept = self.files()
            warnings.warn(
                f"could not save step {step} to {str(self.directory)!r} ({error.strerror}); the run goes "
                f"on, and the last checkpoint is {kept[0].name if kept else 'none'}.",
                RuntimeWarning,
                stacklevel=3,
            )
        self._ended = time.perf_counter()
        self._cost = self._ended - started


@contextlib.contextmanager
def opened(
    directory: Any, resume: bool, team: Team | None = None, **identity: Any
) -> Iterator[Store | None]:
    """The store of a run, None without a directory.

    Leaving it, also by an exception, writes what is due. Until then SIGTERM only sets `terminated`. Of several
    processes the first writes, and all of them read, in a directory that they share.
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
        store = Store(folder, {name: _digest(value) for name, value in identity.items()}, team)
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


def _read(path: Path) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Raises ValueError for a file that is cut short, damaged, or of another format."""
    arrays = load_arrays(path)
    try:
        meta = json.loads(str(arrays["meta"]))
        if meta["format"] != FORMAT:
            raise ValueError(
                f"it has format {meta['format']}, of bilevel {meta['versions'].get('bilevel')}, and "
                f"this version reads format {FORMAT}"
            )
        return meta, [arrays[f"leaf_{i}"] for i in range(len(meta["leaves"]))]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"it is no checkpoint ({error!r})") from error


def _versions() -> dict[str, str]:
    return {
        name: value for name, value in versions().items() if name in ("bilevel", "jax", "jaxlib")
    }


def check_state(state: Any, like: RunState) -> None:
    """Raise TypeError where `state` is none of a run, ValueError where it is one of a run unlike this."""
    if not isinstance(state, RunState):
        raise TypeError(
            f"state must be result.state of an earlier run, got {type(state).__name__}."
        )
    was, now = _describe_state(state), _describe_state(like)
    _same("state is of another run: ", was, now, "the same retries=..., or no state")


def _same(where: str, was: Any, now: Any, remedy: str) -> None:
    was, now = dict(was), dict(now)
    for name in {**was, **now}:
        if was.get(name) != now.get(name):
            raise ValueError(
                f"{where}{name} is {was.get(name, 'absent')} there and {now.get(name, 'absent')} "
                f"here; expected the same problem, solver, engine and outer rule, {remedy}."
            )


def _describe_state(state: Any) -> list[tuple[str, str]]:
    named = [(f"state{jax.tree_util.keystr(path)}", leaf) for path, leaf in _leaves(state)]
    return [(name, f"{leaf.dtype}{list(leaf.shape)}") for name, leaf in named]


def _describe(tree: tuple[Any, History]) -> list[tuple[str, str]]:
    """Name and type of each leaf; the length of the history is no part of it."""
    state, history = tree
    found = _describe_state(state)
    named = [(f"history{jax.tree_util.keystr(path)}", leaf) for path, leaf in _leaves(history)]
    return found + [(name, str(leaf.dtype)) for name, leaf in named]


def _leaves(tree: Any) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_flatten_with_path(tree)[0]


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _from_host(array: np.ndarray, like: Any, impl: str) -> Any:
    if isinstance(like, np.ndarray):  # of a pool, which stays in the host's memory
        return array if array.dtype == like.dtype else array.view(like.dtype)
    if impl:
        return jax.random.wrap_key_data(jnp.asarray(array), impl=impl)
    # npz gives dtypes that NumPy does not have (bfloat16) back as bytes.
    return jnp.asarray(array if array.dtype == like.dtype else array.view(like.dtype))


def _digest(tree: Any) -> str:
    """Of shapes, dtypes and values of all arrays."""
    found = hashlib.blake2b(digest_size=16)
    for leaf in jax.tree.leaves(eqx.filter(tree, lambda x: isinstance(x, jax.Array | np.ndarray))):
        array = processes.whole(leaf)
        found.update(f"{leaf.dtype}{leaf.shape}".encode())
        # By parts: a file that is mapped may be larger than the memory.
        part = max(2**24 // max(array[:1].nbytes, 1), 1) if array.ndim else 1
        for i in range(0, len(array) if array.ndim else 1, part):
            found.update((array[i : i + part] if array.ndim else array).tobytes())
    return found.hexdigest()
