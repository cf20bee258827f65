"""BOME, V-PBGD and G-PBGD: penalty methods that move `w` and `lam` together."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array

from hypergrad.base import BilevelProblem
from hypergrad.estimators import AbstractEstimator, Oracles, Plain, Point
from hypergrad.f3sa import value_gap
from hypergrad.single_loop import AbstractSingleLoop, Cost, Move, Stage, nothing
from hypergrad.soba import adjoint_products, outer_oracles
from solvers import tree
from solvers.fields import Number, cast, number, static
from solvers.types import Tree


class VPBGD(AbstractSingleLoop):
    """Descent on `F(y) + penalty (g(y) - g(w))` in y and `lam` at once, w by gradient steps on g.

    `w -= s dg/dw(w)`, `inner_steps` times; then from one point
    `y -= r (dF/dw(y) + penalty dg/dw(y))`, r = `outer_step / max(penalty, 1)`, and
    `grad = dF/dlam(y) + penalty (dg/dlam(y) - dg/dlam(w))`. `outer_step=None` is s. The paper moves `lam` by the
    rate r too, and lets the penalty rise linearly (a schedule).

    Class: inner loss with the PL inequality. Bias O(1/penalty).
    Cost per step: `inner_steps + 5` gradients. Memory: two copies of `w`.
    Source: Shen and Chen 2023 (V-PBGD).
    """

    step_size: Number | str = number("auto", low=0.0, strict=True)
    penalty: Number = number(10.0, low=0.0, strict=True)
    outer_step: Number | None = number(None, low=0.0, strict=True)
    inner_steps: int = static(1, low=1)
    estimator: AbstractEstimator = eqx.field(default_factory=Plain)
    estimate: bool | None = static(None)

    def start(self, problem: BilevelProblem, w: Tree, lam: Tree) -> Point:
        return {"y": w}

    def stages(self, problem: BilevelProblem, size: Array) -> tuple[Stage, ...]:
        penalty = cast(self.penalty, size)
        step = size if self.outer_step is None else cast(self.outer_step, size)
        step = step / jnp.maximum(penalty, 1)

        def move(oracles: Oracles, point: Point) -> Move:
            pull = tree.axpy(penalty, oracles["g_y"], oracles["f_w"])
            grad = tree.axpy(penalty, oracles["gap_lam"], oracles["f_lam"])
            return Move({"y": tree.axpy(-step, pull, point["y"])}, grad=grad)

        descent = _descent(problem, "w", size, self.inner_steps)
        return descent, Stage(_gap(problem), outer_oracles(problem, "y"), move)

    def calls(self) -> Cost:
        return Cost(gradients=(self.inner_steps + 5) * self.estimator.evaluations)


class GPBGD(AbstractSingleLoop):
    """Descent on `F + penalty / 2 ||dg/dw||^2` in `w` and `lam` at once.

    `w -= s (dF/dw + penalty H dg/dw)`, `grad = dF/dlam + penalty C dg/dw`. `step_size="auto"` is divided by
    `max(penalty, 1)` and by L.

    Class: inner loss with the PL inequality and a Lipschitz Hessian; stationary points of g count as solutions.
    The penalty is no mean over rows: with batches it is biased by the variance of the gradient.
    Cost per step: three gradients, one Hessian-vector product. Memory: one copy of `w`.
    Source: Shen and Chen 2023 (G-PBGD).
    """

    step_size: Number | str = number("auto", low=0.0, strict=True)
    penalty: Number = number(10.0, low=0.0, strict=True)
    estimator: AbstractEstimator = eqx.field(default_factory=Plain)
    estimate: bool | None = static(None)

    second_order = True

    def start(self, problem: BilevelProblem, w: Tree, lam: Tree) -> Point:
        return {}

    def stages(self, problem: BilevelProblem, size: Array) -> tuple[Stage, ...]:
        penalty = cast(self.penalty, size)
        if isinstance(self.step_size, str):
            size = size * jnp.minimum(2 * size, 1) / jnp.maximum(penalty, 1)

        def inner(point: Point, batch: Any) -> tuple[Oracles, dict]:
            slope = jax.grad(problem.inner)(point["w"], point["lam"], batch)
            value, _, product, cross = adjoint_products(problem, point | {"v": slope}, batch)
            report = {"inner_value": value, "residual": tree.norm(slope)}
            return {"product": product, "cross_lam": cross}, report

        def move(oracles: Oracles, point: Point) -> Move:
            pull = tree.axpy(penalty, oracles["product"], oracles["f_w"])
            grad = tree.axpy(penalty, oracles["cross_lam"], oracles["f_lam"])
            return Move({"w": tree.axpy(-size, pull, point["w"])}, grad=grad)

        return (Stage(inner, outer_oracles(problem), move),)

    def calls(self) -> Cost:
        times = self.estimator.evaluations
        return Cost(gradients=3 * times, hvps=times)


class BOME(AbstractSingleLoop):
    """A descent direction of F that also lowers `q = g(y) - g(z)`, z some gradient steps from y.

    z starts at y and takes `inner_steps` steps s on g. With `dq = (dg/dw(y), dg/dlam(y) - dg/dlam(z))` and
    `c = max(eta ||dq||^2 - <dF, dq>, 0) / (||dq||^2 + 1e-8)`, from one point: `y -= r (dF/dw + c dg/dw)`,
    `grad = dF/dlam + c dq_lam`. `outer_step=None` is r = s; the paper moves `lam` by the same r. `h.w` is y.

    Class: inner loss with the PL inequality. Steps have to decay; few inner steps leave a bias.
    Cost per step: `inner_steps + 5` gradients. Memory: two copies of `w`.
    Source: Liu, Ye, Wright, Stone and Liu 2022; 1e-8 as in their code, where q = 0 would divide by zero.
    """

    step_size: Number | str = number("auto", low=0.0, strict=True)
    eta: Number = number(0.5, low=0.0, strict=True)
    outer_step: Number | None = number(None, low=0.0, strict=True)
    inner_steps: int = static(10, low=1)
    estimator: AbstractEstimator = eqx.field(default_factory=Plain)
    estimate: bool | None = static(None)

    def start(self, problem: BilevelProblem, w: Tree, lam: Tree) -> Point:
        return {"y": w}

    def stages(self, problem: BilevelProblem, size: Array) -> tuple[Stage, ...]:
        step = size if self.outer_step is None else self.outer_step

        def move(oracles: Oracles, point: Point) -> Move:
            q = oracles["g_y"], oracles["gap_lam"]
            f = oracles["f_w"], oracles["f_lam"]
            square = tree.vdot(q, q)
            wanted = jnp.maximum(cast(self.eta, square) * square - tree.vdot(f, q), 0)
            pull, grad = tree.axpy(wanted / (square + 1e-8), q, f)
            y = tree.axpy(-step, pull, point["y"])
            # "w" is z in this step; the next one starts at y.
            return Move({"y": y, "w": y}, {"residual": tree.norm(q[0])}, grad)

        descent = _descent(problem, "w", size, self.inner_steps)
        return descent, Stage(_gap(problem), outer_oracles(problem, "y"), move)

    def calls(self) -> Cost:
        return Cost(gradients=(self.inner_steps + 5) * self.estimator.evaluations)


def _descent(problem: BilevelProblem, name: str, size: Array, times: int) -> Stage:
    """Gradient steps of one variable on the inner loss."""

    def slope(point: Point, batch: Any) -> tuple[Oracles, dict]:
        value, g = jax.value_and_grad(problem.inner)(point[name], point["lam"], batch)
        return {"g": g}, {"inner_value": value}

    def move(oracles: Oracles, point: Point) -> Move:
        after = tree.axpy(-size, oracles["g"], point[name])
        return Move({name: after}, {"residual": tree.norm(oracles["g"])})

    return Stage(slope, nothing, move, times)


def _gap(problem: BilevelProblem):
    """Raw oracles `gap_lam` and `g_y`, on one batch."""
    gap = value_gap(problem)

    def inner(point: Point, batch: Any) -> tuple[Oracles, dict]:
        oracles, _ = gap(point, batch)
        return oracles | {"g_y": jax.grad(problem.inner)(point["y"], point["lam"], batch)}, {}

    return inner
