"""The single loop of the fully first-order penalty method, plain (F2SA) or with momentum (F3SA)."""

from typing import Any

import equinox as eqx
import jax
import numpy as np
from jax import Array
from jax.core import Tracer

from hypergrad.base import BilevelProblem
from hypergrad.estimators import STORM, AbstractEstimator, Oracles, Point
from hypergrad.single_loop import AbstractSingleLoop, Cost, Move, Stage
from solvers import tree
from solvers.fields import Number, cast, number, static
from solvers.types import Tree


class F3SA(AbstractSingleLoop):
    """A penalised copy of `w` beside `w`, both moved by single gradient steps: no Hessian.

    `w -= s dg/dw(w);  y -= (ratio s / penalty) (dF/dw(y) + penalty dg/dw(y))`, `inner_steps` times; then
    `grad = dF/dlam(y) + penalty (dg/dlam(y) - dg/dlam(w))`. The bias is O(1/penalty), the noise of `grad`
    grows with the penalty, so in the paper it grows slowly while the steps shrink:
    `bilevel.schedules.penalty` makes `step_size`, `penalty` and the rate of the outer rule together.

    With the estimator `Plain()` it is single-loop F2SA, and with many `inner_steps` F2BA; `STORM` (the
    default) is F3SA and takes one inner step. `coupled` uses one batch for both copies in each move, which
    cancels most of the noise that the penalty multiplies; False draws two. `ratio <= 1` keeps the copy's step
    at most as long as that of `w`: else `w` lags behind and the penalty multiplies the lag.

    Class: inner problem strongly convex, `penalty >= 2 L_F / mu`. `F2SA` is the double loop, of any order.
    Cost per step: `3 inner_steps + 3` gradients, twice as many with STORM. `h.w` is the unpenalised copy;
    `outer_value` is that of the penalised one. Memory: two copies of `w` beside the estimator's.
    Source: Kwon, Kwon, Wright and Nowak 2023; Chen, Ma and Zhang 2025 (F2BA).
    """

    step_size: Number | str = number("auto", low=0.0, strict=True)
    penalty: Number = number(50.0, low=0.0, strict=True)
    ratio: Number = number(0.5, low=0.0, strict=True)
    inner_steps: int = static(1, low=1)
    coupled: bool = static(True)
    estimator: AbstractEstimator = eqx.field(default_factory=STORM)
    estimate: bool | None = static(None)

    def __check_init__(self) -> None:
        fixed = isinstance(self.ratio, jax.Array)
        if not fixed or not isinstance(self.ratio, Tracer) and np.any(np.asarray(self.ratio) > 1):
            raise ValueError(
                "F3SA(ratio=...) must be a number in (0, 1]: above 1 the penalised copy moves faster than "
                f"the plain one, which the penalty then punishes without bound. Got {self.ratio!r}."
            )
        if not self.coupled and self.estimator.needs_slots:
            raise ValueError(
                "F3SA(coupled=False) draws two batches at once, which "
                f"{type(self.estimator).__name__}() cannot: expected coupled=True."
            )

    @property
    def pairs(self) -> bool:
        return not self.coupled

    def start(self, problem: BilevelProblem, w: Tree, lam: Tree) -> Point:
        return {"y": w}

    def stages(self, problem: BilevelProblem, size: Array) -> tuple[Stage, ...]:
        penalty = cast(self.penalty, size)
        step_y = cast(self.ratio, size) * size / penalty

        def two(batch: Any) -> tuple[Any, Any]:
            return (batch, batch) if self.coupled else batch

        def both(point: Point, batch: Any) -> tuple[Oracles, dict]:
            first, second = two(batch)
            value, g_w = jax.value_and_grad(problem.inner)(point["w"], point["lam"], first)
            g_y = jax.grad(problem.inner)(point["y"], point["lam"], second)
            return {"g_w": g_w, "g_y": g_y}, {"inner_value": value}

        def outer_y(point: Point, batch: Any) -> tuple[Oracles, dict]:
            return {"f_y": jax.grad(problem.outer)(point["y"], point["lam"], batch)}, {}

        def move(oracles: Oracles, point: Point) -> Move:
            pull = tree.axpy(penalty, oracles["g_y"], oracles["f_y"])
            after = {
                "w": tree.axpy(-size, oracles["g_w"], point["w"]),
                "y": tree.axpy(-step_y, pull, point["y"]),
            }
            return Move(after, {"residual": tree.norm(oracles["g_w"])})

        def direct(oracles: Oracles, point: Point) -> Move:
            return Move({}, grad=tree.axpy(penalty, oracles["gap_lam"], oracles["f_lam"]))

        gap, outer_lam = value_gap(problem, two), outer_slope(problem)
        return Stage(both, outer_y, move, self.inner_steps), Stage(gap, outer_lam, direct)

    def calls(self) -> Cost:
        return Cost(gradients=(3 * self.inner_steps + 3) * self.estimator.evaluations)


def value_gap(problem: BilevelProblem, two=lambda batch: (batch, batch)):
    """The raw oracle `gap_lam`, `dg/dlam(y) - dg/dlam(w)`."""

    def gap(point: Point, batch: Any) -> tuple[Oracles, dict]:
        first, second = two(batch)

        def difference(lam: Tree) -> Array:
            return problem.inner(point["y"], lam, second) - problem.inner(point["w"], lam, first)

        return {"gap_lam": jax.grad(difference)(point["lam"])}, {}

    return gap


def outer_slope(problem: BilevelProblem):
    """The raw oracle `f_lam` at y."""

    def outer(point: Point, batch: Any) -> tuple[Oracles, dict]:
        value, f_lam = jax.value_and_grad(problem.outer, argnums=1)(point["y"], point["lam"], batch)
        return {"f_lam": f_lam}, {"outer_value": value}

    return outer
