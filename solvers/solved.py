"""An inner solution that was found elsewhere."""

from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp

from solvers import tree
from solvers.base import AbstractInnerSolver
from solvers.fields import Number, number
from solvers.types import ObjectiveFn, Scalar, Tree


class Solved(AbstractInnerSolver):
    """Takes `w` as the solution, by scikit-learn or a program of yours, and only checks it.

    No step is taken; a gradient whose norm at `w` is above `tol` is MAX_STEPS. For `hypergradient`: in `run`
    the solution has to follow `lam`.
    """

    tol: Number | None = number(None, low=0.0, infinite=False)

    max_steps: ClassVar[int] = 0
    unrollable = False

    def init(self, objective: ObjectiveFn, w: Tree, batch: Any) -> "_State":
        return _State(jnp.zeros((), tree.accumulation_dtype(w)))

    def step(
        self, objective: ObjectiveFn, w: Tree, state: "_State", batch: Any
    ) -> tuple[Tree, "_State"]:
        return w, state


class _State(NamedTuple):
    residual: Scalar  # zero, so that no loop takes a step
