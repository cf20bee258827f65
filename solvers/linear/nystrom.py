"""Nystrom's low-rank approximation, as an approximate inverse and as a preconditioner."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from solvers import tree
from solvers.fields import Number, cast, number, static
from solvers.linear.base import AbstractLinearSolver, LinearInfo, finish
from solvers.linear.preconditioners import AbstractPreconditioner
from solvers.status import Status
from solvers.types import MatVec, Scalar, Tree


class Nystrom(AbstractLinearSolver):
    """`x = (A_k + damping I)^-1 b` with a rank-k approximation `A_k` of a semidefinite `A`.

    `A_k = (A Q) (Q' A Q)^+ (A Q)'` with `k = rank` random orthonormal columns `Q`; exact up to the damping
    where the rank of `A` is at most k. The start is not used. The approximate inverse is what was asked
    for, so what is left of `A x = b`, which is `residual`, does not change the status as long as it is less than
    `x = 0` leaves; else MAX_STEPS. Directions outside
    the approximation are divided by `damping`, an absolute number to be chosen near the eigenvalues
    that are left out.

    Class: positive semidefinite with few large eigenvalues; many right-hand sides; noisy products.
    Status: INDEFINITE where a Ritz value (an eigenvalue of `Q' A Q`; the smallest is `curvature`) is
    negative, since the formula is then no damped inverse; else OK.

    Cost: k products once per operator, one per right-hand side for the residual; memory k vectors.
    Source: Hataya and Yamada 2023, with Gaussian sketches instead of coordinates; Frangella, Tropp and
    Udell 2021.
    """

    rank: int = static(10, low=1)
    damping: Number = number(0.01, low=0.0, strict=True)

    def init(self, matvec: MatVec, like: Tree, key: Array) -> "_Sketch":
        return _sketch(matvec, like, key, self.rank)

    def solve_unit(
        self, matvec: MatVec, b: Tree, x0: Tree, state: Any, key: Array, unit: Scalar
    ) -> tuple[Tree, LinearInfo]:
        flat, unflatten = tree.flatten(b)
        damping = cast(self.damping, flat)
        inside = state.vectors.T @ flat
        outside = flat - state.vectors @ inside
        # What is outside by rounding alone is nothing, and must not be divided by a small damping.
        rounding = 10 * tree.epsilon(b) * state.values.size * jnp.linalg.norm(flat)
        outside = jnp.where(jnp.linalg.norm(outside) <= rounding, 0, outside / damping)
        x = unflatten(outside + state.vectors @ (inside / (state.values + damping)))
        b_norm = tree.norm(b)
        negative = (state.smallest < -100 * tree.epsilon(b) * state.largest) & (b_norm > 0)
        steps = jnp.int32(state.values.size)
        info = finish(
            matvec,
            b,
            x,
            tree.axpy(-1.0, matvec(x), b),
            num_steps=jnp.where(b_norm > 0, steps, jnp.int32(0)),
            code=jnp.where(negative, jnp.int32(Status.INDEFINITE), jnp.int32(Status.OK)),
            curvature=state.smallest,
            target=b_norm,
            largest=state.largest,
        )
        return x, info


class NystromPreconditioner(AbstractPreconditioner):
    """`P^-1 = U diag(l_k / l_i) U' + I - U U'` with the eigenpairs of a rank-k Nystrom approximation.

    The k largest eigenvalues are brought down to the smallest of them: it pays where they stand out.
    Damping needs no place in it, as the operator it approximates is the damped one. Approximate
    eigenvalues of rounding size (a rank below k) count as not there.

    Cost: `rank` products once per operator; `2 rank` inner products of vectors per step; memory `rank`
    vectors.
    Source: Frangella, Tropp and Udell 2021.
    """

    rank: int = static(10, low=1)

    def init(self, matvec: MatVec, like: Tree, key: Array) -> "_Deflation":
        sketch = _sketch(matvec, like, key, self.rank)
        values = sketch.values
        there = values > 10 * tree.epsilon(like) * values[0]
        smallest = jnp.min(jnp.where(there, values, values[0]))
        weights = jnp.where(there, smallest / jnp.where(there, values, 1), 1)
        return _Deflation(sketch.vectors, 1 - weights, values[0])

    def apply(self, state: "_Deflation", r: Tree) -> Tree:
        flat, unflatten = tree.flatten(r)
        return unflatten(flat - state.vectors @ (state.less * (state.vectors.T @ flat)))

    def largest(self, state: "_Deflation") -> Scalar:
        return state.largest


class _Deflation(NamedTuple):
    vectors: Array  # (d, k), orthonormal
    less: Array  # (k,), how much less than one each is weighted
    largest: Scalar


class _Sketch(NamedTuple):
    vectors: Array  # (d, k), orthonormal
    values: Array  # (k,), descending, not negative
    smallest: Scalar  # the smallest Ritz value
    largest: Scalar  # the largest `||A q||` of the random directions


def _sketch(matvec: MatVec, like: Tree, key: Array, rank: int) -> _Sketch:
    """Eigenpairs of the Nystrom approximation from `rank` Gaussian directions."""
    flat, unflatten = tree.flatten(like)
    rank = min(rank, flat.size)
    directions = jax.random.normal(key, (flat.size, rank), flat.dtype)
    directions, _ = jnp.linalg.qr(directions)
    # One after the other: a batch of products holds `rank` times the memory of one.
    images = jax.lax.map(lambda q: tree.flatten(matvec(unflatten(q)))[0], directions.T).T
    core = directions.T @ images
    ritz, turn = jnp.linalg.eigh((core + core.T) / 2)
    # The pseudo-inverse of the core: its directions of rounding size carry nothing of A.
    there = ritz > 10 * tree.epsilon(like) * jnp.max(jnp.abs(ritz))
    scale = jnp.where(there, 1 / jnp.sqrt(jnp.where(there, ritz, 1)), 0)
    vectors, singular, _ = jnp.linalg.svd(images @ (turn * scale[None, :]), full_matrices=False)
    largest = jnp.max(jnp.linalg.norm(images, axis=0))
    return _Sketch(vectors, singular**2, ritz[0], largest)
