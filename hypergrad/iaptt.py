"""IAPTT: unrolled steps whose start is an outer variable too, cut where the outer loss is worst."""

from typing import Any, NamedTuple

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
from solvers import AbstractInnerSolver, GradientDescent, tree
from solvers.fields import Number, cast, number, static
from solvers.loops import fixed_budget, judge
from solvers.proximal import apply_prox
from solvers.types import Tree


class IAPTT(AbstractEngine):
    """The derivative of `max over t <= T of F(w_t, lam)` along T = `solver.max_steps` steps from z.

    F is the outer loss, `w_0 = z`. The start z is a second outer variable, which the engine moves itself:
    `z <- prox(z - start_step dF/dz)`, from the `w` of the first call; `grad` is the derivative at fixed z. The
    largest F along the path, in the place of the last, bounds all of them; its derivative is that of the step
    where it is attained. With `Problem(inner_init=...)` z is that start instead, so that the outer rule
    moves what it depends on.

    `h.w` is the w_t of the largest F, `info.outer_value` that F, and `info.inner.num_steps` its t.

    Class: smooth inner losses, convex or not, with constraints by an `inner_prox` (a projection) and a
    solver that can be unrolled. A local method: of the inner minima z finds one that is good for F.
    Cost: as `Unrolled` with one level, and an outer value at each step. Memory: T copies of `w`.
    Source: Liu, Liu, Zeng and Zhang 2021 (IAPTT-GM).
    """

    start_step: Number = number(0.1, low=0.0, strict=True)
    estimate: bool | None = static(None)

    estimates = False
    proximal = True
    through_steps = True

    def init(
        self, problem: BilevelProblem, solver: Solver, w: Tree, lam: Tree, key: Array
    ) -> "_State":
        return _State(w)

    def step(
        self,
        problem: BilevelProblem,
        solver: Solver,
        w: Tree,
        lam: Tree,
        state: "_State",
        key: Array,
    ) -> tuple[Hypergradient, "_State"]:
        sampler, outer_batch = problem.inner_sampler(key), problem.outer_batch(key)
        if has_prox(problem):
            check_proximal(make_solver(solver, lam))

        def path(lam: Tree, z: Tree) -> Tree:
            at_lam, objective = make_solver(solver, lam), problem.inner_objective(lam)
            first = problem.start(z, lam, sampler(0))

            def step(carry: Any, index: Array) -> tuple[Any, Tree]:
                w, inner_state = carry
                w, inner_state = at_lam.step(objective, w, inner_state, sampler(index))
                return (w, inner_state), w

            carry = first, at_lam.init(objective, first, sampler(0))
            step = jax.checkpoint(step, prevent_cse=False)
            return jax.lax.scan(step, carry, jnp.arange(fixed_budget(at_lam)))[1]

        def worst(lam: Tree, z: Tree) -> tuple[Array, tuple[Tree, Array]]:
            points = path(lam, z)
            value = lambda w: problem.outer(w, lam, outer_batch)
            index = jnp.argmax(jax.lax.map(value, jax.lax.stop_gradient(points)))
            w = jax.tree.map(lambda leaf: leaf[index], points)
            return value(w), (w, index.astype(jnp.int32) + 1)

        slopes = jax.value_and_grad(worst, argnums=(0, 1), has_aux=True)
        (value, (w, count)), (grad, by_start) = slopes(lam, state.start)
        at_lam, objective = make_solver(solver, lam), problem.inner_objective(lam)
        inner = judge(at_lam, objective, w, sampler(0), count, jnp.zeros(()))
        size = cast(self.start_step, inner.residual)
        moved = apply_prox(objective, tree.axpy(-size, by_start, state.start), size)
        info = make_info(value, inner, (grad, by_start), adjoint_steps=count)
        return Hypergradient(grad, w, info), _State(moved)

    @classmethod
    def default_solver(cls) -> AbstractInnerSolver:
        return GradientDescent(max_steps=100, learning_rate="auto")


class _State(NamedTuple):
    start: Tree
