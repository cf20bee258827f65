"""The ends of a symmetric operator's spectrum, by Lanczos."""

import jax
import jax.numpy as jnp
from jax import Array

from solvers import tree
from solvers.types import MatVec, Scalar, Tree


def ritz_values(matvec: MatVec, like: Tree, key: Array, num_steps: int = 12) -> Array:
    """Ascending Ritz values of a symmetric operator, shape (num_steps,).

    `num_steps` products from a random start, with full reorthogonalisation. The largest value
    approaches the largest eigenvalue from below and the smallest from above, so a step length wants a
    margin (1.05 at 12 steps) and the smallest is an estimate, never a certificate. Where the Krylov
    space ends early, the first Rayleigh quotient fills the unused entries.

    Source: Golub and Van Loan, Matrix Computations, chapter 10.
    """
    flat, unflatten = tree.flatten(like)
    start = jax.random.normal(key, flat.shape, flat.dtype)  # one draw: its code is long to compile
    start = start / jnp.linalg.norm(start)
    dim, dtype = start.size, start.dtype
    num_steps = min(num_steps, dim)

    def product(v: Array) -> Array:
        return tree.flatten(matvec(unflatten(v)))[0]

    def step(carry, k):
        basis, v, alive, scale, first = carry
        basis = basis.at[k].set(v)
        image = product(v)
        alpha = jnp.vdot(v, image)
        first = jnp.where(k == 0, alpha, first)
        scale = jnp.maximum(scale, jnp.linalg.norm(image))
        # Twice is enough to orthogonalise to machine precision.
        image = image - basis.T @ (basis @ image)
        image = image - basis.T @ (basis @ image)
        beta = jnp.linalg.norm(image)
        goes_on = alive & (beta > 100 * jnp.finfo(dtype).eps * scale)
        following = jnp.where(goes_on, image / jnp.where(goes_on, beta, 1), jnp.zeros_like(v))
        alpha = jnp.where(alive, alpha, first)
        beta = jnp.where(goes_on, beta, jnp.zeros((), dtype))
        return (basis, following, goes_on, scale, first), (alpha, beta)

    zero = jnp.zeros((), dtype)
    carry = (jnp.zeros((num_steps, dim), dtype), start, jnp.asarray(True), zero, zero)
    _, (alphas, betas) = jax.lax.scan(step, carry, jnp.arange(num_steps))
    tridiagonal = jnp.diag(alphas) + jnp.diag(betas[:-1], 1) + jnp.diag(betas[:-1], -1)
    return jnp.linalg.eigvalsh(tridiagonal)


def largest_eigenvalue(matvec: MatVec, like: Tree, key: Array) -> Scalar:
    """The largest magnitude among 12 Lanczos steps' Ritz values; slightly below the true one."""
    return jnp.max(jnp.abs(ritz_values(matvec, like, key)))
