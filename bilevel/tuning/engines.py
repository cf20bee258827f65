"""Which engine and which inner solver a command uses."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp

import bilevel as bl
from hypergrad.registry import ENGINES
from solvers.loops import solve as solve_inner
from solvers.types import constant_sampler


def engine_names() -> tuple[str, ...]:
    """Names that `--engine` takes."""
    return tuple(ENGINES)


def solver() -> bl.Newton:
    """Truncated Newton: with the cheap products of a linear model it needs few, long steps."""
    return bl.Newton(max_steps=30)


def inner_solver(engine: str) -> Any:
    """Newton where the engine takes any solver; the engine's own default where it differentiates
    through the steps.
    """
    return solver() if ENGINES[engine].needs_implicit else ENGINES[engine].default_solver()


def solve(problem: bl.Problem, lam: Any, w: Any) -> tuple[Any, Any]:
    """Outer value and `w` of a converged inner solve, however an engine left it."""
    return _solve(problem, solver(), jnp.asarray(lam, float), w)


@eqx.filter_jit
def _solve(problem: bl.Problem, solver: bl.Newton, lam: Any, w: Any) -> tuple[Any, Any]:
    objective = problem.inner_objective(lam)
    state = solver.init(objective, w, problem.inner_data)
    sampler = constant_sampler(problem.inner_data)
    w, _, _ = solve_inner(solver, objective, w, state, sampler)
    return problem.outer(w, lam, problem.outer_data), w
