"""Tasks drawn by how large their hypergradients have been, and where the work of a run went."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from hypergrad import HypergradInfo

UNIFORM = 0.25
"""Share of the uniform distribution in the chances: no task counts more than four times."""
RATE = 0.5
"""Weight of the newest norm in a task's average."""


class TaskStates(NamedTuple):
    """What the next step of tasks needs; `result.state.engine` of a run."""

    own: Any
    """The engine's states, stacked."""
    inner_steps: Array
    """(tasks,), int32: inner steps of each so far."""
    adjoint_steps: Array
    """The same of adjoint steps."""
    status: Array
    """(tasks,), int32: the `Status` of each in the last step that took it and was good; -1 before the first."""
    difficulty: Array | None
    """(tasks,), where `weights="difficulty"`: running averages of hypergradients' norms, NaN before the first."""


class Drawn(NamedTuple):
    """The tasks that a step took."""

    numbers: Array
    """(per_step,)"""
    factors: Array | None
    """What each counts in the mean: one over the number of tasks times its chance. None is the same for all."""


def begun(own: Any, count: int, weights: Any) -> TaskStates:
    nobody = jnp.zeros(count, jnp.int32)
    by_difficulty = isinstance(weights, str)
    unknown = jnp.full(count, jnp.nan, jnp.result_type(float)) if by_difficulty else None
    return TaskStates(own, nobody, nobody, nobody - 1, unknown)


def chances(difficulty: Array) -> Array:
    """(tasks,): in proportion to the averages, mixed with the uniform distribution.

    The variance of the mean is least for chances in proportion to the norms themselves (Zhao and Zhang 2015). A task
    that was never drawn counts as the mean of the others.
    """
    known = ~jnp.isnan(difficulty)
    mean = jnp.sum(jnp.where(known, difficulty, 0.0)) / jnp.maximum(
        jnp.sum(known, dtype=difficulty.dtype), 1
    )
    score = jnp.where(known, difficulty, mean)
    total, uniform = jnp.sum(score), 1 / difficulty.size
    shares = jnp.where(total > 0, score / jnp.where(total > 0, total, 1.0), uniform)
    return (1 - UNIFORM) * shares + UNIFORM * uniform


def after(
    state: TaskStates, own: Any, norms: Array, each: HypergradInfo, drawn: Array | None
) -> TaskStates:
    """The state after a step in which the tasks drawn (None: all) had these reports and norms of hypergradients."""
    at = jnp.arange(norms.size) if drawn is None else drawn
    difficulty = state.difficulty
    if difficulty is not None:
        norms = norms.astype(difficulty.dtype)
        old = difficulty[at]
        new = jnp.where(jnp.isnan(old), norms, (1 - RATE) * old + RATE * norms)
        # A task drawn twice writes the same number twice.
        difficulty = difficulty.at[at].set(jnp.where(jnp.isfinite(new), new, old))
    return TaskStates(
        own,
        state.inner_steps.at[at].add(each.inner.num_steps),
        state.adjoint_steps.at[at].add(each.adjoint_steps),
        state.status.at[at].set(each.status),
        difficulty,
    )
