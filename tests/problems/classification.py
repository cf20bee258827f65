"""Logistic and softmax regression."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from problems.base import Case, Tree, cast, exact
from problems.ridge import regression_data


def _newton(value: Callable, derivatives: Callable, w: np.ndarray) -> np.ndarray:
    """Minimise by Newton steps, halved until the value falls."""
    for _ in range(100):
        gradient, hessian = derivatives(w)
        step, scale = np.linalg.solve(hessian, gradient), 1.0
        if gradient @ step < 1e-24 * (1 + abs(value(w))):
            return w - step
        while value(w - scale * step) > value(w) and scale > 1e-6:
            scale /= 2
        w = w - scale * step
    raise RuntimeError("Newton's method did not converge")


def logistic_inner(w: jax.Array, lam: jax.Array, batch: Tree) -> jax.Array:
    """Mean logistic loss and lam/2 |w|^2; labels are -1 or 1."""
    return logistic_outer(w, lam, batch) + 0.5 * lam * jnp.sum(w**2)


def logistic_outer(w: jax.Array, lam: jax.Array, batch: Tree) -> jax.Array:
    """Mean logistic loss."""
    return jnp.mean(jax.nn.softplus(-batch["y"] * (batch["X"] @ w)))


@dataclasses.dataclass(frozen=True)
class Logistic(Case):
    """One penalty. With s = 1/(1 + exp(y Xw)): gradient -X'(ys)/n, Hessian X' diag(s - s^2) X/n."""

    inner: ClassVar = staticmethod(logistic_inner)
    outer: ClassVar = staticmethod(logistic_outer)

    @staticmethod
    def _derivatives(w: np.ndarray, X: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        s = 1 / (1 + np.exp(y * (X @ w)))
        return -X.T @ (y * s) / len(X), (X.T * (s * (1 - s))) @ X / len(X)

    def _solve(self, lam: Tree) -> tuple[np.ndarray, np.ndarray]:
        X, y = exact(self.inner_data["X"]), exact(self.inner_data["y"])
        lam, eye = float(lam), np.eye(X.shape[1])

        def value(w: np.ndarray) -> float:
            return np.logaddexp(0, -y * (X @ w)).mean() + 0.5 * lam * w @ w

        def derivatives(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            gradient, hessian = self._derivatives(w, X, y)
            return gradient + lam * w, hessian + lam * eye

        w = _newton(value, derivatives, np.zeros(X.shape[1]))
        return w, derivatives(w)[1]

    def solution(self, lam: Tree) -> np.ndarray:
        return self._solve(lam)[0]

    def hypergradient(self, lam: Tree) -> np.ndarray:
        X, y = exact(self.outer_data["X"]), exact(self.outer_data["y"])
        w, hessian = self._solve(lam)
        return -w @ np.linalg.solve(hessian, self._derivatives(w, X, y)[0])


def make_logistic(rng: np.random.Generator, dtype: Any, *, n: int = 40, d: int = 5) -> Logistic:
    train, validation = regression_data(rng, n, d)
    for part in (train, validation):
        part["y"] = np.where(part["y"] > 0, 1.0, -1.0)
    return Logistic(*cast((train, validation, np.exp(rng.normal() - 3), np.zeros(d)), dtype))


def softmax_inner(w: jax.Array, lam: jax.Array, batch: Tree) -> jax.Array:
    """Mean cross-entropy and a penalty per feature; w is (d, classes), labels class indices."""
    return softmax_outer(w, lam, batch) + 0.5 * jnp.sum(lam[:, None] * w**2)


def softmax_outer(w: jax.Array, lam: jax.Array, batch: Tree) -> jax.Array:
    """Mean cross-entropy."""
    logits = batch["X"] @ w
    picked = jnp.take_along_axis(logits, batch["y"][:, None], axis=1)[:, 0]
    return jnp.mean(jax.nn.logsumexp(logits, axis=1) - picked)


def softmax_hvp(w: jax.Array, lam: jax.Array, batch: Tree, v: jax.Array) -> jax.Array:
    """The inner Hessian times v."""
    X = batch["X"]
    p, u = jax.nn.softmax(X @ w, axis=1), X @ v
    u = p * (u - jnp.sum(p * u, axis=1, keepdims=True))
    return X.T @ u / X.shape[0] + lam[:, None] * v


@dataclasses.dataclass(frozen=True)
class Softmax(Case):
    """One penalty for each feature. With P the probabilities and Y the one-hot labels: gradient
    X'(P - Y)/n, Hessian mean_i (x_i x_i') kron (diag(p_i) - p_i p_i').
    """

    inner: ClassVar = staticmethod(softmax_inner)
    outer: ClassVar = staticmethod(softmax_outer)
    inner_hvp: ClassVar = staticmethod(softmax_hvp)

    def _gradient(self, w: np.ndarray, data: Tree) -> tuple[np.ndarray, np.ndarray]:
        X, y = data["X"], data["y"]
        logits = X @ w
        P = np.exp(logits - logits.max(axis=1, keepdims=True))
        P /= P.sum(axis=1, keepdims=True)
        return X.T @ (P - np.eye(P.shape[1])[y]) / len(X), P

    def _solve(self, lam: Tree) -> tuple[np.ndarray, np.ndarray]:
        data, lam = exact(self.inner_data), exact(lam)[:, None]
        X, y, shape = data["X"], data["y"], self.w.shape

        def value(flat: np.ndarray) -> float:
            w = flat.reshape(shape)
            logits = X @ w
            loss = np.logaddexp.reduce(logits, axis=1) - logits[np.arange(len(X)), y]
            return loss.mean() + 0.5 * np.sum(lam * w**2)

        def derivatives(flat: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            w = flat.reshape(shape)
            gradient, P = self._gradient(w, data)
            curvature = P[:, :, None] * np.eye(shape[1]) - P[:, :, None] * P[:, None, :]
            hessian = np.einsum("ni,nj,nkl->ikjl", X, X, curvature) / len(X)
            penalties = np.diag(np.broadcast_to(lam, shape).ravel())
            return (gradient + lam * w).ravel(), hessian.reshape(flat.size, -1) + penalties

        flat = _newton(value, derivatives, np.zeros(self.w.size))
        return flat.reshape(shape), derivatives(flat)[1]

    def solution(self, lam: Tree) -> np.ndarray:
        return self._solve(lam)[0]

    def hypergradient(self, lam: Tree) -> np.ndarray:
        w, hessian = self._solve(lam)
        c, _ = self._gradient(w, exact(self.outer_data))
        q = np.linalg.solve(hessian, c.ravel()).reshape(w.shape)
        return -np.sum(w * q, axis=1)


def make_softmax(
    rng: np.random.Generator, dtype: Any, *, n: int = 40, d: int = 4, classes: int = 3
) -> Softmax:
    X = rng.normal(size=(2 * n, d))
    scores = X @ rng.normal(size=(d, classes)) + rng.gumbel(size=(2 * n, classes))
    y = scores.argmax(axis=1).astype(np.int32)
    train, validation = {"X": X[:n], "y": y[:n]}, {"X": X[n:], "y": y[n:]}
    lam = np.exp(0.5 * rng.normal(size=d) - 3)
    return Softmax(*cast((train, validation, lam, np.zeros((d, classes))), dtype))
