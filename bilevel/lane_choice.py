"""How many lanes suit a problem on a device: measured, as neither extreme is best everywhere."""

import dataclasses
import logging
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from bilevel import processes
from bilevel.calls import engine_step, init_engine
from bilevel.footprint import signature
from bilevel.tasks import Tasks
from bilevel.validation import is_traced

logger = logging.getLogger("bilevel")

CANDIDATES = (1, 4, 8, 16, 32)
"""And all tasks of a device."""
ENOUGH = 0.3
"""Seconds of short calls that tell a few percent apart."""


def settled(
    engine: Any,
    problem: Any,
    solver: Any,
    w: Any,
    lam: Any,
    key: Any,
    notes: dict[str, Any] | None = None,
) -> Any:
    """The problem; where it has `lanes="auto"`, with the number that is fastest.

    Or with the one in `notes`, which else gets it: results differ by rounding between numbers of lanes.
    """
    if not isinstance(problem, Tasks) or problem.lanes != "auto":
        return problem
    if is_traced(problem, solver, engine, w, lam, key):
        raise TypeError(
            "lanes='auto' measures, which cannot be done inside jit, vmap or grad: pass "
            "lanes=bilevel.choose_lanes(...)."
        )
    notes = {} if notes is None else notes
    if "lanes" not in notes:
        notes["lanes"] = measured(engine, problem, solver, w, lam, key)
    return dataclasses.replace(problem, lanes=int(notes["lanes"]))


def measured(engine: Any, problem: Any, solver: Any, w: Any, lam: Any, key: Any) -> int:
    """The number of lanes with the fastest first step; remembered for these shapes and settings."""
    if getattr(engine, "memory_budget", None) is not None:
        raise ValueError(
            "lanes='auto' and memory_budget depend on each other: choose the lanes with the engine of "
            "bilevel.memory(...), or give a number."
        )
    name = signature(engine_step, problem, solver, engine, w, lam)
    if name not in _chosen:
        if len(_chosen) >= 256:
            _chosen.pop(next(iter(_chosen)))

        team = processes.team(problem.mesh)

        def seconds(lanes: int) -> float:
            tasks: Any = dataclasses.replace(problem, lanes=lanes)
            state = init_engine(tasks, solver, engine, w, lam, key)
            args = (tasks, solver, engine, w, lam, state, key, jnp.int32(0))
            return team.chosen(_seconds(lambda: engine_step(*args)))

        here = (problem.per_step or problem.count) // (
            1 if problem.mesh is None else problem.mesh.size
        )
        few = [lanes for lanes in CANDIDATES if lanes < here]
        if jax.default_backend() == "cpu":
            # Steps of tiny problems cost least at either end, and more in between.
            _chosen[name] = fastest(few[1:], seconds, ends=[*few[:1], here])
        else:
            _chosen[name] = fastest([here, *reversed(few)], seconds)
    return _chosen[name]


def fastest(
    candidates: Iterable[int], seconds: Callable[[int], float], ends: Iterable[int] = ()
) -> int:
    """The first of the ends and the candidates that no later one beats by a twentieth.

    All ends are tried. A candidate that then takes a quarter more than the best so far ends the search: times fall,
    then rise.
    """
    best, least = 0, float("inf")

    def is_slow(lanes: int) -> bool:
        nonlocal best, least
        spent = seconds(lanes)
        logger.info("%d lanes: %.3g s per step", lanes, spent)
        slow = spent > 1.25 * least
        if spent < 0.95 * least:
            best, least = lanes, spent
        return slow

    for lanes in ends:
        is_slow(lanes)
    for lanes in candidates:
        if is_slow(lanes):
            break
    return best


def _seconds(call: Callable[[], Any]) -> float:
    """Of the fastest of two calls, after one that compiles; of up to ten where they are short, and so uncertain."""
    jax.block_until_ready(call())
    spent: list[float] = []
    while len(spent) < 2 or (len(spent) < 10 and sum(spent) < ENOUGH):
        start = time.perf_counter()
        jax.block_until_ready(call())
        spent.append(time.perf_counter() - start)
    return min(spent)


_chosen: dict[Any, int] = {}
