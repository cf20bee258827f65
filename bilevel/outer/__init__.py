"""Outer methods that search along lines and say how exact the next hypergradient must be."""

from bilevel.outer.base import OuterMethod
from bilevel.outer.hoag import HOAG
from bilevel.outer.line_search import MAID, Adaptive

__all__ = ["HOAG", "MAID", "Adaptive", "OuterMethod"]
