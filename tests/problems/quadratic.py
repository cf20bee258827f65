"""Quadratics in both levels, and what the penalty methods make of them."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from problems.base import Case, Tree, cast, exact


def quadratic_inner(w: jax.Array, lam: jax.Array, batch: Tree) -> jax.Array:
    """mean_i 1/2 w'A_i w - w'(B_i lam + b_i)."""
    A, B, b = batch["A"], batch["B"], batch["b"]
    return jnp.mean(0.5 * ((A @ w) @ w) - (B @ lam + b) @ w)


def quadratic_outer(w: jax.Array, lam: jax.Array, batch: Tree) -> jax.Array:
    """mean_j 1/2 (w - t_j)'D_j(w - t_j) + rho_j/2 |lam|^2, where the D_j are equal."""
    e = w[None, :] - batch["t"]
    misfit = jnp.einsum("ni,nij,nj->n", e, batch["D"], e)
    return jnp.mean(0.5 * misfit + 0.5 * batch["rho"] * jnp.sum(lam**2))


def quadratic_hvp(w: jax.Array, lam: jax.Array, batch: Tree, v: jax.Array) -> jax.Array:
    """The inner Hessian times v."""
    return jnp.mean(batch["A"], axis=0) @ v


@dataclasses.dataclass(frozen=True)
class Quadratic(Case):
    """Finite sums of quadratics in both levels; all formulas are in their means A, B, b, D, t, rho.

    With E = 0 for the bilevel problem itself, the penalty methods at a constant penalty replace the
    pair (w*, F) by w_E = t + (I + E)^-1 (w* - t) and the gradient rho lam + B'A^-1 D (w_E - t):

    - value-function penalty f + c (g - min g), F2SA of order 1:  E = A^-1 D / c
    - Moreau penalty f + c (g - v), v(lam, w) = min_z g(lam, z) + |z - w|^2 / (2 gamma):
      E = A^-1 (I + A^-1 / gamma) D / c, from stationarity in w,
      D (w - t) / c + gamma A^2 (I + gamma A)^-1 (w - w*) = 0
    - squared-gradient penalty f + c/2 |grad_w g|^2:  E = A^-2 D / c
    """

    inner: ClassVar = staticmethod(quadratic_inner)
    outer: ClassVar = staticmethod(quadratic_outer)
    inner_hvp: ClassVar = staticmethod(quadratic_hvp)

    @property
    def means(self) -> tuple[np.ndarray, ...]:
        """A, B, b, D, t, rho."""
        mean = jax.tree.map(lambda x: x.mean(axis=0), exact((self.inner_data, self.outer_data)))
        inner, outer = mean
        return inner["A"], inner["B"], inner["b"], outer["D"], outer["t"], outer["rho"]

    def solution(self, lam: Tree) -> np.ndarray:
        A, B, b, *_ = self.means
        return np.linalg.solve(A, B @ exact(lam) + b)

    def hypergradient(self, lam: Tree) -> np.ndarray:
        return self._gradient(np.zeros_like(self.means[0]), lam)

    def optimum(self) -> np.ndarray:
        """The minimiser of F."""
        return self._root(np.zeros_like(self.means[0]))

    def value(self, lam: Tree) -> float:
        """F(lam)."""
        lam = exact(lam)
        *_, rho = self.means
        D, t = exact(self.outer_data["D"]), exact(self.outer_data["t"])
        e = self.solution(lam) - t
        return float(0.5 * np.mean(np.einsum("ni,nij,nj->n", e, D, e)) + 0.5 * rho * lam @ lam)

    # F2SA of order 1: the penalty f + c (g - min g).

    def penalised_solution(self, lam: Tree, penalty: float) -> np.ndarray:
        """argmin over w of f + penalty g."""
        A, B, b, D, t, _ = self.means
        return np.linalg.solve(penalty * A + D, penalty * (B @ exact(lam) + b) + D @ t)

    def penalised_gradient(self, lam: Tree, penalty: float) -> np.ndarray:
        """The gradient of min over w of f + penalty (g - min g)."""
        return self._gradient(self._value_E(penalty), lam)

    def penalised_optimum(self, penalty: float) -> np.ndarray:
        """Where that gradient is zero."""
        return self._root(self._value_E(penalty))

    # F2SA of order 2: the central difference in nu of d/dlam min_w g + nu f.

    def central_gradient(self, lam: Tree, nu: float) -> np.ndarray:
        """d/dlam (l(nu) - l(-nu)) / (2 nu), l(nu) = min over w of g + nu f; needs A > nu D."""
        A, B, b, D, t, rho = self.means
        lam = exact(lam)
        plus, minus = (np.linalg.solve(A + s * D, B @ lam + b + s * D @ t) for s in (nu, -nu))
        return rho * lam + B.T @ (minus - plus) / (2 * nu)

    def central_optimum(self, nu: float) -> np.ndarray:
        """Where that gradient is zero."""
        A, B, b, D, t, rho = self.means
        M = 0.5 * (np.linalg.inv(A + nu * D) + np.linalg.inv(A - nu * D))
        K = B.T @ M @ D @ np.linalg.inv(A)
        return np.linalg.solve(rho * np.eye(B.shape[1]) + K @ B, K @ (A @ t - b))

    # Moreau (MEHA): the penalty f + c (g - v_gamma).

    def moreau_gradient(self, lam: Tree, penalty: float, gamma: float) -> np.ndarray:
        """The gradient of min over w of f + penalty (g - v_gamma)."""
        return self._gradient(self._moreau_E(penalty, gamma), lam)

    def moreau_solution(self, lam: Tree, penalty: float, gamma: float) -> np.ndarray:
        """argmin over w of f + penalty (g - v_gamma)."""
        return self._penalised(self._moreau_E(penalty, gamma), lam)

    def moreau_optimum(self, penalty: float, gamma: float) -> np.ndarray:
        """Where that gradient is zero."""
        return self._root(self._moreau_E(penalty, gamma))

    def squared_optimum(self, penalty: float) -> np.ndarray:
        """Where the gradient of min over w of f + penalty/2 |grad_w g|^2 is zero."""
        A, _, _, D, _, _ = self.means
        return self._root(np.linalg.solve(A @ A, D) / penalty)

    def aggregated_optimum(self, mu: float) -> np.ndarray:
        """Where dF/dlam - C v is zero with phi = mu f + (1 - mu) g for the inner loss (BAMM).

        rho lam + B'M D M A (w* - t) with M = (A + D mu / (1 - mu))^-1.
        """
        A, B, b, D, t, rho = self.means
        M = np.linalg.inv(A + mu / (1 - mu) * D)
        K = B.T @ M @ D @ M
        return np.linalg.solve(rho * np.eye(B.shape[1]) + K @ B, K @ (A @ t - b))

    def series_optimum(self, terms: int, step: float) -> np.ndarray:
        """Where dF/dlam - C v is zero with v = step sum_(q < terms) (I - step A)^q grad_w f (stocBiO)."""
        A, B, b, D, t, rho = self.means
        once = np.eye(len(A)) - step * A
        N = step * sum(np.linalg.matrix_power(once, q) for q in range(terms))
        K = B.T @ N @ D @ np.linalg.inv(A)
        return np.linalg.solve(rho * np.eye(B.shape[1]) + K @ B, K @ (A @ t - b))

    def _value_E(self, penalty: float) -> np.ndarray:
        A, _, _, D, _, _ = self.means
        return np.linalg.solve(A, D) / penalty

    def _moreau_E(self, penalty: float, gamma: float) -> np.ndarray:
        A, _, _, D, _, _ = self.means
        A_inv = np.linalg.inv(A)
        return A_inv @ (np.eye(len(A)) + A_inv / gamma) @ D / penalty

    def _penalised(self, E: np.ndarray, lam: Tree) -> np.ndarray:
        *_, t, _ = self.means
        return t + np.linalg.solve(np.eye(len(t)) + E, self.solution(lam) - t)

    def _gradient(self, E: np.ndarray, lam: Tree) -> np.ndarray:
        A, B, _, D, t, rho = self.means
        return rho * exact(lam) + B.T @ np.linalg.solve(A, D @ (self._penalised(E, lam) - t))

    def _root(self, E: np.ndarray) -> np.ndarray:
        A, B, b, D, t, rho = self.means
        K = B.T @ np.linalg.inv(A) @ D @ np.linalg.inv(np.eye(len(t)) + E) @ np.linalg.inv(A)
        return np.linalg.solve(rho * np.eye(B.shape[1]) + K @ B, K @ (A @ t - b))


