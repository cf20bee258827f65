"""Evolution strategies: hypergradients from outer values alone, where nothing can be differentiated."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from hypergrad.base import (
    AbstractEngine,
    BilevelProblem,
    Hypergradient,
    Solver,
    begin,
    check_proximal,
    check_settings,
    has_prox,
    make_info,
    make_solver,
)
from solvers import AbstractInnerSolver, GradientDescent, Status, tree
from solvers.fields import Number, cast, number, static
from solvers.loops import fixed_budget, judge, run_steps, solve
from solvers.status import where
from solvers.types import Tree


class ES(AbstractEngine):
    """`mean_i e_i (Phi(lam + sigma e_i) - Phi(lam - sigma e_i)) / (2 sigma)`, e_i normal, N pairs.

    Unbiased for the gradient of the smoothed `E_e Phi(lam + sigma e)`, `Phi(lam) = outer(w(lam), lam)`; of Phi itself
    where that is quadratic. Where Phi is nearly linear, `E ||h - grad||^2 = (p + 1) / N ||grad||^2` for p entries of
    lam. All perturbed solves see the same batches. `info.error_estimate` is the standard error of the mean over
    the pairs relative to its norm (NaN for one pair): noise, not the smoothing.

    `persistent=True` (PES) is for trainings too long for one call: 2N + 1 of them stay alive, and a call moves each
    `solver.max_steps` on under fresh e_i. The difference of a pair is weighted with the sum of all its e_i so far,
    so that the derivative through the earlier windows is not cut off: unbiased, where short restarted or truncated
    runs are not. `info.error_estimate` grows with the root of the number of windows; after `windows` calls
    all start anew. Solver settings made from lam must be read anew at each step.

    `sigma` is one length for all entries of lam: choose units for them (logarithms, say) in which it is
    small. Flat around lam in all directions, up to rounding, is BREAKDOWN: then sigma is too small.

    Class: any inner problem and solver, none of which is differentiated in lam; `FixedPoint` needs no derivative
    at all. Solves go to their tolerance; the persistent ones take fixed steps.
    Cost: 2N + 1 inner solves. Memory: 2N + 1 times w and the solver's state.
    Source: Salimans et al. 2017 (antithetic); Vicol, Metz and Sohl-Dickstein 2021 (persistent). Here the
    unperturbed run goes along, for `w` and the report.
    """

    pairs: int = static(16, low=1)
    sigma: Number = number(0.1, low=0.0, strict=True)
    persistent: bool = static(False)
    windows: int | None = static(None, low=1)
    estimate: bool | None = static(None)

    estimates = False
    second_order = False
    proximal = True
    fixed_points = True

    def __check_init__(self) -> None:
        if self.windows is not None and not self.persistent:
            raise ValueError("ES: windows is for persistent=True; without, each call starts anew.")

    def init(
        self, problem: BilevelProblem, solver: Solver, w: Tree, lam: Tree, key: Array
    ) -> "_Persistent | None":
        if not self.persistent:
            return None
        carry = begin(problem, solver, w, lam, key)
        check_settings("ES(persistent=True)", solver, make_solver(solver, lam), carry[1])
        count = 2 * self.pairs + 1
        alive = jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *x.shape)), carry)
        flat, _ = tree.flatten(lam)
        return _Persistent(w, alive, jnp.zeros((self.pairs, flat.size), flat.dtype), jnp.int32(0))

    def step(
        self, problem: BilevelProblem, solver: Solver, w: Tree, lam: Tree, state: Any, key: Array
    ) -> tuple[Hypergradient, "_Persistent | None"]:
        sampler, outer_batch = problem.inner_sampler(key), problem.outer_batch(key)
        at_lam = make_solver(solver, lam)
        if has_prox(problem):
            check_proximal(at_lam)
        flat, unflatten = tree.flatten(lam)
        sigma = cast(self.sigma, flat)
        e = jax.random.normal(jax.random.fold_in(key, 6), (self.pairs, flat.size), flat.dtype)
        moves = jnp.concatenate([jnp.zeros_like(flat)[None], sigma * e, -sigma * e])
        points = flat[None] + moves
        origin = w if state is None else state.origin
        start = lambda point: begin(problem, solver, origin, unflatten(point), key)

        def go_on(point: Array, carry: Any) -> Any:
            lam = unflatten(point)
            one, objective = make_solver(solver, lam), problem.inner_objective(lam)
            w, inner_state = carry
            if self.persistent:
                w, inner_state = run_steps(
                    one, objective, w, inner_state, sampler, fixed_budget(one)
                )
                steps, zero = jnp.int32(one.max_steps), jnp.zeros(())
                info = judge(one, objective, w, sampler(0), steps, zero)
            else:
                w, inner_state, info = solve(one, objective, w, inner_state, sampler)
            return problem.outer(w, lam, outer_batch), info, (w, inner_state)

        after, carry = None, jax.vmap(start)(points)
        weights = e / sigma
        if state is not None:
            first = state.count == 0
            carry = jax.tree.map(lambda new, old: jnp.where(first, new, old), carry, state.alive)
            total = jnp.where(first, jnp.zeros_like(e), state.total) + sigma * e
            weights = total / sigma**2
        values, infos, carry = jax.vmap(go_on)(points, carry)
        if state is not None:
            count = state.count + 1
            if self.windows is not None:
                count = count % self.windows
            after = _Persistent(origin, carry, total, count)

        value, (up, down) = values[0], jnp.split(values[1:], 2)
        each = weights * ((up - down) / 2).astype(flat.dtype)[:, None]
        mean = jnp.mean(each, axis=0)
        rounding = 4 * tree.epsilon(value) * jnp.abs(value)
        still = jnp.max(jnp.abs(values - value)) <= rounding  # False for NaN
        inner = jax.tree.map(lambda leaf: leaf[0], infos)
        info = make_info(
            value,
            inner,
            unflatten(mean),
            where(still, Status.BREAKDOWN),
            jnp.max(infos.status),
            adjoint_steps=jnp.sum(infos.num_steps[1:]),
        )
        if self.pairs > 1:
            spread = jnp.sum((each - mean[None]) ** 2) / (self.pairs * (self.pairs - 1))
            norm = jnp.linalg.norm(mean)
            error = jnp.sqrt(spread) / jnp.where(norm > 0, norm, jnp.ones_like(norm))
            info = info._replace(error_estimate=cast(error, info.error_estimate))
        w = jax.tree.map(lambda leaf: leaf[0], carry[0])
        return Hypergradient(unflatten(mean), w, info), after

    @classmethod
    def default_solver(cls) -> AbstractInnerSolver:
        return GradientDescent(max_steps=100, learning_rate="auto")


class _Persistent(NamedTuple):
    origin: Tree
    """Where a training starts, if the problem does not say."""
    alive: Any
    """The inner variable and the solver's state: at lam, then at the pairs, plus before minus."""
    total: Array
    """What each pair's lam has been moved by in all windows so far, added up, (pairs, entries)."""
    count: Array
    """Windows since the start, int32."""
