"""The middle floor: two levels. (problem, inner solver) -> hypergradient with a trust report."""

from hypergrad import optimality
from hypergrad.amigo import FSLA, AmIGO, StocBiO
from hypergrad.bamm import BAMM
from hypergrad.base import AbstractEngine, BilevelProblem, Hypergradient, HypergradInfo
from hypergrad.bda import BDA
from hypergrad.borep import BOREP
from hypergrad.bsvrb import BSVRB
from hypergrad.certificate import Constants
from hypergrad.estimators import EMA, SAGA, SPIDER, STORM, AbstractEstimator, Plain
from hypergrad.evolution import ES
from hypergrad.exact import Exact
from hypergrad.f2sa import F2SA
from hypergrad.f3sa import F3SA
from hypergrad.forward import Forward
from hypergrad.iaptt import IAPTT
from hypergrad.implicit import Implicit
from hypergrad.joint_penalty import BOME, GPBGD, VPBGD
from hypergrad.lvhba import LVHBA
from hypergrad.meha import MEHA
from hypergrad.minimax import CGD, Extragradient
from hypergrad.moreau import Moreau
from hypergrad.one_step import OneStep
from hypergrad.pzobo import PZOBO
from hypergrad.registry import ENGINES
from hypergrad.root import implicit
from hypergrad.series import BSA, MRBO, SUSTAIN, TTSA, VRBO
from hypergrad.soba import SABA, SOBA, SRBA
from hypergrad.unrolled import Unrolled

__all__ = [
    "BAMM",
    "BDA",
    "BOME",
    "BOREP",
    "BSA",
    "BSVRB",
    "CGD",
    "EMA",
    "ENGINES",
    "ES",
    "F2SA",
    "F3SA",
    "FSLA",
    "GPBGD",
    "IAPTT",
    "LVHBA",
    "MEHA",
    "MRBO",
    "PZOBO",
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
    "BilevelProblem",
    "Constants",
    "Exact",
    "Extragradient",
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
]
