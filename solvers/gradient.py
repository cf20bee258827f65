"""Gradient descent."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from solvers import tree
from solvers.base import AbstractInnerSolver
from solvers.fields import Number, cast, number, static
from solvers.linear.spectrum import largest_eigenvalue
from solvers.types import MatVec, ObjectiveFn, Scalar, Tree


class GradientDescent(AbstractInnerSolver):
    """`m <- momentum m + g; w <- w - learning_rate m` (heavy ball), or its Nesterov form.

    Nesterov: `w <- w - learning_rate (momentum m + g)`. `learning_rate="auto"` is `1 / (1.05 L)` with
    L the largest curvature at the start of each solve, from 12 Lanczos products; no derivative is taken
    through it. Linear rate `1 - learning_rate mu` on a mu-strongly convex objective.
    """

    learning_rate: Number | str = number("auto", low=0.0, strict=True)
    momentum: Number = number(0.0, low=0.0)
    max_steps: int = static(100, low=1)
    tol: Number | None = number(None, low=0.0, infinite=False)
    nesterov: bool = static(False)

    measured = ("learning_rate",)
    lagged = True

    def __check_init__(self) -> None:
        if isinstance(self.learning_rate, str) and self.learning_rate != "auto":
            raise ValueError(
                "GradientDescent(learning_rate=...) must be a positive number or 'auto', got "
                f"{self.learning_rate!r}."
            )

    def init(self, objective: ObjectiveFn, w: Tree, batch: Any) -> "_State":
        like = jnp.zeros((), tree.accumulation_dtype(w))
        if isinstance(self.learning_rate, str):
            _, hvp = linearized_hvp(objective, w, batch)
            curvature = largest_eigenvalue(hvp, w, jax.random.key(0))
            learning_rate = jax.lax.stop_gradient(
                jnp.where(curvature > 0, 1 / (1.05 * curvature), 1.0)
            )
        else:
            learning_rate = cast(self.learning_rate, like)
        return _State(tree.zeros_like(w), learning_rate, jnp.full_like(like, jnp.inf))

    def step(
        self, objective: ObjectiveFn, w: Tree, state: "_State", batch: Any
    ) -> tuple[Tree, "_State"]:
        gradient = jax.grad(objective)(w, batch)
        momentum = tree.axpy(self.momentum, state.momentum, gradient)
        direction = tree.axpy(self.momentum, momentum, gradient) if self.nesterov else momentum
        automatic = isinstance(self.learning_rate, str)
        rate = state.learning_rate if automatic else cast(self.learning_rate, state.learning_rate)
        w = tree.axpy(-rate, direction, w)
        # The square root in the norm has no derivative at zero; nothing differentiates the residual.
        residual = tree.norm(jax.lax.stop_gradient(gradient))
        return w, _State(momentum, state.learning_rate, residual)


class _State(NamedTuple):
    momentum: Tree
    learning_rate: Scalar
    residual: Scalar


def linearized_hvp(objective: ObjectiveFn, w: Tree, batch: Any) -> tuple[Tree, MatVec]:
    """The gradient at `w` and the Hessian-vector product there, linearised once for many products.

    Forward over reverse; an objective that carries its own `hvp` uses that instead.
    """
    own = getattr(objective, "hvp", None)
    if own is not None:
        gradient = jax.grad(objective)(w, batch)
        return gradient, lambda v: own(w, getattr(objective, "args", None), batch, v)
    return jax.linearize(lambda u: jax.grad(objective)(u, batch), w)
