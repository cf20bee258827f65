"""Runs on more rows than a device holds: the data are in the host's memory, a chunk loads the batches that it takes."""

import dataclasses
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bilevel.calls import can_estimate
from bilevel.problem import Problem, Shuffled
from bilevel.result import RunState
from bilevel.sampling import num_rows, random_rows
from hypergrad import AbstractEngine
from hypergrad.base import Solver
from hypergrad.levels import Loaded, Slots
from hypergrad.single_loop import AbstractSingleLoop
from solvers import AbstractInnerSolver, Sampler
from solvers.types import Tree, constant_sampler


def streamed(problem: Any, key: Array, chunk: int, mesh: Any) -> "Stream | None":
    """The data of `Problem(data="host")`; None for other problems.

    Raises TypeError for a subclass of `Problem`, which may draw batches of its own, ValueError for a mesh.
    """
    if not isinstance(problem, Problem) or problem.data is None:
        return None
    if type(problem) is not Problem:
        raise TypeError(
            f"data='host' is for bilevel.Problem, got its subclass {type(problem).__name__}."
        )
    if mesh is not None:
        raise ValueError(
            "data='host' loads batches to one device: expected mesh=None, or data=None."
        )
    return Stream(problem, key, chunk)


class Streamed(Shuffled):
    """What some steps of a run see of such a problem."""

    loaded: Any = eqx.field(default=None, kw_only=True)
    """The `Slots` of both levels, `Loaded` where the rows are on the host."""

    def __post_init__(self) -> None:
        pass  # checked as a Problem; these data are in another form

    def slots(self) -> tuple[Slots, Slots]:
        return self.loaded


class _Sample(Problem):
    """The problem with one batch of each level as its data: for checks and starts before a run."""

    def inner_sampler(self, key: Array) -> Sampler:
        return constant_sampler(self.inner_data)

    def outer_batch(self, key: Array) -> Any:
        return self.outer_data


class _Plan(NamedTuple):
    """The batches of some steps, for each level."""

    starts: tuple[np.ndarray, np.ndarray]
    """Where they begin in the shuffled rows: ascending, each once."""
    room: tuple[int, int]
    """The most that so many steps may take: the shapes on the device depend on nothing else."""


class Stream:
    """The rows of a problem in NumPy, and the batches of chunks on the device: those of this chunk and of the next.

    Which batches the steps of a run take follows from its key and their numbers: they are known before a chunk begins,
    and those of the next are fetched by a thread while the device works on this one.
    """

    def __init__(self, problem: Problem, key: Array, chunk: int) -> None:
        self.problem, self.key, self.chunk = problem, key, chunk
        self.end = 0
        """The step that a run ends before: nothing is fetched for it."""
        self._orders: tuple[np.ndarray, ...] = ()
        # A thread, as a call of a compiled program returns when it is done. It ends with this object.
        self._thread = ThreadPoolExecutor(1)
        self._ahead: tuple[_Plan, Future[Streamed]] | None = None
        # A thread does not see the settings that are made in `with` blocks of another.
        self._device = cast(Any, jax.config).jax_default_device
        self._dtypes = jax.tree.map(
            lambda leaf: jax.dtypes.canonicalize_dtype(leaf.dtype), self._data()
        )

    def sample(self) -> Problem:
        """One batch of each level on the device, that which `Problem` draws from the key of the run."""
        keys = [jax.random.fold_in(self.key, level) for level in (0, 1)]
        keys[0] = jax.random.fold_in(keys[0], 0)  # its first batch

        def batch(level: int) -> Any:
            data, size = self._data()[level], self.problem.batch_size[level]
            if size is None:
                return data
            stored = self._rows(level, np.asarray(random_rows(data, size, keys[level]))[None], 1)
            return jax.tree.map(lambda leaf: leaf[0], stored)

        inner, outer = batch(0), batch(1)
        return _Sample(**_fields(self.problem) | {"inner_data": inner, "outer_data": outer})

    def start(self) -> Any:
        """What an engine sees before the first step: the first batch of each level."""
        levels = zip(self._data(), self.problem.batch_size, (0, 1), strict=True)
        self._orders = tuple(
            np.zeros(0, np.int32) if size is None else _order(data, jax.random.fold_in(self.key, i))
            for data, size, i in levels
        )
        return self._loaded(_plan(self._unloaded().starts(self.key, 1), (1, 1)))

    def check(self, engine: AbstractEngine, solver: Solver, shapes: RunState) -> None:
        """Raises ValueError for an engine whose batches are not known ahead."""
        zero = {"ahead": jnp.int32(0), "length": jnp.int32(0)}
        eqx.filter_eval_shape(_starts, *self._arguments(engine, solver, shapes), **zero)

    def load(
        self, engine: AbstractEngine, solver: Solver, state: RunState, length: int
    ) -> Streamed:
        """What the next `length` steps see, fetched ahead where it was; those after them are now."""
        plan = self._planned(engine, solver, state, 0, length)
        ahead, self._ahead = self._ahead, None
        found = None if ahead is None else ahead[1].result()
        if ahead is None or not all(map(np.array_equal, ahead[0].starts, plan.starts)):
            found = None  # a step failed, and the run is elsewhere: to be let go of first
        found = self._loaded(plan) if found is None else found
        left = min(self.chunk, self.end - int(state.step) - length)
        if left > 0:
            then = self._planned(engine, solver, state, length, left)
            self._ahead = then, self._thread.submit(self._loaded, then)
        return found

    def _data(self) -> tuple[Any, Any]:
        return self.problem.inner_data, self.problem.outer_data

    def _planned(
        self, engine: AbstractEngine, solver: Solver, state: RunState, ahead: int, length: int
    ) -> _Plan:
        numbers = {"ahead": jnp.int32(ahead), "length": jnp.int32(length)}
        found = _starts(*self._arguments(engine, solver, state), **numbers)
        # Of a table, there are no other batches than its slots, and each is drawn again before long.
        table = isinstance(engine, AbstractSingleLoop) and engine.estimator.has_table
        slots, own = self._unloaded().slots(), table and not engine.wants_estimate()
        inner, outer = (
            min(rows.size, one.num if own else one.num_rows)
            for rows, one in zip(found, slots, strict=True)
        )
        return _plan(found, (inner, outer))

    def _arguments(
        self, engine: AbstractEngine, solver: Solver, state: RunState
    ) -> tuple[Any, ...]:
        own = state.engine
        cycle = (own.order, own.count) if isinstance(engine, AbstractSingleLoop) else None
        most = self.chunk, inner_batches(engine, solver, state.lam)
        return (engine, self._unloaded(), solver, state.step, cycle, self.key, *most)

    def _unloaded(self) -> Streamed:
        rows = self.problem.rows()
        slots = zip(self.problem.batch_size, rows, strict=True)
        return self._streamed(tuple(Slots(None, size, count, True) for size, count in slots))

    def _streamed(self, loaded: Any) -> Streamed:
        inner, outer = (
            data if size is None else None
            for data, size in zip(self._data(), self.problem.batch_size, strict=True)
        )
        data = {"inner_data": inner, "outer_data": outer, "loaded": loaded}
        return Streamed(**_fields(self.problem) | data, num_rows=self.problem.rows())

    def _loaded(self, plan: _Plan) -> Streamed:
        made = []
        for level, size in enumerate(self.problem.batch_size):
            if size is None:
                made.append(Slots(self._data()[level], None, 1, True))
                continue
            order, starts, room = self._orders[level], plan.starts[level], plan.room[level]
            rows = order[(starts[:, None] + np.arange(size)) % len(order)]
            filled = np.full(room, np.iinfo(np.int32).max, np.int32)
            filled[: len(starts)] = starts
            filled = jax.device_put(filled, self._device)
            made.append(
                Loaded(self._rows(level, rows, room), size, len(order), True, starts=filled)
            )
        return self._streamed(tuple(made))

    def _rows(self, level: int, rows: np.ndarray, room: int) -> Any:
        """Batches of the rows with these numbers, (batches, size), on the device, with the dtypes of data there.

        What is made has shape (room + 1, size, ...), NaN at the end.
        """

        def one(leaf: np.ndarray, dtype: np.dtype) -> Array:
            # Always a new array: the device may work on one of NumPy's without copying it.
            made = np.empty((room + 1, *rows.shape[1:], *leaf.shape[1:]), dtype)
            if leaf.dtype == dtype:
                np.take(leaf, rows, axis=0, out=made[: len(rows)], mode="clip")  # needs no buffer
            else:
                for i, numbers in enumerate(rows):
                    made[i] = leaf[numbers]
            made[len(rows) :] = _missing(dtype)
            return jax.device_put(made, self._device)

        return jax.tree.map(one, self._data()[level], self._dtypes[level])


