"""sl-BAMM: SOBA on an average of both losses, for inner problems with many solutions."""

from typing import Any

import equinox as eqx
import jax
from jax import Array

from hypergrad.base import BilevelProblem
from hypergrad.estimators import AbstractEstimator, Oracles, Plain, Point
from hypergrad.single_loop import AbstractSingleLoop, Cost, Move, Stage, relative
from hypergrad.soba import adjoint_products
from solvers import tree
from solvers.fields import Number, cast, number, static
from solvers.types import Tree


class BAMM(AbstractSingleLoop):
    """`SOBA` with `phi = mu F + (1 - mu) g` in place of the inner loss g, in `w`, adjoint and `lam`.

    `w -= s dphi/dw;  v -= r (d2phi/dw2 v - dF/dw);  grad = dF/dlam - (d2phi/dlam dw) v`, at one point. With
    `mu > 0` falling to 0 (the paper: `0.9 (k + 1)^(-1/10)`, steps falling along) it picks, where the inner
    problem has many solutions, the one best for the outer loss; a constant mu is biased by it, mu = 0 is SOBA.
    `adjoint_step=None` is r = s.

    Class: inner loss convex, outer loss strongly convex in `w`. v grows like 1/mu where g is flat.
    Cost per step: two gradients and two Hessian-vector products. Memory: two copies of `w`.
    Source: Liu, Liu, Yao, Zeng and Zhang 2023 (Jacobi form, without their exact line search for v).
    """

    step_size: Number | str = number("auto", low=0.0, strict=True)
    adjoint_step: Number | None = number(None, low=0.0, strict=True)
    mu: Number = number(0.0, low=0.0)
    estimator: AbstractEstimator = eqx.field(default_factory=Plain)
    estimate: bool | None = static(None)

    second_order = True

    def start(self, problem: BilevelProblem, w: Tree, lam: Tree) -> Point:
        return {"v": tree.zeros_like(w)}

    def stages(self, problem: BilevelProblem, size: Array) -> tuple[Stage, ...]:
        step_v = size if self.adjoint_step is None else self.adjoint_step
        mu = cast(self.mu, size)

        def inner(point: Point, batch: Any) -> tuple[Oracles, dict]:
            value, g_w, product, cross = adjoint_products(problem, point, batch)
            oracles = {"g_w": g_w, "g_product": product, "g_cross_lam": cross}
            return oracles, {"inner_value": value}

        def outer(point: Point, batch: Any) -> tuple[Oracles, dict]:
            gradients = jax.value_and_grad(problem.outer, argnums=(0, 1))
            at = lambda w: gradients(w, point["lam"], batch)
            (value, (f_w, f_lam)), (_, (product, cross)) = jax.jvp(at, (point["w"],), (point["v"],))
            oracles = {"f_w": f_w, "f_lam": f_lam, "f_product": product, "f_cross_lam": cross}
            return oracles, {"outer_value": value}

        def average(f: Tree, g: Tree) -> Tree:
            return tree.axpy(mu, f, tree.scale(1 - mu, g))

        def move(oracles: Oracles, point: Point) -> Move:
            slope = average(oracles["f_w"], oracles["g_w"])
            left = tree.sub(average(oracles["f_product"], oracles["g_product"]), oracles["f_w"])
            cross = average(oracles["f_cross_lam"], oracles["g_cross_lam"])
            after = {
                "w": tree.axpy(-size, slope, point["w"]),
                "v": tree.axpy(-step_v, left, point["v"]),
            }
            report = {
                "residual": tree.norm(slope),
                "adjoint_residual": relative(left, oracles["f_w"]),
            }
            return Move(after, report, tree.sub(oracles["f_lam"], cross))

        return (Stage(inner, outer, move),)

    def calls(self) -> Cost:
        times = self.estimator.evaluations
        return Cost(gradients=2 * times, hvps=2 * times)
