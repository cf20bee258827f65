"""Which tasks a step takes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer


def check_draws(tasks: Any) -> None:
    """Raise TypeError or ValueError for settings of `Tasks` that cannot be drawn by."""
    per_step, weights, count = tasks.per_step, tasks.weights, tasks.total
    if tasks.pool not in (None, "host"):
        raise ValueError(f"Tasks(pool=...) must be 'host' or None, got {tasks.pool!r}.")
    if tasks.pool is not None and (per_step is None or tasks.lanes == "auto"):
        raise ValueError(
            "Tasks(pool='host') loads the tasks that are drawn: expected per_step=..., and a number of lanes "
            "or None."
        )
    if per_step is None:
        if weights is not None:
            raise ValueError(
                "Tasks(weights=...) says how to draw tasks: expected per_step=... too."
            )
        return
    if isinstance(per_step, bool) or not isinstance(per_step, int | np.integer):
        raise TypeError(f"Tasks(per_step=...) must be an integer or None, got {per_step!r}.")
    if not 1 <= per_step <= count:
        raise ValueError(
            f"Tasks(per_step=...) must be from 1 to the number of tasks, {count}; got {per_step}."
        )
    if tasks.mesh is not None:
        raise ValueError(
            "tasks drawn for a step lie on any device: expected per_step=None with a mesh, or no mesh."
        )
    if weights is None or isinstance(weights, Tracer):
        return
    if isinstance(weights, str):
        if weights != "difficulty":
            raise ValueError(
                f"Tasks(weights=...) must be numbers, 'difficulty' or None, got {weights!r}."
            )
        if tasks.pool is not None:
            raise ValueError(
                "a chunk's tasks are loaded before their difficulty is known: expected Tasks(pool=None) with "
                "weights='difficulty', or numbers as weights."
            )
        return
    found = np.asarray(weights)
    if found.shape != (count,) or found.dtype.kind not in "iuf":
        raise ValueError(
            f"Tasks(weights=...) must be one number for each of the {count} tasks, got shape {found.shape}."
        )
    if not (np.isfinite(found).all() and (found > 0).all()):
        raise ValueError(
            "Tasks(weights=...) must be positive: a task that is never drawn would be missing in the mean."
        )
    tasks.weights = jnp.asarray(found, jnp.result_type(float))


def draw(count: int, per_step: int, weights: Any, key: Array) -> Array:
    """Numbers of the tasks, (per_step,). The key's other uses fold in numbers of tasks, which are smaller."""
    key = jax.random.fold_in(key, np.uint32(2**32 - 1))
    if weights is None:
        return jax.random.choice(key, count, (per_step,), replace=False)
    return jax.random.choice(key, count, (per_step,), p=weights / jnp.sum(weights))


def draw_steps(count: int, per_step: int, weights: Any, key: Array, first: Array, steps: int):
    """Of the steps from `first` on, (steps, per_step)."""
    one = lambda step: draw(count, per_step, weights, jax.random.fold_in(key, step))
    return jax.vmap(one)(first + jnp.arange(steps, dtype=jnp.int32))
