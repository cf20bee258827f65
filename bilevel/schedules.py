"""Numbers that change from outer step to outer step.

Any number of an engine, an inner solver or a linear solver may be a function of the outer step: an
optax schedule, or one of these. `bl.F2SA(nu=bl.schedules.power(0.1, 0.5))`.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from bilevel.validation import count


def power(start: float, exponent: float, offset: float = 1.0) -> Callable[[Array], Array]:
    """`start * ((step + offset) / offset) ** -exponent`. Raises ValueError unless `offset` is positive."""
    if not 0 < offset < math.inf:
        raise ValueError(f"offset must be a positive number, got {offset!r}.")

    def schedule(step: Array) -> Array:
        return start * ((step.astype(float) + offset) / offset) ** -exponent

    return schedule


def geometric(start: float, ratio: float, low: float = 0.0) -> Callable[[Array], Array]:
    """`max(start * ratio ** step, low)`. Raises ValueError unless `ratio` is positive."""
    if not 0 < ratio < math.inf:
        raise ValueError(f"ratio must be a positive number, got {ratio!r}.")

    def schedule(step: Array) -> Array:
        return jnp.maximum(start * ratio ** step.astype(float), low)

    return schedule


def periodic(usual: Any, at_times: Any, every: int) -> Callable[[Array], Array]:
    """`at_times` at the outer steps 0, `every`, 2 `every`, ..., else `usual`: a refresh every so many steps.

    Either may be a schedule. `LBFGS(tol=periodic(1e-2, 1e-8, 10))` solves exactly at each tenth step,
    `LBFGS(steps=periodic(0, 100, 10))` solves at each tenth step only.

    Raises TypeError or ValueError for `every` that is no positive integer.
    """
    every = count("every", every, 1)
    value = lambda x, step: jnp.asarray(x(step) if callable(x) else x, float)

    def schedule(step: Array) -> Array:
        return jnp.where(step % every == 0, value(at_times, step), value(usual, step))

    return schedule


class Penalty(NamedTuple):
    """What a single-loop penalty method needs, made together; each is a function of the step."""

    step_size: Callable[[Array], Array]
    penalty: Callable[[Array], Array]
    outer: Callable[[Array], Array]
    """The learning rate of the outer rule: `optax.sgd(s.outer)`."""


EXPONENTS = {
    ("both", False): (5 / 7, 4 / 7),
    ("outer", False): (3 / 5, 2 / 5),
    ("none", False): (1 / 3, 0.0),
    ("both", True): (3 / 5, 2 / 5),
    ("outer", True): (1 / 2, 1 / 4),
    ("none", True): (1 / 3, 0.0),
}
"""(a, c) of Kwon et al. 2023 by where there is noise, and whether momentum (F3SA) is used."""


def penalty(
    step_size: float,
    *,
    noise: str = "both",
    momentum: bool = False,
    exponents: tuple[float, float] | None = None,
    start: float = 2.0,
    ratio: float = 0.5,
    xi: float = 1.0,
    offset: float = 10.0,
) -> Penalty:
    """Step `s_k = step_size r^-c` and penalty `l_k = start r^(a-c)`, r = (k + offset) / offset.

    The outer rate is `xi ratio s_k / l_k`, xi times the step of the penalised copy of `F3SA(ratio=ratio)`; so the
    papers' `alpha l <= gamma` holds by construction. `exponents` is (a, c); the papers' are taken where it
    is left out (`EXPONENTS`). Use `F3SA(s.step_size, penalty=s.penalty, ratio=ratio)`.

    Raises ValueError for a schedule that cannot work: a penalty that falls, steps that grow, ratio > 1.
    """
    if exponents is None:
        if (noise, momentum) not in EXPONENTS:
            raise ValueError(f"noise must be 'both', 'outer' or 'none', got {noise!r}.")
        exponents = EXPONENTS[noise, momentum]
    a, c = exponents
    if not 0 <= c <= a <= 1:
        raise ValueError(
            f"exponents (a, c) must satisfy 0 <= c <= a <= 1 (the penalty grows like k^(a-c), steps "
            f"fall like k^-c and k^-a), got {exponents}."
        )
    for name, value in {"step_size": step_size, "start": start, "xi": xi, "offset": offset}.items():
        if not value > 0:
            raise ValueError(f"{name} must be positive, got {value}.")
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio must be in (0, 1], so that alpha * penalty <= gamma, got {ratio}.")
    return Penalty(
        power(step_size, c, offset),
        power(start, c - a, offset),
        power(xi * ratio * step_size / start, a, offset),
    )
