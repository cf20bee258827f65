"""Conjugate gradients that report the true residual and the curvature they met."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from solvers import tree
from solvers.fields import Number, cast, number, static
from solvers.linear.base import (
    AbstractLinearSolver,
    LinearInfo,
    accept_fixed_budget,
    finish,
    step_budget,
    target_residual,
)
from solvers.linear.preconditioners import AbstractPreconditioner
from solvers.status import Status
from solvers.types import MatVec, ObjectiveFn, Scalar, Tree


class CG(AbstractLinearSolver):
    """Preconditioned conjugate gradients for a symmetric positive (semi)definite system.

    Stops at `||b - A x|| <= max(rtol ||b||, atol)`; the recursion's residual is checked against the
    recomputed one and the iteration restarted where they disagree. `rtol` defaults to 1e-10 in
    float64 and 1e-5 in float32 (never below 10 eps), `max_steps` to ten times the dimension, within
    100 and 5000. `rtol=0, atol=0` runs `max_steps` steps (or until rounding ends the progress).
    `preconditioner` is a symmetric positive definite approximation of the inverse: a function `r -> z`,
    or `Jacobi`, `NystromPreconditioner` or another `AbstractPreconditioner`, made once per operator.

    Status: INDEFINITE where a direction of negative curvature is met, BREAKDOWN where one of zero
    curvature is (a right-hand side outside the range of a singular matrix), else MAX_STEPS or OK. A
    singular but consistent system is OK. `curvature` is the smallest `p'Ap / p'p` of the directions.

    Cost: one product per step and one to recompute the residual; memory four vectors.
    Source: Hestenes and Stiefel 1952; restart and curvature test as in Nocedal and Wright, chapter 7.
    """

    rtol: Number | None = number(None, low=0.0)
    atol: Number = number(0.0, low=0.0)
    max_steps: int | None = static(None, low=1)
    preconditioner: AbstractPreconditioner | Callable[[Tree], Tree] | None = None

    def __check_init__(self) -> None:
        given = self.preconditioner
        if isinstance(given, type) or not (
            given is None or callable(given) or isinstance(given, AbstractPreconditioner)
        ):
            raise TypeError(
                "CG(preconditioner=...) must be a function or an instance such as Jacobi(), "
                f"got {given!r}."
            )

    def init(self, matvec: MatVec, like: Tree, key: Array) -> Any:
        """The preconditioner's state, if it has one."""
        if isinstance(self.preconditioner, AbstractPreconditioner):
            return self.preconditioner.init(matvec, like, key)
        return None

    def solve_unit(
        self, matvec: MatVec, b: Tree, x0: Tree, state: Any, key: Array, unit: Scalar
    ) -> tuple[Tree, LinearInfo]:
        b_norm = tree.norm(b)
        dtype = b_norm.dtype
        eps = tree.epsilon(b)
        target = target_residual(b, self.rtol, self.atol, unit)
        max_steps = step_budget(self.max_steps, b)
        approximate = self.preconditioner

        def precondition(r: Tree) -> Tree:
            if approximate is None:
                return r
            if isinstance(approximate, AbstractPreconditioner):
                return approximate.apply(state, r)
            return approximate(r)

        largest = jnp.zeros((), dtype)
        if isinstance(approximate, AbstractPreconditioner):
            largest = largest + cast(approximate.largest(state), b_norm)

        x0 = tree.where(b_norm > 0, x0, tree.zeros_like(x0))
        warm = tree.max_abs(x0) > 0

        def is_open(residual: Scalar, steps: Array, code: Array) -> Array:
            return (residual > target) & (steps < max_steps) & (code == Status.OK)

        def step(c: _Carry) -> _Carry:
            """One product: with the direction, or with `x` to recompute the residual.

            Both in one body, since compilation takes as long as the products that are written out.
            """
            image = matvec(tree.where(c.recompute, c.x, c.p))
            kappa, length2 = tree.vdot(c.p, image), tree.vdot(c.p, c.p)
            rayleigh = kappa / length2
            largest = jnp.maximum(c.largest, tree.norm(image) / jnp.sqrt(length2))
            flat = 10 * eps * largest
            code = jnp.where(
                rayleigh < -flat,
                jnp.int32(Status.INDEFINITE),
                jnp.where(rayleigh <= flat, jnp.int32(Status.BREAKDOWN), jnp.int32(Status.OK)),
            )
            code = jnp.where(c.recompute, c.code, code)
            moves = ~c.recompute & (code == Status.OK)
            alpha = jnp.where(moves, c.gamma / kappa, jnp.zeros((), dtype))
            x = tree.axpy(alpha, c.p, c.x)
            r = tree.axpy(
                -jnp.where(c.recompute, jnp.ones((), dtype), alpha),
                image,
                tree.where(c.recompute, b, c.r),
            )
            residual = tree.norm(r)
            z = precondition(r)
            gamma = tree.vdot(r, z)
            beta = jnp.where(c.recompute, jnp.zeros((), dtype), gamma / c.gamma)
            steps = c.steps + jnp.where(c.recompute, 0, 1)
            opened = is_open(residual, steps, code)
            return _Carry(
                x=x,
                r=r,
                p=tree.axpy(beta, c.p, z),
                gamma=gamma,
                residual=residual,
                last_true=jnp.where(c.recompute, residual, c.last_true),
                recompute=~c.recompute & ~opened,
                # The recomputed residual ends it where it met the target or no longer falls.
                done=c.recompute & ~(opened & (residual < 0.5 * c.last_true)),
                steps=steps,
                code=code,
                curvature=jnp.where(c.recompute, c.curvature, jnp.minimum(c.curvature, rayleigh)),
                largest=jnp.where(c.recompute, c.largest, largest),
            )

        z = precondition(b)
        ok = jnp.int32(Status.OK)
        last = jax.lax.while_loop(
            lambda c: ~c.done,
            step,
            _Carry(
                x=x0,
                r=b,
                p=z,
                gamma=tree.vdot(b, z),
                residual=b_norm,
                last_true=jnp.where(warm, jnp.asarray(jnp.inf, dtype), b_norm),
                recompute=warm,
                done=~warm & ~is_open(b_norm, jnp.int32(0), ok),
                steps=jnp.int32(0),
                code=ok,
                curvature=jnp.asarray(jnp.inf, dtype),
                largest=largest,
            ),
        )
        curvature = jnp.where(jnp.isinf(last.curvature), jnp.nan, last.curvature)
        info = finish(
            matvec,
            b,
            last.x,
            last.r,
            num_steps=last.steps,
            code=last.code,
            curvature=curvature,
            target=target,
            largest=last.largest,
        )
        return last.x, accept_fixed_budget(info, self.rtol, self.atol)


def preconditioned(
    linear: AbstractLinearSolver, objective: ObjectiveFn, w: Tree, batch: Any
) -> AbstractLinearSolver:
    """The solver with the objective's own preconditioner at `w`, where it is a CG without any."""
    own = getattr(objective, "preconditioner", None)
    if own is None or not isinstance(linear, CG) or linear.preconditioner is not None:
        return linear
    prepared = own(w, getattr(objective, "args", None), batch)
    return dataclasses.replace(linear, preconditioner=prepared)


class _Carry(NamedTuple):
    x: Tree
    r: Tree
    p: Tree
    gamma: Scalar
    residual: Scalar
    last_true: Scalar  # the residual when it was last recomputed
    recompute: Array  # whether the next product is for the residual
    done: Array
    steps: Array
    code: Array
    curvature: Scalar
    largest: Scalar
