"""PZOBO: the derivative of the inner steps by differences along random directions."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array

from hypergrad.base import BilevelProblem
from hypergrad.estimators import AbstractEstimator, Oracles, Plain, Point
from hypergrad.single_loop import AbstractSingleLoop, Cost, Move, Stage, nothing
from hypergrad.soba import outer_oracles
from solvers import tree
from solvers.fields import Number, cast, number, static
from solvers.types import Tree


class PZOBO(AbstractSingleLoop):
    """Inner steps at `lam` and at Q shifted `lam`; how far they part stands for `dw/dlam`: no Hessian.

    With w_T(lam) after `inner_steps` steps `w -= s dg/dw` from the last w, all on the same batches, and fresh
    normal u_j: `grad = dF/dlam + (1/Q) sum_j <(w_T(lam + mu u_j) - w_T(lam)) / mu, dF/dw> u_j`, mu = `smoothing`.
    Its mean is the derivative through the T steps up to O(mu^2).

    Class: smooth inner losses, defined a few mu around `lam` (on its natural scale). The variance of the part
    through w is about (d + 1) / Q of its square, d the size of `lam`, also at the solution: the rate of the outer
    rule has to decay. T steps from a warm start leave the bias of `Unrolled` with `max_steps=T`.
    Cost per step: `T (Q + 1) + 1` gradients. Memory: Q + 1 copies of `w`.
    Source: Sow, Ji and Liang 2022; directions are not normalised (their code does that).
    """

    step_size: Number | str = number("auto", low=0.0, strict=True)
    smoothing: Number = number(0.01, low=0.0, strict=True)
    directions: int = static(10, low=1)
    inner_steps: int = static(10, low=1)
    estimator: AbstractEstimator = eqx.field(default_factory=Plain)
    estimate: bool | None = static(None)

    def start(self, problem: BilevelProblem, w: Tree, lam: Tree) -> Point:
        return {"shifted": self._copies(w), "u": tree.zeros_like(self._copies(lam))}

    def stages(self, problem: BilevelProblem, size: Array) -> tuple[Stage, ...]:
        mu = cast(self.smoothing, size)

        def scatter(point: Point, key: Array) -> Point:
            flat, unflatten = tree.flatten(point["lam"])
            u = jax.random.normal(key, (self.directions, flat.size), flat.dtype)
            return {"shifted": self._copies(point["w"]), "u": jax.vmap(unflatten)(u)}

        def slopes(point: Point, batch: Any) -> tuple[Oracles, dict]:
            value, g = jax.value_and_grad(problem.inner)(point["w"], point["lam"], batch)

            def one(w: Tree, u: Tree) -> Tree:
                return jax.grad(problem.inner)(w, tree.axpy(mu, u, point["lam"]), batch)

            g_shifted = jax.vmap(one)(point["shifted"], point["u"])
            return {"g_w": g, "g_shifted": g_shifted}, {"inner_value": value}

        def descend(oracles: Oracles, point: Point) -> Move:
            after = {
                "w": tree.axpy(-size, oracles["g_w"], point["w"]),
                "shifted": tree.axpy(-size, oracles["g_shifted"], point["shifted"]),
            }
            return Move(after, {"residual": tree.norm(oracles["g_w"])})

        def direct(oracles: Oracles, point: Point) -> Move:
            def term(shifted: Tree, u: Tree) -> Tree:
                apart = tree.vdot(tree.sub(shifted, point["w"]), oracles["f_w"])
                return tree.scale(apart / mu, u)

            terms = jax.vmap(term)(point["shifted"], point["u"])
            mean = jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), terms)
            return Move({}, grad=tree.add(oracles["f_lam"], mean))

        return (
            Stage(slopes, nothing, descend, self.inner_steps, first=scatter),
            Stage(nothing, outer_oracles(problem), direct),
        )

    def calls(self) -> Cost:
        times = self.estimator.evaluations
        return Cost(gradients=(self.inner_steps * (self.directions + 1) + 1) * times)

    def _copies(self, x: Tree) -> Tree:
        stack = lambda leaf: jnp.broadcast_to(leaf, (self.directions, *jnp.shape(leaf)))
        return jax.tree.map(stack, x)
