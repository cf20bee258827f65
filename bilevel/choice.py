"""Which engine and inner solver suit a problem, and why."""

import dataclasses
import logging
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array

from bilevel import validation
from bilevel.tasks import Tasks
from hypergrad import F2SA, AbstractEngine, BilevelProblem, Forward, Implicit, Unrolled
from hypergrad.base import Solver, has_prox
from solvers import LBFGS, AbstractInnerSolver, FixedPoint, Mapping, Newton, ProximalGradient, tree
from solvers.linear.spectrum import ritz_values
from solvers.types import Tree

logger = logging.getLogger("bilevel")

FEW = 20
"""Outer variables up to which forward mode is chosen: its cost grows with them, that of reverse mode does not."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """An engine and a solver to pass on, and the reason in words."""

    engine: AbstractEngine
    solver: Solver
    reason: str

    def __str__(self) -> str:
        return f"{_name(self.engine)} with {_name(self.solver)}: {self.reason}"


def choose(
    problem: BilevelProblem,
    lam: Tree,
    w: Tree | None = None,
    *,
    solver: Solver | str | None = None,
    key: Array | None = None,
) -> Choice:
    """The engine and the inner solver that `engine="auto"` takes, from structure, size and curvature.

    Args:
      solver: kept where given; then only the engine is chosen.

    | the problem | engine | solver |
    | --- | --- | --- |
    | `lam` acts through the solver or the start, at most 20 outer variables | Forward | gradient descent |
    | the same, more of them | Unrolled | gradient descent |
    | a fixed point (`Mapping`) | Implicit, by GMRES | FixedPoint, accelerated |
    | an `inner_prox` | Implicit, on the support | ProximalGradient |
    | `second_order=False` | F2SA | LBFGS |
    | negative curvature at `w` (12 Lanczos products) | Unrolled | gradient descent |
    | an `inner_hvp` or `inner_preconditioner` | Implicit, by CG | Newton |
    | else | Implicit, by CG | LBFGS |

    A negative curvature at the start proves that the inner loss is not convex; none proves nothing, so an
    implicit hypergradient still reports INDEFINITE where its solution is no minimum. A dense inverse, which
    costs a Hessian-vector product for each unknown, is never chosen: CG seldom takes as many.

    Raises as `hypergradient` does. Works from Python, not under `jit`.
    """
    validation.problem(problem)
    if isinstance(problem, Tasks):
        raise TypeError(
            "choose looks at one problem: pass tasks.problem with the data of one task."
        )
    key = jax.random.key(0) if key is None else key
    lam = validation.variables("lam", lam)
    w = validation.start(problem, w, lam, key)
    validation.losses(problem, w, lam)
    if validation.is_traced(problem, lam, w, key):
        raise TypeError("choose looks at values: do not call it inside jit, vmap or grad.")
    engine, default, reason = _rule(problem, solver, lam, w, key)
    chosen = validation.solver(default if solver is None else solver, engine, problem)
    return Choice(engine, chosen, reason)


def _rule(
    problem: Any, solver: Any, lam: Tree, w: Tree, key: Array
) -> tuple[AbstractEngine, Solver | None, str]:
    """The engine, its solver where none is given (None: the engine's own default), and why."""
    made_from_lam = callable(solver) and not isinstance(solver, AbstractInnerSolver)
    if made_from_lam or getattr(problem, "inner_init", None) is not None:
        count = tree.size(lam)
        through = "the solver's settings" if made_from_lam else "the start of the inner solve"
        why = f"lam acts through {through}, so the steps are differentiated, "
        if count <= FEW:
            return Forward(), None, f"{why}forward for {count} outer variables"
        return Unrolled(), None, f"{why}in reverse for {count} outer variables"
    if isinstance(problem.inner, Mapping):
        return Implicit(), FixedPoint(memory=5), "the inner problem is a fixed point"
    if has_prox(problem):
        return Implicit(), ProximalGradient(max_steps=10_000), "the inner problem has a prox"
    if not getattr(problem, "second_order", True):
        return F2SA(), LBFGS(), "the problem is declared without second derivatives"
    curvature = float(_lowest_curvature(problem, lam, w, key))
    if curvature < 0:
        why = f"the inner loss has negative curvature at w ({curvature:.2g}), so it is not convex: the "
        return Unrolled(), None, f"{why}steps taken are differentiated, whatever they reach"
    own = ("inner_hvp", "inner_preconditioner")
    if any(getattr(problem, name, None) is not None for name in own):
        return Implicit(), Newton(), "the problem knows its Hessian, and no curvature is negative"
    return Implicit(), LBFGS(), "no curvature seen at w is negative"


@eqx.filter_jit
def _lowest_curvature(problem: Any, lam: Tree, w: Tree, key: Array) -> Array:
    """The smallest of 12 Ritz values; 0 where it is negative by rounding alone, or NaN."""
    batch = problem.inner_sampler(key)(0)
    gradient = jax.grad(problem.inner_objective(lam))
    _, hvp = jax.linearize(lambda w: gradient(w, batch), w)
    ritz = ritz_values(hvp, w, jax.random.fold_in(key, 3))
    negative = ritz[0] < -100 * tree.epsilon(w) * jnp.max(jnp.abs(ritz))
    return jnp.where(negative, ritz[0], jnp.zeros_like(ritz[0]))


def _name(part: Any) -> str:
    known = isinstance(part, AbstractEngine | AbstractInnerSolver)
    return type(part).__name__ if known else "the solver made from lam"


def resolved(
    engine: Any, solver: Any, problem: Any, lam: Tree, w: Tree | None, key: Array | None
) -> tuple[Any, Any]:
    """`(engine, solver)`, chosen (and logged) where the engine is "auto"."""
    if not isinstance(engine, str) or engine.lower() != "auto":
        return engine, solver
    choice = choose(problem, lam, w, solver=solver, key=key)
    logger.info("%s", choice)
    return choice.engine, choice.solver
