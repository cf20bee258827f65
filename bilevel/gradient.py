"""One hypergradient."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array

from bilevel import validation
from bilevel.calls import can_estimate, engine_step, init_engine
from bilevel.footprint import Memory, fitted
from bilevel.result import BilevelError
from hypergrad import AbstractEngine, BilevelProblem, Hypergradient
from hypergrad.base import Solver
from hypergrad.estimate import with_estimate
from solvers import Status
from solvers.fields import at_step
from solvers.types import Tree


def hypergradient(
    problem: BilevelProblem,
    lam: Tree,
    w: Tree | None = None,
    *,
    solver: Solver | str | None = None,
    engine: AbstractEngine | str = "implicit",
    key: Array | None = None,
    throw: bool = True,
) -> Hypergradient:
    """The gradient of `outer(w*(lam), lam)`, with a trust report: `(grad, w, info)`.

    Args:
      problem: the two losses and their data.
      lam: the outer variable, a pytree of floating-point arrays.
      w: where the inner solve starts, a pytree of floating-point arrays; may be left out where the
        problem has an `inner_init`, which then says where.
      solver: inner solver or its name; None takes the engine's default.
      engine: hypergradient engine or its name.
      key: random key (batches, probes); None is key 0.
      throw: raise BilevelError where the status is not OK. Inside `jit` or `vmap` pass False and read
        `info.status`.

    Raises:
      TypeError, ValueError: bad input, before any compute.
      BilevelError: with `throw`, a status other than OK; its `outcome` is the hypergradient.
    """
    engine, *args = _checked(problem, lam, w, solver, engine, key)
    traced = validation.is_traced(engine, *args)
    if throw and traced:
        raise TypeError("inside jit, vmap or grad an error cannot be raised: pass throw=False.")
    if getattr(engine, "memory_budget", None) is not None:
        if traced:
            raise TypeError(
                "memory_budget compiles to find its setting, which cannot be done inside jit, vmap or "
                "grad: pass the engine of bilevel.memory(...)."
            )
        engine = fitted(_hypergradient, engine, *args).engine
    h = _hypergradient(engine, *args)
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
    engine, *args = _checked(problem, lam, w, solver, engine, key)
    return fitted(_hypergradient, engine, *args)


def _checked(problem: Any, lam: Any, w: Any, solver: Any, engine: Any, key: Any) -> tuple[Any, ...]:
    """The arguments of the program: (engine, problem, solver, w, lam, key)."""
    validation.problem(problem)
    engine = validation.engine(engine)
    solver = validation.solver(solver, engine, problem)
    key = jax.random.key(0) if key is None else key
    lam = validation.variables("lam", lam)
    w = validation.start(problem, w, lam, key)
    validation.losses(problem, w, lam)
    return engine, problem, solver, w, lam, key


@eqx.filter_jit
def _hypergradient(
    engine: Any, problem: BilevelProblem, solver: Any, w: Tree, lam: Tree, key: Array
) -> Hypergradient:
    state = init_engine(problem, solver, engine, w, lam, key)
    h, state = engine_step(problem, solver, engine, w, lam, state, key, jnp.int32(0))
    if can_estimate(problem, solver, engine):
        solver, engine = at_step((solver, engine), 0)
        h = with_estimate(problem, solver, engine, lam, h, state, key)
    return h
