"""Stochastic estimators of oracles: what replaces "the gradient on one batch" in a single-loop method.

An estimator sees raw oracles, which are means over rows (gradients, Hessian-vector products), before any
weight that changes from step to step multiplies them. It treats the two levels separately.
"""

import abc
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from hypergrad.levels import Level, Slots
from solvers import tree
from solvers.fields import Number, Settings, number, static
from solvers.types import Tree

Point = dict[str, Tree]
"""The variables of a method by name: "lam", "w", and its own."""

Oracles = dict[str, Tree]
"""Means over the rows of a batch, by name. Names that end in "lam" only enter the direction of `lam`."""

Raw = Callable[[Point, Any], tuple[Oracles, Any]]
"""`raw(point, batch) -> (oracles, report)`; the report is of the batch and is not estimated."""


class AbstractEstimator(Settings):
    """`estimator(raw, point, level, memory) -> (oracles, report, memory)`."""

    evaluations: ClassVar[int] = 1
    """Evaluations of the oracles per step."""
    needs_slots: ClassVar[bool] = False
    """Whether it needs numbered batches, or all of the data."""
    has_table: ClassVar[bool] = False
    """Whether it keeps oracles by slot, of one level."""

    @abc.abstractmethod
    def init(self, raw: Raw, point: Point, level: Level) -> Any:
        """The memory before the first step."""

    @abc.abstractmethod
    def __call__(
        self, raw: Raw, point: Point, level: Level, memory: Any
    ) -> tuple[Oracles, Any, Any]:
        """The oracles at `point`."""


class Plain(AbstractEstimator):
    """The oracles on one fresh batch."""

    def init(self, raw: Raw, point: Point, level: Level) -> Any:
        return None

    def __call__(
        self, raw: Raw, point: Point, level: Level, memory: Any
    ) -> tuple[Oracles, Any, Any]:
        oracles, report = raw(point, level.draw())
        return oracles, report, None


class EMA(AbstractEstimator):
    """`d <- (1 - rate) d + rate now`, of what enters the direction of `lam` (`everything`: of all)."""

    rate: Number = number(0.1, low=0.0, strict=True, high=1.0)
    everything: bool = static(False)

    def init(self, raw: Raw, point: Point, level: Level) -> "_Mean":
        return _Mean(_zeros(raw, point, level), jnp.int32(0))

    def __call__(
        self, raw: Raw, point: Point, level: Level, memory: "_Mean"
    ) -> tuple[Oracles, Any, "_Mean"]:
        now, report = raw(point, level.draw())
        keep = jnp.where(memory.count == 0, 0.0, 1.0 - jnp.asarray(self.rate))
        mixed = {
            name: tree.axpy(keep, tree.sub(memory.oracles[name], value), value)
            if self.everything or name.endswith("lam")
            else value
            for name, value in now.items()
        }
        return mixed, report, _Mean(mixed, memory.count + 1)


class STORM(AbstractEstimator):
    """`d <- now + (1 - rate) (d - before)`, `now` and `before` on one batch at this and the last point.

    The first step takes `now`. `everything=False`: only of what enters the direction of `lam`.
    Source: Cutkosky and Orabona 2019.
    """

    rate: Number = number(0.1, low=0.0, strict=True, high=1.0)
    everything: bool = static(True)

    evaluations = 2

    def init(self, raw: Raw, point: Point, level: Level) -> "_Path":
        return _Path(_zeros(raw, point, level), point, jnp.int32(0))

    def __call__(
        self, raw: Raw, point: Point, level: Level, memory: "_Path"
    ) -> tuple[Oracles, Any, "_Path"]:
        batch = level.draw()
        now, report = raw(point, batch)
        before, _ = raw(memory.point, batch)
        keep = jnp.where(memory.count == 0, 0.0, 1.0 - jnp.asarray(self.rate))
        oracles = {
            name: tree.axpy(keep, tree.sub(memory.oracles[name], before[name]), value)
            if self.everything or name.endswith("lam")
            else value
            for name, value in now.items()
        }
        return oracles, report, _Path(oracles, point, memory.count + 1)


class SPIDER(AbstractEstimator):
    """All rows every `period` steps; between, `d <- d + now - before` on one batch.

    Source: Fang, Li, Lin and Zhang 2018.
    """

    period: int = static(16, low=1)

    evaluations = 2
    needs_slots = True

    def init(self, raw: Raw, point: Point, level: Level) -> "_Path":
        return _Path(_zeros(raw, point, level), point, jnp.int32(0))

    def __call__(
        self, raw: Raw, point: Point, level: Level, memory: "_Path"
    ) -> tuple[Oracles, Any, "_Path"]:
        slots = _slots(level)

        def walk() -> tuple[Oracles, Any]:
            batch = level.draw()
            now, report = raw(point, batch)
            before, _ = raw(memory.point, batch)
            return tree.add(memory.oracles, tree.sub(now, before)), report

        whole = memory.count % self.period == 0
        oracles, report = jax.lax.cond(whole, lambda: raw(point, slots.data), walk)
        return oracles, report, _Path(oracles, point, memory.count + 1)


class SAGA(AbstractEstimator):
    """`mean + now - table[i]`, then `table[i] = now`; `mean` is that of the table over all rows.

    One row of the table for each batch that the data are cut into, zero until its first visit. Memory: the
    oracles times the number of batches; the table is updated in place. Source: Defazio, Bach and
    Lacoste-Julien 2014; a short last batch counts by its rows.
    """

    needs_slots = True
    has_table = True

    def init(self, raw: Raw, point: Point, level: Level) -> "_Table":
        zeros, slots = _zeros(raw, point, level), _slots(level)
        zero = tree.flatten(zeros)[0] if zeros else jnp.zeros(0)
        rows = jnp.zeros((slots.num, zero.size), zero.dtype)
        return _Table(rows, zero, slots.draw(level.bits), zero)

    def __call__(
        self, raw: Raw, point: Point, level: Level, memory: "_Table"
    ) -> tuple[Oracles, Any, "_Table"]:
        slots, i = _slots(level), memory.index
        now, report = slots.on(i, lambda batch: raw(point, batch))
        if not now:
            return now, report, memory
        now, unflatten = tree.flatten(now)  # one row to write, whatever the oracles
        change = now - memory.old
        rows = jax.lax.dynamic_update_index_in_dim(memory.rows, now, i, 0)
        mean = memory.mean + slots.share(i).astype(now.dtype) * change
        # The next step's row is read here, after the write: a read of the table before its update, in the
        # same step, would make XLA copy the whole table.
        i = slots.draw(level.bits)
        old = jax.lax.dynamic_index_in_dim(rows, i, keepdims=False)
        return unflatten(memory.mean + change), report, _Table(rows, mean, i, old)


class _Mean(NamedTuple):
    oracles: Oracles
    count: Array


class _Path(NamedTuple):
    oracles: Oracles
    point: Point  # where they were taken
    count: Array


class _Table(NamedTuple):
    rows: Array  # flattened oracles, by slot
    mean: Array
    index: Array  # of the slot of the next step
    old: Array  # and its row


def _zeros(raw: Raw, point: Point, level: Level) -> Oracles:
    shapes, _ = jax.eval_shape(lambda point: raw(point, level.draw()), point)
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


def _slots(level: Level) -> Slots:
    if level.slots is None:
        raise ValueError(
            "this estimator needs the rows of the data by number: expected a bilevel.Problem without "
            "same_rows."
        )
    return level.slots
