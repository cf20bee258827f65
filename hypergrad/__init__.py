"""The middle floor: two levels. (problem, inner solver) -> hypergradient with a trust report."""

from hypergrad import optimality
from hypergrad.base import AbstractEngine, BilevelProblem, Hypergradient, HypergradInfo
from hypergrad.certificate import Constants
from hypergrad.exact import Exact
from hypergrad.f2sa import F2SA
from hypergrad.forward import Forward
from hypergrad.implicit import Implicit
from hypergrad.moreau import Moreau
from hypergrad.one_step import OneStep
from hypergrad.registry import ENGINES
from hypergrad.root import implicit
from hypergrad.unrolled import Unrolled

__all__ = [
    "ENGINES",
    "F2SA",
    "AbstractEngine",
    "BilevelProblem",
    "Constants",
    "Exact",
    "Forward",
    "HypergradInfo",
    "Hypergradient",
    "Implicit",
    "Moreau",
    "OneStep",
    "Unrolled",
    "implicit",
    "optimality",
]
