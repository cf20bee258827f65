"""What a run returns, and the error it raises."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bilevel.difficulty import TaskStates
from hypergrad import AbstractEngine, HypergradInfo
from hypergrad.base import Hypergradient
from solvers import Status, tree
from solvers.status import explain
from solvers.types import Tree


class BilevelError(RuntimeError):
    """A computation ended in a status that is not OK. `outcome` holds what was computed."""

    def __init__(self, status: int, where: str, outcome: Any = None):
        super().__init__(f"{where} ended with status {explain(status)}{_growth(status, outcome)}")
        self.status = Status(int(status))
        self.outcome = outcome


def _growth(status: int, outcome: Any) -> str:
    """How far the adjoint grew, where that is known."""
    found = getattr(getattr(outcome, "info", None), "peak_growth", np.nan)
    grew = int(status) == Status.DIVERGED and float(found) > 1
    return f" Here the adjoint grew by a factor of {float(found):.3g}." if grew else ""


class History(NamedTuple):
    """Arrays of shape (steps done,), one entry for each outer step."""

    outer_value: Array
    """The outer loss at the step's `lam` and inner solution."""
    grad_norm: Array
    """2-norm of the hypergradient, on the natural scale of `lam`."""
    inner_residual: Array
    inner_steps: Array
    lane_steps: Array
    """Inner steps of all lanes of `Tasks`, idle or not, of which `inner_steps` were of use; else the same."""
    adjoint_steps: Array
    adjoint_residual: Array
    curvature: Array
    error_estimate: Array
    """Estimated relative error of the hypergradient; NaN where it was not asked for."""
    status: Array


class Best(NamedTuple):
    """The step with the smallest outer value so far: the pair that attained it.

    With an outer method, of the points it accepted, and corrected to second order. Its early values are rough:
    steps are compared by `outer_value + margin`.
    """

    lam: Tree
    w: Tree
    outer_value: Array
    step: Array
    margin: Array
    """What the value was corrected by; 0 without an outer method."""


class RunState(NamedTuple):
    """All that the next outer step needs; `run(..., state=result.state)` goes on from here."""

    step: Array
    lam: Tree
    """The outer variable on the natural scale."""
    w: Tree
    engine: Any
    outer: Any
    """State of the outer rule."""
    best: Best
    worst: Array
    """Worst status other than MAX_STEPS so far."""


@dataclasses.dataclass(frozen=True)
class Result:
    """Outcome of `run`.

    `lam` is the outer variable after the last step (with an outer method: the last point that it
    accepted) and `w` the inner variable that the last step solved for; `best` is the pair with the
    smallest outer value.
    """

    lam: Tree
    w: Tree
    history: History
    status: Status
    state: RunState
    best: Best
    stopped: str
    """Why the run ended: "num_steps", "outer_tol", "patience", "callback", "time_limit", "status", "interrupted"
    (Ctrl-C) or "terminated" (SIGTERM)."""
    retries: int = 0
    """How often a failed step was tried again (`run(retries=...)`); `history.status` says which."""
    multipliers: Any = None
    """Of constraints on `w` and `lam` together, after the last step, with the active ones; None without."""

    def __repr__(self) -> str:
        steps = len(self.history.outer_value)
        if not steps:
            return f"Result(status={self.status.name}, steps=0)"
        held = "" if self.multipliers is None else f", multipliers={self.multipliers}"
        return (
            f"Result(status={self.status.name}, steps={steps}, stopped={self.stopped!r}, "
            f"outer_value={float(self.history.outer_value[-1]):.6g}, "
            f"best={float(self.best.outer_value):.6g} at step {int(self.best.step)}{held})"
        )


def record(h: Hypergradient) -> History:
    """One step's entries."""
    info: HypergradInfo = h.info
    return History(
        outer_value=info.outer_value,
        grad_norm=tree.norm(h.grad),
        inner_residual=info.inner.residual,
        inner_steps=info.inner.num_steps,
        lane_steps=info.inner.num_steps if info.lane_steps is None else info.lane_steps,
        adjoint_steps=info.adjoint_steps,
        adjoint_residual=info.adjoint_residual,
        curvature=info.curvature,
        error_estimate=info.error_estimate,
        status=info.status,
    )


def join(pieces: Sequence[History], entries: Callable[[], History]) -> History:
    """Chunks of history as one, in NumPy arrays; where there are none, `entries()` has their dtypes."""
    if not pieces:
        return jax.tree.map(lambda leaf: np.zeros((0,), jnp.result_type(leaf)), entries())
    return jax.tree.map(lambda *parts: np.concatenate(parts), *pieces)


def finished(
    engine: AbstractEngine,
    lam: Tree,
    state: RunState,
    history: History,
    stopped: str,
    retries: int = 0,
) -> Result:
    """The result of a run that ended at this state: its worst status, or else that of its last step."""
    worst = int(state.worst)
    if worst <= Status.MAX_STEPS and len(history.status):
        worst = int(history.status[-1])
    tasks = isinstance(state.engine, TaskStates)  # which have no such constraints
    return Result(
        lam=lam,
        w=state.w,
        history=history,
        status=Status(worst),
        state=state,
        best=state.best,
        stopped=stopped,
        retries=retries,
        multipliers=None if tasks else engine.multipliers(state.engine),
    )


def verdict(
    state: RunState, pieces: Sequence[History], outer_tol: float, patience: int | None
) -> str:
    """Why a run ends at this state; empty where it goes on."""
    if int(state.worst) > Status.MAX_STEPS:
        return "status"
    if not pieces:
        return ""
    # A single loop may begin with a direction of zero: without a tolerance that is no end.
    if outer_tol > 0 and float(pieces[-1].grad_norm[-1]) <= outer_tol:
        return "outer_tol"
    since = int(state.step) - 1 - int(state.best.step)
    return "patience" if patience is not None and since >= patience else ""


def packed(entries: History) -> dict[str, Array]:
    """A step's entries in one vector for each dtype, under their names: each write costs as much as a short step."""
    names: dict[str, list[str]] = {}
    for name, entry in entries._asdict().items():
        names.setdefault(str(entry.dtype), []).append(name)
    return {
        " ".join(alike): jnp.stack([getattr(entries, name) for name in alike])
        for alike in names.values()
    }


def unpacked(buffer: dict[str, Array]) -> History:
    """The history back, in NumPy: leaves (..., steps, entries of a dtype) become entries (..., steps)."""
    columns: dict[str, Any] = {}
    for names, rows in buffer.items():
        columns |= zip(names.split(), np.moveaxis(np.asarray(rows), -1, 0), strict=True)
    return History(**columns)
