"""The arguments of a run, checked and in the form that its programs take."""

from typing import Any, NamedTuple

import jax
import optax
from jax import Array

from bilevel import retries as retrying
from bilevel import sharding, transforms, validation
from bilevel.choice import resolved
from bilevel.outer.base import OuterMethod, check
from hypergrad import AbstractEngine, BilevelProblem
from hypergrad.base import Solver
from solvers.static_function import StaticFunction
from solvers.types import Tree


class Prepared(NamedTuple):
    engine: AbstractEngine
    problem: BilevelProblem
    solver: Solver
    rule: Any
    """The outer method, or the optax rule as a static function."""
    scales: Any
    """A transform for each leaf of `lam`."""
    w: Tree
    lam: Tree
    key: Array


def prepared(
    problem: Any,
    lam: Any,
    w: Any,
    solver: Any,
    engine: Any,
    outer: Any,
    transform: Any,
    key: Any,
    mesh: Any = None,
    retries: int = 0,
) -> Prepared:
    """Raises TypeError or ValueError for what `run` does not take."""
    problem = sharding.spread(validation.problem(problem), mesh)
    engine, solver = resolved(engine, solver, problem, lam, w, key)
    engine = validation.engine(engine)
    solver = validation.stepping(validation.solver(solver, engine, problem))
    key = jax.random.key(0) if key is None else key
    lam = validation.variables("lam", lam)
    w = validation.start(problem, w, lam, key)
    if validation.is_traced(problem, lam, w, solver, engine, key):
        raise TypeError(
            "run works from Python, between compiled chunks: do not call it inside jit."
        )
    outer = optax.adam(1e-1) if outer is None else outer
    if isinstance(outer, OuterMethod):
        check(problem, solver, engine)
        if retries:
            raise TypeError(
                "retries=... halves the steps of an optax rule; an outer method has none."
            )
    elif not isinstance(outer, optax.GradientTransformation):
        raise TypeError(
            "outer must be an optax rule such as optax.adam(1e-1) or an outer method such as "
            f"bilevel.Adaptive(), got {outer!r}."
        )
    elif validation.count("retries", retries, 0):
        outer = retrying.shortening(outer)
    scales = transforms.broadcast(transform, lam)
    transforms.check_domain(scales, lam)
    validation.losses(problem, w, lam)
    w, (lam, key) = sharding.by_task(problem, w), sharding.on_all(problem, (lam, key))

    rule = outer if isinstance(outer, OuterMethod) else StaticFunction(outer)
    return Prepared(engine, problem, solver, rule, scales, w, lam, key)
