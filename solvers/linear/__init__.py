"""Linear solvers for the systems of the adjoint and of Newton's method, and their preconditioners."""

from solvers.linear.base import AbstractLinearSolver, LinearInfo
from solvers.linear.cg import CG
from solvers.linear.chebyshev import Chebyshev
from solvers.linear.dense import Dense
from solvers.linear.gmres import GMRES
from solvers.linear.minres import MINRES
from solvers.linear.neumann import Neumann
from solvers.linear.nystrom import Nystrom, NystromPreconditioner
from solvers.linear.preconditioners import AbstractPreconditioner, Jacobi

__all__ = [
    "CG",
    "GMRES",
    "MINRES",
    "AbstractLinearSolver",
    "AbstractPreconditioner",
    "Chebyshev",
    "Dense",
    "Jacobi",
    "LinearInfo",
    "Neumann",
    "Nystrom",
    "NystromPreconditioner",
]
