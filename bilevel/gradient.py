"""One hypergradient, the memory and the lanes it takes, and how many steps of it matter."""

import dataclasses
import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh

from bilevel import lane_choice, sharding, validation
from bilevel.calls import can_estimate, engine_step, estimated, init_engine
from bilevel.choice import resolved
from bilevel.footprint import Memory, fitted
from bilevel.result import BilevelError
from bilevel.tasks import Tasks
from hypergrad import AbstractEngine, BilevelProblem, Constants, Hypergradient, Unrolled
from hypergrad.base import Solver, make_solver
from hypergrad.derivatives import hessian_product
from solvers import GradientDescent, Status
from solvers.linear.spectrum import ritz_values
from solvers.types import Tree


def hypergradient(
    problem: BilevelProblem,
    lam: Tree,
    w: Tree | None = None,
    *,
    solver: Solver | str | None = None,
    engine: AbstractEngine | str = "implicit",
    key: Array | None = None,
    mesh: Mesh | None = None,
    throw: bool = True,
) -> Hypergradient:
    """The gradient of `outer(w*(lam), lam)`, with a trust report: `(grad, w, info)`.

    Args:
      problem: the two losses and their data, or `bilevel.Tasks` of them.
      lam: the outer variable, a pytree of floating-point arrays.
      w: where the inner solve starts, a pytree of floating-point arrays; may be left out where the
        problem has an `inner_init`, which then says where.
      solver: inner solver or its name; None takes the engine's default.
      engine: hypergradient engine or its name; "auto" takes what `bilevel.choose` finds, and logs why (logger
        `bilevel`, level INFO).
      key: random key (batches, probes); None is key 0.
      mesh: `jax.sharding.Mesh` over whose devices `Tasks`, or the rows of a `Problem` (`shard_rows`), are spread, their
        number a multiple of its size.
      throw: raise BilevelError where the status is not OK. Inside `jit` or `vmap` pass False and read
        `info.status`.

    Raises:
      TypeError, ValueError: bad input, before any compute.
      BilevelError: with `throw`, a status other than OK; its `outcome` is the hypergradient.
    """
    validation.flag("throw", throw)
    chosen, *args = _checked(problem, lam, w, solver, engine, key, mesh)
    traced = validation.is_traced(chosen, *args)
    if throw and traced:
        raise TypeError("inside jit, vmap or grad an error cannot be raised: pass throw=False.")
    if getattr(chosen, "memory_budget", None) is not None:
        if traced:
            raise TypeError(
                "memory_budget compiles to find its setting, which cannot be done inside jit, vmap or "
                "grad: pass the engine of bilevel.memory(...)."
            )
        chosen = fitted(_hypergradient, chosen, *args).engine
    h = _hypergradient(chosen, *args)
    if throw and int(h.info.status) != Status.OK:
        raise BilevelError(int(h.info.status), "hypergradient", h)
    return h


def memory(
    problem: BilevelProblem,
    lam: Tree,
    w: Tree | None = None,
    *,
    solver: Solver | str | None = None,
    engine: AbstractEngine | str = "implicit",
    key: Array | None = None,
) -> Memory:
    """What `hypergradient` with these arguments takes, in bytes: compiled, not run.

    With `Unrolled(memory_budget=...)`, of the setting that was chosen, which is the result's `engine`.

    Raises as `hypergradient` does, and ValueError where no setting fits.
    """
    chosen, *args = _checked(problem, lam, w, solver, engine, key)
    return fitted(_hypergradient, chosen, *args)


def choose_lanes(
    problem: Tasks,
    lam: Tree,
    w: Tree | None = None,
    *,
    solver: Solver | str | None = None,
    engine: AbstractEngine | str = "implicit",
    key: Array | None = None,
    mesh: Mesh | None = None,
) -> int:
    """The number of lanes (of each device) that takes the fewest seconds for the step at `lam` and `w`.

    Tried are 1, 4, 8, 16, 32 and all tasks, on accelerators from the other end, until one takes a quarter
    longer than the best; within a twentieth the earlier one is taken. Each costs one compilation and three steps
    (more where they are short).
    The answer is remembered in this process for these shapes and settings. It holds for solves like those
    of the first step; which number wins may change between processes, and results with it by rounding.

    Raises as `hypergradient` does.
    """
    if not isinstance(problem, Tasks):
        raise TypeError(f"problem must be bilevel.Tasks, got {type(problem).__name__}.")
    problem = dataclasses.replace(problem, lanes="auto")
    return _checked(problem, lam, w, solver, engine, key, mesh)[1].lanes


