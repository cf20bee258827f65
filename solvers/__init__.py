"""The ground floor: one level. Minimise an objective, solve a linear system."""

from solvers import prox
from solvers.base import AbstractInnerSolver
from solvers.fixed_point import FixedPoint, Mapping
from solvers.gradient import GradientDescent
from solvers.jaxopt_solver import JaxoptSolver
from solvers.lbfgs import LBFGS
from solvers.linear import (
    CG,
    GMRES,
    MINRES,
    AbstractLinearSolver,
    AbstractPreconditioner,
    Chebyshev,
    Dense,
    Jacobi,
    LinearInfo,
    Neumann,
    Nystrom,
    NystromPreconditioner,
)
from solvers.newton import Newton
from solvers.optax_solver import OptaxSolver
from solvers.proximal import ProximalGradient
from solvers.solved import Solved
from solvers.status import Status
from solvers.types import Objective, Sampler, SolveInfo
from solvers.working_set import WorkingSet

SOLVERS = {
    "fixedpoint": FixedPoint,
    "gradientdescent": GradientDescent,
    "lbfgs": LBFGS,
    "newton": Newton,
    "proximalgradient": ProximalGradient,
    "solved": Solved,
    "workingset": WorkingSet,
}
"""Inner solvers that need no argument, by their registry name: the lower-case class name."""

__all__ = [
    "CG",
    "GMRES",
    "LBFGS",
    "MINRES",
    "SOLVERS",
    "AbstractInnerSolver",
    "AbstractLinearSolver",
    "AbstractPreconditioner",
    "Chebyshev",
    "Dense",
    "FixedPoint",
    "GradientDescent",
    "Jacobi",
    "JaxoptSolver",
    "LinearInfo",
    "Mapping",
    "Neumann",
    "Newton",
    "Nystrom",
    "NystromPreconditioner",
    "Objective",
    "OptaxSolver",
    "ProximalGradient",
    "Sampler",
    "SolveInfo",
    "Solved",
    "Status",
    "WorkingSet",
    "prox",
]
