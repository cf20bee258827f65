"""The compiled pieces that `hypergradient` and `run` share. Only this floor jits."""

from typing import Any

import equinox as eqx
from jax import Array

from bilevel.rows_last import rows_last
from bilevel.tasks import Tasks
from hypergrad import AbstractEngine, BilevelProblem, Hypergradient
from hypergrad.base import Solver
from hypergrad.estimate import with_estimate
from solvers import AbstractInnerSolver
from solvers.fields import at_step
from solvers.types import Tree


def can_estimate(problem: BilevelProblem, solver: Solver, engine: AbstractEngine) -> bool:
    """Whether the engine's hypergradient can and should be compared with the implicit one."""
    # Each step has one already.
    if getattr(engine, "refine", False) or getattr(engine, "target", None) is not None:
        return False
    # Outer variables that act through the start or the solver have no implicit derivative.
    implicit = isinstance(solver, AbstractInnerSolver)
    return engine.wants_estimate() and implicit and getattr(problem, "inner_init", None) is None


@eqx.filter_jit
def init_engine(
    problem: BilevelProblem, solver: Solver, engine: AbstractEngine, w: Tree, lam: Tree, key: Array
) -> Any:
    """The engine's state before the first step."""
    solver, engine = at_step((solver, engine), 0)
    problem = rows_last(problem)
    if isinstance(problem, Tasks):
        return problem.init(engine, solver, w, lam, key)
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
    problem = rows_last(problem)
    if isinstance(problem, Tasks):
        return problem.step(engine, solver, w, lam, state, key)
    return engine.step(problem, solver, w, lam, state, key)


def estimated(
    problem: BilevelProblem,
    solver: Solver,
    engine: AbstractEngine,
    lam: Tree,
    h: Hypergradient,
    state: Any,
    key: Array,
    step: Array | int,
) -> Hypergradient:
    """The step's hypergradient with its error estimate."""
    solver, engine = at_step((solver, engine), step)
    problem = rows_last(problem)
    if isinstance(problem, Tasks):
        return problem.estimate(engine, solver, lam, h, state, key)
    return with_estimate(problem, solver, engine, lam, h, state, key)
