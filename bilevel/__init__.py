"""Bilevel and hyperparameter optimisation in JAX: one Problem, any hypergradient engine, one driver."""

from bilevel import schedules, transforms
from bilevel.driver import run
from bilevel.hypergradient import hypergradient
from bilevel.problem import Problem
from bilevel.result import BilevelError, History, Result, RunState
from hypergrad import (
    F2SA,
    AbstractEngine,
    Exact,
    Hypergradient,
    HypergradInfo,
    Implicit,
    Moreau,
    OneStep,
    Unrolled,
)
from solvers import (
    CG,
    LBFGS,
    AbstractInnerSolver,
    AbstractLinearSolver,
    Dense,
    GradientDescent,
    JaxoptSolver,
    Neumann,
    Newton,
    OptaxSolver,
    SolveInfo,
    Status,
)

__version__ = "0.1.0"

__all__ = [
    "CG",
    "F2SA",
    "LBFGS",
    "AbstractEngine",
    "AbstractInnerSolver",
    "AbstractLinearSolver",
    "BilevelError",
    "Dense",
    "Exact",
    "GradientDescent",
    "History",
    "HypergradInfo",
    "Hypergradient",
    "Implicit",
    "JaxoptSolver",
    "Moreau",
    "Neumann",
    "Newton",
    "OneStep",
    "OptaxSolver",
    "Problem",
    "Result",
    "RunState",
    "SolveInfo",
    "Status",
    "Unrolled",
    "hypergradient",
    "run",
    "schedules",
    "transforms",
]
