"""What a preconditioner is: prepare once for an operator, apply to any number of residuals."""

import abc
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from solvers import tree
from solvers.fields import Settings, static
from solvers.types import MatVec, Scalar, Tree


class AbstractPreconditioner(Settings):
    """A symmetric positive definite approximation of the inverse of an operator.

    `CG(preconditioner=...)` calls `init` once per operator, in its own `init`, and `apply` in each step.
    Both work under `jit` and `vmap`.
    """

    @abc.abstractmethod
    def init(self, matvec: MatVec, like: Tree, key: Array) -> Any:
        """Prepare for the operator. `like` is a tree of the shape of the residuals."""

    @abc.abstractmethod
    def apply(self, state: Any, r: Tree) -> Tree:
        """The approximate inverse times `r`; the state is what `init` returned."""

    def largest(self, state: Any) -> Scalar | float:
        """A lower bound of the operator's norm, where the preparation met one.

        The solver judges what is rounding by the norm, and its own directions, being preconditioned, may
        never see it.
        """
        return 0.0


class Jacobi(AbstractPreconditioner):
    """`z = r / diag(A)`: for variables of different scale.

    The diagonal is the given tree `diagonal`; or exact, from one product per dimension, where these are at
    most `num_probes`; or else estimated as the mean of `z * A z` over that many vectors `z` of random
    signs, which is off by `sqrt(sum_{j != i} a_ij^2 / num_probes)` in entry `i`: it pays where the
    diagonal dominates. An estimate below a tenth of its row's norm (the root mean square of the same
    products) is replaced by that, so that none is negative.

    Cost: `num_probes` products at most, none per step; memory one vector.
    Source: Bekas, Kokiopoulou and Saad 2007; the floor is ours.
    """

    num_probes: int = static(32, low=1)
    diagonal: Tree | None = None

    def init(self, matvec: MatVec, like: Tree, key: Array) -> Tree:
        """The diagonal, like `like`, made positive."""
        vector, unflatten = tree.flatten(like)
        dim = vector.size
        if self.diagonal is not None:
            given = jax.tree.map(
                lambda a, b: jnp.broadcast_to(jnp.asarray(a).astype(b.dtype), b.shape),
                self.diagonal,
                like,
            )
            return unflatten(_positive(tree.flatten(given)[0]))
        exact = dim <= self.num_probes
        if exact:
            probes = jnp.eye(dim, dtype=vector.dtype)
        else:
            probes = jax.random.rademacher(key, (self.num_probes, dim), vector.dtype)
        images = jax.lax.map(lambda z: z * tree.flatten(matvec(unflatten(z)))[0], probes)
        if exact:
            return unflatten(_positive(jnp.sum(images, axis=0)))
        row_norm = jnp.sqrt(jnp.mean(images**2, axis=0))
        return unflatten(_positive(jnp.maximum(jnp.mean(images, axis=0), row_norm / 10)))

    def apply(self, state: Any, r: Tree) -> Tree:
        return jax.tree.map(jnp.divide, r, state)

    def largest(self, state: Any) -> Scalar:
        return tree.max_abs(state)


def _positive(diagonal: Array) -> Array:
    """Magnitudes; where one is of rounding size (a zero row), the largest."""
    size = jnp.abs(diagonal)
    largest = jnp.max(size)
    largest = jnp.where(largest > 0, largest, jnp.ones_like(largest))
    return jnp.where(size > jnp.finfo(size.dtype).eps * largest, size, largest)
