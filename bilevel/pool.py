"""Runs of more tasks than a device holds: the pool is in the host's memory, a chunk loads what it draws."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ParamSpec

import jax
import jax.numpy as jnp
import numpy as np

from bilevel import retries, validation
from bilevel.checkpoint import Saved, opened
from bilevel.draws import draw_steps
from bilevel.log import Log
from bilevel.progress import Progress, work
from bilevel.result import BilevelError, Result, RunState, join, verdict
from bilevel.tasks import Loaded, Tasks
from solvers import Status

P = ParamSpec("P")


def with_pool(run: Callable[P, Result]) -> Callable[P, Result]:
    """`run`, which for `Tasks(pool="host")` is `run` on the tasks of one chunk after the other."""

    @functools.wraps(run)
    def either(*args: P.args, **kwargs: P.kwargs) -> Result:
        problem = args[0] if args else kwargs.get("problem")
        if isinstance(problem, Tasks) and problem.pool is not None:
            pooled: Callable[..., Result] = _run
            return pooled(run, *args, **kwargs)
        return run(*args, **kwargs)

    return either


class _Pool:
    """The tasks, and how chunks of a run see them."""

    def __init__(self, tasks: Tasks, key: Any, chunk: int) -> None:
        assert tasks.per_step is not None
        self.tasks, self.key, self.chunk = tasks, key, chunk
        self.size = min(tasks.count, chunk * tasks.per_step)
        count, per_step, weights = tasks.count, tasks.per_step, tasks.weights
        draws = lambda key, first: draw_steps(count, per_step, weights, key, first, chunk)
        self._draws = jax.jit(draws)

    def numbers(self, step: int, length: int) -> np.ndarray:
        """All that the steps from `step` on draw, filled up with others to `size`; rising."""
        drawn = np.unique(np.asarray(self._draws(self.key, jnp.int32(step)))[:length])
        others = np.setdiff1d(np.arange(self.tasks.count), drawn)
        return np.sort(np.concatenate([drawn, others[: self.size - len(drawn)]]))

    def load(self, numbers: np.ndarray) -> Loaded:
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

    def first(self, run: Callable[..., Result], lam: Any, w: Any, settings: Any) -> Result:
        """The result of no step; states of tasks are made a load at a time."""
        count, size = self.tasks.count, self.size
        whole: Any = None
        result: Any = None
        for begin in range(0, count, size):
            numbers = np.arange(size) + min(begin, count - size)
            part = run(self.load(numbers), lam, take(w, numbers), num_steps=0, **settings)
            if result is None:
                whole, result = (
                    jax.tree.map(lambda leaf: _grown(leaf, count), part.state.engine),
                    part,
                )
            for leaf, rows in zip(
                jax.tree.leaves(whole), jax.tree.leaves(part.state.engine), strict=True
            ):
                leaf[numbers] = np.asarray(rows)
        return dataclasses.replace(result, state=_host(result.state, w, whole))

    def on_device(self, state: RunState, numbers: np.ndarray) -> RunState:
        """The state of a load; the rows of its best pair are not kept."""
        w, engine = take((state.w, state.engine), numbers)
        return state._replace(w=w, engine=engine, best=state.best._replace(w=w))


def _run(
    run: Callable[..., Result],
    problem: Tasks,
    lam: Any,
    w: Any = None,
    *,
    num_steps: int = 100,
    chunk: int | None = None,
    key: Any = None,
    state: RunState | None = None,
    checkpoint: Any = None,
    resume: bool = False,
    log: Any = None,
    callback: Any = None,
    progress: bool | None = None,
    outer_tol: float = 0.0,
    patience: int | None = None,
    estimate_every: int | None = None,
    throw: bool = True,
    **settings: Any,
) -> Result:
    """`run` with the arrays of tasks in NumPy, in `result.w` and `result.state` too; `result.best.w` is None."""
    if estimate_every is not None:
        raise ValueError(
            "with a pool every chunk ends with an error estimate: leave estimate_every out."
        )
    num_steps = validation.count("num_steps", num_steps, 0)
    chunk = (
        min(max(num_steps // 10, 1), 100) if chunk is None else validation.count("chunk", chunk, 1)
    )
    key = jax.random.key(0) if key is None else key
    w = _start(problem, w)
    pool = _Pool(problem, key, chunk)
    settings |= {"chunk": chunk, "key": key, "throw": False, "progress": False}
    outcome = pool.first(run, lam, w, settings)
    first = outcome.state
    if state is not None:
        first = _host(state, *jax.tree.map(np.asarray, (state.w, state.engine)))
    empty, stopped = outcome.history, "num_steps"
    identity = {"data": (problem.task_data, problem.problem, problem.weights), "key": key}
    with opened(checkpoint, resume, **identity) as store, Log(log) as journal:
        saved = None if store is None else store.load(first, empty)
        saved = saved or Saved(first, (), int(first.step), 0)
        begin = saved.begin
        journal.start(begin, saved.history, resume)
        try:
            with Progress(progress, num_steps) as bar:
                while True:
                    now, pieces = saved.state, saved.history
                    done = sum(len(rows.status) for rows in pieces)
                    if why := verdict(now, pieces, outer_tol, patience):
                        stopped = why
                        break
                    if done >= num_steps:
                        break
                    if store is not None and store.terminated:
                        stopped = "terminated"
                        break
                    length = min(chunk, num_steps - done)
                    numbers = pool.numbers(int(now.step), length)
                    loaded, part = pool.load(numbers), pool.on_device(now, numbers)
                    outcome = run(loaded, lam, part.w, num_steps=length, state=part, **settings)
                    rows = outcome.history
                    done += len(rows.status)
                    if len(rows.status):
                        new = outcome.state
                        now = _host(new, *put((now.w, now.engine), numbers, (new.w, new.engine)))
                        saved = Saved(now, (*pieces, rows), begin, done)
                        if store is not None:
                            store.save(saved)
                        journal.write(begin + done, rows)
                        bar.update(
                            done, float(rows.outer_value[-1]), float(rows.grad_norm[-1]), work(rows)
                        )
                    if outcome.stopped == "interrupted":
                        raise KeyboardInterrupt
                    stop = callback is not None and bool(callback(now, rows))
                    if stop and int(now.worst) <= Status.MAX_STEPS:
                        stopped = "callback"
                        break
        except KeyboardInterrupt:
            stopped = "interrupted"
            if store is not None:
                store.save(saved)
    history, worst = join(saved.history, empty), int(saved.state.worst)
    if worst <= Status.MAX_STEPS and len(history.status):
        worst = int(history.status[-1])
    result = dataclasses.replace(
        outcome,
        lam=saved.state.lam,
        w=saved.state.w,
        history=history,
        status=Status(worst),
        state=saved.state,
        best=saved.state.best,
        stopped=stopped,
        retries=retries.used(saved.state),
    )
    if throw and worst != Status.OK:
        raise BilevelError(worst, f"run: outer step {begin + len(history.status) - 1}", result)
    return result


def _start(problem: Tasks, w: Any) -> Any:
    """The starts of all tasks in NumPy, on the device at no time."""
    if w is None:
        raise TypeError("w is missing: with a pool, expected a start for the inner variable.")
    leaves = [np.shape(leaf) for leaf in jax.tree.leaves(w)]
    if not all(shape and shape[0] == problem.count for shape in leaves):
        return jax.tree.map(np.asarray, problem.stacked(validation.variables("w", w)))
    validation.variables("w", jax.tree.map(lambda leaf: leaf[:1], w))
    return jax.tree.map(np.asarray, w)


def _host(state: RunState, w: Any, engine: Any) -> RunState:
    return state._replace(w=w, engine=engine, best=state.best._replace(w=None))


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
