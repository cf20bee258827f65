"""MINRES: symmetric systems of any sign, with the curvature that the residuals met."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from solvers import tree
from solvers.fields import Number, number, static
from solvers.linear.base import (
    AbstractLinearSolver,
    LinearInfo,
    accept_fixed_budget,
    finish,
    step_budget,
    target_residual,
)
from solvers.status import Status
from solvers.types import MatVec, Scalar, Tree


class MINRES(AbstractLinearSolver):
    """The smallest residual over the Krylov space, for a symmetric, possibly indefinite system.

    `min ||b - A x||` over `x0 + span(r0, A r0, ...)`, by the QR factorisation of the Lanczos matrix;
    the residual never grows. Tolerances, budget and the restart from a recomputed residual are those
    of `CG`.

    Class: symmetric; definite, indefinite, or singular with `b` in the range. A negative eigenvalue is
    no failure of the solve, so the status is OK; `curvature` tells. It is the smallest Rayleigh quotient
    of the residuals and Lanczos vectors met, and in exact arithmetic negative as soon as a Ritz value
    is: the residual's is what turns negative first. Status BREAKDOWN where what is left of `b` lies in
    the null space (`x` is then a least-squares solution), else MAX_STEPS or OK.

    Cost: one product per step and one to recompute the residual; memory six vectors.
    Source: Paige and Saunders 1975; the curvature of the residuals as in Liu and Roosta 2022.
    """

    rtol: Number | None = number(None, low=0.0, infinite=False)
    atol: Number = number(0.0, low=0.0, infinite=False)
    max_steps: int | None = static(None, low=1)

    def init(self, matvec: MatVec, like: Tree, key: Array) -> None:
        return None

    def solve_unit(
        self, matvec: MatVec, b: Tree, x0: Tree, state: Any, key: Array, unit: Scalar
    ) -> tuple[Tree, LinearInfo]:
        b_norm = tree.norm(b)
        dtype = b_norm.dtype
        eps = tree.epsilon(b)
        target = target_residual(b, self.rtol, self.atol, unit)
        max_steps = step_budget(self.max_steps, b)
        zero, one = jnp.zeros((), dtype), jnp.ones((), dtype)
        zeros = tree.zeros_like(b)

        def is_open(residual: Scalar, steps: Array) -> Array:
            return (residual > target) & (steps < max_steps)

        def start(r: Tree, residual: Scalar) -> _Lanczos:
            v = tree.divide(r, jnp.where(residual > 0, residual, one))
            first = _Rotation(one, zero)
            return _Lanczos(v, zeros, zeros, zeros, zero, residual, first, first)

        def step(c: _Carry) -> _Carry:
            """One product: with the Lanczos vector, or with `x` to recompute the residual."""
            k = c.lanczos
            image = matvec(tree.where(c.recompute, c.x, k.v))
            # The next Lanczos vector.
            alpha = tree.vdot(k.v, image)
            ahead = tree.axpy(-k.beta, k.v_before, tree.axpy(-alpha, k.v, image))
            beta = tree.norm(ahead)
            largest = jnp.maximum(c.largest, tree.norm(image))
            flat = 10 * eps * largest
            # The new column of the tridiagonal matrix under the two last rotations, and its own.
            last, before = k.last, k.before
            diagonal = last.cos * alpha - last.sin * before.cos * k.beta
            above = last.sin * alpha + last.cos * before.cos * k.beta
            above2 = before.sin * k.beta
            length = jnp.hypot(diagonal, beta)
            safe = jnp.where(length > flat, length, one)
            rotation = _Rotation(diagonal / safe, beta / safe)
            w = tree.axpy(-above2, k.w_before, tree.axpy(-above, k.w, k.v))
            w = tree.divide(w, safe)
            # ||A r|| / ||r|| and r'Ar / r'r of the residual before this step.
            slope = jnp.hypot(diagonal, last.cos * beta)
            rayleigh = jnp.minimum(alpha, last.cos * diagonal)
            # In the null space, but for an image so small that the step would add more rounding error
            # (eps L ||w|| |cos eta|) than it takes off the residual (about cos^2 |eta|).
            harmful = eps * largest * tree.norm(w) >= jnp.abs(rotation.cos)
            stuck = (slope <= flat) | ((slope <= 10 * eps**0.5 * largest) & harmful)
            stuck = stuck & ~c.recompute
            moves = ~c.recompute & ~stuck
            x = tree.axpy(jnp.where(moves, rotation.cos * k.eta, zero), w, c.x)
            eta = jnp.where(moves, -rotation.sin * k.eta, k.eta)
            v = tree.divide(ahead, jnp.where(beta > 0, beta, one))

            r = tree.sub(b, image)
            residual = jnp.where(c.recompute, tree.norm(r), jnp.abs(eta))
            went_on = _Lanczos(v, k.v, w, k.w, beta, eta, rotation, last)
            lanczos = jax.tree.map(
                lambda new, old: jnp.where(c.recompute, new, old), start(r, residual), went_on
            )
            steps = c.steps + jnp.where(c.recompute, 0, 1)
            opened = is_open(residual, steps)
            ends = stuck | (beta <= flat)  # or the Krylov space is complete
            return _Carry(
                x=x,
                lanczos=lanczos,
                residual=residual,
                last_true=jnp.where(c.recompute, residual, c.last_true),
                recompute=~c.recompute & (ends | ~opened),
                # The recomputed residual ends it where it met the target or no longer falls.
                done=c.recompute & ~(opened & (residual < 0.5 * c.last_true)),
                stuck=jnp.where(c.recompute, c.stuck, stuck),
                steps=steps,
                curvature=jnp.where(c.recompute, c.curvature, jnp.minimum(c.curvature, rayleigh)),
                largest=jnp.where(c.recompute, c.largest, largest),
            )

        x0 = tree.where(b_norm > 0, x0, tree.zeros_like(x0))
        warm = tree.max_abs(x0) > 0
        end = jax.lax.while_loop(
            lambda c: ~c.done,
            step,
            _Carry(
                x=x0,
                lanczos=start(b, b_norm),
                residual=b_norm,
                last_true=jnp.where(warm, jnp.asarray(jnp.inf, dtype), b_norm),
                recompute=warm,
                done=~warm & ~is_open(b_norm, jnp.int32(0)),
                stuck=jnp.asarray(False),
                steps=jnp.int32(0),
                curvature=jnp.asarray(jnp.inf, dtype),
                largest=zero,
            ),
        )
        info = finish(
            matvec,
            b,
            end.x,
            tree.scale(end.lanczos.eta, end.lanczos.v),  # as recomputed last
            num_steps=end.steps,
            code=jnp.int32(Status.OK),
            curvature=jnp.where(jnp.isinf(end.curvature), jnp.nan, end.curvature),
            target=target,
            largest=end.largest,
            singular=end.stuck,
        )
        return end.x, accept_fixed_budget(info, self.rtol, self.atol)


class _Rotation(NamedTuple):
    cos: Scalar
    sin: Scalar


class _Lanczos(NamedTuple):
    v: Tree
    v_before: Tree
    w: Tree  # the last search direction: V R^-1, by columns
    w_before: Tree
    beta: Scalar  # between the two Lanczos vectors
    eta: Scalar  # the residual with a sign
    last: _Rotation
    before: _Rotation


class _Carry(NamedTuple):
    x: Tree
    lanczos: _Lanczos
    residual: Scalar
    last_true: Scalar  # the residual when it was last recomputed
    recompute: Array  # whether the next product is for the residual
    done: Array
    stuck: Array  # whether the last residual lay in the null space
    steps: Array
    curvature: Scalar
    largest: Scalar
