"""The Moreau-envelope penalty method (MEHA) for smooth inner problems."""

from typing import Any, NamedTuple

import equinox as eqx
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
from hypergrad.derivatives import hessian_product
from hypergrad.f2sa import Penalised, tightened
from solvers import Status, tree
from solvers.fields import Number, cast, number, static
from solvers.linear.spectrum import ritz_values
from solvers.loops import solve, tolerance
from solvers.status import where
from solvers.types import Tree


class Proximal(eqx.Module):
    """`inner + ||w - centre||^2 / (2 gamma)`: its minimum over w is the Moreau envelope at `centre`."""

    problem: BilevelProblem
    lam: Tree
    centre: Tree
    gamma: Array

    def __call__(self, w: Tree, batch: Any) -> Array:
        g = self.problem.inner(w, self.lam, batch)
        distance = tree.sub(w, self.centre)
        return g + (tree.vdot(distance, distance) / (2 * self.gamma)).astype(g.dtype)


class Tilted(eqx.Module):
    """`penalised - <slope, w>`: the penalty problem with the envelope replaced by its tangent."""

    penalised: Penalised
    slope: Tree

    def __call__(self, w: Tree, batch: Any) -> Array:
        value = self.penalised(w, batch)
        return value - tree.vdot(self.slope, w).astype(value.dtype)


