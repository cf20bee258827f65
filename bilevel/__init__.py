"""Bilevel and hyperparameter optimisation in JAX: one Problem, any hypergradient engine, one driver.

A public name is loaded when it is first asked for: JAX takes seconds to import, and a command that is
given a wrong file name should say so at once.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bilevel import glm, schedules, transforms
    from bilevel.checks import Check, check
    from bilevel.choice import Choice, choose
    from bilevel.driver import run
    from bilevel.footprint import Memory
    from bilevel.gradient import choose_lanes, hypergradient, memory, truncation
    from bilevel.log import scalars
    from bilevel.outer import HOAG, MAID, Adaptive
    from bilevel.population import Population, run_population
    from bilevel.problem import Problem
    from bilevel.processes import gather
    from bilevel.result import BilevelError, History, Result, RunState
    from bilevel.smoothness import Metasmoothness, metasmoothness
    from bilevel.snapshots import replay
    from bilevel.tasks import Tasks
    from hypergrad import (
        BAMM,
        BOME,
        BOREP,
        BSA,
        EMA,
        ES,
        F2SA,
        F3SA,
        FSLA,
        GPBGD,
        MEHA,
        MRBO,
        SABA,
        SAGA,
        SOBA,
        SPIDER,
        SRBA,
        STORM,
        SUSTAIN,
        TTSA,
        VPBGD,
        VRBO,
        AbstractEngine,
        AbstractEstimator,
        AmIGO,
        Constants,
        Exact,
        Forward,
        Hypergradient,
        HypergradInfo,
        Implicit,
        Moreau,
        OneStep,
        Plain,
        StocBiO,
        Unrolled,
        implicit,
        optimality,
    )
    from solvers import (
        CG,
        GMRES,
        LBFGS,
        MINRES,
        AbstractInnerSolver,
        AbstractLinearSolver,
        AbstractPreconditioner,
        Chebyshev,
        Dense,
        FixedPoint,
        GradientDescent,
        Jacobi,
        JaxoptSolver,
        Mapping,
        Neumann,
        Newton,
        Nystrom,
        NystromPreconditioner,
        OptaxSolver,
        ProximalGradient,
        Solved,
        SolveInfo,
        Status,
        prox,
    )

__version__ = "0.1.0"

__all__ = [
    "BAMM",
    "BOME",
    "BOREP",
    "BSA",
    "CG",
    "EMA",
    "ES",
    "F2SA",
    "F3SA",
    "FSLA",
    "GMRES",
    "GPBGD",
    "HOAG",
    "LBFGS",
    "MAID",
    "MEHA",
    "MINRES",
    "MRBO",
    "SABA",
    "SAGA",
    "SOBA",
    "SPIDER",
    "SRBA",
    "STORM",
    "SUSTAIN",
    "TTSA",
    "VPBGD",
    "VRBO",
    "AbstractEngine",
    "AbstractEstimator",
    "AbstractInnerSolver",
    "AbstractLinearSolver",
    "AbstractPreconditioner",
    "Adaptive",
    "AmIGO",
    "BilevelError",
    "Chebyshev",
    "Check",
    "Choice",
    "Constants",
    "Dense",
    "Exact",
    "FixedPoint",
    "Forward",
    "GradientDescent",
    "History",
    "HypergradInfo",
    "Hypergradient",
    "Implicit",
    "Jacobi",
    "JaxoptSolver",
    "Mapping",
    "Memory",
    "Metasmoothness",
    "Moreau",
    "Neumann",
    "Newton",
    "Nystrom",
    "NystromPreconditioner",
    "OneStep",
    "OptaxSolver",
    "Plain",
    "Population",
    "Problem",
    "ProximalGradient",
    "Result",
    "RunState",
    "SolveInfo",
    "Solved",
    "Status",
    "StocBiO",
    "Tasks",
    "Unrolled",
    "check",
    "choose",
    "choose_lanes",
    "gather",
    "glm",
    "hypergradient",
    "implicit",
    "memory",
    "metasmoothness",
    "optimality",
    "prox",
    "replay",
    "run",
    "run_population",
    "scalars",
    "schedules",
    "transforms",
    "truncation",
]

_HOMES = {
    "bilevel.checks": {"Check", "check"},
    "bilevel.choice": {"Choice", "choose"},
    "bilevel.driver": {"run"},
    "bilevel.footprint": {"Memory"},
    "bilevel.gradient": {"choose_lanes", "hypergradient", "memory", "truncation"},
    "bilevel.log": {"scalars"},
    "bilevel.outer": {"HOAG", "MAID", "Adaptive"},
    "bilevel.population": {"Population", "run_population"},
    "bilevel.problem": {"Problem"},
    "bilevel.processes": {"gather"},
    "bilevel.result": {"BilevelError", "History", "Result", "RunState"},
    "bilevel.smoothness": {"Metasmoothness", "metasmoothness"},
    "bilevel.snapshots": {"replay"},
    "bilevel.tasks": {"Tasks"},
    "hypergrad": {
        "BAMM",
        "BOME",
        "BOREP",
        "BSA",
        "EMA",
        "ES",
        "F2SA",
        "F3SA",
        "FSLA",
        "GPBGD",
        "MEHA",
        "MRBO",
        "SABA",
        "SAGA",
        "SOBA",
        "SPIDER",
        "SRBA",
        "STORM",
        "SUSTAIN",
        "TTSA",
        "VPBGD",
        "VRBO",
        "AbstractEngine",
        "AbstractEstimator",
        "AmIGO",
        "Constants",
        "Exact",
        "Forward",
        "HypergradInfo",
        "Hypergradient",
        "Implicit",
        "Moreau",
        "OneStep",
        "Plain",
        "StocBiO",
        "Unrolled",
        "implicit",
        "optimality",
    },
}
"""Where the public names live that are neither modules of this package nor from `solvers`."""

if not TYPE_CHECKING:  # a type checker would take this for a licence to any name

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        if name in ("glm", "schedules", "transforms"):
            return importlib.import_module(f"bilevel.{name}")
        home = next((home for home, names in _HOMES.items() if name in names), "solvers")
        return getattr(importlib.import_module(home), name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
