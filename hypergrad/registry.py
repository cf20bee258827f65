"""Engines by name. A new engine is one line here."""

from hypergrad.base import AbstractEngine
from hypergrad.exact import Exact
from hypergrad.f2sa import F2SA
from hypergrad.implicit import Implicit
from hypergrad.moreau import Moreau
from hypergrad.one_step import OneStep
from hypergrad.soba import SABA, SOBA, SRBA
from hypergrad.unrolled import Unrolled

ENGINES: dict[str, type[AbstractEngine]] = {
    engine.__name__.lower(): engine
    for engine in (
        Exact,
        F2SA,
        Implicit,
        Moreau,
        OneStep,
        Unrolled,
        SABA,
        SOBA,
        SRBA,
    )
}
"""The lower-case class name of each engine."""