class Moreau(AbstractEngine):
    """Hypergradient of `min_y f + c (g - v)`, v the Moreau envelope of the inner loss: no Hessian.

    With `theta = argmin g(theta) + ||theta - y||^2 / (2 gamma)`, y a stationary point of
    `f/c + g - v`, where `dv/dy = (y - theta) / gamma`:
    `grad = df/dlam(y) + c [dg/dlam(y) - dg/dlam(theta)]`. The bias is O(1/c).

    y is found by the convex-concave procedure: v is replaced by its tangent at the current y, the convex
    rest is minimised by the inner solver, again until the stationarity residual meets the tolerance
    (at most `max_sweeps` times; contraction 1 / (1 + gamma mu) a sweep). `gamma="auto"` is `10 / mu` with
    mu the smallest Ritz value of 12 Lanczos products (at least `10 / L`; `0.4 / rho` where the inner
    loss has negative curvature -rho), measured once at the start.

    Class: inner loss convex, or weakly convex with `gamma < 1 / (2 rho)`; then a relaxation to inner
    stationarity. Errors of the solves are multiplied by `c`, so their tolerance is tightened by `1/c`.
    `h.w` is theta and `info.inner` reports the inner problem at theta, which is O(1/c) from its solution.

    Cost per step: two warm inner solves a sweep, four gradients. Memory: two copies of `w`.
    Source: Liu, Liu, Yao, Zeng and Zhang 2024 (MEHA). Departs from the paper: constant c, and a double
    loop over any inner solver instead of single gradient steps; the fixed point is the same.
    """

    c: Number = number(1000.0, low=0.0, strict=True)
    gamma: Number | str = number("auto", low=0.0, strict=True)
    max_sweeps: int = static(50, low=1)
    estimate: bool | None = static(None)

    estimates = False
    second_order = False
    measured = ("gamma",)
    needs_implicit = True

    def __check_init__(self) -> None:
        if isinstance(self.gamma, str) and self.gamma != "auto":
            raise ValueError(
                f"Moreau(gamma=...) must be a positive number or 'auto', got {self.gamma!r}."
            )

    def init(
        self, problem: BilevelProblem, solver: Solver, w: Tree, lam: Tree, key: Array
    ) -> "_State":
        solver = make_solver(solver, lam)
        batch = problem.inner_sampler(key)(0)
        like = jnp.zeros((), tree.accumulation_dtype(w))
        if isinstance(self.gamma, str):
            product = hessian_product(problem, w, lam, batch)
            ritz = ritz_values(product, w, key)
            largest = jnp.max(jnp.abs(ritz))
            small = jnp.clip(ritz[0], 1e-3 * largest, largest)
            gamma = jnp.where(ritz[0] < -1e-3 * largest, -0.4 / ritz[0], 10 / small)
        else:
            gamma = cast(self.gamma, like)
        proximal = solver.init(Proximal(problem, lam, w, gamma), w, batch)
        tilted = Tilted(self._penalised(problem, lam, key, like), tree.zeros_like(w))
        return _State(w, gamma.astype(like.dtype), proximal, solver.init(tilted, w, batch))

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
        like = state.gamma
        c, gamma = cast(self.c, like), state.gamma
        wanted = tolerance(solver, w)
        solver = tightened(solver, w, 0.1 / c)
        sampler, outer_batch = problem.inner_sampler(key), problem.outer_batch(key)
        batch = sampler(0)
        penalised = self._penalised(problem, lam, key, like)

        def envelope(theta: Tree, y: Tree, inner_state: Any) -> tuple[Tree, Any, Any]:
            objective = Proximal(problem, lam, y, gamma)
            begin = solver.restart(objective, theta, inner_state, batch)
            return solve(solver, objective, theta, begin, sampler)

        def slope(theta: Tree, y: Tree) -> Tree:
            return tree.scale(1 / gamma, tree.sub(y, theta))

        def stationarity(theta: Tree, y: Tree) -> Array:
            """`c` times the residual of the penalty problem: on the scale of the outer gradient."""
            gradient = jax.grad(penalised)(y, batch)
            return c * tree.norm(tree.sub(gradient, slope(theta, y)))

        def sweep(carry: _Carry) -> _Carry:
            objective = Tilted(penalised, slope(carry.theta, carry.y))
            begin = solver.restart(objective, carry.y, carry.tilted, batch)
            y, tilted, report_y = solve(solver, objective, carry.y, begin, sampler)
            theta, proximal, report_theta = envelope(carry.theta, y, carry.proximal)
            return _Carry(
                y=y,
                theta=theta,
                proximal=proximal,
                tilted=tilted,
                residual=stationarity(theta, y),
                sweeps=carry.sweeps + 1,
                status=jnp.maximum(report_y.status, report_theta.status),
            )

        # A fixed budget (tol = 0) runs a fixed number of sweeps.
        goal = jnp.maximum(wanted, 10 * tree.epsilon(w) * c)
        y = problem.start(state.y, lam, batch)
        theta, proximal, report = envelope(problem.start(w, lam, batch), y, state.proximal)
        last = jax.lax.while_loop(
            lambda s: (s.sweeps < self.max_sweeps) & (s.residual > goal),
            sweep,
            _Carry(
                y,
                theta,
                proximal,
                state.tilted,
                jnp.full_like(like, jnp.inf),
                jnp.int32(0),
                report.status,
            ),
        )
        y, theta = last.y, last.theta

        def penalty(lam: Tree) -> Array:
            """Its gradient in lam at fixed y and theta is the hypergradient."""
            gap = problem.inner(y, lam, batch) - problem.inner(theta, lam, batch)
            return problem.outer(y, lam, outer_batch) + cast(self.c, gap) * gap

        grad = jax.grad(penalty)(lam)
        value = problem.outer(theta, lam, outer_batch)
        # theta solves the proximal problem; what the inner problem itself has left there is O(1/c).
        objective = problem.inner_objective(lam)
        residual = tree.norm(solver.optimality(objective, theta, batch))
        inner = report._replace(
            value=objective(theta, batch),
            residual=residual,
            num_steps=last.sweeps,
            status=last.status,
        )
        unmet = (wanted > 0) & (last.residual > goal)
        info = make_info(value, inner, grad, where(unmet, Status.MAX_STEPS))
        return Hypergradient(grad, theta, info), _State(y, gamma, last.proximal, last.tilted)

    def _penalised(self, problem: BilevelProblem, lam: Tree, key: Array, like: Array) -> Penalised:
        return Penalised(problem, lam, 1 / cast(self.c, like), problem.outer_batch(key))


class _State(NamedTuple):
    y: Tree
    gamma: Array
    proximal: Any  # solver states of the two problems
    tilted: Any


class _Carry(NamedTuple):
    y: Tree
    theta: Tree
    proximal: Any
    tilted: Any
    residual: Array
    sweeps: Array
    status: Array
