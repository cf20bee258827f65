"""The outer steps of a command: shown while they run, ended early by Ctrl-C, written down one by one."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import optax

import bilevel as bl
from bilevel.tuning import engines
from solvers.status import explain

INTERRUPTED = (
    "interrupted after {done}: finishing with what they reached; Ctrl-C again ends without results"
)


def run_steps(
    problem: bl.Problem,
    lam: Any,
    w: Any,
    *,
    engine: str,
    num_steps: int,
    say: Callable[[str], None],
    progress: bool,
    outer: optax.GradientTransformation,
    transform: Any,
) -> bl.Result:
    """`bilevel.run` with a named engine; raises BilevelError where the run broke off.

    Ctrl-C ends it after any step, with what was reached so far and `stopped="interrupted"`. One step is
    one call of the compiled program; the error estimate, which can cost more than a step, comes once.
    """
    result = engines.check(
        bl.run(
            problem,
            lam,
            w,
            num_steps=num_steps,
            chunk=1,
            estimate_every=max(num_steps, 1),
            progress=progress,
            throw=False,
            solver=engines.inner_solver(engine),
            engine=engines.make_engine(engine),
            outer=outer,
            transform=transform,
        )
    )
    if result.stopped == "interrupted":
        say(INTERRUPTED.format(done=f"{len(result.history.status)} of {num_steps} steps"))
    return result


class Steps(NamedTuple):
    """How outer steps went; a `bilevel.Result` says the same and more."""

    history: bl.History
    status: bl.Status
    stopped: str


class Stepped(Protocol):
    """The outcome of an optimisation."""

    @property
    def steps(self) -> Steps | bl.Result: ...


T = TypeVar("T", bound=Stepped)


def timed(optimise: Callable[..., T], say: Callable[[str], None]) -> tuple[T, dict[str, Any]]:
    """The outcome of `optimise(say, progress=...)` and its seconds: cold, and warm for once more.

    After Ctrl-C there is no second time.
    """
    started = time.perf_counter()
    outcome = optimise(say, progress=True)
    seconds = {"cold": time.perf_counter() - started, "warm": None}
    if outcome.steps.stopped != "interrupted":
        started = time.perf_counter()
        optimise(lambda _: None, progress=False)
        seconds["warm"] = time.perf_counter() - started
    say(took(seconds))
    return outcome, seconds


def took(seconds: dict[str, Any]) -> str:
    """Seconds in words."""
    text = f"{seconds['cold']:.2f} s with compilation"
    return text if seconds["warm"] is None else f"{text}, {seconds['warm']:.2f} s without"


def step_fields(steps: Steps | bl.Result) -> dict[str, Any]:
    """What `result.json` says about the steps: how they ended, and a list entry for each of them."""
    history = steps.history
    statuses = [bl.Status(int(status)) for status in history.status]
    return {
        "status": steps.status.name,
        "stopped": steps.stopped,
        "outer_steps": len(statuses),
        "history": {
            "objective": np.asarray(history.outer_value),
            "grad_norm": np.asarray(history.grad_norm),
            "error_estimate": np.asarray(history.error_estimate),
            "status": [status.name for status in statuses],
            "advice": {status.name: explain(status) for status in sorted({*statuses})},
        },
    }
