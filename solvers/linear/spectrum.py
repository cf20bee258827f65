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
    dim, dtype = flat.size, flat.dtype
    num_steps = min(num_steps, dim)
    start = _random_vector(key, dim).astype(dtype)
    start = start / jnp.linalg.norm(start)

    def product(v: Array) -> Array:
        return tree.flatten(matvec(unflatten(v)))[0]

    def step(carry, k):
        basis, v, scale = carry
        basis = basis.at[k].set(v)
        image = product(v)
        along = basis @ image
        alpha = along[k]
        # Twice is enough to orthogonalise to machine precision.
        image = image - basis.T @ along
        image = image - basis.T @ (basis @ image)
        beta = jnp.linalg.norm(image)
        scale = jnp.maximum(scale, jnp.abs(alpha) + beta)
        goes_on = beta > 100 * jnp.finfo(dtype).eps * scale
        # Once zero, v and beta stay zero.
        following = jnp.where(goes_on, image / jnp.where(goes_on, beta, 1), jnp.zeros_like(v))
        beta = jnp.where(goes_on, beta, jnp.zeros((), dtype))
        return (basis, following, scale), (alpha, beta)

    carry = (jnp.zeros((num_steps, dim), dtype), start, jnp.zeros((), dtype))
    _, (alphas, betas) = jax.lax.scan(step, carry, jnp.arange(num_steps))
    betas = betas[:-1]
    alphas = alphas.at[1:].set(jnp.where(betas > 0, alphas[1:], alphas[0]))
    tridiagonal = jnp.diag(alphas) + jnp.diag(betas, 1) + jnp.diag(betas, -1)
    return jnp.linalg.eigvalsh(tridiagonal)


def _random_vector(key: Array, dim: int) -> Array:
    """Entries uniform in (-1, 1), float32.

    Indices hashed with the key by MurmurHash3's finaliser: one kernel, where `jax.random` takes as long to
    compile as all the rest of Lanczos. That no direction is missed by design is all that is asked of it.
    """
    word = lambda x: jnp.asarray(x, jnp.uint32)

    def mixed(x: Array) -> Array:
        x = (x ^ (x >> word(16))) * word(0x85EBCA6B)
        x = (x ^ (x >> word(13))) * word(0xC2B2AE35)
        return x ^ (x >> word(16))

    words = jax.random.key_data(key)
    bits = jnp.arange(dim, dtype=jnp.uint32)
    for i in range(words.shape[-1]):
        bits = mixed(bits ^ words[i])
    return (bits >> word(8)).astype(jnp.float32) / 2**23 - 1 + 2**-24


def largest_eigenvalue(matvec: MatVec, like: Tree, key: Array) -> Scalar:
    """The largest magnitude among 12 Lanczos steps' Ritz values; slightly below the true one."""
    return jnp.max(jnp.abs(ritz_values(matvec, like, key)))
