"""A weak Wolfe line search by bisection."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from solvers.types import Scalar

_DECREASE, _CURVATURE, _TRIALS = 1e-4, 0.9, 30


class LineSearchResult(NamedTuple):
    step: Scalar
    value: Scalar
    gradient: Array
    failed: Array
    """No step gave the decrease; `step` is then 0."""


def wolfe_search(
    value_and_grad: Callable[[Array], tuple[Scalar, Array]],
    w: Array,
    value: Scalar,
    gradient: Array,
    direction: Array,
    first_step: Scalar,
) -> LineSearchResult:
    """A step along a descent direction with sufficient decrease and increased slope.

    Bisection and doubling as in Lewis and Overton 2013. Near a minimiser differences of values drown
    in rounding, so a step is also accepted by slopes alone where the value rose by less than
    `sqrt(eps) max(1, |value|)` (Hager and Zhang 2005, approximate Wolfe conditions; their 1e-6 is as
    generous). One value and gradient per trial.
    """
    slope = jnp.vdot(gradient, direction)
    noise = jnp.finfo(value.dtype).eps ** 0.5 * jnp.maximum(jnp.abs(value), 1.0)

    def is_open(c: _Carry) -> Array:
        return ~c.accepted & (c.trials < _TRIALS)

    def trial(c: _Carry) -> _Carry:
        new_value, new_gradient = value_and_grad(w + c.step * direction)
        new_slope = jnp.vdot(new_gradient, direction)
        armijo = new_value <= value + _DECREASE * c.step * slope
        by_slope = (new_value <= value + noise) & (new_slope <= (2 * _DECREASE - 1) * slope)
        decreases = armijo | by_slope  # False for NaN
        steep = new_slope < _CURVATURE * slope
        low = jnp.where(decreases & steep, c.step, c.low)
        high = jnp.where(decreases, c.high, c.step)
        following = jnp.where(jnp.isinf(high), 2 * low, (low + high) / 2)
        accepted = decreases & ~steep
        # A decrease that is still steep is worth keeping in case nothing better turns up.
        best = decreases & (new_value <= c.best_value + noise)
        return _Carry(
            step=jnp.where(accepted, c.step, following),
            low=low,
            high=high,
            best_step=jnp.where(best | accepted, c.step, c.best_step),
            best_value=jnp.where(best | accepted, new_value, c.best_value),
            best_gradient=jnp.where(best | accepted, new_gradient, c.best_gradient),
            accepted=accepted,
            trials=c.trials + 1,
        )

    zero = jnp.zeros_like(value)
    last = jax.lax.while_loop(
        is_open,
        trial,
        _Carry(
            step=first_step,
            low=zero,
            high=jnp.full_like(value, jnp.inf),
            best_step=zero,
            best_value=value,
            best_gradient=gradient,
            accepted=jnp.asarray(False),
            trials=jnp.int32(0),
        ),
    )
    return LineSearchResult(
        last.best_step, last.best_value, last.best_gradient, last.best_step == 0
    )


class _Carry(NamedTuple):
    step: Scalar
    low: Scalar
    high: Scalar
    best_step: Scalar
    best_value: Scalar
    best_gradient: Array
    accepted: Array
    trials: Array
