"""Single-loop methods: one cycle of short moves per outer step, no inner convergence.

A method is a few `Stage`s in order. Each has raw oracles (means over rows), which an estimator takes
on a fresh batch, and a move that combines them. One stage that evaluates everything at one point is a Jacobi
method (SOBA), several are a Gauss-Seidel one (F3SA, MEHA). `lam` is moved by the driver's rule at the end
of the cycle, by the direction that the last stage returns.
"""

import abc
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array

from hypergrad.base import AbstractEngine, BilevelProblem, Hypergradient, Solver, make_info
from hypergrad.derivatives import hessian_product
from hypergrad.estimators import AbstractEstimator, Oracles, Point, Raw
from hypergrad.levels import Level, both_levels, joint_seed, levels, mixed, seeds
from solvers import SolveInfo, Status, tree
from solvers.fields import Number, cast
from solvers.linear.spectrum import largest_eigenvalue
from solvers.status import where
from solvers.types import Tree

DIRECTIONS = 1 << 20
"""Folded into a step's key for what stages draw themselves; batches have small numbers."""


MEASURING = 12
"""Hessian-vector products for a step size "auto"."""


class Stage(NamedTuple):
    """One move of a cycle."""

    inner: Raw
    """Oracles on the inner data."""
    outer: Raw
    """Oracles on the outer data."""
    move: Callable[[Oracles, Point], "Move"]
    """What they do: both levels' estimates at the point before the move."""
    times: int = 1
    """How often in a row, each time on fresh batches."""
    turns: Callable[[Array], Array] | None = None
    """How often of these it is in fact, by the number of the cycle; then it reports nothing."""
    joint: int = 0
    """Where not 0, `inner` gets a `Both`, batches of both levels, at most so many inner ones, and `outer` nothing."""
    first: Callable[[Point, Array], Point] | None = None
    """New values of some variables before the first of these, from a random key of the step."""


class Move(NamedTuple):
    """What a stage changes, and what it learnt."""

    point: Point
    """New values of some variables, never of `lam`."""
    report: dict[str, Array] = {}  # noqa: RUF012
    """Some of "residual", "adjoint_residual", "diverged", "status" and "solve" (both a `Status`), and "products"
    where that is not always `cost().hvps`."""
    grad: Tree | None = None
    """The direction for `lam`."""


class Cost(NamedTuple):
    """Oracle calls per outer step; a gradient is one backward pass over one batch, of one loss."""

    gradients: int = 0
    hvps: int = 0
    """Hessian-vector products, with the cross derivative that comes along."""
    passes: float = 0.0
    """The share of turns that take all rows of both levels in the place of batches (SPIDER, from the first on)."""
    pass_gradients: int = 0
    """What replaces `gradients` where every turn of a step is such a turn: each is over all rows."""
    pass_hvps: int = 0
    """What replaces `hvps` there."""
    start_hvps: int = 0
    """Once before the first step, on one batch: to measure the step size "auto". Tables start at zero, at no cost."""


