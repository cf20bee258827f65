"""Matrix products with a narrow variable, computed the other way round: faster on CPU."""

import copy
from typing import Any, cast

import jax
from jax import Array
from jax.core import eval_jaxpr
from jax.extend.core import Jaxpr, JaxprEqn, Literal

from bilevel.problem import Loss, Problem
from bilevel.tasks import Tasks
from solvers import Mapping

NARROW = 32
"""Columns up to which it is faster. At 10 columns a hypergradient takes about half the time (`benchmarks/w1a.py`)."""


def rows_last(problem: Any) -> Any:
    """A `Problem`, or `Tasks` of one, with losses in which `X @ w` is `(w.T @ X.T).T` on CPU.

    X (n, d) are data or a layer's inputs, and w (d, k), with k up to `NARROW`, depends on the variables. The values are
    the same up to rounding. It is for the derivative in w: of `X @ w` it is `X.T @ r`, for which X is packed anew, and
    of the other `r.T @ X`, which takes X as it lies.

    For one traced program: what is returned has losses of its own, which no later one equals.
    """
    if jax.default_backend() != "cpu":
        return problem
    changed = copy.copy(problem)
    if isinstance(problem, Tasks):
        object.__setattr__(changed, "problem", rows_last(problem.problem))
        return changed
    if not isinstance(problem, Problem):
        return problem
    for name in ("inner", "outer"):
        loss = getattr(problem, name)
        if not isinstance(loss, Mapping):
            object.__setattr__(changed, name, _rows_last(loss))
    return changed


def _rows_last(loss: Loss) -> Loss:
    traced: dict[Any, Any] = {}

    def fast(w: Any, lam: Any, batch: Any) -> Array:
        leaves, treedef = jax.tree.flatten((w, lam, batch))
        kind = treedef, *map(jax.typeof, leaves)
        if kind not in traced:
            traced[kind] = _traced(loss, treedef, leaves, len(jax.tree.leaves((w, lam))))
        closed = traced[kind]
        return eval_jaxpr(closed.jaxpr, closed.consts, *leaves)[0]

    return fast


def _traced(loss: Loss, treedef: Any, leaves: list[Any], variables: int) -> Any:
    """The program of the loss, with its narrow products turned; of the leaves the first are variables.

    One trace serves all derivatives: traced again for each of them, a loss is a good part of what a run takes to begin.
    """
    closed = jax.make_jaxpr(lambda *leaves: loss(*jax.tree.unflatten(treedef, leaves)))(*leaves)
    varies = [place < variables for place in range(len(leaves))]
    evaluate = lambda *leaves: _evaluated(closed.jaxpr, closed.consts, leaves, varies)[0]
    return jax.make_jaxpr(evaluate)(*leaves)


def _evaluated(jaxpr: Jaxpr, consts: Any, inputs: Any, varies: list[bool]) -> list[Any]:
    """The outputs; `varies` says which inputs depend on a variable."""
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *inputs), strict=True))
    reached = {v for v, depends in zip(jaxpr.invars, varies, strict=True) if depends}
    read = lambda v: v.val if isinstance(v, Literal) else values[v]
    for equation in jaxpr.eqns:
        depends = [not isinstance(v, Literal) and v in reached for v in equation.invars]
        if any(depends):
            reached.update(equation.outvars)
        if equation.primitive.name in ("jit", "pjit"):
            inner = equation.params["jaxpr"]
            operands = [read(v) for v in equation.invars]
            outputs = _evaluated(inner.jaxpr, inner.consts, operands, depends)
        elif _is_narrow(equation, depends):
            outputs = [_product(*(read(v) for v in equation.invars), equation.params)]
        else:
            own = list(dict.fromkeys(v for v in equation.invars if not isinstance(v, Literal)))
            one = jaxpr.replace(constvars=[], invars=own, outvars=equation.outvars, eqns=[equation])
            outputs = eval_jaxpr(one, (), *(values[v] for v in own))
        values |= zip(equation.outvars, outputs, strict=True)
    return [read(v) for v in jaxpr.outvars]


def _is_narrow(equation: JaxprEqn, depends: list[bool]) -> bool:
    """Whether it is `X @ w`, with as few columns as that."""
    if equation.primitive.name != "dot_general" or not depends[1]:
        return False
    params = equation.params
    X, w = (cast(Any, v.aval) for v in equation.invars)
    return (
        params["dimension_numbers"] == (((1,), (0,)), ((), ()))
        and X.ndim == w.ndim == 2
        and w.shape[1] <= NARROW
        and params["precision"] is None
        and params["out_sharding"] is None
    )


def _product(X: Array, w: Array, params: dict[str, Any]) -> Array:
    # The barriers keep XLA from turning it back, here and in the derivative.
    w = jax.lax.optimization_barrier(w.T)
    dimensions = (((1,), (1,)), ((), ()))
    product = jax.lax.dot_general(
        w, X, dimensions, preferred_element_type=params["preferred_element_type"]
    )
    return jax.lax.optimization_barrier(product).T
