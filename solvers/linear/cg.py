"""Conjugate gradients that report the true residual and the curvature they met."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from solvers import tree
from solvers.fields import Number, cast, number, static
from solvers.linear.base import AbstractLinearSolver, LinearInfo, accept_fixed_budget, finish
from solvers.status import Status
from solvers.types import MatVec, Scalar, Tree


class CG(AbstractLinearSolver):
    """Preconditioned conjugate gradients for a symmetric positive (semi)definite system.

    Stops at `||b - A x|| <= max(rtol ||b||, atol)`; the recursion's residual is checked against the
    recomputed one and the iteration restarted where they disagree. `rtol` defaults to 1e-10 in
    float64 and 1e-5 in float32 (never below 10 eps), `max_steps` to ten times the dimension, within
    100 and 5000. `rtol=0, atol=0` runs `max_steps` steps (or until rounding ends the progress).
    `preconditioner(r) -> z` is a symmetric positive definite approximation of the inverse.

    Status: INDEFINITE where a direction of negative curvature is met, BREAKDOWN where one of zero
    curvature is (a right-hand side outside the range of a singular matrix), else MAX_STEPS or OK. A
    singular but consistent system is OK. `curvature` is the smallest `p'Ap / p'p` of the directions.

    Cost: one product per step and one to recompute the residual; memory four vectors.
    Source: Hestenes and Stiefel 1952; restart and curvature test as in Nocedal and Wright, chapter 7.
    """

    rtol: Number | None = number(None, low=0.0)
    atol: Number = number(0.0, low=0.0)
    max_steps: int | None = static(None, low=1)
    preconditioner: Callable[[Tree], Tree] | None = None

    def init(self, matvec: MatVec, like: Tree, key: Array) -> None:
        return None

    def solve_unit(
        self, matvec: MatVec, b: Tree, x0: Tree, state: Any, key: Array, unit: Scalar
    ) -> tuple[Tree, LinearInfo]:
        b_norm = tree.norm(b)
        dtype = b_norm.dtype
        eps = tree.epsilon(b)
        default_rtol = 1e-10 if eps < 1e-10 else 1e-5
        rtol = jnp.asarray(default_rtol, dtype) if self.rtol is None else cast(self.rtol, b_norm)
        rtol = jnp.maximum(rtol, 10 * eps)
        target = jnp.maximum(rtol * b_norm, cast(self.atol, b_norm) / unit)
        max_steps = self.max_steps
        if max_steps is None:
            max_steps = min(max(10 * tree.size(b), 100), 5000)
        precondition = (lambda r: r) if self.preconditioner is None else self.preconditioner

        def is_open(carry: _Pass) -> Array:
            return (carry.residual > target) & (carry.steps < max_steps) & (carry.code == Status.OK)

        def step(carry: _Step) -> _Step:
            outer = carry.outer
            image = matvec(carry.p)
            kappa, length2 = tree.vdot(carry.p, image), tree.vdot(carry.p, carry.p)
            rayleigh = kappa / length2
            largest = jnp.maximum(outer.largest, tree.norm(image) / jnp.sqrt(length2))
            flat = 10 * eps * largest
            code = jnp.where(
                rayleigh < -flat,
                jnp.int32(Status.INDEFINITE),
                jnp.where(rayleigh <= flat, jnp.int32(Status.BREAKDOWN), jnp.int32(Status.OK)),
            )
            alpha = jnp.where(code == Status.OK, carry.gamma / kappa, jnp.zeros((), dtype))
            x = tree.axpy(alpha, carry.p, outer.x)
            r = tree.axpy(-alpha, image, carry.r)
            z = precondition(r)
            gamma = tree.vdot(r, z)
            p = tree.axpy(gamma / carry.gamma, carry.p, z)
            outer = outer._replace(
                x=x,
                residual=tree.norm(r),
                steps=outer.steps + 1,
                code=code,
                curvature=jnp.minimum(outer.curvature, rayleigh),
                largest=largest,
            )
            return _Step(outer, r, p, gamma)

        def run(carry: _Pass) -> _Pass:
            """Recompute the residual; where it misses the target and still falls, iterate on it."""
            r = tree.axpy(-1.0, matvec(carry.x), b)
            residual = tree.norm(r)
            z = precondition(r)
            begin = carry._replace(residual=residual, last_true=residual)
            falls = residual < 0.5 * carry.last_true
            ended = jax.lax.while_loop(
                lambda c: falls & is_open(c.outer), step, _Step(begin, r, z, tree.vdot(r, z))
            ).outer
            return ended._replace(is_true=ended.steps == carry.steps)

        infinity = jnp.asarray(jnp.inf, dtype)
        last = jax.lax.while_loop(
            lambda c: ~c.is_true,
            run,
            _Pass(
                x=tree.where(b_norm > 0, x0, tree.zeros_like(x0)),
                residual=infinity,
                last_true=infinity,
                is_true=jnp.asarray(False),
                steps=jnp.int32(0),
                code=jnp.int32(Status.OK),
                curvature=infinity,
                largest=jnp.zeros((), dtype),
            ),
        )
        curvature = jnp.where(jnp.isinf(last.curvature), jnp.nan, last.curvature)
        info = finish(
            matvec,
            b,
            last.x,
            last.residual,
            num_steps=last.steps,
            code=last.code,
            curvature=curvature,
            target=target,
            largest=last.largest,
        )
        return last.x, accept_fixed_budget(info, self.rtol, self.atol)


class _Pass(NamedTuple):
    """What survives a restart."""

    x: Tree
    residual: Scalar
    last_true: Scalar  # the residual recomputed at the last restart
    is_true: Array  # whether `residual` is recomputed, not the recursion's
    steps: Array
    code: Array
    curvature: Scalar
    largest: Scalar


class _Step(NamedTuple):
    """One run of the recursion."""

    outer: _Pass
    r: Tree
    p: Tree
    gamma: Scalar
