"""An inner loss made of a model and a loss of its outputs, with its Gauss-Newton matrix."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import Array

from bilevel.problem import Loss
from solvers import tree
from solvers.types import MatVec, Tree


class GaussNewton(NamedTuple):
    """What `Problem(inner, ..., inner_gauss_newton=product)` takes."""

    inner: Loss
    """`(w, lam, batch) -> scalar`."""
    product: Callable[[Tree, Tree, Any], MatVec]
    """`(w, lam, batch) -> (v -> G v)`."""


def gauss_newton(
    model: Callable[[Tree, Tree, Any], Tree],
    loss: Callable[[Tree, Tree, Any], Array],
    penalty: Callable[[Tree, Tree, Any], Array] | None = None,
) -> GaussNewton:
    """`inner(w, lam, batch) = loss(model(w, lam, batch), lam, batch) + penalty(w, lam, batch)` and its `G`.

    `G = J' L J + P`, with J the Jacobian of the outputs in w, L the Hessian of the loss in the outputs and P that
    of the penalty in w: the Hessian without the curvature of the model, `sum_i (dloss/doutput_i) d2output_i/dw2`.
    Positive semidefinite where the loss is convex in the outputs and the penalty in w. A product costs one
    forward and one reverse pass through the model, about a Hessian-vector product; memory one linearisation.

    Args:
      model: `(w, lam, batch) -> outputs`, a pytree of floating-point arrays.
      loss: `(outputs, lam, batch) -> scalar`.
      penalty: `(w, lam, batch) -> scalar`; None is none.

    Call it once, outside of loops: each call makes new functions, which compile anew.
    Raises TypeError for what is not callable. Source: Schraudolph 2002; Martens 2010.
    """
    for name, value in (("model", model), ("loss", loss)):
        if not callable(value):
            raise TypeError(f"gauss_newton({name}=...) must be a function, got {value!r}.")
    if penalty is not None and not callable(penalty):
        raise TypeError(f"gauss_newton(penalty=...) must be a function or None, got {penalty!r}.")

    def inner(w: Tree, lam: Tree, batch: Any) -> Array:
        value = loss(model(w, lam, batch), lam, batch)
        return value if penalty is None else value + penalty(w, lam, batch)

    def product(w: Tree, lam: Tree, batch: Any) -> MatVec:
        outputs, forward = jax.linearize(lambda w: model(w, lam, batch), w)
        backward = jax.linear_transpose(forward, w)
        _, curve = jax.linearize(lambda z: jax.grad(loss)(z, lam, batch), outputs)
        if penalty is None:
            return lambda v: backward(curve(forward(v)))[0]
        slope = jax.grad(penalty)
        _, shrink = jax.linearize(lambda w: slope(w, lam, batch), w)
        return lambda v: tree.add(backward(curve(forward(v)))[0], shrink(v))

    return GaussNewton(inner, product)
