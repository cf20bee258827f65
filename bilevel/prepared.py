"""The arguments of a run, checked and in the form that its programs take."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from bilevel import retries as retrying
from bilevel import sharding, transforms, validation
from bilevel.choice import resolved
from bilevel.outer.base import OuterMethod, check
from hypergrad import AbstractEngine, BilevelProblem
from hypergrad.base import Solver
from solvers import tree
from solvers.fields import Schedule, at_step
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
    key = validation.key(key)
    lam = validation.variables("lam", lam)
    w = validation.start(problem, w, lam, key)
    if validation.is_traced(problem, lam, w, solver, engine, key):
        raise TypeError(
            "run works from Python, between compiled chunks: do not call it inside jit."
        )
    own = engine.descent_rate()
    if outer is None:
        outer = optax.adam(1e-1) if own is None else optax.sgd(_plain_rate(own))
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
    elif own is not None and not _is_descent(outer, own, lam):
        name = type(engine).__name__
        raise ValueError(
            f"{name} is right where lam takes plain gradient steps at the engine's own rate: expected "
            f"outer=optax.sgd(r) with {name}(outer_step=r), r = step_size where it is None, or no outer= at all."
        )
    elif validation.count("retries", retries, 0):
        outer = retrying.shortening(outer)
    scales = transforms.broadcast(transform, lam)
    transforms.check_domain(scales, lam)
    validation.losses(problem, w, lam)
    w, (lam, key) = sharding.by_task(problem, w), sharding.on_all(problem, (lam, key))

    rule = outer if isinstance(outer, OuterMethod) else StaticFunction(outer)
    return Prepared(engine, problem, solver, rule, scales, w, lam, key)


def _plain_rate(own: Any) -> Any:
    """The rate as optax takes it: a number, or a function of the step."""
    return own if isinstance(own, Schedule) else float(own)


def _is_descent(rule: optax.GradientTransformation, own: Any, lam: Tree) -> bool:
    """Whether the first two steps of the rule are `-rate * gradient`, for gradients of different sizes and signs."""
    rule = optax.with_extra_args_support(rule)
    shape = jax.tree.map(
        lambda x: (1 + jnp.arange(x.size) % 3).reshape(x.shape).astype(x.dtype), lam
    )
    rtol = 10 * tree.epsilon(lam)
    try:
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            state = rule.init(lam)
            for step, factor in enumerate((1e3, -1.0)):
                gradient, rate = tree.scale(factor, shape), at_step(own, step)
                moves, state = rule.update(gradient, state, lam)
                far = tree.max_abs(tree.sub(moves, tree.scale(-rate, gradient)))
                if not far <= rtol * rate * tree.max_abs(gradient):
                    return False
    except Exception:  # it wants more than gradients
        return False
    return True
