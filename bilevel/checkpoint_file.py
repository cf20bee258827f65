"""What one checkpoint holds: an npz file of the leaves of a state and its history, and of what they belong to."""

import functools
import hashlib
import json
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from bilevel import processes
from bilevel.result import History, RunState, join
from bilevel.tuning.files import load_arrays
from bilevel.tuning.output import put, versions

FORMAT = 2


class Saved(NamedTuple):
    """What a run goes on from."""

    state: Any
    """A RunState, or another tree with a `step`."""
    history: tuple[History, ...]
    """Of the chunks, in order."""
    begin: int
    """Outer step at which the run began."""
    estimated: int
    """Steps done at the last error estimate."""


class Marks(NamedTuple):
    """What a checkpoint belongs to, and what its run has settled."""

    identity: dict[str, str]
    """Digests of what has to be the same."""
    computed: dict[str, str]
    """Digests of what the problem computes (`bilevel.fingerprint`)."""
    notes: dict[str, Any]
    """What was settled by measurement, and has to be the same after a break."""


class Content(NamedTuple):
    """A checkpoint in the host's memory."""

    meta: dict[str, Any]
    arrays: list[np.ndarray]
    """Leaves of state and history."""


def content(saved: Saved, marks: Marks) -> Content:
    """Everything that is written, in NumPy. Several processes gather the arrays: all of them have to call it."""
    tree = (saved.state, join(saved.history, lambda: saved.history[0]))
    leaves = jax.tree.leaves(tree)
    meta = {
        "format": FORMAT,
        "versions": _versions(),
        "leaves": _describe(tree),
        "keys": [str(jax.random.key_impl(x)) if _is_key(x) else "" for x in leaves],
        **marks._asdict(),
        "begin": saved.begin,
        "estimated": saved.estimated,
    }
    return Content(meta, [processes.whole(leaf) for leaf in leaves])


def write(path: Path, found: Content) -> None:
    """A whole file on disk, or an OSError and no file."""
    arrays = {f"leaf_{i}": array for i, array in enumerate(found.arrays)}
    arrays["meta"] = np.asarray(json.dumps(found.meta))
    # NumPy's stub takes any `**arrays` for its boolean option `allow_pickle`.
    # NumPy's types take any keyword for its own `allow_pickle`.
    put(path, lambda file: np.savez(file, **arrays), force=True)  # type: ignore[arg-type]


def read(path: Path) -> Content:
    """Raises ValueError for a file that is cut short, damaged, or of another format."""
    arrays = load_arrays(path)
    try:
        meta = json.loads(str(arrays["meta"]))
        if meta["format"] != FORMAT:
            raise ValueError(
                f"it has format {meta['format']}, of bilevel {meta['versions'].get('bilevel')}, and "
                f"this version reads format {FORMAT}"
            )
        return Content(meta, [arrays[f"leaf_{i}"] for i in range(len(meta["leaves"]))])
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"it is no checkpoint ({error!r})") from error


def restored(path: Path, found: Content, marks: Marks, state: Any, history: History) -> Saved:
    """What the file of that name held; `state` and `history` give structure, shapes and dtypes.

    Raises ValueError where they or the identity are those of another run. Other versions, and a problem that
    computes something else, are warnings.
    """
    meta, arrays = found
    leaves, treedef = jax.tree.flatten((state, history))
    where = f"{str(path)!r} is of another run: "
    _same(where, meta["leaves"], _describe((state, history)), "or another directory")
    for name, digest in marks.identity.items():
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
    was, now = meta.get("computed", {}), marks.computed
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


def check_state(state: Any, like: RunState) -> None:
    """Raise TypeError where `state` is none of a run, ValueError where it is one of a run unlike this."""
    if not isinstance(state, RunState):
        raise TypeError(
            f"state must be result.state of an earlier run, got {type(state).__name__}."
        )
    was, now = _describe_state(state), _describe_state(like)
    _same("state is of another run: ", was, now, "the same retries=..., or no state")


@functools.cache
def _versions() -> dict[str, str]:
    return {
        name: value for name, value in versions().items() if name in ("bilevel", "jax", "jaxlib")
    }


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


def digest(tree: Any) -> str:
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
