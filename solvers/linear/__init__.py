"""Linear solvers for the symmetric systems of the adjoint and of Newton's method."""

from solvers.linear.base import AbstractLinearSolver, LinearInfo
from solvers.linear.cg import CG
from solvers.linear.dense import Dense
from solvers.linear.neumann import Neumann

__all__ = ["CG", "AbstractLinearSolver", "Dense", "LinearInfo", "Neumann"]
