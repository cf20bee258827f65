"""How far an adjoint grows on its way back through the steps, seen while it goes."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from solvers import tree
from solvers.types import Tree


class Watched(NamedTuple):
    """A solver whose state carries a number with it: zero, whose derivative is the adjoint's largest norm.

    The state is `(state of the solver, number)`. The norm is that of the derivative in the inner variable, before
    each of the steps.
    """

    solver: Any

    def step(self, objective: Any, w: Tree, state: Any, batch: Any) -> tuple[Tree, Any]:
        inner_state, peak = state
        w, peak = _watch(w, peak)
        w, inner_state = self.solver.step(objective, w, inner_state, batch)
        return w, (inner_state, peak)


def no_peak(w: Tree) -> Array:
    """The number to begin with."""
    return jnp.zeros((), tree.accumulation_dtype(w))


@jax.custom_vjp
def _watch(w: Tree, peak: Array) -> tuple[Tree, Array]:
    return w, peak


def _kept(w: Tree, peak: Array) -> tuple[tuple[Tree, Array], None]:
    return (w, peak), None


def _larger(_: None, adjoint: tuple[Tree, Array]) -> tuple[Tree, Array]:
    of_w, so_far = adjoint
    return of_w, jnp.maximum(so_far, tree.norm(of_w).astype(so_far.dtype))


_watch.defvjp(_kept, _larger)
