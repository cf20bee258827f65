"""Whether a map acts on each entry of an array by itself, as seen in its operations."""

from collections.abc import Callable
from typing import Any

import jax
from jax import Array

_COUPLING = (
    *("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "dot_general", "scatter-add"),
    *("cumsum", "cumprod", "cummax", "cummin", "sort", "top_k", "argmax", "argmin"),
)
"""Operations in which entries of an array meet."""


def coupling(fn: Callable[[Array], Any], v: Any) -> str | None:
    """The first operation of `fn` that brings entries of `v` (d,) together; None where each stays by itself.

    Nothing is computed. What does not depend on `v` counts for nothing; in loops and branches all does.
    """
    traced = jax.make_jaxpr(fn)(v)
    return _in(traced.jaxpr, [True])


def _in(jaxpr: Any, inputs: list[bool]) -> str | None:
    literal = lambda v: hasattr(v, "val")  # not hashable
    reached = {v for v, depends in zip(jaxpr.invars, inputs, strict=True) if depends}
    for equation in jaxpr.eqns:
        depends = [not literal(v) and v in reached for v in equation.invars]
        if not any(depends):
            continue
        reached.update(equation.outvars)
        if equation.primitive.name in _COUPLING:
            return equation.primitive.name
        for inner in _jaxprs(equation.params):
            same = len(inner.invars) == len(depends)
            found = _in(inner, depends if same else [True] * len(inner.invars))
            if found is not None:
                return found
    return None


def _jaxprs(params: dict[str, Any]) -> list[Any]:
    leaves = jax.tree.leaves(list(params.values()), is_leaf=lambda x: hasattr(x, "eqns"))
    return [getattr(leaf, "jaxpr", leaf) for leaf in leaves if hasattr(leaf, "eqns")]
