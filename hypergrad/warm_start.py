"""Where the next inner solve starts."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from hypergrad.base import BilevelProblem, has_prox
from hypergrad.derivatives import linearized_map
from hypergrad.nonsmooth import fixed_point, narrowed, step_size
from solvers import AbstractInnerSolver, AbstractLinearSolver, tree
from solvers.gradient import linearized_hvp
from solvers.linear.cg import preconditioned
from solvers.types import Tree


def newton_start(
    problem: BilevelProblem,
    solver: AbstractInnerSolver,
    linear: AbstractLinearSolver,
    w: Tree,
    lam: Tree,
    batch: Any,
    key: Array,
) -> tuple[Tree, Array]:
    """One Newton step on the optimality equation at the new `lam`, from the last solution: `(w, products)`.

    From an exact solution `w*(lam - d)` it is the tangent of the solution path, `w - H^-1 C' d`, up to O(d^2): a start
    whose error is O(d^2) instead of O(d). With an `inner_prox` it is a semismooth step, exact where the
    path is piecewise linear (the Lasso) and the support stays. A step that does not lower the residual is not
    taken.
    """
    objective = problem.inner_objective(lam)
    zero = tree.zeros_like(w)
    if has_prox(problem):
        at = fixed_point(problem, w, lam, batch, step_size(problem, w, lam, batch))
        system = narrowed(problem, solver, w, lam, batch, at)
        state = linear.init(system.product, w, key)
        y, info = linear.solve(system.product, at.project(at.newton_rhs()), zero, state, key)
        moved = tree.add(w, at.newton_step(y))
    else:
        if solver.symmetric:
            residual, product = linearized_hvp(objective, w, batch)
        else:
            residual, product, _ = linearized_map(solver, objective, w, batch)
        linear = preconditioned(linear, objective, w, batch)
        state = linear.init(product, w, key)
        change, info = linear.solve(product, tree.scale(-1.0, residual), zero, state, key)
        moved = tree.add(w, change)
    return _nearer(problem, solver, w, moved, lam, batch), info.num_steps


def extrapolated_start(
    problem: BilevelProblem,
    solver: AbstractInnerSolver,
    w: Tree,
    previous: Tree,
    lam: Tree,
    batch: Any,
) -> Tree:
    """`w + (w - previous)`, the last two solutions continued along their secant, where its residual is lower.

    As near as the tangent where `lam` moves on as it did, for two evaluations of the optimality map.
    """
    moved = tree.axpy(2.0, w, tree.scale(-1.0, previous))
    return _nearer(problem, solver, w, moved, lam, batch)


def _nearer(
    problem: BilevelProblem,
    solver: AbstractInnerSolver,
    w: Tree,
    moved: Tree,
    lam: Tree,
    batch: Any,
) -> Tree:
    """`moved` where its residual is lower, else `w`."""
    objective = problem.inner_objective(lam)
    norm = lambda w: tree.norm(solver.optimality(objective, w, batch))
    before, after = jax.lax.map(norm, jax.tree.map(lambda *x: jnp.stack(x), w, moved))
    return tree.where(after < before, moved, w)  # False for NaN
