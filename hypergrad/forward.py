"""Forward mode through the inner solver's steps: memory that does not grow with their number."""

import math
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
    begin,
    check_proximal,
    check_settings,
    has_prox,
    make_info,
    make_solver,
)
from solvers import AbstractInnerSolver, GradientDescent, Status, tree
from solvers.fields import Number, cast, number, static
from solvers.loops import fixed_budget, judge, run_steps
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

    `reset=False` tunes while it trains (real-time): each call goes on for `solver.max_steps` steps from where the
    last one ended, solver state and Z included; the `w` and the start of the problem count at the first. The
    result is `dF/dlam + Z' dF/dw` with the Z of all steps so far, each at the lam it had: the derivative in a
    change of all of them by the same amount, and that of the whole run where lam stays. Solver settings made
    from lam must be read anew at each step, and "auto" is measured once.

    Class: any solver without a line search; no convexity; settings and starts as for `Unrolled`.
    Cost: about 3 + 2p gradients per step (p: entries, or directions); the guess costs another solve.
    Memory: p + 2 solver states, whatever T.
    Source: Franceschi et al. 2017 (forward); Baydin et al. 2022 (random directions), which has normal
    instead of Rademacher directions, of larger variance; Fournier et al. 2023 (guesses).
    """

    directions: int | str | None = static(None)
    limit: int = static(64, low=1)
    reset: bool = static(True)
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
        if not self.reset and k is not None:
            raise ValueError(
                "Forward(reset=False) carries the tangent of every entry of lam: leave out directions."
            )

    def wants_estimate(self) -> bool:
        # Of a slope along few directions it would say what is known: far from the gradient.
        return (self.directions is None) if self.estimate is None else self.estimate

    def init(
        self, problem: BilevelProblem, solver: Solver, w: Tree, lam: Tree, key: Array
    ) -> "_Running | None":
        size = tree.size(lam)
        if self.directions is None and size > self.limit:
            raise ValueError(
                f"Forward carries one tangent of the whole solver state for each of the {size} entries of "
                f"lam, more than limit={self.limit}. Use Unrolled, whose cost does not grow with them, "
                "Forward(directions=K) for an unbiased estimate, or raise the limit."
            )
        if self.reset:
            return None
        running = self._begun(problem, solver, w, lam, key, self._tangents(lam, key)[0])
        check_settings(
            "Forward(reset=False)", solver, make_solver(solver, lam), _joined(*running[:2])[1]
        )
        return running

    def step(
        self, problem: BilevelProblem, solver: Solver, w: Tree, lam: Tree, state: Any, key: Array
    ) -> tuple[Hypergradient, "_Running | None"]:
        sampler, outer_batch = problem.inner_sampler(key), problem.outer_batch(key)
        at_lam = make_solver(solver, lam)
        if has_prox(problem):
            check_proximal(at_lam)
        total = fixed_budget(at_lam)
        flat, unflatten = tree.flatten(lam)

        def steps(lam: Tree, carry: Any, num_steps: int, start: int) -> Any:
            inner_solver, objective = make_solver(solver, lam), problem.inner_objective(lam)
            first, inner_state = carry
            return run_steps(
                inner_solver, objective, first, inner_state, sampler, num_steps, start=start
            )

        code = jnp.int32(Status.OK)
        if self.directions == "guess":
            carry = steps(lam, begin(problem, solver, w, lam, key), total - 1, 0)

            def last(lam: Tree) -> Array:
                return problem.outer(steps(lam, carry, 1, total - 1)[0], lam, outer_batch)

            u = tree.flatten(jax.grad(last)(lam))[0]
            norm = jnp.linalg.norm(u)
            code = where(norm == 0, Status.BREAKDOWN)
            unit = u / jnp.where(norm > 0, norm, jnp.ones_like(norm))
            tangents, count = self._watched(unit[None])
        else:
            tangents, count = self._tangents(lam, key)
        running = self._begun(problem, solver, w, lam, key, tangents) if self.reset else state

        def trained(flat: Array, floats: Any) -> tuple[tuple[Array, Any], Any]:
            lam = unflatten(flat)
            carry = steps(lam, _joined(floats, running.others), total, 0)
            floats, others = _parted(carry)
            return (problem.outer(carry[0], lam, outer_batch), floats), others

        # The primal has no tangent axis: it is computed once.
        along = lambda v, z: jax.jvp(trained, (flat, running.floats), (v, z), has_aux=True)
        moved = jax.vmap(along, out_axes=(None, 0, None))(tangents, running.tangents)
        (value, floats), (slopes, after), others = moved
        w = floats[0]
        mean = slopes[:count].astype(flat.dtype) @ tangents[:count]
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
            size = flat.size
            spread = math.sqrt((size - 1) / (self.directions + size - 1))
            info = info._replace(error_estimate=cast(spread, info.error_estimate))
        return Hypergradient(grad, w, info), None if self.reset else _Running(floats, others, after)

    def _tangents(self, lam: Tree, key: Array) -> tuple[Array, int]:
        """Directions of lam, one a row, and their number; a row of zeros follows where growth is watched."""
        flat, _ = tree.flatten(lam)
        if self.directions is None:
            return self._watched(jnp.eye(flat.size, dtype=flat.dtype))
        shape, at = (int(self.directions), flat.size), jax.random.fold_in(key, 4)
        return self._watched(jax.random.rademacher(at, shape, flat.dtype))

    def _watched(self, basis: Array) -> tuple[Array, int]:
        if self.max_growth is None:
            return basis, len(basis)
        return jnp.concatenate([basis, jnp.zeros_like(basis[:1])]), len(basis)

    def _begun(
        self,
        problem: BilevelProblem,
        solver: Solver,
        w: Tree,
        lam: Tree,
        key: Array,
        tangents: Array,
    ) -> "_Running":
        """The first state and its tangents along these directions of lam."""
        flat, unflatten = tree.flatten(lam)
        start = lambda flat: _parted(begin(problem, solver, w, unflatten(flat), key))
        along = lambda v: jax.jvp(start, (flat,), (v,), has_aux=True)
        floats, moved, others = jax.vmap(along, out_axes=(None, 0, None))(tangents)
        if self.max_growth is not None:
            first, inner = moved
            moved = _set_last(first, jax.random.fold_in(key, 5)), inner
        return _Running(floats, others, moved)

    @classmethod
    def default_solver(cls) -> AbstractInnerSolver:
        return GradientDescent(max_steps=100, learning_rate="auto")


class _Running(NamedTuple):
    """A training on its way: the inner variable and the solver's state."""

    floats: Any
    others: Any
    """The leaves of the state that have no derivative: counts, keys."""
    tangents: Any
    """Of `floats`, along the first axis; the last one watches the growth."""


def _parted(carry: Any) -> tuple[Any, Any]:
    return eqx.partition(carry, eqx.is_inexact_array)


def _joined(floats: Any, others: Any) -> Any:
    return eqx.combine(floats, others)


def _set_last(tangents: Tree, key: Array) -> Tree:
    """Random entries 1 and -1 in the last of the tangents."""
    leaves, treedef = jax.tree.flatten(tangents)
    keys = jax.random.split(key, len(leaves))
    signs = [
        jax.random.rademacher(k, x.shape[1:], x.dtype) for k, x in zip(keys, leaves, strict=True)
    ]
    moved = [x.at[-1].set(sign) for x, sign in zip(leaves, signs, strict=True)]
    return jax.tree.unflatten(treedef, moved)
