"""Backpropagation through the inner solver's steps, all of them or the last few."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from hypergrad.base import (
    AbstractEngine,
    BilevelProblem,
    Hypergradient,
    Solver,
    check_proximal,
    has_prox,
    make_info,
    make_solver,
)
from solvers import AbstractInnerSolver, GradientDescent
from solvers.fields import static
from solvers.loops import judge, run_steps
from solvers.types import Tree


class Unrolled(AbstractEngine):
    """The exact derivative of `outer(w_T(lam), lam)` after T = `solver.max_steps` steps from `w`.

    Class: any solver without a line search; no convexity. The whole state of the solver is
    differentiated, so outer variables may be its learning rate (`solver` as a function of lam) or the
    start (`Problem(inner_init=...)`). `tol` is ignored. The derivative is that of the T-step problem;
    `info.error_estimate` says how far it is from the derivative of the converged one.

    `truncate=K` differentiates the last K steps only; at a fixed point of gradient descent this is the
    K-term Neumann series, with an error of order `(1 - learning_rate mu)^K`. `checkpoint` recomputes
    instead of storing: memory 2 sqrt(T) states, and faster than storing everything.

    Each solve starts with a fresh solver state, so the result depends on `w` and `lam` alone.

    Cost: about four gradients per differentiated step.
    Source: Franceschi et al. 2017 (reverse); Shaban et al. 2019 (truncated).
    """

    truncate: int | None = static(None, low=1)
    checkpoint: bool = static(True)
    estimate: bool | None = static(None)

    proximal = True
    fixed_points = True

    def init(self, problem: BilevelProblem, solver: Solver, w: Tree, lam: Tree, key: Array) -> None:
        return None

    def step(
        self, problem: BilevelProblem, solver: Solver, w: Tree, lam: Tree, state: None, key: Array
    ) -> tuple[Hypergradient, None]:
        sampler, outer_batch = problem.inner_sampler(key), problem.outer_batch(key)
        first_solver = make_solver(solver, lam)
        if has_prox(problem):
            check_proximal(first_solver)
        total = first_solver.max_steps
        tail = total if self.truncate is None else min(self.truncate, total)
        head = total - tail

        def trained(lam: Tree, carry: Any, num_steps: int, start: int, checkpoint: bool) -> Any:
            inner_solver = make_solver(solver, lam)
            return run_steps(
                inner_solver,
                problem.inner_objective(lam),
                carry[0],
                carry[1],
                sampler,
                num_steps,
                start=start,
                checkpoint=checkpoint,
            )

        def begin(lam: Tree) -> Any:
            batch = sampler(0)
            first = problem.start(w, lam, batch)
            objective = problem.inner_objective(lam)
            return first, make_solver(solver, lam).init(objective, first, batch)

        if head:  # outside the differentiated function: a constant of the last K steps
            prefix = trained(lam, begin(lam), head, 0, False)

        def unrolled(lam: Tree) -> tuple[Array, Tree]:
            carry = prefix if head else begin(lam)
            w_final, _ = trained(lam, carry, tail, head, self.checkpoint)
            return problem.outer(w_final, lam, outer_batch), w_final

        (value, w), grad = jax.value_and_grad(unrolled, has_aux=True)(lam)
        inner = judge(
            make_solver(solver, lam),
            problem.inner_objective(lam),
            w,
            sampler(0),
            jnp.int32(total),
            jnp.zeros(()),
        )
        return Hypergradient(grad, w, make_info(value, inner, grad, adjoint_steps=tail)), None

    @classmethod
    def default_solver(cls) -> AbstractInnerSolver:
        return GradientDescent(max_steps=100, learning_rate="auto")
