"""Restarted GMRES: any matrix, symmetric or not."""

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


class GMRES(AbstractLinearSolver):
    """The smallest residual over Krylov spaces of `restart` products, for any square system.

    In each cycle `min ||r0 - A V y||` over the Arnoldi basis `V` of `span(r0, A r0, ...)`, orthogonalised
    twice; a cycle ends with the recomputed residual, from which the next one starts. Tolerances and
    budget are those of `CG`. It takes no preconditioner.

    Class: any matrix, so also the adjoints of fixed-point and proximal maps. Without restarts it takes at
    most one step per dimension; a cycle that gains nothing ends the solve (MAX_STEPS: raise `restart`).
    `curvature` is the smallest Ritz value of the symmetric part, whose sign says nothing
    where `A` is not symmetric; a negative one is no failure, the status is OK. BREAKDOWN where the
    Krylov space is complete with a residual left, or the residual is in the null space: `A` is singular.

    Cost: one product per step and one per cycle, `4 restart` inner products of vectors per step; memory
    `restart + 3` vectors.
    Source: Saad and Schultz 1986; orthogonalised as in Giraud, Langou and Rozloznik 2005.
    """

    restart: int = static(20, low=1)
    rtol: Number | None = number(None, low=0.0, infinite=False)
    atol: Number = number(0.0, low=0.0, infinite=False)
    max_steps: int | None = static(None, low=1)

    def init(self, matvec: MatVec, like: Tree, key: Array) -> None:
        return None

    def solve_unit(
        self, matvec: MatVec, b: Tree, x0: Tree, state: Any, key: Array, unit: Scalar
    ) -> tuple[Tree, LinearInfo]:
        rhs, unflatten = tree.flatten(b)
        dtype, eps = rhs.dtype, tree.epsilon(b)
        b_norm = tree.norm(b)
        target = target_residual(b, self.rtol, self.atol, unit)
        max_steps = step_budget(self.max_steps, b)
        size = min(self.restart, rhs.size)
        rows = jnp.arange(size + 1, dtype=jnp.int32)

        def is_open(residual: Scalar, steps: Array) -> Array:
            return (residual > target) & (steps < max_steps)

        def unit_vector(r: Array, residual: Scalar) -> Array:
            return r / jnp.where(residual > 0, residual, jnp.ones((), dtype))

        def step(c: _Carry) -> _Carry:
            """One product: with the Arnoldi vector, or with `x` to recompute the residual."""
            vector = jnp.where(c.recompute, c.x, c.basis[c.column])
            image = tree.flatten(matvec(unflatten(vector)))[0]
            largest = jnp.maximum(c.largest, jnp.linalg.norm(image))
            flat = 10 * eps * largest

            # Arnoldi: orthogonal to the vectors of this cycle (those after them are an old cycle's).
            there = rows <= c.column
            first = jnp.where(there, c.basis @ image, 0)
            ahead = image - c.basis.T @ first
            second = jnp.where(there, c.basis @ ahead, 0)
            ahead = ahead - c.basis.T @ second
            beta = jnp.linalg.norm(ahead)
            complete = beta <= flat
            entries = jnp.where(rows == c.column + 1, beta, first + second)

            # The column under the rotations so far, then its own rotation.
            turned = c.rotations @ entries
            diagonal = turned[c.column]
            length = jnp.hypot(diagonal, beta)
            stuck = length <= flat  # complete, and the last column adds nothing
            safe = jnp.where(stuck, jnp.ones((), dtype), length)
            cos, sin = diagonal / safe, beta / safe
            upper, lower = c.rotations[c.column], c.rotations[c.column + 1]
            rotations = c.rotations.at[c.column].set(cos * upper + sin * lower)
            rotations = rotations.at[c.column + 1].set(cos * lower - sin * upper)
            rotations = jnp.where(stuck, c.rotations, rotations)
            column = jnp.where(rows < c.column, turned, jnp.where(rows == c.column, length, 0))
            triangle = c.triangle.at[:, c.column].set(column[:size])
            hessenberg = c.hessenberg.at[:, c.column].set(entries[:size])
            kept = c.column + jnp.where(stuck, 0, 1)
            left = jnp.abs(rotations[kept, 0]) * c.start
            steps = c.steps + jnp.where(c.recompute, 0, 1)
            ends = stuck | complete | (kept == size) | ~is_open(left, steps)
            closes = ends & ~c.recompute

            def close(_: None) -> tuple[Array, Scalar]:
                identity = jnp.eye(size, dtype=dtype)
                used = rows[:size] < kept
                square = jnp.where(used[:, None] & used[None, :], triangle, identity)
                inverse = jax.scipy.linalg.solve_triangular(square, identity)
                # The last columns are left out that add more rounding error, eps L ||R^-1 e_k g_k||, than
                # they take off the residual, about g_k^2 / ||r||: near a singular matrix x runs away.
                goal = jnp.where(used, rotations[:size, 0] * c.start, 0)
                before = jnp.sqrt(jnp.maximum(c.start**2 - jnp.cumsum(goal**2) + goal**2, 0))
                length = jnp.linalg.norm(inverse, axis=0)
                useful = used & (jnp.abs(goal) > 10 * eps * largest * length * before)
                goal = jnp.where(
                    rows[:size] <= jnp.max(jnp.where(useful, rows[:size], -1)), goal, 0
                )
                y = inverse @ goal
                # All columns had their product, kept or not; the first diagonal fills the rest.
                met = rows[:size] <= c.column
                mask = met[:, None] & met[None, :]
                part = jnp.where(mask, (hessenberg + hessenberg.T) / 2, hessenberg[0, 0] * identity)
                return c.x + c.basis[:size].T @ y, jnp.linalg.eigvalsh(part)[0]

            x, smallest = jax.lax.cond(closes, close, lambda _: (c.x, c.curvature), None)

            r = rhs - image
            true = jnp.linalg.norm(r)
            opened = is_open(true, steps)
            following = jnp.where(
                c.recompute,
                unit_vector(r, true),
                ahead / jnp.where(beta > 0, beta, jnp.ones((), dtype)),
            )
            index = jnp.where(c.recompute, 0, c.column + 1)
            return _Carry(
                x=x,
                basis=c.basis.at[index].set(following),
                rotations=jnp.where(c.recompute, jnp.eye(size + 1, dtype=dtype), rotations),
                triangle=triangle,
                hessenberg=hessenberg,
                column=jnp.where(c.recompute | closes, 0, c.column + 1),
                start=jnp.where(c.recompute, true, c.start),
                recompute=closes,
                # The recomputed residual ends it where it met the target or no longer falls.
                done=c.recompute & ~(opened & (true < (1 - 10 * eps) * c.start)),
                stuck=jnp.where(c.recompute, c.stuck, stuck),
                steps=steps,
                curvature=jnp.where(closes, jnp.fmin(c.curvature, smallest), c.curvature),
                largest=jnp.where(c.recompute, c.largest, largest),
            )

        x0 = tree.where(b_norm > 0, x0, tree.zeros_like(x0))
        warm = tree.max_abs(x0) > 0
        zeros = jnp.zeros((size, size), dtype)
        end = jax.lax.while_loop(
            lambda c: ~c.done,
            step,
            _Carry(
                x=tree.flatten(x0)[0],
                basis=jnp.zeros((size + 1, rhs.size), dtype).at[0].set(unit_vector(rhs, b_norm)),
                rotations=jnp.eye(size + 1, dtype=dtype),
                triangle=zeros,
                hessenberg=zeros,
                column=jnp.int32(0),
                start=jnp.where(warm, jnp.asarray(jnp.inf, dtype), b_norm),
                recompute=warm,
                done=~warm & ~is_open(b_norm, jnp.int32(0)),
                stuck=jnp.asarray(False),
                steps=jnp.int32(0),
                curvature=jnp.asarray(jnp.nan, dtype),
                largest=jnp.zeros((), dtype),
            ),
        )
        x = unflatten(end.x)
        info = finish(
            matvec,
            b,
            x,
            unflatten(end.start * end.basis[0]),  # as recomputed last
            num_steps=end.steps,
            code=jnp.int32(Status.OK),
            curvature=end.curvature,
            target=target,
            largest=end.largest,
            singular=end.stuck,
        )
        return x, accept_fixed_budget(info, self.rtol, self.atol)


class _Carry(NamedTuple):
    x: Array  # (d,)
    basis: Array  # (restart + 1, d)
    rotations: Array  # (restart + 1, restart + 1), their product
    triangle: Array  # (restart, restart), the Hessenberg matrix after the rotations
    hessenberg: Array  # (restart, restart)
    column: Array
    start: Scalar  # the residual at the start of the cycle
    recompute: Array  # whether the next product is for the residual
    done: Array
    stuck: Array  # whether the last Krylov space was complete with a residual left
    steps: Array
    curvature: Scalar
    largest: Scalar
