"""BO-REP: outer losses whose curvature grows with their gradient."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array

from hypergrad.base import BilevelProblem
from hypergrad.estimators import EMA, AbstractEstimator, Oracles, Point
from hypergrad.single_loop import AbstractSingleLoop, Cost, Move, Stage, nothing, relative
from hypergrad.soba import adjoint_products, outer_oracles
from solvers import tree
from solvers.fields import Number, cast, number, static
from solvers.types import Tree


class BOREP(AbstractSingleLoop):
    """Steps on `w` every few outer steps, one on the adjoint, momentum in `lam`; for a rule that normalises.

    Every `period` steps (the first time `refine_steps`, else `inner_steps` times): `w -= s dg/dw`, projected on
    the ball of radius `radius` around where `w` began (none by default). Then `v -= r (H v - dF/dw)` and
    `grad <- (1 - rate) grad + rate (dF/dlam - C v)`, rate that of the estimator `EMA`. The paper's step,
    `lam -= eta grad / ||grad||`, is the outer rule
    `optax.chain(optax.normalize_by_update_norm(), optax.sgd(eta))`: it stays bounded where the gradient
    explodes, and ends within about eta of the solution unless eta decays.

    Class: inner problem smooth and strongly convex; outer loss (L0, L1)-smooth, as of recurrent networks.
    Cost per step: four gradients and two Hessian-vector products, beside the steps on `w`. Memory: three copies of `w`.
    Source: Hao, Gong and Liu 2024. Departs from the paper: the refinement is plain gradient steps.
    """

    step_size: Number | str = number("auto", low=0.0, strict=True)
    adjoint_step: Number | None = number(None, low=0.0, strict=True)
    period: int = static(2, low=1)
    inner_steps: int = static(3, low=1)
    refine_steps: int = static(100, low=1)
    radius: Number | None = number(None, low=0.0, strict=True)
    estimator: AbstractEstimator = eqx.field(default_factory=EMA)
    estimate: bool | None = static(None)

    second_order = True

    def start(self, problem: BilevelProblem, w: Tree, lam: Tree) -> Point:
        return {"v": tree.zeros_like(w), "center": w}

    def stages(self, problem: BilevelProblem, size: Array) -> tuple[Stage, ...]:
        step_v = size if self.adjoint_step is None else self.adjoint_step

        def slope(point: Point, batch: Any) -> tuple[Oracles, dict]:
            return {"g_w": jax.grad(problem.inner)(point["w"], point["lam"], batch)}, {}

        def products(point: Point, batch: Any) -> tuple[Oracles, dict]:
            value, g_w, product, cross = adjoint_products(problem, point, batch)
            report = {"inner_value": value, "residual": tree.norm(g_w)}
            return {"product": product, "cross_lam": cross}, report

        def move_w(oracles: Oracles, point: Point) -> Move:
            after = tree.axpy(-size, oracles["g_w"], point["w"])
            if self.radius is not None:
                away = tree.sub(after, point["center"])
                far, radius = tree.norm(away), cast(self.radius, size)
                inside = tree.axpy(radius / jnp.maximum(far, radius), away, point["center"])
                after = tree.where(far > radius, inside, after)
            return Move({"w": after})

        def move_v(oracles: Oracles, point: Point) -> Move:
            left = tree.sub(oracles["product"], oracles["f_w"])
            after = tree.axpy(-step_v, left, point["v"])
            return Move({"v": after}, {"adjoint_residual": relative(left, oracles["f_w"])})

        def direct(oracles: Oracles, point: Point) -> Move:
            grad = tree.sub(oracles["f_lam"], oracles["cross_lam"])
            return Move({"center": point["w"]}, grad=grad)  # w stays until the next turn of steps

        def turns(count: Array) -> Array:
            later = jnp.where(count % self.period == 0, self.inner_steps, 0)
            return jnp.where(count == 0, self.refine_steps, later).astype(jnp.int32)

        outer, most = outer_oracles(problem), max(self.inner_steps, self.refine_steps)
        return (
            Stage(slope, nothing, move_w, most, turns),
            Stage(products, outer, move_v),
            Stage(products, outer, direct),
        )

    def calls(self) -> Cost:
        """Of a step with most steps on `w`; the history has what each took."""
        steps = max(self.inner_steps, self.refine_steps)
        times = self.estimator.evaluations
        return Cost(gradients=(steps + 4) * times, hvps=2 * times)
