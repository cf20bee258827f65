"""Bilevel problems whose solution and hypergradient are known in closed form.

Each problem holds two losses `(w, lam, batch) -> scalar`, their data, an outer variable `lam`, a
start `w`, and `solution(lam)` and `hypergradient(lam)`, computed in NumPy and float64 from the
data as stored, by formulas derived by hand (no automatic differentiation). `make(name, seed)` draws
one, `make_judged(kind, seed)` one whose adjoint system is singular, indefinite or trivial.

In the formulas g is the inner loss, f the outer one, F(lam) = f(w*(lam), lam), H the Hessian of g
in w, and the adjoint q solves H q = grad_w f; then grad F = grad_lam f - (d/dlam grad_w g)' q.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from problems.blocks import make_blocks
from problems.classification import make_logistic, make_softmax
from problems.judged import JUDGED, Judged
from problems.judged import make_judged as draw_judged
from problems.quadratic import make_quadratic
from problems.ridge import make_ridge, make_weighted_ridge

__all__ = ["FACTORIES", "JUDGED", "make", "make_judged"]

FACTORIES: dict[str, Callable[..., Any]] = {
    "quadratic": make_quadratic,
    "ridge": make_ridge,
    "weighted_ridge": make_weighted_ridge,
    "logistic": make_logistic,
    "softmax": make_softmax,
    "blocks": make_blocks,
}


def make(name: str, seed: int = 0, dtype: Any = jnp.float64, **sizes: Any) -> Any:
    """A random problem of FACTORIES; equal arguments give an equal problem."""
    return FACTORIES[name](np.random.default_rng(seed), dtype, **sizes)


def make_judged(kind: str, seed: int = 0, dtype: Any = jnp.float64, **sizes: Any) -> Judged:
    """A quadratic of JUDGED."""
    return draw_judged(np.random.default_rng(seed), dtype, kind, **sizes)
