"""Another try with shorter outer steps, after a step that led where nothing can be computed."""

import warnings
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax import Array

from bilevel import transforms
from bilevel.result import RunState
from solvers import Status
from solvers.types import Tree


class Shortened(NamedTuple):
    """State of `shortening(rule)`."""

    rule: Any
    before: Tree
    """The unconstrained outer variable that the last step came from."""
    taken: Array
    """Steps taken, so without those that failed."""
    halvings: Array


def shortening(rule: optax.GradientTransformation) -> optax.GradientTransformation:
    """The rule with its steps `2^-halvings` times as long, and a memory of where the last one began."""
    rule = optax.with_extra_args_support(rule)

    def init(u: Tree) -> Shortened:
        return Shortened(rule.init(u), u, jnp.int32(0), jnp.int32(0))

    def update(grad: Tree, state: Shortened, u: Tree | None = None, **extra: Any):
        updates, own = rule.update(grad, state.rule, u, **extra)

        def shorter(x: Array) -> Array:
            # Chosen, not multiplied by one, so that a run without failures keeps its bits.
            scale = jnp.exp2(-state.halvings.astype(x.dtype))
            return jnp.where(state.halvings == 0, x, scale * x)

        updates = jax.tree.map(shorter, updates)
        return updates, Shortened(own, u, state.taken + 1, state.halvings)

    return optax.GradientTransformationExtraArgs(init, update)


def again(problem: Any, scales: Any, state: RunState, retries: int) -> RunState:
    """The state to go on from: after a failed step half of the way back, while there are tries left.

    A failure that only the error estimate finds ends a run all the same: the step that it condemns
    was the last good point.
    """
    status, own = int(state.worst), state.outer
    if status <= Status.MAX_STEPS or not isinstance(own, Shortened) or not int(own.taken):
        return state
    used = int(own.halvings)
    failed = int(state.step) - int(own.taken) == used + 1
    if used >= retries or not failed:
        return state
    warnings.warn(
        f"outer step {int(state.step) - 1} ended with {Status(status).name}: going on from half of the "
        f"way back, with steps {0.5 ** (used + 1):g} times as long (retry {used + 1} of {retries}).",
        RuntimeWarning,
        stacklevel=3,
    )
    return _back(problem, scales, state)


def used(state: RunState) -> int:
    """Retries so far."""
    return int(state.outer.halvings) if isinstance(state.outer, Shortened) else 0


@eqx.filter_jit
def _back(problem: Any, scales: Any, state: RunState) -> RunState:
    own: Shortened = state.outer

    def halfway(u: Array, before: Array) -> Array:
        return jnp.where(jnp.isfinite(u), before + 0.5 * (u - before), before)

    u = jax.tree.map(halfway, transforms.inverse(scales, state.lam), own.before)
    project = getattr(problem, "outer_projection", None) or (lambda lam: lam)
    return state._replace(
        lam=project(transforms.forward(scales, u)),
        outer=own._replace(halvings=own.halvings + 1),
        worst=jnp.int32(Status.OK),
    )
