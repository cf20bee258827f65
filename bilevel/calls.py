"""The compiled pieces that `hypergradient` and `run` share. Only this floor jits."""

from typing import Any

import equinox as eqx
from jax import Array

from hypergrad import AbstractEngine, BilevelProblem, Hypergradient
from hypergrad.base import Solver
from solvers import AbstractInnerSolver
from solvers.fields import at_step
from solvers.types import Tree


def can_estimate(problem: BilevelProblem, solver: Solver, engine: AbstractEngine) -> bool:
    """Whether the engine's hypergradient can and should be compared with the implicit one."""
    if getattr(engine, "refine", False):  # each step has one already
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
