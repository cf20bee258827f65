"""The search for penalties: one penalty first, then the few numbers that make many of it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import minimize

import bilevel as bl
from bilevel.calls import can_estimate, engine_step, init_engine
from bilevel.progress import Progress
from bilevel.result import History, record
from bilevel.tuning import engines, penalties
from bilevel.tuning.folds import BOUNDS, Folds
from bilevel.tuning.models import Rule, prior
from bilevel.tuning.steps import INTERRUPTED, Steps
from hypergrad.estimate import with_estimate

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
    steps: Steps
    """Each evaluation with a hypergradient; the status is the worst of them, where it is not fatal."""
    evaluations: dict[str, int]
    """Evaluations of the cross-validated loss (K fits each): `pilot` and `search` with its gradient, the
    coarse grid, the statistics (K + 1 fits) and the closing solves without."""
    rule: Rule
    """Of the folds."""


class Objective:
    """Cross-validated loss plus prior and its gradient in theta, in units of `unit`.

    Each call starts from the weights and the adjoint of the call before.
    """

    def __init__(self, folds: Folds, w: Any, engine: str, bar: Progress) -> None:
        self._folds, self._bar = folds, bar
        self._solver, self._engine = engines.inner_solver(engine), engines.make_engine(engine)
        self._key = jax.random.key(0)
        self._state = None
        self._last: Any = None
        self.w = w
        self.records: list[History] = []
        self.stopped = "converged"

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
        _check(int(h.info.status), h)
        self.w, self._last = h.w, (self._problem, point, h, self._state)
        self.records.append(record(h))
        value, corrected = float(h.info.outer_value), float(h.info.corrected_value)
        # To second order in the inner error, as the gradient's model of it is; NaN where there is none.
        value = corrected if np.isfinite(corrected) else value
        if value < self.best[0]:
            self.best = (value, np.array(theta), h.w)
        self._bar.update(self.count, value, float(self.records[-1].grad_norm))
        return value / self.unit, np.asarray(h.grad, float) / self.unit

    @property
    def count(self) -> int:
        """Evaluations so far."""
        return len(self.records)

    def search(
        self,
        call: Callable[[np.ndarray], tuple[float, np.ndarray]],
        start: np.ndarray,
        bounds: list[tuple[float, float | None]],
        say: Callable[[str], None],
        rough: bool = False,
    ) -> None:
        """`minimise` until it ends or Ctrl-C does; after that, nothing."""
        if self.stopped == "interrupted":
            return
        try:
            self.stopped = minimise(call, start, bounds, rough)
        except KeyboardInterrupt:
            self.stopped = "interrupted"
            say(INTERRUPTED.format(done=f"{self.count} evaluations"))

    def steps(self) -> Steps:
        """What the evaluations were, the last one with an error estimate where the engine has one.

        Raises BilevelError where the estimate finds that the hypergradient does not exist.
        """
        records = list(self.records)
        if self._last is not None and can_estimate(self._last[0], self._solver, self._engine):
            problem, point, h, state = self._last
            call = (problem, self._solver, self._engine, point, h, state, self._key)
            h = _estimated(*call)
            _check(int(h.info.status), h)
            records[-1] = record(h)
        columns = zip(*records, strict=True) if records else [[]] * len(History._fields)
        history = History._make(np.asarray(column) for column in columns)
        status = max((bl.Status(int(one.status)) for one in records), default=bl.Status.OK)
        return Steps(history, status, self.stopped)


_estimated = eqx.filter_jit(with_estimate)


def _check(status: int, outcome: bl.Hypergradient) -> None:
    """Raise for what cannot be trusted; a budget that ran out is reported, not raised."""
    if status > bl.Status.MAX_STEPS:
        raise bl.BilevelError(status, "the search for penalties", outcome)


ENDS = ("converged", "num_steps", "stalled")
"""How a search ends, by SciPy's number: at its tolerance, at its budget, or in a line search that rounding
and inexact inner solves defeat."""


def minimise(
    call: Callable[[np.ndarray], tuple[float, np.ndarray]],
    start: np.ndarray,
    bounds: list[tuple[float, float | None]],
    rough: bool = False,
) -> str:
    """Bounded quasi-Newton search, one of `ENDS`; the values are in units of a log-likelihood."""
    first = None

    def gain(point: np.ndarray) -> tuple[float, np.ndarray]:
        """Relative to the start, so that `ftol` is a share of what was gained, or a small part of a unit."""
        nonlocal first
        value, grad = call(point)
        first = value if first is None else first
        return value - first, grad

    # The budget is for free penalties; the others need about ten evaluations.
    ftol, gtol = (0.05, 0.1) if rough else (5e-4, 0.005)
    stop = {"maxiter": 100, "maxfun": 150, "ftol": ftol, "gtol": gtol}
    found = minimize(gain, start, jac=True, method="L-BFGS-B", bounds=bounds, options=stop)
    return ENDS[found.status]


def optimise(
    folds: Folds,
    kind: str,
    engine: str,
    say: Callable[[str], None],
    group: np.ndarray | None = None,
    *,
    progress: bool = False,
) -> Tuned:
    """One of `options.PENALTIES`; `group` (d,) numbers the features' groups, for `per-group`.

    Ctrl-C ends the search with the best so far.
    """
    with Progress(progress, None) as bar:
        return _optimise(folds, kind, engine, say, group, bar)


def _optimise(
    folds: Folds,
    kind: str,
    engine: str,
    say: Callable[[str], None],
    group: np.ndarray | None,
    bar: Progress,
) -> Tuned:
    n, num_parts = folds.num_rows, len(folds.parts)
    unknown = np.zeros((num_parts, 2, folds.num_features))
    weight = 1 / n

    def make_rule(relative: np.ndarray, weight: float) -> Rule:
        return penalties.make_rule(kind, relative, group, weight, n)

    rule = make_rule(unknown[:-1], 0.0 if kind == "single" else weight)
    values, w = folds.curve(COARSE, rule, tol=1e-3)  # tells them apart
    coarse = float(COARSE[int(np.argmin(values))])
    say(f"best of a coarse grid: penalty {coarse:.0e}, cross-validated loss {values.min():.5g}")

    objective = Objective(folds, w, engine, bar)
    rough = kind != "single"
    theta = _pilot(objective, rule, weight, np.log(coarse), say, rough)
    if kind != "single" and folds.task == "ridge" and objective.best[1] is not None:
        # The unit of a log-likelihood is the noise variance; the pilot's prior is the hinge alone.
        noise = 2 * (objective.best[0] - float(prior(jnp.asarray(theta), rule)))
        weight = max(noise, 1e-12) / n  # a target without noise leaves nothing to divide by
        if rule.level @ theta < -np.log(n):
            rule = make_rule(unknown[:-1], weight)
            theta = _pilot(objective, rule, weight, float(rule.level @ theta), say, rough)
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
        start, bounds = _start(kind, theta)
        objective.search(objective, start, bounds, say)
        # Interrupted before the first evaluation: one penalty for all.
        theta = _single(kind, theta) if objective.best[1] is None else objective.best[1]
    counts |= {"search": objective.count - counts["pilot"], "closing": 1}
    cv_loss, _ = folds.solve(theta, rule, objective.best[2])
    if kind == "single":
        counts["closing"] = 2
        coarse_loss, _ = folds.solve(np.log([coarse]), rule, w)
        if cv_loss > coarse_loss:
            # An engine's own weights can flatter its outer value.
            say("the search did not improve on the coarse grid")
            theta, cv_loss = np.log([coarse]), coarse_loss
    say(f"{objective.count} hypergradients: cross-validated loss {cv_loss:.5g}")
    chosen = penalties.at(theta, refit_rule)[0]
    return Tuned(
        theta,
        float(np.exp(np.log(chosen).mean())),
        chosen,
        cv_loss,
        folds.fit_part(-1, chosen),
        objective.steps(),
        counts,
        rule,
    )


def _pilot(
    objective: Objective,
    rule: Rule,
    unit: float,
    level: float,
    say: Callable[[str], None],
    rough: bool,
) -> np.ndarray:
    """The theta of the best single penalty under the rule: a search along one line.

    `rough` where another search goes on from there.
    """
    line = penalties.line(rule)

    def along(a: np.ndarray) -> tuple[float, np.ndarray]:
        value, grad = objective(a * line)
        return value, np.array([line @ grad])

    objective.use(rule, unit)
    objective.search(along, np.array([level]), [LOG_BOUNDS], say, rough)
    return level * line if objective.best[1] is None else objective.best[1]


def _single(kind: str, theta: np.ndarray) -> np.ndarray:
    """The pilot's theta as one of `kind`."""
    return np.array([theta[0], 0.0, 0.0]) if kind == "per-feature" else theta


def _start(kind: str, theta: np.ndarray) -> tuple[np.ndarray, list[tuple[float, float | None]]]:
    """Where the search of many penalties starts, given the pilot's theta, and its box."""
    if kind == "per-feature":
        return np.array([theta[0], 0.2, 0.2]), [LOG_BOUNDS, *penalties.EXPONENT_BOUNDS]
    return theta, [LOG_BOUNDS] * len(theta)