def _checked(
    problem: Any, lam: Any, w: Any, solver: Any, engine: Any, key: Any, mesh: Any = None
) -> tuple[Any, ...]:
    """The arguments of the program: (engine, problem, solver, w, lam, key)."""
    problem = sharding.spread(validation.problem(problem), mesh)
    if getattr(problem, "pool", None) is not None:
        raise ValueError("a pool of tasks is for bilevel.run: expected Tasks(pool=None).")
    engine, solver = resolved(engine, solver, problem, lam, w, key)
    engine = validation.engine(engine)
    solver = validation.solver(solver, engine, problem)
    key = validation.key(key)
    lam = validation.variables("lam", lam)
    w = validation.start(problem, w, lam, key)
    validation.losses(problem, w, lam)
    w, (lam, key) = sharding.by_task(problem, w), sharding.on_all(problem, (lam, key))
    problem = lane_choice.settled(engine, problem, solver, w, lam, key)
    return engine, problem, solver, w, lam, key


@eqx.filter_jit
def _hypergradient(
    engine: Any, problem: BilevelProblem, solver: Any, w: Tree, lam: Tree, key: Array
) -> Hypergradient:
    state = init_engine(problem, solver, engine, w, lam, key)
    h, state = engine_step(problem, solver, engine, w, lam, state, key, jnp.int32(0))
    if can_estimate(problem, solver, engine):
        h = estimated(problem, solver, engine, lam, h, state, key, 0)
    return h


def truncation(
    problem: BilevelProblem,
    lam: Tree,
    w: Tree | None = None,
    *,
    solver: Solver | str | None = None,
    target: float = 1e-3,
    key: Array | None = None,
) -> int:
    """The smallest K for `Unrolled(truncate=K)` with `rho^K <= target`, at most the solver's `max_steps`.

    `rho = max |1 - learning_rate h|` over the curvatures h of the inner loss: what one step leaves of the adjoint.
    At the inner solution the last K steps are the first K terms of a series whose rest is at most
    `rho^K` of the whole in the norm of the adjoint. The smallest curvature is that of the problem's `constants`, else
    the smallest Ritz value of 12 Lanczos products at `w`: not below the true one, so K may be too small;
    `info.error_estimate` and, with constants, `info.bound` say what K really left out.

    Class: gradient descent without momentum on a strongly convex inner loss. Raises ValueError for others.
    """
    if not 0 < target < 1:
        raise ValueError(f"target must be between 0 and 1, got {target!r}.")
    args = _checked(problem, lam, w, solver, Unrolled(), key)[1:]
    if validation.is_traced(*args):
        raise TypeError("truncation returns a Python integer: do not call it inside jit or vmap.")
    at_lam = make_solver(args[1], args[3])
    if not isinstance(at_lam, GradientDescent) or float(at_lam.momentum) != 0:
        raise ValueError(
            "truncation knows the rate of gradient descent without momentum; got "
            f"{at_lam}. Choose K by info.error_estimate."
        )
    rate = float(_contraction(args[0], at_lam, *args[2:]))
    if not rate < 1:
        raise ValueError(
            f"the inner steps do not contract at w (rate {rate:.3g}): the inner loss is not strongly "
            "convex there, or the learning rate is too large."
        )
    steps = math.log(target) / math.log(rate) if rate > 0 else 1
    return max(1, min(math.ceil(steps - 1e-9), at_lam.max_steps))


@eqx.filter_jit
def _contraction(problem: Any, solver: GradientDescent, w: Tree, lam: Tree, key: Array) -> Array:
    batch = problem.inner_sampler(key)(0)
    objective = problem.inner_objective(lam)
    w = problem.start(w, lam, batch)
    rate = solver.init(objective, w, batch).learning_rate
    ritz = ritz_values(hessian_product(problem, w, lam, batch), w, jax.random.fold_in(key, 3))
    low, high = ritz[0], ritz[-1]
    constants = getattr(problem, "constants", None)
    if constants is not None:
        if not isinstance(constants, Constants):
            constants = constants(w, lam, batch, problem.outer_batch(key))
        low = jnp.asarray(constants.strong_convexity, low.dtype)
    worst = jnp.where(low > 0, jnp.maximum(jnp.abs(1 - rate * low), jnp.abs(1 - rate * high)), 1.0)
    return worst