def inner_batches(engine: AbstractEngine, solver: Any, lam: Tree) -> int:
    """How many inner batches a step takes at most, each with its number."""
    if isinstance(engine, AbstractSingleLoop):
        return 1
    if not isinstance(solver, AbstractInnerSolver):
        solver = eqx.filter_eval_shape(solver, lam)
    stays = engine.needs_implicit and not solver.minibatches
    return 1 if stays else max(solver.max_steps, 1)


@eqx.filter_jit
def _starts(
    engine: AbstractEngine,
    problem: Any,
    solver: Solver,
    step: Array,
    cycle: tuple[Array, Array] | None,
    key: Array,
    size: int,
    number: int,
    ahead: Array,
    length: Array,
) -> tuple[Array, Array]:
    """First rows of the batches of `length <= size` steps from `step + ahead` on, (n,) for each level; -1 for none."""
    found = []
    if isinstance(engine, AbstractSingleLoop):
        assert cycle is not None
        order, count = cycle
        found.append(engine.starts(problem, order, count + ahead, length, size))
    if cycle is None or can_estimate(problem, solver, engine):
        steps = jnp.arange(size, dtype=jnp.int32)
        own = lambda i: problem.starts(jax.random.fold_in(key, step + ahead + i), number)
        needed = lambda rows: jnp.where(steps[:, None] < length, rows, -1)
        found.append(jax.tree.map(needed, jax.vmap(own)(steps)))
    inner, outer = (jnp.concatenate([rows.ravel() for rows in level]) for level in zip(*found))  # noqa: B905
    return inner, outer


def _plan(starts: tuple[Array, Array], room: tuple[int, int]) -> _Plan:
    found = [np.unique(np.asarray(rows)) for rows in starts]
    inner, outer = (rows[rows >= 0] for rows in found)
    return _Plan((inner, outer), room)


def _order(data: Any, key: Array) -> np.ndarray:
    """The order that `shuffled` puts the rows in."""
    # A copy: on CPU NumPy would look at the array of the device, and keep it.
    return np.array(_permutation(key, num_rows(data)), np.int32)


_permutation = jax.jit(jax.random.permutation, static_argnums=1)


def _missing(dtype: np.dtype) -> Any:
    """NaN; of integers, the largest."""
    if jnp.issubdtype(dtype, jnp.floating):
        return np.nan
    return True if dtype.kind == "b" else np.iinfo(dtype).max


def _fields(problem: Problem) -> dict[str, Any]:
    names = (field.name for field in dataclasses.fields(problem))
    return {name: getattr(problem, name) for name in names} | {"data": None}