def _orthogonal(rng: np.random.Generator, n: int) -> np.ndarray:
    return np.linalg.qr(rng.normal(size=(n, n)))[0]


def make_quadratic(
    rng: np.random.Generator, dtype: Any, *, n: int = 16, d: int = 4, p: int = 6
) -> Quadratic:
    """`n` terms, outer dimension `d`, inner dimension `p`; mean A in [.5, 2], D in [.5, 1.5]."""
    Q, R = _orthogonal(rng, p), _orthogonal(rng, p)
    A = Q @ np.diag(np.linspace(0.5, 2, p)) @ Q.T
    D = R @ np.diag(np.linspace(0.5, 1.5, p)) @ R.T

    def scatter(mean: np.ndarray, scale: float = 0.3) -> np.ndarray:
        noise = scale * rng.normal(size=(n, *mean.shape))
        return mean + noise - noise.mean(axis=0)

    A_i = scatter(A, 0.1)
    inner_data = {
        "A": 0.5 * (A_i + A_i.transpose(0, 2, 1)),
        "B": scatter(0.25 * rng.normal(size=(p, d))),
        "b": scatter(rng.normal(size=p)),
    }
    outer_data = {
        "D": np.broadcast_to(D, (n, p, p)),
        "t": scatter(rng.normal(size=p)),
        "rho": np.full(n, 0.5),
    }
    data = cast((inner_data, outer_data, rng.normal(size=d), np.zeros(p)), dtype)
    return Quadratic(*data)
