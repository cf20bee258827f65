"""Which engine and which inner solver a command uses."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

import bilevel as bl
from bilevel.calls import engine_step, init_engine
from hypergrad.registry import ENGINES
from solvers.loops import solve as solve_inner
from solvers.types import constant_sampler


def engine_names() -> tuple[str, ...]:
    """Names that `--engine` takes.

    Not `es`, whose moves of a penalty are not on its own scale, nor those that solve nothing: a command takes tens of
    steps, and they take thousands.
    """
    return tuple(name for name, engine in ENGINES.items() if name != "es" and engine.uses_solver)


def make_engine(name: str) -> Any:
    """The engine with its defaults, but for two numbers where linear models want others."""
    if name == "implicit":  # no more exact than a step on the way needs
        return bl.Implicit(linear_solver=bl.CG(rtol=1e-3))
    if name == "f2sa" and is_double():  # the penalised copies stay convex under weak penalties
        return bl.F2SA(nu=1e-4)
    return ENGINES[name]()


def is_double() -> bool:
    """Whether new arrays have 64 bits."""
    return jnp.zeros(()).dtype == jnp.float64


def newton(tol: float | None = None) -> bl.Newton:
    """Truncated Newton: with the cheap products of a linear model it needs few, long steps."""
    default = 1e-5 if is_double() else 1e-4
    return bl.Newton(max_steps=30, tol=default if tol is None else tol)


def inner_solver(name: str) -> Any:
    """Newton where the engine takes any solver; the engine's own default where it differentiates
    through the steps.
    """
    return newton() if ENGINES[name].needs_implicit else ENGINES[name].default_solver()


def check(result: bl.Result) -> bl.Result:
    """Raise where a run broke off; a budget that ran out is reported, not raised."""
    if result.status > bl.Status.MAX_STEPS:
        raise bl.BilevelError(result.status, "the hypergradient run", result)
    return result


def solve(problem: bl.Problem, lam: Any, w: Any, tol: float | None = None) -> tuple[Any, Any]:
    """Outer value and `w` of a converged inner solve, however an engine left it."""
    return _solve(problem, newton(tol), jnp.asarray(lam, float), w)


def solve_in_search(problem: bl.Problem, lam: Any, w: Any, tol: float | None) -> tuple[Any, Any]:
    """As `solve`, by the program that a search with `implicit` runs, so that none is compiled for it.

    `tol` is of the inner solve, None as in the search.
    """
    solver = newton(tol)
    # A solution of the adjoint system to its full size is none at all: zero, in no steps.
    engine = bl.Implicit(linear_solver=bl.CG(rtol=1.0))
    lam, key = jnp.asarray(lam, float), jax.random.key(0)
    state = init_engine(problem, solver, engine, w, lam, key)
    h, _ = engine_step(problem, solver, engine, w, lam, state, key, jnp.int32(0))
    return h.info.outer_value, h.w


@eqx.filter_jit
def _solve(problem: bl.Problem, solver: bl.Newton, lam: Any, w: Any) -> tuple[Any, Any]:
    objective = problem.inner_objective(lam)
    state = solver.init(objective, w, problem.inner_data)
    sampler = constant_sampler(problem.inner_data)
    w, _, _ = solve_inner(solver, objective, w, state, sampler)
    return problem.outer(w, lam, problem.outer_data), w
