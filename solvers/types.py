"""The types that all floors share."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
from jax import Array

Tree = Any
"""A pytree of floating-point arrays; each leaf keeps its own dtype."""

Scalar = Array
"""An array of shape ()."""

MatVec = Callable[[Tree], Tree]
"""A linear map between trees of one structure."""


ObjectiveFn = Callable[[Tree, Any], Scalar]
"""What solvers minimise: `objective(w, batch) -> scalar`."""


class Objective(eqx.Module):
    """A scalar function of `w` at fixed arguments: `objective(w, batch) = fn(w, args, batch)`.

    `args` are array leaves, so one compiled solver serves all their values. `hvp(w, args, batch, v)`,
    where given, is the Hessian-vector product in `w`; it replaces automatic differentiation.

    `preconditioner(w, args, batch) -> (r -> z)`, where given, prepares a symmetric positive definite
    approximation of the inverse Hessian at `w`. `gauss_newton(w, args, batch) -> (v -> G v)`, where given,
    prepares products with the Gauss-Newton matrix there.

    `prox(v, step, args) -> w`, where given, is the proximal operator of `step` times a nonsmooth part
    that is minimised along with `fn`; calls give the smooth part alone.

    `restrict(args, batch, indices) -> (args, batch)`, where given, makes of both what belongs to the coordinates
    `indices` of a `w` of one array (d,), all others being zero.
    """

    fn: Callable[[Tree, Any, Any], Scalar] = eqx.field(static=True)
    args: Any = None
    hvp: Callable[[Tree, Any, Any, Tree], Tree] | None = eqx.field(static=True, default=None)
    prox: Callable[[Tree, Any, Any], Tree] | None = eqx.field(static=True, default=None)
    preconditioner: Callable[[Tree, Any, Any], MatVec] | None = eqx.field(static=True, default=None)
    gauss_newton: Callable[[Tree, Any, Any], MatVec] | None = eqx.field(static=True, default=None)
    restrict: Callable[[Any, Any, Array], tuple[Any, Any]] | None = eqx.field(
        static=True, default=None
    )

    def __call__(self, w: Tree, batch: Any) -> Scalar:
        return self.fn(w, self.args, batch)


class Sampler(eqx.Module):
    """Batches by step number: `sampler(step) -> batch`.

    `varies` is static and says whether two steps can see different batches. `plan(step)`, where given, is the
    small part of the work that is best done for many steps at once (the numbers of random rows), and
    `draw` takes its result in the place of the step number.
    """

    draw: Callable[[Any], Any]
    varies: bool = eqx.field(static=True)
    plan: Callable[[Array], Any] | None = None

    def __call__(self, step: Array | int) -> Any:
        return self.draw(step if self.plan is None else self.plan(jnp.asarray(step)))


class SolveInfo(NamedTuple):
    """What people read about one inner solve; every field has shape ()."""

    value: Array
    """The objective at the returned point."""
    residual: Array
    """2-norm of the solver's optimality map at the returned point, recomputed there."""
    num_steps: Array
    """Steps taken, int32."""
    status: Array
    """A `Status`, int32."""


def constant_sampler(batch: Any) -> Sampler:
    """The same batch at every step."""
    return Sampler(lambda step: batch, varies=False)
