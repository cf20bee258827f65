"""Numbers that change from outer step to outer step.

Any number of an engine, an inner solver or a linear solver may be a function of the outer step: an
optax schedule, or one of these. `bl.F2SA(nu=bl.schedules.power(0.1, 0.5))`.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array


def power(start: float, exponent: float, offset: float = 1.0) -> Callable[[Array], Array]:
    """`start * ((step + offset) / offset) ** -exponent`."""

    def schedule(step: Array) -> Array:
        return start * ((step.astype(float) + offset) / offset) ** -exponent

    return schedule


def geometric(start: float, ratio: float, low: float = 0.0) -> Callable[[Array], Array]:
    """`max(start * ratio ** step, low)`."""

    def schedule(step: Array) -> Array:
        return jnp.maximum(start * ratio ** step.astype(float), low)

    return schedule
