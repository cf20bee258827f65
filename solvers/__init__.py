"""The ground floor: one level. Minimise an objective, solve a linear system."""

from solvers import prox
from solvers.base import AbstractInnerSolver
from solvers.gradient import GradientDescent
from solvers.jaxopt_solver import JaxoptSolver
from solvers.lbfgs import LBFGS
from solvers.linear import CG, AbstractLinearSolver, Dense, LinearInfo, Neumann
from solvers.newton import Newton
from solvers.optax_solver import OptaxSolver
from solvers.proximal import ProximalGradient
from solvers.status import Status
from solvers.types import Objective, Sampler, SolveInfo

SOLVERS = {
    "gradientdescent": GradientDescent,
    "lbfgs": LBFGS,
    "newton": Newton,
    "proximalgradient": ProximalGradient,
}
"""Inner solvers that need no argument, by their registry name: the lower-case class name."""

__all__ = [
    "CG",
    "LBFGS",
    "SOLVERS",
    "AbstractInnerSolver",
    "AbstractLinearSolver",
    "Dense",
    "GradientDescent",
    "JaxoptSolver",
    "LinearInfo",
    "Neumann",
    "Newton",
    "Objective",
    "OptaxSolver",
    "ProximalGradient",
    "Sampler",
    "SolveInfo",
    "Status",
    "prox",
]
