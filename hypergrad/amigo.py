"""AmIGO, stocBiO and FSLA: steps on `w`, then steps on the adjoint, then `lam`."""

from typing import Any

import equinox as eqx
import jax
from jax import Array

from hypergrad.base import BilevelProblem
from hypergrad.estimators import STORM, AbstractEstimator, Oracles, Plain, Point
from hypergrad.single_loop import AbstractSingleLoop, Cost, Move, Stage, nothing, relative
from hypergrad.soba import adjoint_products, outer_oracles
from solvers import tree
from solvers.fields import Number, number, static
from solvers.types import Tree


class AbstractAmIGO(AbstractSingleLoop):
    """T gradient steps on `w`, then Q on the adjoint at the new `w`, then the direction at both."""

    adjoint_step: eqx.AbstractVar[Number | None]
    inner_steps: eqx.AbstractVar[int]
    adjoint_steps: eqx.AbstractVar[int]

    second_order = True
    cold = False  # whether the adjoint starts at zero in every outer step

    def start(self, problem: BilevelProblem, w: Tree, lam: Tree) -> Point:
        return {"v": tree.zeros_like(w)}

    def stages(self, problem: BilevelProblem, size: Array) -> tuple[Stage, ...]:
        step_v = size if self.adjoint_step is None else self.adjoint_step

        def slope(point: Point, batch: Any) -> tuple[Oracles, dict]:
            value, g = jax.value_and_grad(problem.inner)(point["w"], point["lam"], batch)
            return {"g_w": g}, {"inner_value": value}

        def products(point: Point, batch: Any) -> tuple[Oracles, dict]:
            _, _, product, cross = adjoint_products(problem, point, batch)
            return {"product": product, "cross_lam": cross}, {}

        def move_w(oracles: Oracles, point: Point) -> Move:
            after = tree.axpy(-size, oracles["g_w"], point["w"])
            return Move({"w": after}, {"residual": tree.norm(oracles["g_w"])})

        def move_v(oracles: Oracles, point: Point) -> Move:
            left = tree.sub(oracles["product"], oracles["f_w"])
            after = tree.axpy(-step_v, left, point["v"])
            return Move({"v": after}, {"adjoint_residual": relative(left, oracles["f_w"])})

        def direct(oracles: Oracles, point: Point) -> Move:
            grad = tree.sub(oracles["f_lam"], oracles["cross_lam"])
            return Move({"v": tree.zeros_like(point["v"])} if self.cold else {}, grad=grad)

        outer = outer_oracles(problem)
        return (
            Stage(slope, nothing, move_w, self.inner_steps),
            Stage(products, outer, move_v, self.adjoint_steps),
            Stage(products, outer, direct),
        )

    def calls(self) -> Cost:
        times, Q = self.estimator.evaluations, self.adjoint_steps
        return Cost(gradients=(self.inner_steps + Q + 1) * times, hvps=(Q + 1) * times)


class AmIGO(AbstractAmIGO):
    """Some gradient steps on `w`, some on the warm adjoint, then the direction for `lam`.

    `w -= s dg/dw`, `inner_steps` times; `v -= r (H v - dF/dw)`, `adjoint_steps` times; then
    `grad = dF/dlam - C v`. `adjoint_step=None` is r = s.

    Class: smooth inner problems, strongly convex. Without noise constant steps converge linearly.
    Cost per step: `T + Q + 1` gradients, `Q + 1` Hessian-vector products. Memory: two copies of `w`.
    Source: Arbel and Mairal 2022.
    """

    step_size: Number | str = number("auto", low=0.0, strict=True)
    adjoint_step: Number | None = number(None, low=0.0, strict=True)
    inner_steps: int = static(10, low=1)
    adjoint_steps: int = static(10, low=1)
    estimator: AbstractEstimator = eqx.field(default_factory=Plain)
    estimate: bool | None = static(None)


class StocBiO(AbstractAmIGO):
    """`AmIGO` with an adjoint that starts at zero: `adjoint_steps` terms of a stochastic Neumann series.

    Its bias is `(1 - r mu)^adjoint_steps`, whatever the number of outer steps. Class, cost, memory as `AmIGO`.
    Source: Ji, Yang and Liang 2021. Departs from the paper: a fresh outer gradient for each term, not one.
    """

    step_size: Number | str = number("auto", low=0.0, strict=True)
    adjoint_step: Number | None = number(None, low=0.0, strict=True)
    inner_steps: int = static(10, low=1)
    adjoint_steps: int = static(10, low=1)
    estimator: AbstractEstimator = eqx.field(default_factory=Plain)
    estimate: bool | None = static(None)

    cold = True


class FSLA(AbstractAmIGO):
    """One step on `w`, one on the adjoint, and a direction for `lam` with STORM's momentum.

    `AmIGO` with single steps, where the estimator is applied to what enters the direction alone.
    Class, memory as `AmIGO`. Cost per step: twice two gradients and two Hessian-vector products, and one.
    Source: Li, Gu and Huang 2022.
    """

    step_size: Number | str = number("auto", low=0.0, strict=True)
    adjoint_step: Number | None = number(None, low=0.0, strict=True)
    inner_steps: int = static(1, low=1)
    adjoint_steps: int = static(1, low=1)
    estimator: AbstractEstimator = eqx.field(default_factory=lambda: STORM(everything=False))
    estimate: bool | None = static(None)
