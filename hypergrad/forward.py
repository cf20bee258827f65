"""Forward mode through the inner solver's steps: memory that does not grow with their number."""

import math
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
from solvers import AbstractInnerSolver, GradientDescent, Status, tree
from solvers.fields import Number, cast, number, static
from solvers.loops import judge, run_steps
from solvers.status import where
from solvers.types import Tree


class Forward(AbstractEngine):
    """The exact derivative of `outer(w_T(lam), lam)` after T = `solver.max_steps` steps, forward mode.

    The same number as `Unrolled()` gives: `dF/dlam + Z' dF/dw` with `Z = dw_T/dlam` carried along, one tangent for
    each of the p entries of lam. Refuses more than `limit` of them.

    For many entries, slopes along few directions (`Phi(lam) = outer(w_T(lam), lam)`, `<grad, v>` its slope along v):

    - `directions=K`: the mean over K random v of entries 1 and -1 of `<grad, v> v`. Unbiased, with
      `E ||h - grad||^2 = (p - 1) / K ||grad||^2`; `info.error_estimate` is what this makes of ||h||, a root
      mean square over v. Fresh directions for each key.
    - `directions="guess"`: `<grad, u> u / ||u||^2` with u the derivative through the last step alone: the
      projection of the exact derivative on u, so never longer and never uphill. BREAKDOWN where u is
      zero (lam acts through the start alone, say).

    One more tangent starts from random entries 1 and -1 in the first state: `info.growth` is the slope of the
    outer loss along it over `||dF/dw||`, the root mean square of which is the growth that `Unrolled` measures. Above
    `max_growth` it is DIVERGED; `max_growth=None` saves the tangent, and no explosion is seen.

    Class: any solver without a line search; no convexity; settings and starts as for `Unrolled`.
    Cost: about 3 + 2p gradients per step (p: entries, or directions); the guess costs another solve.
    Memory: p + 2 solver states, whatever T.
    Source: Franceschi et al. 2017 (forward); Baydin et al. 2022 (random directions), which has normal
    instead of Rademacher directions, of larger variance; Fournier et al. 2023 (guesses).
    """

    directions: int | str | None = static(None)
    limit: int = static(64, low=1)
    max_growth: Number | None = number(1e6, low=0.0, strict=True)
    estimate: bool | None = static(None)

    proximal = True
    fixed_points = True
    through_steps = True

    def __check_init__(self) -> None:
        k = self.directions
        counts = isinstance(k, int) and not isinstance(k, bool) and k >= 1
        if k is not None and k != "guess" and not counts:
            raise ValueError(
                "Forward(directions=...) must be a number of directions (at least 1), 'guess' or None (all "
                f"of them, exact), got {k!r}."
            )

    def wants_estimate(self) -> bool:
        # Of a slope along few directions it would say what is known: far from the gradient.
        return (self.directions is None) if self.estimate is None else self.estimate

    def init(self, problem: BilevelProblem, solver: Solver, w: Tree, lam: Tree, key: Array) -> None:
        size = tree.size(lam)
        if self.directions is None and size > self.limit:
            raise ValueError(
                f"Forward carries one tangent of the whole solver state for each of the {size} entries of "
                f"lam, more than limit={self.limit}. Use Unrolled, whose cost does not grow with them, "
                "Forward(directions=K) for an unbiased estimate, or raise the limit."
            )

    def step(
        self, problem: BilevelProblem, solver: Solver, w: Tree, lam: Tree, state: None, key: Array
    ) -> tuple[Hypergradient, None]:
        sampler, outer_batch = problem.inner_sampler(key), problem.outer_batch(key)
        at_lam = make_solver(solver, lam)
        if has_prox(problem):
            check_proximal(at_lam)
        total = at_lam.max_steps

        def begin(lam: Tree) -> Any:
            first = problem.start(w, lam, sampler(0))
            objective = problem.inner_objective(lam)
            return first, make_solver(solver, lam).init(objective, first, sampler(0))

        def steps(lam: Tree, carry: Any, num_steps: int, start: int) -> Any:
            inner_solver, objective = make_solver(solver, lam), problem.inner_objective(lam)
            first, inner_state = carry
            return run_steps(
                inner_solver, objective, first, inner_state, sampler, num_steps, start=start
            )

        def trained(flat: Array, moved: Array) -> tuple[Array, Tree]:
            lam = unflatten(flat)
            first, inner_state = begin(lam)
            if watched:
                first = _moved(first, moved, jax.random.fold_in(key, 5))
            w_final, _ = steps(lam, (first, inner_state), total, 0)
            return problem.outer(w_final, lam, outer_batch), w_final

        flat, unflatten = tree.flatten(lam)
        size, code = flat.size, jnp.int32(Status.OK)
        if self.directions is None:
            basis = jnp.eye(size, dtype=flat.dtype)
        elif self.directions == "guess":
            carry = steps(lam, begin(lam), total - 1, 0)

            def last(lam: Tree) -> Array:
                return problem.outer(steps(lam, carry, 1, total - 1)[0], lam, outer_batch)

            u = tree.flatten(jax.grad(last)(lam))[0]
            norm = jnp.linalg.norm(u)
            code = where(norm == 0, Status.BREAKDOWN)
            basis = (u / jnp.where(norm > 0, norm, jnp.ones_like(norm)))[None]
        else:
            shape, at = (int(self.directions), size), jax.random.fold_in(key, 4)
            basis = jax.random.rademacher(at, shape, flat.dtype)

        zero, count, watched = jnp.zeros((), flat.dtype), len(basis), self.max_growth is not None
        tangents = (basis, jnp.zeros(count, flat.dtype))
        if watched:
            tangents = (
                jnp.concatenate([basis, jnp.zeros_like(flat)[None]]),
                jnp.append(tangents[1], jnp.ones_like(zero)),
            )
        # The primal has no tangent axis: it is computed once.
        along = lambda v, m: jax.jvp(trained, (flat, zero), (v, m), has_aux=True)
        value, slopes, w = jax.vmap(along, out_axes=(None, 0, None))(*tangents)
        mean = slopes[:count].astype(flat.dtype) @ basis
        if isinstance(self.directions, int):
            mean = mean / self.directions
        grad = unflatten(mean)
        growth, exploded = None, jnp.int32(Status.OK)
        if self.max_growth is not None:
            c_norm = tree.norm(jax.grad(problem.outer)(w, lam, outer_batch))
            growth = jnp.abs(slopes[-1]) / jnp.where(c_norm > 0, c_norm, jnp.ones_like(c_norm))
            exploded = where(growth > cast(self.max_growth, growth), Status.DIVERGED)
        inner = judge(
            at_lam,
            problem.inner_objective(lam),
            w,
            sampler(0),
            jnp.int32(total),
            jnp.zeros(()),
        )
        info = make_info(value, inner, grad, code, exploded, adjoint_steps=total, growth=growth)
        if isinstance(self.directions, int):
            spread = math.sqrt((size - 1) / (self.directions + size - 1))
            info = info._replace(error_estimate=cast(spread, info.error_estimate))
        return Hypergradient(grad, w, info), None

    @classmethod
    def default_solver(cls) -> AbstractInnerSolver:
        return GradientDescent(max_steps=100, learning_rate="auto")


def _moved(w: Tree, far: Array, key: Array) -> Tree:
    """`w` plus `far` times random entries 1 and -1."""
    leaves, treedef = jax.tree.flatten(w)
    keys = jax.random.split(key, len(leaves))
    signs = [jax.random.rademacher(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
    moved = [x + far.astype(x.dtype) * sign for x, sign in zip(leaves, signs, strict=True)]
    return jax.tree.unflatten(treedef, moved)