class AbstractSingleLoop(AbstractEngine):
    """What single-loop methods share.

    `step_size="auto"` is `1 / (2 L)`, L the largest curvature of the inner loss at the start by 12 Lanczos
    products on one batch, measured once. DIVERGED where `w` or an own sequence grew beyond 1e8 (1 + its first norm).

    `info` is of the batch and of the point at which the direction was taken: `outer_value`, `inner.value`;
    `inner.residual` is the norm of the estimated inner gradient, `inner.num_steps` counts the gradients and
    `adjoint_steps` the Hessian-vector products of the step on batches; a step with a turn over all rows has the same
    numbers there, and `cost()` says what such turns take.
    """

    step_size: eqx.AbstractVar[Number | str]
    estimator: eqx.AbstractVar[AbstractEstimator]
    estimate: eqx.AbstractVar[bool | None]

    estimates = False
    needs_implicit = True
    uses_solver = False
    rewinds = False  # a table is updated in place: there is no old one to go back to
    second_order = False
    measured = ("step_size",)

    def __check_init__(self) -> None:
        if isinstance(self.step_size, str) and self.step_size != "auto":
            raise ValueError(
                f"{type(self).__name__}(step_size=...) must be a positive number or 'auto', got "
                f"{self.step_size!r}."
            )
        if not isinstance(self.estimator, AbstractEstimator):
            raise TypeError(
                f"{type(self).__name__}(estimator=...) must be an estimator such as bilevel.STORM(), got "
                f"{self.estimator!r}."
            )

    @property
    def pairs(self) -> bool:
        """Whether the inner oracles take two batches, drawn independently."""
        return False

    @abc.abstractmethod
    def start(self, problem: BilevelProblem, w: Tree, lam: Tree) -> Point:
        """The method's own variables before the first step."""

    @abc.abstractmethod
    def stages(self, problem: BilevelProblem, size: Array) -> tuple[Stage, ...]:
        """The cycle; `size` is the step size, a scalar of the accumulation dtype."""

    @abc.abstractmethod
    def calls(self) -> Cost:
        """Oracle calls per outer step, where no turn takes all rows."""

    def cost(self) -> Cost:
        """Oracle calls per outer step: `(1 - passes)` of `gradients` and `hvps`, each over a batch, and `passes` of
        `pass_gradients` and `pass_hvps`, each over all rows."""
        calls = self.calls()
        period, times = getattr(self.estimator, "period", None), self.estimator.evaluations
        start = MEASURING if isinstance(self.step_size, str) else 0
        if period is None:
            return calls._replace(pass_hvps=0, start_hvps=start)
        return calls._replace(
            passes=1 / period,
            pass_gradients=calls.gradients // times,
            pass_hvps=calls.pass_hvps or calls.hvps // times,
            start_hvps=start,
        )

    def init(
        self, problem: BilevelProblem, solver: Solver, w: Tree, lam: Tree, key: Array
    ) -> "_State":
        like = jnp.zeros((), tree.accumulation_dtype(w))
        if isinstance(self.step_size, str):
            product = hessian_product(problem, w, lam, problem.inner_sampler(key)(0))
            curvature = largest_eigenvalue(product, w, jax.random.fold_in(key, 2))
            size = jnp.where(curvature > 0, 0.5 / curvature, 1.0).astype(like.dtype)
        else:
            size = cast(self.step_size, like)
        own = self.start(problem, w, lam)
        point = own | {"w": w, "lam": lam}
        stages, count = self.stages(problem, size), jnp.int32(-1)
        order = seeds(jax.random.fold_in(key, 3), sum(stage.times for stage in stages))
        memory = []
        for stage in stages:
            inner, outer = self._data(stage, problem, key, order, count, 0)
            start = self.estimator.init
            memory.append((start(stage.inner, point, inner), start(stage.outer, point, outer)))
        limit = 1e8 * (1 + tree.norm(own | {"w": w}))
        return _State(own, tuple(memory), size, limit, order, count + 1)

    def _data(
        self,
        stage: Stage,
        problem: BilevelProblem,
        key: Array,
        order: Array,
        count: Array,
        index: Any,
    ) -> tuple[Level, Level]:
        """What the inner and the outer oracles of a stage see."""
        if stage.joint:
            level = both_levels(problem, key, order, count, index)
            return level, level
        return levels(problem, key, order, count, index, self.pairs)

    def starts(
        self, problem: Any, order: Array, first: Array, length: Array, size: int
    ) -> tuple[Array, Array]:
        """The first rows of all batches that `length <= size` cycles from `first` on may take, int32, at each level.

        `order` is that of the state, `problem` has shuffled rows. -1 where there is none: the shapes are those of
        `size` cycles. Of a table, the slots drawn in the cycle before are among them.
        """
        tables = int(self.estimator.has_table)
        cycles = jnp.arange(size + tables, dtype=jnp.int32)[:, None]
        counts, needed = first - tables + cycles, cycles < length + tables
        found: tuple[list, list] = ([], [])
        place = 0
        for stage in self.stages(problem, jnp.ones(())):
            own = order[place : place + stage.times]
            place += stage.times
            if tables and stage.turns is not None:
                raise ValueError(
                    f"{type(self).__name__} leaves out turns, so which rows of a table come next is not known ahead: "
                    "expected an estimator without tables, or Problem(data=None)."
                )
            inner = [own[:, 0], own[:, 1]] if self.pairs else [own[:, 0]]
            if stage.joint:
                inner = [joint_seed(own.T, number) for number in range(stage.joint)]
            unused = (stage.inner is nothing, stage.outer is nothing and not stage.joint)
            seeds = (jnp.concatenate(inner), own[:, 2])
            for level, slots in enumerate(problem.slots()):
                if slots.size is None or (unused[level] and not tables):
                    continue
                if tables:
                    drawn = slots.draw(mixed(own[:, 3 + level][None], counts)) * slots.size
                    starts = jnp.broadcast_to(drawn, (len(cycles), stage.times))
                else:
                    starts = slots.turn_start(seeds[level][None], counts)
                found[level].append(jnp.where(needed, starts, -1).ravel())
        empty = jnp.zeros(0, jnp.int32)
        inner, outer = (jnp.concatenate([empty, *rows]) for rows in found)
        return inner, outer

    def step(
        self,
        problem: BilevelProblem,
        solver: Solver,
        w: Tree,
        lam: Tree,
        state: "_State",
        key: Array,
    ) -> tuple[Hypergradient, "_State"]:
        size = state.size
        if not isinstance(self.step_size, str):  # it may be a schedule
            size = cast(self.step_size, size)
        stages = self.stages(problem, size)
        point, memory = {"lam": lam, "w": w} | state.own, list(state.memory)
        report: dict[str, Any] = {}
        place, missed = 0, jnp.int32(0)
        for index, stage in enumerate(stages):
            first = place
            if stage.first is not None:
                point = point | stage.first(point, jax.random.fold_in(key, DIRECTIONS + place))

            def take(turn: Array | int, point: Point, memory: Any, stage=stage, first=first):
                place = problem, key, state.order, state.count, first + turn
                inner, outer = self._data(stage, *place)
                below, on_inner, inner_memory = self.estimator(stage.inner, point, inner, memory[0])
                above, on_outer, outer_memory = self.estimator(stage.outer, point, outer, memory[1])
                move = stage.move(below | above, point)
                found = on_inner | on_outer | move.report
                if move.grad is not None:
                    found["grad"] = move.grad
                return point | move.point, (inner_memory, outer_memory), found

            if stage.turns is not None:
                turns = stage.turns(state.count)
                missed += stage.times - turns
                point, memory[index] = jax.lax.fori_loop(
                    0,
                    turns,
                    lambda turn, carry, take=take: take(turn, *carry)[:2],
                    (point, memory[index]),
                )
                found = {}
            else:
                if stage.times > 1:
                    # Only the last one reports, so that the loop takes no norms and values.
                    point, memory[index] = jax.lax.fori_loop(
                        0,
                        stage.times - 1,
                        lambda turn, carry, take=take: take(turn, *carry)[:2],
                        (point, memory[index]),
                    )
                point, memory[index], found = take(stage.times - 1, point, memory[index])
            report |= found
            place += stage.times

        w = point["w"]
        own = {name: point[name] for name in state.own}
        grad = report["grad"]
        count, residual = self.calls(), report["residual"]
        status = where(~jnp.isfinite(report["inner_value"]), Status.NONFINITE)
        inner = SolveInfo(report["inner_value"], residual, count.gradients - missed, status)
        grown = tree.norm(own | {"w": w})
        info = make_info(
            report["outer_value"],
            inner,
            grad,
            where((grown > state.limit) | report.get("diverged", False), Status.DIVERGED),
            where(~jnp.isfinite(grown), Status.NONFINITE),
            *(report[name] for name in ("status", "solve") if name in report),
            adjoint_residual=report.get("adjoint_residual"),
            adjoint_steps=report.get("products", count.hvps),
        )
        after = _State(own, tuple(memory), size, state.limit, state.order, state.count + 1)
        info = info._replace(multipliers=self.multipliers(after))
        return Hypergradient(grad, w, info), after


class _State(NamedTuple):
    own: Point
    memory: Any  # the estimators', by stage and level
    size: Array  # the step size
    limit: Array  # of the norm: beyond it the method has diverged
    order: Array  # seeds of the batches, by place
    count: Array  # of cycles


def relative(x: Tree, reference: Tree) -> Array:
    """`||x|| / ||reference||`; 0 where both are zero."""
    size = tree.norm(reference)
    return tree.norm(x) / jnp.where(size > 0, size, jnp.ones_like(size))


def nothing(point: Point, batch: Any) -> tuple[Oracles, dict]:
    """No oracles on this level."""
    return {}, {}
