"""The whole matrix, for small systems: exact, with its whole spectrum."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from solvers import tree
from solvers.linear.base import AbstractLinearSolver, LinearInfo, finish
from solvers.status import Status
from solvers.types import MatVec, Scalar, Tree


class Dense(AbstractLinearSolver):
    """Builds the matrix (one product per dimension) and factors it once for all right-hand sides.

    Positive definite matrices are solved by Cholesky; otherwise the eigendecomposition gives the
    minimum-norm solution. The spectrum is always computed, so `curvature` is the exact smallest
    eigenvalue. Status: INDEFINITE for a negative eigenvalue, BREAKDOWN for a right-hand side outside
    the range, OK for a consistent singular system.

    Cost O(d^3), memory two d x d matrices: for d up to a few thousand.
    """

    def init(self, matvec: MatVec, like: Tree, key: Array) -> "_Factors":
        vector, unflatten = tree.flatten(like)
        identity = jnp.eye(vector.size, dtype=vector.dtype)
        matrix = jax.vmap(lambda e: tree.flatten(matvec(unflatten(e)))[0])(identity)
        matrix = (matrix + matrix.T) / 2
        eigenvalues, vectors = jnp.linalg.eigh(matrix)
        return _Factors(jnp.linalg.cholesky(matrix), eigenvalues, vectors)

    def solve_unit(
        self, matvec: MatVec, b: Tree, x0: Tree, state: Any, key: Array, unit: Scalar
    ) -> tuple[Tree, LinearInfo]:
        flat, unflatten = tree.flatten(b)
        values = state.eigenvalues
        smallest, largest = values[0], jnp.max(jnp.abs(values))
        eps = tree.epsilon(b)
        rounding = 10 * flat.size * eps * largest
        definite = smallest > rounding

        def by_cholesky(_: None) -> Array:
            return jax.scipy.linalg.cho_solve((state.cholesky, True), flat)

        def by_eigenvectors(_: None) -> Array:
            kept = jnp.abs(values) > rounding
            inverse = jnp.where(kept, 1 / jnp.where(kept, values, 1.0), 0.0)
            return state.vectors @ (inverse * (state.vectors.T @ flat))

        x = unflatten(jax.lax.cond(definite, by_cholesky, by_eigenvectors, None))
        code = jnp.where(smallest < -rounding, jnp.int32(Status.INDEFINITE), jnp.int32(Status.OK))
        info = finish(
            matvec,
            b,
            x,
            tree.axpy(-1.0, matvec(x), b),
            num_steps=jnp.where(tree.norm(b) > 0, jnp.int32(flat.size), jnp.int32(0)),
            code=code,
            curvature=smallest,
            target=eps**0.5 * tree.norm(b),
            largest=largest,
        )
        return x, info


class _Factors(NamedTuple):
    cholesky: Array
    eigenvalues: Array
    vectors: Array
