"""One hypergradient."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array

from bilevel import validation
from bilevel.calls import can_estimate, engine_step, estimated, init_engine
from bilevel.result import BilevelError
from hypergrad import AbstractEngine, BilevelProblem, Hypergradient
from hypergrad.base import Solver
from solvers import Status
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
      problem: the two losses and their data, or `bilevel.Tasks` of them.
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
    validation.problem(problem)
    engine = validation.engine(engine)
    solver = validation.solver(solver, engine, problem)
    key = jax.random.key(0) if key is None else key
    lam = validation.variables("lam", lam)
    w = validation.start(problem, w, lam, key)
    if throw and validation.is_traced(problem, lam, w, solver, engine, key):
        raise TypeError("inside jit, vmap or grad an error cannot be raised: pass throw=False.")
    validation.losses(problem, w, lam)
    h = _hypergradient(problem, solver, engine, w, lam, key)
    if throw and int(h.info.status) != Status.OK:
        raise BilevelError(int(h.info.status), "hypergradient", h)
    return h


@eqx.filter_jit
def _hypergradient(
    problem: BilevelProblem, solver: Any, engine: Any, w: Tree, lam: Tree, key: Array
) -> Hypergradient:
    state = init_engine(problem, solver, engine, w, lam, key)
    h, state = engine_step(problem, solver, engine, w, lam, state, key, jnp.int32(0))
    if can_estimate(problem, solver, engine):
        h = estimated(problem, solver, engine, lam, h, state, key, 0)
    return h
