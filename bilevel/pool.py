"""Runs of more tasks than a device holds: the pool is in the host's memory, a chunk loads what it draws."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bilevel import validation
from bilevel.draws import draw_steps
from bilevel.result import RunState
from bilevel.tasks import Loaded, Tasks


def pooled(problem: Any, w: Any, key: Array, chunk: int) -> "Pool | None":
    """The pool of `Tasks(pool="host")`; None for other problems. Raises TypeError where `w` is missing."""
    if isinstance(problem, Tasks) and problem.pool is not None:
        return Pool(problem, w, key, chunk)
    return None


class Pool:
    """The tasks and their solutions in NumPy, and how chunks of a run see them.

    The states of a run have NumPy arrays with a row for each task in `w`, `engine` and `best.w`; a chunk gets those
    that it draws, filled up with others to always the same number.
    """

    def __init__(self, tasks: Tasks, w: Any, key: Array, chunk: int) -> None:
        assert tasks.per_step is not None
        self.tasks, self.key = tasks, key
        self.w = _start(tasks, w)
        self.size = min(tasks.count, chunk * tasks.per_step)
        count, per_step, weights = tasks.count, tasks.per_step, tasks.weights
        draws = lambda key, first: draw_steps(count, per_step, weights, key, first, chunk)
        self._draws = jax.jit(draws)

    def sample(self) -> tuple[Loaded, Any]:
        """Some tasks and their starts on the device, as many as a chunk has."""
        numbers = np.arange(self.size)
        return self._tasks(numbers), take(self.w, numbers)

    def first_state(self, make: Callable[[Loaded, Any], RunState]) -> RunState:
        """Of a run, from what `make(tasks, w)` makes of a load at a time."""
        count, size = self.tasks.count, self.size
        made, engine = None, None
        for begin in range(0, count, size):
            numbers = np.arange(size) + min(begin, count - size)
            made = make(self._tasks(numbers), take(self.w, numbers))
            if engine is None:
                engine = jax.tree.map(lambda leaf: _grown(leaf, count), made.engine)
            for leaf, rows in zip(
                jax.tree.leaves(engine), jax.tree.leaves(made.engine), strict=True
            ):
                leaf[numbers] = np.asarray(rows)
        assert made is not None
        return made._replace(w=self.w, engine=engine, best=made.best._replace(w=self.w))

    def load(self, state: RunState, length: int) -> tuple[Loaded, RunState, np.ndarray]:
        """What the next steps need on the device: tasks and their part of the state; and the tasks' numbers."""
        drawn = np.unique(np.asarray(self._draws(self.key, state.step))[:length])
        others = np.setdiff1d(np.arange(self.tasks.count), drawn)
        numbers = np.sort(np.concatenate([drawn, others[: self.size - len(drawn)]]))
        w, engine, best = take((state.w, state.engine, state.best.w), numbers)
        part = state._replace(w=w, engine=engine, best=state.best._replace(w=best))
        return self._tasks(numbers), part, numbers

    def store(self, state: RunState, numbers: Any, part: RunState) -> RunState:
        """The state after these steps. A task that was not loaded is where it was, at the best step too."""
        w, engine = put((state.w, state.engine), numbers, (part.w, part.engine))
        better = int(part.best.step) != int(state.best.step)
        best = put(state.w, numbers, part.best.w) if better else state.best.w
        return part._replace(w=w, engine=engine, best=part.best._replace(w=best))

    def _tasks(self, numbers: np.ndarray) -> Loaded:
        tasks = self.tasks
        return Loaded(
            tasks.problem,
            take(tasks.task_data, numbers),
            lanes=tasks.lanes,
            per_step=tasks.per_step,
            weights=tasks.weights,
            numbers=jnp.asarray(numbers),
            of=tasks.count,
        )


def on_host(state: RunState) -> RunState:
    """The state of an earlier run with its rows in NumPy."""
    w, engine, best = jax.tree.map(np.asarray, (state.w, state.engine, state.best.w))
    return state._replace(w=w, engine=engine, best=state.best._replace(w=best))


def _start(problem: Tasks, w: Any) -> Any:
    """The starts of all tasks in NumPy, on the device at no time."""
    if w is None:
        raise TypeError("w is missing: with a pool, expected a start for the inner variable.")
    leaves = [np.shape(leaf) for leaf in jax.tree.leaves(w)]
    if not all(shape and shape[0] == problem.count for shape in leaves):
        return jax.tree.map(np.asarray, problem.stacked(validation.variables("w", w)))
    validation.variables("w", jax.tree.map(lambda leaf: leaf[:1], w))
    return jax.tree.map(np.asarray, w)


def _grown(leaf: Any, count: int) -> np.ndarray:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        raise TypeError("the engine keeps random keys in its state: expected Tasks(pool=None).")
    return np.zeros((count, *leaf.shape[1:]), leaf.dtype)


def take(tree: Any, numbers: np.ndarray) -> Any:
    """Those tasks on the device."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf[numbers]), tree)


def put(tree: Any, numbers: np.ndarray, rows: Any) -> Any:
    """A copy with new rows: what was saved before stays what it was."""

    def one(leaf: np.ndarray, new: Any) -> np.ndarray:
        leaf = leaf.copy()
        leaf[numbers] = np.asarray(new)
        return leaf

    return jax.tree.map(one, tree, rows)
