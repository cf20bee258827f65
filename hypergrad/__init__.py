"""The middle floor: two levels. (problem, inner solver) -> hypergradient with a trust report."""

from hypergrad.base import AbstractEngine, BilevelProblem, Hypergradient, HypergradInfo
from hypergrad.certificate import Constants
from hypergrad.estimators import EMA, SAGA, SPIDER, STORM, AbstractEstimator, Plain
from hypergrad.exact import Exact
from hypergrad.f2sa import F2SA
from hypergrad.implicit import Implicit
from hypergrad.moreau import Moreau
from hypergrad.one_step import OneStep
from hypergrad.registry import ENGINES
from hypergrad.soba import SABA, SOBA, SRBA
from hypergrad.unrolled import Unrolled

__all__ = [
    "EMA",
    "ENGINES",
    "F2SA",
    "SABA",
    "SAGA",
    "SOBA",
    "SPIDER",
    "SRBA",
    "STORM",
    "AbstractEngine",
    "AbstractEstimator",
    "BilevelProblem",
    "Constants",
    "Exact",
    "HypergradInfo",
    "Hypergradient",
    "Implicit",
    "Moreau",
    "OneStep",
    "Plain",
    "Unrolled",
]
