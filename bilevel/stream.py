"""Runs on more rows than a device holds: the data are in the host's memory, a chunk loads the batches that it takes."""

import dataclasses
from typing import Any, NamedTuple

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
    """Where the batches of some steps begin in the shuffled rows: ascending, each once; none where all rows are one."""

    inner: np.ndarray
    outer: np.ndarray
    room: tuple[int, int]
    """The most batches that so many steps may take: the shapes on the device depend on nothing else."""


class Stream:
    """The rows of a problem in NumPy, and the batches of chunks on the device: those of this chunk and of the next.

    Which batches the steps of a run take follows from its key and their numbers: they are known before a chunk begins,
    and those of the next are fetched while the device works on this one.
    """

    def __init__(self, problem: Problem, key: Array, chunk: int) -> None:
        self.problem, self.key, self.chunk = problem, key, chunk
        self.end = 0
        """The step that a run ends before: nothing is fetched for it."""
        self._orders: tuple[np.ndarray, ...] = ()
        self._next: _Plan | None = None
        self._ahead: tuple[_Plan, Streamed] | None = None

    def sample(self) -> Problem:
        """One batch of each level on the device, that which `Problem` draws from the key of the run."""
        keys = jax.random.fold_in(jax.random.fold_in(self.key, 0), 0), jax.random.fold_in(self.key, 1)  # fmt: skip

        def batch(data: Any, size: int | None, key: Array) -> Any:
            return data if size is None else _rows(data, np.asarray(random_rows(data, size, key)))

        inner, outer = map(batch, self._data(), self.problem.batch_size, keys)
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
        eqx.filter_eval_shape(
            _starts, *self._arguments(engine, solver, shapes), jnp.int32(0), jnp.int32(0)
        )

    def load(
        self, engine: AbstractEngine, solver: Solver, state: RunState, length: int
    ) -> Streamed:
        """What the next `length` steps see, fetched ahead where it was."""
        plan = self._planned(engine, solver, state, 0, length)
        # Now, as computations on a device queue: later it would wait for the chunk.
        step = int(state.step) + length
        left = min(self.chunk, self.end - step)
        self._next = self._planned(engine, solver, state, length, left) if left > 0 else None
        ahead, self._ahead = self._ahead, None
        if ahead is not None and all(map(np.array_equal, ahead[0], plan)):
            return ahead[1]
        return self._loaded(plan)

    def fetch_ahead(self) -> None:
        """The batches of the chunk after the one that was loaded: to be called once that one is under way."""
        if self._next is not None:
            self._ahead = self._next, self._loaded(self._next)

    def _data(self) -> tuple[Any, Any]:
        return self.problem.inner_data, self.problem.outer_data

    def _planned(
        self, engine: AbstractEngine, solver: Solver, state: RunState, ahead: int, length: int
    ) -> _Plan:
        numbers = jnp.int32(ahead), jnp.int32(length)
        found = _starts(*self._arguments(engine, solver, state), *numbers)
        slots = self._unloaded().slots()
        table = isinstance(engine, AbstractSingleLoop) and engine.estimator.has_table
        most = [one.num if table else one.num_rows for one in slots]
        return _plan(found, (min(found[0].size, most[0]), min(found[1].size, most[1])))

    def _arguments(self, engine: AbstractEngine, solver: Solver, state: RunState) -> tuple:
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
        of = zip(self._data(), self.problem.batch_size, self._orders, plan[:2], plan.room, strict=True)  # fmt: skip
        for data, size, order, starts, room in of:
            if size is None:
                made.append(Slots(data, None, 1, True))
                continue
            rows = order[(starts[:, None] + np.arange(size)) % len(order)]
            filled = np.full(room, np.iinfo(np.int32).max, np.int32)
            filled[: len(starts)] = starts
            stored = _rows(data, rows, room)
            made.append(Loaded(stored, size, len(order), True, starts=jnp.asarray(filled)))
        return self._streamed(tuple(made))


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
    return _Plan(inner, outer, room)


def _order(data: Any, key: Array) -> np.ndarray:
    """The order that `shuffled` puts the rows in."""
    # A copy: on CPU NumPy would look at the array of the device, and keep it.
    return np.array(_permutation(key, num_rows(data)), np.int32)


_permutation = jax.jit(jax.random.permutation, static_argnums=1)


def _rows(data: Any, rows: np.ndarray, room: int | None = None) -> Any:
    """The rows with these numbers on the device, with the dtypes that data on the device have.

    `room`: `rows` has shape (batches, size), and what is made (room + 1, size, ...): NaN at the end.
    """

    def one(leaf: np.ndarray) -> Array:
        dtype = jax.dtypes.canonicalize_dtype(leaf.dtype)
        if room is None:
            return jnp.asarray(leaf[rows].astype(dtype))
        # Always a new array: the device may work on one of NumPy's without copying it.
        made = np.empty((room + 1, rows.shape[1], *leaf.shape[1:]), dtype)
        for i, numbers in enumerate(rows):
            made[i] = leaf[numbers]
        made[len(rows) :] = _missing(dtype)
        return jax.device_put(made)

    return jax.tree.map(one, data)


def _missing(dtype: np.dtype) -> Any:
    """NaN; of integers, the largest."""
    if jnp.issubdtype(dtype, jnp.floating):
        return np.nan
    return True if dtype.kind == "b" else np.iinfo(dtype).max


def _fields(problem: Problem) -> dict[str, Any]:
    names = (field.name for field in dataclasses.fields(problem))
    return {name: getattr(problem, name) for name in names} | {"data": None}
