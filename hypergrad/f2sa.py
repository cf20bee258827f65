"""The fully first-order penalty method, as finite differences of any order."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from hypergrad.base import (
    AbstractEngine,
    BilevelProblem,
    Hypergradient,
    Solver,
    make_info,
    make_solver,
)
from solvers import AbstractInnerSolver, tree
from solvers.fields import Number, cast, number, static
from solvers.loops import solve, tolerance
from solvers.types import Tree


def difference_nodes(order: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Integer nodes j and weights c with `sum c_j phi(j nu) / nu = phi'(0) + O(nu^order)`.

    Order 1 is the forward difference (nodes 1, 0), even orders are central and do without node 0.
    The weights solve the moment conditions `sum c_j j^k = [k == 1]`, k = 0..order.
    """
    low = -(order // 2) if order % 2 == 0 else -(order - 1) // 2
    nodes = [j for j in range(low, low + order + 1) if j != 0 or order % 2]
    moments = np.vander(np.array(nodes, float), len(nodes), increasing=True).T
    weights = np.linalg.solve(moments, np.eye(len(nodes))[1])
    return tuple(nodes), tuple(float(c) for c in weights)


class Penalised(eqx.Module):
    """`inner + weight * outer` at a fixed outer variable: what the copies of `w` minimise."""

    problem: BilevelProblem
    lam: Tree
    weight: Number
    outer_batch: Any

    def __call__(self, w: Tree, batch: Any) -> Array:
        g = self.problem.inner(w, self.lam, batch)
        f = self.problem.outer(w, self.lam, self.outer_batch)
        return g + jnp.asarray(self.weight, f.dtype) * f


class F2SA(AbstractEngine):
    """First-order hypergradients: differences of penalised minimisers, no Hessian.

    With `y_j = argmin_y g + j nu f`: `grad = (1/nu) sum_j c_j [dg/dlam(y_j) + j nu df/dlam(y_j)]`, the
    order-p finite difference at 0 of the gradient of `min_y g + nu f`. `order=1` is F2SA with the
    multiplier `1/nu` (bias O(nu)); the default `order=2` costs one solve more than order 1 (which has the
    unpenalised copy among its nodes) and has bias O(nu^2).

    Class: inner problem strongly convex; orders above 1 need `mu > (order/2) nu L_f`, else `g - j nu f`
    is not convex. Errors of the inner solves are multiplied by `1/nu`, so their tolerance is tightened
    by `nu`. Every copy is warm-started and all share one batch.

    `h.w` and `info.inner` are the unpenalised solution's. `estimate=True` asks for the error estimate,
    which needs Hessian-vector products; by default there is none.

    Cost per step: `order + 1` warm inner solves and as many gradients in lam. Memory: a copy of `w` and of
    the solver's state for each.
    Source: Kwon et al. 2023 (F2SA); Chen, Ma and Zhang 2025 (order p). Departs from the single-loop
    schedule of the paper: the penalty is constant and the copies are solved.
    """

    nu: Number = number(0.02, low=0.0, strict=True)
    order: int = static(2, low=1)
    estimate: bool | None = static(None)

    estimates = False
    second_order = False
    needs_implicit = True

    def init(
        self, problem: BilevelProblem, solver: Solver, w: Tree, lam: Tree, key: Array
    ) -> "_State":
        solver = make_solver(solver, lam)
        batch = problem.inner_sampler(key)(0)
        nodes, _ = difference_nodes(self.order)
        start = solver.init(problem.inner_objective(lam), w, batch)
        penalised = [
            solver.init(self._objective(problem, lam, j, key), w, batch) for j in nodes if j
        ]
        return _State(start, tuple(penalised), tuple(tree.zeros_like(w) for _ in penalised))

    def step(
        self,
        problem: BilevelProblem,
        solver: Solver,
        w: Tree,
        lam: Tree,
        state: "_State",
        key: Array,
    ) -> tuple[Hypergradient, "_State"]:
        solver = tightened(make_solver(solver, lam), w, self.nu)
        nodes, weights = difference_nodes(self.order)
        sampler, outer_batch = problem.inner_sampler(key), problem.outer_batch(key)
        batch = sampler(0)
        w = problem.start(w, lam, batch)
        objective = problem.inner_objective(lam)
        begin = solver.restart(objective, w, state.inner, batch)
        w, inner_state, inner = solve(solver, objective, w, begin, sampler)

        copies = {0: w}
        states, shifts, statuses = [], [], []
        previous = zip(state.penalised, state.shifts, strict=True)
        for j in (j for j in nodes if j):
            last_state, shift = next(previous)
            objective = self._objective(problem, lam, j, key)
            y = tree.add(w, shift)  # the copy moved with the unpenalised solution
            begin = solver.restart(objective, y, last_state, batch)
            y, last_state, report = solve(solver, objective, y, begin, sampler)
            copies[j] = y
            states.append(last_state)
            shifts.append(tree.sub(y, w))
            statuses.append(report.status)

        def difference(lam: Tree) -> Array:
            """Its gradient in lam at fixed copies is the hypergradient."""
            total = 0.0
            for j, c in zip(nodes, weights, strict=True):
                g = problem.inner(copies[j], lam, batch)
                f = problem.outer(copies[j], lam, outer_batch)
                total = total + c * (g / cast(self.nu, g) + j * f)
            return jnp.asarray(total)

        grad = jax.grad(difference)(lam)
        value = problem.outer(w, lam, outer_batch)
        info = make_info(value, inner, grad, *statuses)
        return Hypergradient(grad, w, info), _State(inner_state, tuple(states), tuple(shifts))

    def _objective(self, problem: BilevelProblem, lam: Tree, j: int, key: Array) -> Penalised:
        return Penalised(problem, lam, j * self.nu, problem.outer_batch(key))


def tightened(solver: AbstractInnerSolver, w: Tree, factor: Number) -> AbstractInnerSolver:
    """The solver with its tolerance multiplied by a penalty parameter below 1 (0 stays 0)."""
    tol = tolerance(solver, w)
    tol = tol * jnp.minimum(cast(factor, tol), 1.0)
    return eqx.tree_at(lambda s: s.tol, solver, tol, is_leaf=lambda leaf: leaf is None)


class _State(NamedTuple):
    inner: Any
    penalised: tuple[Any, ...]
    shifts: tuple[Tree, ...]  # each copy's distance from the unpenalised solution
