"""Quadratics that an adjoint solve has to judge."""

import dataclasses
from typing import Any

import numpy as np

from problems.base import Tree, cast, exact
from problems.quadratic import Quadratic


@dataclasses.dataclass(frozen=True)
class Judged(Quadratic):
    """A quadratic that starts at an exactly stationary point, and the status its adjoint deserves.

    All entries are dyadic, so that grad_w g(w, lam) is zero without rounding, in float32 too.
    """

    status: str

    def solution(self, lam: Tree) -> np.ndarray:
        """A stationary point, with the part of `w` that a singular A leaves free."""
        A, B, b, *_ = self.means
        inverse = np.linalg.pinv(A)
        return inverse @ (B @ exact(lam) + b) + exact(self.w) - inverse @ A @ exact(self.w)

    def hypergradient(self, lam: Tree) -> np.ndarray:
        """Of that point; where none exists (status BREAKDOWN), NaN."""
        A, B, _, D, t, rho = self.means
        lam = exact(lam)
        c = D @ (self.solution(lam) - t)
        q = np.linalg.pinv(A) @ c
        if not np.allclose(A @ q, c):
            return np.full_like(lam, np.nan)
        return rho * lam + B.T @ q


JUDGED = {
    # name: (spectrum of A, part of grad_w f in the eigenvectors, status)
    "indefinite": ([-0.5, 0.5, 1, 1, 2, 2, 4, 4], [1, 1, -1, 2, 1, -2, 1, 1], "INDEFINITE"),
    "negative": ([-0.5, -1, -1, -2, -2, -2, -4, -4], [1, 1, -1, 2, 1, -2, 1, 1], "INDEFINITE"),
    "singular": ([0, 0, 1, 1, 2, 2, 4, 4], [0, 0, -1, 2, 1, -2, 1, 1], "OK"),
    "outside range": ([0, 0, 1, 1, 2, 2, 4, 4], [1, -1, -1, 2, 1, -2, 1, 1], "BREAKDOWN"),
    "null vector": ([0, 0, 1, 1, 2, 2, 4, 4], [1, -1, 0, 0, 0, 0, 0, 0], "BREAKDOWN"),
    "zero matrix": ([0, 0, 0, 0, 0, 0, 0, 0], [1, 1, -1, 2, 1, -2, 1, 1], "BREAKDOWN"),
    "isotropic": ([2, 2, 2, 2, 2, 2, 2, 2], [1, 1, -1, 2, 1, -2, 1, 1], "OK"),
    "eigenvector": ([0.5, 0.5, 1, 1, 2, 2, 4, 4], [0, 0, 0, 2, 0, 0, 0, 0], "OK"),
    "zero right-hand side": ([0.5, 0.5, 1, 1, 2, 2, 4, 4], [0, 0, 0, 0, 0, 0, 0, 0], "OK"),
    "tiny": ([0.5, 0.5, 1, 1, 2, 2, 4, 4], [2.0**-40] * 8, "OK"),
}


def make_judged(
    rng: np.random.Generator, dtype: Any, kind: str, *, n: int = 4, scale: float = 1.0
) -> Judged:
    """`scale` (a power of two) multiplies the inner loss."""
    spectrum, coefficients, status = JUDGED[kind]
    p, d = len(spectrum), 3
    # Two reflections along dyadic unit vectors of equal entries: orthogonal without rounding.
    Q = np.eye(p)
    for _ in range(2):
        v = np.zeros(p)
        v[rng.permutation(p)[:4]] = rng.choice([-0.5, 0.5], size=4)
        Q = Q - 2 * np.outer(v, v @ Q)
    A = scale * Q @ np.diag(np.asarray(spectrum, float)) @ Q.T
    B = A @ rng.integers(-2, 3, size=(p, d)) / 2  # in the range of A, whatever lam
    lam, w = rng.integers(-4, 5, size=d) / 4, rng.integers(-4, 5, size=p) / 4
    c = Q @ np.asarray(coefficients, float)
    rho = 0.5
    if kind == "tiny":  # w - t must not round, and nothing may hide it
        w, rho = np.zeros(p), 0.0

    def rows(x: np.ndarray) -> np.ndarray:
        return np.broadcast_to(x, (n, *x.shape))

    inner_data = {"A": rows(A), "B": rows(B), "b": rows(A @ w - B @ lam)}
    outer_data = {"D": rows(np.eye(p)), "t": rows(w - c), "rho": np.full(n, rho)}
    return Judged(*cast((inner_data, outer_data, lam, w), dtype), status)
