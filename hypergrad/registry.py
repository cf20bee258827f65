"""Engines by name. A new engine is one line here."""

from hypergrad.amigo import FSLA, AmIGO, StocBiO
from hypergrad.bamm import BAMM
from hypergrad.base import AbstractEngine
from hypergrad.bda import BDA
from hypergrad.borep import BOREP
from hypergrad.bsvrb import BSVRB
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
from hypergrad.series import BSA, MRBO, SUSTAIN, TTSA, VRBO
from hypergrad.soba import SABA, SOBA, SRBA
from hypergrad.unrolled import Unrolled

ENGINES: dict[str, type[AbstractEngine]] = {
    engine.__name__.lower(): engine
    for engine in (
        ES,
        Exact,
        F2SA,
        Forward,
        Implicit,
        Moreau,
        OneStep,
        Unrolled,
        F3SA,
        FSLA,
        AmIGO,
        StocBiO,
        BAMM,
        BOME,
        GPBGD,
        VPBGD,
        MEHA,
        LVHBA,
        SABA,
        SOBA,
        SRBA,
        BOREP,
        BSVRB,
        CGD,
        Extragradient,
        PZOBO,
        BDA,
        IAPTT,
        BSA,
        MRBO,
        SUSTAIN,
        TTSA,
        VRBO,
    )
}
"""The lower-case class name of each engine."""
