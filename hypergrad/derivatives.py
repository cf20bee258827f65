"""The derivatives that hypergradients are made of.

With g the inner loss and F the outer one: `H = d2g/dw2`, `c = dF/dw`, and `C q` the derivative in lam
of `<dg/dw, q>`. The hypergradient is `dF/dlam - C q` with `H q = c`.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax import Array

from hypergrad.base import BilevelProblem
from solvers import AbstractInnerSolver, Objective
from solvers.gradient import linearized_hvp
from solvers.types import MatVec, Tree


def outer_value_and_grads(
    problem: BilevelProblem, w: Tree, lam: Tree, batch: Any
) -> tuple[Array, Tree, Tree]:
    """`(F, dF/dw, dF/dlam)` at `(w, lam)`."""
    value, (grad_w, grad_lam) = jax.value_and_grad(problem.outer, argnums=(0, 1))(w, lam, batch)
    return value, grad_w, grad_lam


def hessian_product(problem: BilevelProblem, w: Tree, lam: Tree, batch: Any) -> MatVec:
    """`v -> H v` at `(w, lam)`, linearised once; the problem's own product if it has one."""
    _, hvp = linearized_hvp(problem.inner_objective(lam), w, batch)
    return hvp


def linearized_map(
    solver: AbstractInnerSolver, objective: Objective, w: Tree, batch: Any
) -> tuple[Tree, MatVec, MatVec]:
    """The solver's optimality map at `w`, and the products with its Jacobian and the transpose."""
    residual, product = jax.linearize(lambda w: solver.optimality(objective, w, batch), w)
    transposed = jax.linear_transpose(product, w)
    return residual, product, lambda v: transposed(v)[0]


def cross_vjp(
    problem: BilevelProblem,
    solver: AbstractInnerSolver,
    w: Tree,
    lam: Tree,
    batch: Any,
    q: Tree,
) -> Tree:
    """`C q`: the derivative in lam of the optimality map at `w`, transposed, times `q`."""
    optimality: Callable[[Tree], Tree] = lambda l: solver.optimality(
        problem.inner_objective(l), w, batch
    )
    _, vjp = jax.vjp(optimality, lam)
    return vjp(q)[0]
