"""One-step differentiation: the cheapest hypergradient. Copy this file to start an engine."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from hypergrad.base import (
    AbstractEngine,
    BilevelProblem,
    Hypergradient,
    Solver,
    make_info,
    make_solver,
)
from hypergrad.derivatives import cross_vjp, hessian_product, outer_value_and_grads
from solvers import tree
from solvers.fields import Number, cast, number, static
from solvers.linear.spectrum import largest_eigenvalue
from solvers.loops import solve
from solvers.types import Tree


class OneStep(AbstractEngine):
    """`dF/dlam - step_size C c`: the derivative through one gradient step at the inner solution.

    The inverse Hessian is replaced by `step_size I`, so the result is biased: its error is of the order of
    `1 - step_size mu` and `info.error_estimate` reports it. A cheap guess, for problems where a descent
    direction is enough. `step_size="auto"` is `1 / (1.05 L)`, L by 12 Lanczos products.

    Class: smooth inner problems; the solution need not be exact.
    Cost per step: the inner solve, one Hessian-vector product (for the report), one cross derivative.
    Memory: a few copies of `w`.
    Source: Luketina et al. 2016 (T1-T2); Bolte, Pauwels and Vaiter 2023.
    """

    step_size: Number | str = number("auto", low=0.0, strict=True)
    estimate: bool | None = static(None)

    needs_implicit = True
    solves_once = True

    def __check_init__(self) -> None:
        if isinstance(self.step_size, str) and self.step_size != "auto":
            raise ValueError(
                f"OneStep(step_size=...) must be a positive number or 'auto', got {self.step_size!r}."
            )

    def init(
        self, problem: BilevelProblem, solver: Solver, w: Tree, lam: Tree, key: Array
    ) -> "_State":
        batch = problem.inner_sampler(key)(0)
        return _State(make_solver(solver, lam).blank(problem.inner_objective(lam), w, batch))

    def step(
        self,
        problem: BilevelProblem,
        solver: Solver,
        w: Tree,
        lam: Tree,
        state: "_State",
        key: Array,
    ) -> tuple[Hypergradient, "_State"]:
        solver = make_solver(solver, lam)
        objective, sampler = problem.inner_objective(lam), problem.inner_sampler(key)
        batch = sampler(0)
        w = problem.start(w, lam, batch)
        inner_state = solver.restart(objective, w, state.inner, batch)
        w, inner_state, inner = solve(solver, objective, w, inner_state, sampler)

        value, c, grad_lam = outer_value_and_grads(problem, w, lam, problem.outer_batch(key))
        product = hessian_product(problem, w, lam, batch)
        if isinstance(self.step_size, str):
            size = 1 / (1.05 * largest_eigenvalue(product, w, jax.random.fold_in(key, 2)))
        else:
            size = cast(self.step_size, inner.residual)
        q = tree.scale(size, c)
        grad = tree.sub(grad_lam, cross_vjp(problem, solver, w, lam, batch, q))

        # What one step leaves of the adjoint equation H q = c.
        image, norm = product(q), tree.norm(c)
        norm = jnp.where(norm > 0, norm, jnp.ones_like(norm))  # c = 0: nothing is left
        left = tree.norm(tree.sub(image, c))
        info = make_info(value, inner, grad, adjoint_residual=left / norm, adjoint_steps=1)
        return Hypergradient(grad, w, info), _State(inner_state)


class _State(NamedTuple):
    inner: Any
