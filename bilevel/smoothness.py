"""Whether the derivative of a training says anything about a step of lam: metasmoothness."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bilevel import validation
from bilevel.result import BilevelError
from bilevel.tasks import Tasks
from hypergrad import BilevelProblem, Unrolled
from hypergrad.base import Solver, begin, make_solver
from solvers import Status, tree
from solvers.loops import fixed_budget, run_steps
from solvers.types import Tree


@dataclasses.dataclass(frozen=True)
class Metasmoothness:
    """How smooth a training is in lam along one direction."""

    smoothness: float
    """In [-1, 1]: 1 where every weight moves on the way it began to, near 0 where they move at random."""
    curvature: float
    """`|Phi(lam + 2 h v) - 2 Phi(lam + h v) + Phi(lam)| / h^2` of the outer value."""
    values: tuple[float, float, float]
    """The outer value at lam, lam + h v, lam + 2 h v."""


def metasmoothness(
    problem: BilevelProblem,
    lam: Tree,
    w: Tree | None = None,
    *,
    solver: Solver | str | None = None,
    step: float = 0.05,
    direction: Tree | None = None,
    key: Array | None = None,
) -> Metasmoothness:
    """Three trainings, at lam, lam + h v and lam + 2 h v: does the second half of the way go on like the first?

    `smoothness = sum_i |d_i| / ||d||_1 sign(w_h - w_0)_i sign(w_2h - w_h)_i` with `d = w_2h - w_0`. Where it is far
    below 1, the derivative through the steps (`Unrolled`) is no guide for steps of length h. What raises it: smaller
    logits (divide them by 10), average instead of max pooling, normalisation before the activation, wider
    networks, smaller learning rates, `eps_root` in Adam.

    Args:
      problem, lam, w, solver, key: as in `hypergradient` with `Unrolled`; the batches are the same in all three.
      step: h, the length that a step of the outer rule would have in an entry of lam.
      direction: v, like lam; None draws normal entries.

    Cost: three inner solves of `solver.max_steps` steps, at once. Source: Engstrom et al. 2025.

    Raises TypeError or ValueError for bad input, and where no entry of w moves; BilevelError (NONFINITE) for a
    training that is not finite.
    """
    if not np.isfinite(step) or step <= 0:
        raise ValueError(f"step must be a positive number, got {step!r}.")
    if isinstance(problem, Tasks):
        raise TypeError("metasmoothness takes a bilevel.Problem; of Tasks, measure one of them.")
    chosen = validation.solver(solver, Unrolled(), validation.problem(problem))
    key = jax.random.key(0) if key is None else key
    lam = validation.variables("lam", lam)
    w = validation.start(problem, w, lam, key)
    validation.losses(problem, w, lam)
    flat, _ = tree.flatten(lam)
    if direction is None:
        v = jax.random.normal(jax.random.fold_in(key, 7), flat.shape, flat.dtype)
    else:
        along = validation.variables("direction", direction)
        if jax.tree.map(jnp.shape, along) != jax.tree.map(jnp.shape, lam):
            raise ValueError("direction must have the structure and the shapes of lam.")
        v = tree.flatten(along)[0].astype(flat.dtype)
    ends, outer = _trained(problem, chosen, w, lam, v, jnp.asarray(step, flat.dtype), key)
    ends, outer = np.asarray(ends, float), np.asarray(outer, float)
    if not (np.isfinite(ends).all() and np.isfinite(outer).all()):
        raise BilevelError(Status.NONFINITE, "metasmoothness", (ends, outer))
    first, second = ends[1] - ends[0], ends[2] - ends[1]
    weight = np.abs(ends[2] - ends[0])
    if not first.any() or not weight.any():
        raise ValueError(
            "no entry of w moved: lam does not act on the training, or step is below rounding."
        )
    smoothness = np.sum(weight * np.sign(first) * np.sign(second)) / np.sum(weight)
    curvature = abs(outer[2] - 2 * outer[1] + outer[0]) / step**2
    return Metasmoothness(float(smoothness), float(curvature), tuple(outer.tolist()))


@eqx.filter_jit
def _trained(
    problem: Any, solver: Any, w: Tree, lam: Tree, v: Array, h: Array, key: Array
) -> tuple[Array, Array]:
    """The inner variables after training at the three points, as vectors, and the outer values."""
    flat, unflatten = tree.flatten(lam)
    sampler, outer_batch = problem.inner_sampler(key), problem.outer_batch(key)

    def one(t: Array) -> tuple[Array, Array]:
        at = unflatten(flat + t * v)
        inner_solver = make_solver(solver, at)
        first, state = begin(problem, solver, w, at, key)
        objective = problem.inner_objective(at)
        end, _ = run_steps(
            inner_solver, objective, first, state, sampler, fixed_budget(inner_solver)
        )
        return tree.flatten(end)[0], problem.outer(end, at, outer_batch)

    return jax.vmap(one)(h * jnp.arange(3, dtype=h.dtype))
