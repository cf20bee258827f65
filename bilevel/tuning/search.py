"""The search for penalties: one penalty first, then the few numbers that make many of it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import minimize

import bilevel as bl
from bilevel.calls import engine_step, init_engine
from bilevel.tuning import engines, penalties
from bilevel.tuning.folds import BOUNDS, Folds
from bilevel.tuning.models import Rule, prior

COARSE = np.geomspace(1e-5, 1e2, 6)
"""The cross-validation curve can have several minima and flat ends: start from the best of these."""

LOG_BOUNDS = (float(np.log(BOUNDS[0])), None)
"""Open above: with a box on all sides L-BFGS-B would start with a step as long as the gradient."""


class Tuned(NamedTuple):
    """One search, and the refit on all training rows."""

    theta: np.ndarray
    """What was searched, (p,); see `penalties`."""
    level: float
    """Geometric mean of the penalties."""
    penalties: np.ndarray
    """(d,), those of the refit."""
    cv_loss: float
    """At the end, inner problems solved anew, without the prior."""
    refit: dict[str, np.ndarray]
    status: bl.Status
    """The worst of all inner and adjoint solves, where it is not fatal."""
    evaluations: dict[str, int]
    """Evaluations of the cross-validated loss (K fits each): `pilot` and `search` with its gradient, the
    coarse grid, the statistics (K + 1 fits) and the closing solve without."""


class Objective:
    """Cross-validated loss plus prior and its gradient in theta, in units of `unit`.

    Each call starts from the weights and the adjoint of the call before.
    """

    def __init__(self, folds: Folds, w: Any, engine: str) -> None:
        self._folds = folds
        self._solver, self._engine = engines.inner_solver(engine), engines.make_engine(engine)
        self._key = jax.random.key(0)
        self._state = None
        self.w = w
        self.status, self.count = bl.Status.OK, 0

    def use(self, rule: Rule, unit: float) -> None:
        """The rule of the calls to come; another one of the same shapes compiles nothing."""
        self._problem, self.unit = self._folds.problem(rule), unit
        self.best: tuple[float, Any, Any] = (np.inf, None, self.w)

    def __call__(self, theta: np.ndarray) -> tuple[float, np.ndarray]:
        point = jnp.asarray(theta)
        call = (self._problem, self._solver, self._engine, self.w, point)
        if self._state is None:
            self._state = init_engine(*call, self._key)
        h, self._state = engine_step(*call, self._state, self._key, jnp.int32(self.count))
        self.count += 1
        status = bl.Status(int(h.info.status))
        if status > bl.Status.MAX_STEPS:  # a budget that ran out is reported, not raised
            raise bl.BilevelError(status, "the search for penalties", h)
        self.status, self.w = max(self.status, status), h.w
        value = float(h.info.outer_value)
        if value < self.best[0]:
            self.best = (value, np.array(theta), h.w)
        return value / self.unit, np.asarray(h.grad, float) / self.unit


def minimise(
    call: Callable[[np.ndarray], tuple[float, np.ndarray]],
    start: np.ndarray,
    bounds: list[tuple[float, float | None]],
) -> None:
    """Bounded quasi-Newton search; the values are in units of a log-likelihood."""
    first = None

    def gain(point: np.ndarray) -> tuple[float, np.ndarray]:
        """Relative to the start, so that `ftol` is a share of what was gained, or a small part of a unit."""
        nonlocal first
        value, grad = call(point)
        first = value if first is None else first
        return value - first, grad

    # The budget is for free penalties; the others need about ten evaluations.
    stop = {"maxiter": 100, "maxfun": 150, "ftol": 5e-4, "gtol": 0.005}
    minimize(gain, start, jac=True, method="L-BFGS-B", bounds=bounds, options=stop)


def optimise(
    folds: Folds,
    kind: str,
    engine: str,
    say: Callable[[str], None],
    group: np.ndarray | None = None,
) -> Tuned:
    """One of `options.PENALTIES`; `group` (d,) numbers the features' groups, for `per-group`."""
    n, num_parts = folds.num_rows, len(folds.parts)
    values, w = folds.curve(COARSE)
    coarse = float(COARSE[int(np.argmin(values))])
    say(f"best of a coarse grid: penalty {coarse:.0e}, cross-validated loss {values.min():.5g}")

    def make_rule(relative: np.ndarray, weight: float) -> Rule:
        return penalties.make_rule(kind, relative, group, weight, n)

    objective = Objective(folds, w, engine)
    unknown = np.zeros((num_parts, 2, folds.num_features))
    weight = 1 / n
    rule = make_rule(unknown[:-1], 0.0 if kind == "single" else weight)
    theta = _pilot(objective, rule, weight, np.log(coarse))
    if kind != "single" and folds.task == "ridge":
        # The unit of a log-likelihood is the noise variance; the pilot's prior is the hinge alone.
        noise = 2 * (objective.best[0] - float(prior(jnp.asarray(theta), rule)))
        weight = max(noise, 1e-12) / n  # a target without noise leaves nothing to divide by
        if rule.level @ theta < -np.log(n):
            rule = make_rule(unknown[:-1], weight)
            theta = _pilot(objective, rule, weight, float(rule.level @ theta))
    counts = {"coarse": len(COARSE), "pilot": objective.count}
    refit_rule = rule
    if kind != "single":
        level = float(rule.level @ theta)
        say(f"one penalty for all: {np.exp(level):.4g}")
        if kind == "per-feature":
            counts["statistics"] = 1
            relative = np.stack([folds.statistics(k, np.exp(level)) for k in range(num_parts)])
            rule, refit_rule = make_rule(relative[:-1], weight), make_rule(relative[-1:], weight)
        else:
            rule = refit_rule = make_rule(unknown[:-1], 0.0 if kind == "free" else weight)
        objective.use(rule, weight)
        minimise(objective, *_start(kind, theta))
        theta = objective.best[1]
    counts |= {"search": objective.count - counts["pilot"], "closing": 1}
    cv_loss, _ = folds.solve(penalties.at(theta, rule), objective.best[2])
    if kind == "single" and cv_loss > values.min():
        # An engine's own weights can flatter its outer value.
        say("the search did not improve on the coarse grid")
        theta, cv_loss = np.log([coarse]), float(values.min())
    say(f"{objective.count} hypergradients: cross-validated loss {cv_loss:.5g}")
    chosen = penalties.at(theta, refit_rule)[0]
    return Tuned(
        theta,
        float(np.exp(np.log(chosen).mean())),
        chosen,
        cv_loss,
        folds.fit_part(-1, chosen),
        objective.status,
        counts,
    )


def _pilot(objective: Objective, rule: Rule, unit: float, level: float) -> np.ndarray:
    """The theta of the best single penalty under the rule: a search along one line."""
    level_of = np.asarray(rule.level)
    line = level_of / (level_of @ level_of)

    def along(a: np.ndarray) -> tuple[float, np.ndarray]:
        value, grad = objective(a * line)
        return value, np.array([line @ grad])

    objective.use(rule, unit)
    minimise(along, np.array([level]), [LOG_BOUNDS])
    return objective.best[1]


def _start(kind: str, theta: np.ndarray) -> tuple[np.ndarray, list[tuple[float, float | None]]]:
    """Where the search of many penalties starts, given the pilot's theta, and its box."""
    if kind == "per-feature":
        return np.array([theta[0], 0.2, 0.2]), [LOG_BOUNDS, *penalties.EXPONENT_BOUNDS]
    return theta, [LOG_BOUNDS] * len(theta)
