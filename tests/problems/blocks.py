"""Many quadratics with an inner variable of their own, under one outer variable."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from problems.base import Case, Tree, cast, exact


def blocks_inner(w: jax.Array, lam: jax.Array, batch: Tree) -> jax.Array:
    """mean_i 1/2 w_i'A_i w_i - w_i'(B_i lam + b_i), for any number of blocks i."""
    A, B, b = batch["A"], batch["B"], batch["b"]
    return jnp.mean(jnp.einsum("mi,mij,mj->m", 0.5 * w, A, w) - jnp.sum((B @ lam + b) * w, axis=1))


def blocks_outer(w: jax.Array, lam: jax.Array, batch: Tree) -> jax.Array:
    """mean_i 1/2 |w_i - t_i|^2 + rho_i/2 |lam|^2, where the rho_i are equal."""
    misfit = jnp.sum((w - batch["t"]) ** 2, axis=1)
    return 0.5 * jnp.mean(misfit + batch["rho"] * jnp.sum(lam**2))


@dataclasses.dataclass(frozen=True)
class Blocks(Case):
    """The formulas are in K_i = A_i^-1 B_i and c_i = A_i^-1 b_i: w_i = K_i lam + c_i."""

    inner: ClassVar = staticmethod(blocks_inner)
    outer: ClassVar = staticmethod(blocks_outer)

    @property
    def parts(self) -> tuple[np.ndarray, ...]:
        """A^-1 B (M, p, d), A^-1 b (M, p), t, rho."""
        inner, outer = exact((self.inner_data, self.outer_data))
        K = np.linalg.solve(inner["A"], inner["B"])
        c = np.linalg.solve(inner["A"], inner["b"][..., None])[..., 0]
        return K, c, outer["t"], outer["rho"][0]

    def solution(self, lam: Tree) -> np.ndarray:
        K, c, *_ = self.parts
        return K @ exact(lam) + c

    def hypergradient(self, lam: Tree) -> np.ndarray:
        """rho lam + mean_i K_i'(w_i - t_i)."""
        K, _, t, rho = self.parts
        pull = np.einsum("mpd,mp->d", K, self.solution(lam) - t) / len(K)
        return rho * exact(lam) + pull

    def optimum(self) -> np.ndarray:
        """-[rho I + mean K_i'K_i]^-1 mean K_i'(c_i - t_i)."""
        K, c, t, rho = self.parts
        A = rho * np.eye(K.shape[2]) + np.einsum("mpd,mpe->de", K, K) / len(K)
        return -np.linalg.solve(A, np.einsum("mpd,mp->d", K, c - t) / len(K))


def make_blocks(
    rng: np.random.Generator, dtype: Any, *, blocks: int = 6, d: int = 3, p: int = 4
) -> Blocks:
    """`blocks` blocks, outer dimension `d`, inner dimension `p`; every A_i in [.5, 2]."""
    Q = np.linalg.qr(rng.normal(size=(blocks, p, p)))[0]
    inner_data = {
        "A": (Q * np.linspace(0.5, 2, p)) @ Q.transpose(0, 2, 1),
        "B": 0.5 * rng.normal(size=(blocks, p, d)),
        "b": rng.normal(size=(blocks, p)),
    }
    outer_data = {"t": rng.normal(size=(blocks, p)), "rho": np.full(blocks, 0.5)}
    start = rng.normal(size=d), np.zeros((blocks, p))
    return Blocks(*cast((inner_data, outer_data, *start), dtype))
