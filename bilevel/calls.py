"""The compiled pieces that `hypergradient` and `run` share. Only this floor jits."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array

from hypergrad import AbstractEngine, BilevelProblem, Hypergradient
from hypergrad.base import Solver, make_solver
from hypergrad.estimate import assess
from solvers import AbstractInnerSolver
from solvers.fields import at_step
from solvers.status import combine
from solvers.types import Tree


def can_estimate(problem: BilevelProblem, solver: Solver, engine: AbstractEngine) -> bool:
    """Whether the engine's hypergradient can and should be compared with the implicit one."""
    wanted = getattr(engine, "estimate", None)
    wanted = engine.estimates if wanted is None else wanted
    # Outer variables that act through the start or the solver have no implicit derivative.
    implicit = isinstance(solver, AbstractInnerSolver)
    return wanted and implicit and getattr(problem, "inner_init", None) is None


def with_estimate(
    problem: BilevelProblem,
    solver: Solver,
    engine: AbstractEngine,
    lam: Tree,
    h: Hypergradient,
    state: Any,
    key: Array,
) -> Hypergradient:
    """The hypergradient with its error estimate filled in; `state` is the engine's after the step.

    Where the engine is implicit and undamped, what the estimate's solves found (negative curvature, a
    singular system) is a verdict on the hypergradient too.
    """
    found = assess(
        problem,
        make_solver(solver, lam),
        lam,
        h,
        problem.inner_sampler(key)(0),
        problem.outer_batch(key),
        jax.random.fold_in(key, 3),
        engine.adjoint(state),
    )
    info = h.info
    error = found.error.astype(info.error_estimate.dtype)
    value = found.corrected_value.astype(info.corrected_value.dtype)
    status = info.status
    damping = getattr(engine, "damping", None)
    if damping is not None:
        status = jnp.where(damping == 0, combine(status, found.status), status)
    curvature = jnp.fmin(info.curvature, found.curvature.astype(info.curvature.dtype))
    info = info._replace(
        error_estimate=error, corrected_value=value, status=status, curvature=curvature
    )
    return h._replace(info=info)


@eqx.filter_jit
def init_engine(
    problem: BilevelProblem, solver: Solver, engine: AbstractEngine, w: Tree, lam: Tree, key: Array
) -> Any:
    """The engine's state before the first step."""
    solver, engine = at_step((solver, engine), 0)
    return engine.init(problem, solver, w, lam, key)


@eqx.filter_jit
def engine_step(
    problem: BilevelProblem,
    solver: Solver,
    engine: AbstractEngine,
    w: Tree,
    lam: Tree,
    state: Any,
    key: Array,
    step: Array,
) -> tuple[Hypergradient, Any]:
    """One step. Jitted on its own, so that another outer rule does not trace the losses again."""
    solver, engine = at_step((solver, engine), step)
    return engine.step(problem, solver, w, lam, state, key)
