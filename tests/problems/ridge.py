"""Ridge regression, with one penalty and with one for each feature."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from problems.base import Case, Tree, cast, exact


def ridge_inner(w: jax.Array, lam: jax.Array, batch: Tree) -> jax.Array:
    """Half mean squared error and lam/2 |w|^2."""
    return 0.5 * jnp.mean((batch["X"] @ w - batch["y"]) ** 2) + 0.5 * lam * jnp.sum(w**2)


def ridge_outer(w: jax.Array, lam: jax.Array, batch: Tree) -> jax.Array:
    """Half mean squared error."""
    return 0.5 * jnp.mean((batch["X"] @ w - batch["y"]) ** 2)


def ridge_hvp(w: jax.Array, lam: jax.Array, batch: Tree, v: jax.Array) -> jax.Array:
    """The inner Hessian times v."""
    X = batch["X"]
    return X.T @ (X @ v) / X.shape[0] + lam * v


@dataclasses.dataclass(frozen=True)
class Ridge(Case):
    """One penalty: w* = (X'X/n + lam I)^-1 X'y/n, dF/dlam = -w*'q."""

    inner: ClassVar = staticmethod(ridge_inner)
    outer: ClassVar = staticmethod(ridge_outer)
    inner_hvp: ClassVar = staticmethod(ridge_hvp)

    def _hessian(self, lam: Tree) -> np.ndarray:
        X = exact(self.inner_data["X"])
        return X.T @ X / len(X) + float(lam) * np.eye(X.shape[1])

    def solution(self, lam: Tree) -> np.ndarray:
        X, y = exact(self.inner_data["X"]), exact(self.inner_data["y"])
        return np.linalg.solve(self._hessian(lam), X.T @ y / len(X))

    def hypergradient(self, lam: Tree) -> np.ndarray:
        X, y = exact(self.outer_data["X"]), exact(self.outer_data["y"])
        w = self.solution(lam)
        q = np.linalg.solve(self._hessian(lam), X.T @ (X @ w - y) / len(X))
        return -w @ q


def regression_data(rng: np.random.Generator, n: int, d: int) -> tuple[dict, dict]:
    """Training and validation rows of one noisy linear model."""
    X = rng.normal(size=(2 * n, d)) * np.linspace(0.3, 1.5, d)
    y = X @ rng.normal(size=d) + rng.normal(size=2 * n)
    return {"X": X[:n], "y": y[:n]}, {"X": X[n:], "y": y[n:]}


def make_ridge(rng: np.random.Generator, dtype: Any, *, n: int = 20, d: int = 6) -> Ridge:
    train, validation = regression_data(rng, n, d)
    return Ridge(*cast((train, validation, np.exp(rng.normal() - 2), np.zeros(d)), dtype))


def _predict(w: Tree, X: Tree) -> jax.Array:
    products = jax.tree.map(lambda X, w: X @ w, X, w)
    return jax.tree.reduce(jnp.add, products)


def weighted_ridge_inner(w: Tree, lam: Tree, batch: Tree) -> jax.Array:
    """Half mean squared error and a penalty per feature; w, lam, batch["X"] share a structure."""
    penalties = jax.tree.map(lambda w, lam: 0.5 * jnp.sum(lam * w**2), w, lam)
    fit = 0.5 * jnp.mean((_predict(w, batch["X"]) - batch["y"]) ** 2)
    return fit + jax.tree.reduce(jnp.add, penalties)


def weighted_ridge_outer(w: Tree, lam: Tree, batch: Tree) -> jax.Array:
    """Half mean squared error."""
    return 0.5 * jnp.mean((_predict(w, batch["X"]) - batch["y"]) ** 2)


@dataclasses.dataclass(frozen=True)
class WeightedRidge(Case):
    """One penalty for each feature: w* = (X'X/n + diag lam)^-1 X'y/n, dF/dlam = -w* q."""

    inner: ClassVar = staticmethod(weighted_ridge_inner)
    outer: ClassVar = staticmethod(weighted_ridge_outer)

    @staticmethod
    def _flat(tree: Tree) -> np.ndarray:
        return np.concatenate(jax.tree.leaves(exact(tree)), axis=-1)

    def _nested(self, flat: np.ndarray) -> Tree:
        leaves, treedef = jax.tree.flatten(self.w)
        ends = np.cumsum([leaf.size for leaf in leaves])[:-1]
        return jax.tree.unflatten(treedef, np.split(flat, ends))

    def _solve(self, lam: Tree) -> tuple[np.ndarray, np.ndarray]:
        X, y = self._flat(self.inner_data["X"]), exact(self.inner_data["y"])
        H = X.T @ X / len(X) + np.diag(self._flat(lam))
        return H, np.linalg.solve(H, X.T @ y / len(X))

    def solution(self, lam: Tree) -> Tree:
        return self._nested(self._solve(lam)[1])

    def hypergradient(self, lam: Tree) -> Tree:
        X, y = self._flat(self.outer_data["X"]), exact(self.outer_data["y"])
        H, w = self._solve(lam)
        return self._nested(-w * np.linalg.solve(H, X.T @ (X @ w - y) / len(X)))


def make_weighted_ridge(
    rng: np.random.Generator, dtype: Any, *, n: int = 20, d: int = 6
) -> WeightedRidge:
    def nested(x: np.ndarray) -> Tree:
        return {"first": x[..., :2], "rest": (x[..., 2:3], {"last": x[..., 3:]})}

    train, validation = (
        {"X": nested(part["X"]), "y": part["y"]} for part in regression_data(rng, n, d)
    )
    lam = nested(np.exp(rng.normal(size=d) - 2))
    return WeightedRidge(*cast((train, validation, lam, nested(np.zeros(d))), dtype))
