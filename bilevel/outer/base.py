"""What an outer method is: from one evaluation to the next, and how exact that one has to be."""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
from jax import Array

from hypergrad import AbstractEngine, Implicit
from solvers import CG, AbstractInnerSolver
from solvers.fields import Settings
from solvers.types import Scalar


class Evaluation(NamedTuple):
    """An outer value and a hypergradient, on the unconstrained scale of the outer variable."""

    u: Array
    """(p,), where it was evaluated."""
    grad: Array
    """(p,), after the Newton correction where the method wants it."""
    error: Scalar
    """Estimated relative error before the correction, so more than that of `grad`; NaN = unknown."""
    value: Scalar
    """The outer loss at the inner point."""
    corrected: Scalar
    """The outer value at the inner solution, to second order in the inner error."""
    residual: Scalar
    """Of the inner solve, absolute."""


class OuterMethod(Settings):
    """A method for `run(outer=...)` with the engine `Implicit`: deterministic, so without batches.

    Each outer step of `run` is one evaluation; a method looks at it and says where the next one is (on a
    line, back at the last good point) and to which inner and adjoint tolerance it is solved.
    """

    corrects: ClassVar[bool] = True
    """Whether it wants the error estimate and the Newton-corrected hypergradient, at two more solves."""

    @abc.abstractmethod
    def init(self, u: Array) -> Any:
        """The state before the first evaluation, at `u`."""

    @abc.abstractmethod
    def accuracy(self, state: Any) -> tuple[Scalar, Scalar]:
        """The inner tolerance (absolute) and the adjoint's (relative) of the next evaluation."""

    @abc.abstractmethod
    def point(self, state: Any) -> Array:
        """The last good point, (p,): what a run returns."""

    @abc.abstractmethod
    def update(
        self, at: Evaluation, state: Any, project: Callable[[Array], Array]
    ) -> tuple[Array, Any]:
        """Where the next evaluation is, (p,), and the state. `project` will be applied to the former."""


def check(problem: Any, solver: Any, engine: AbstractEngine) -> None:
    """Raise TypeError where a method cannot set the tolerances, or compare values."""
    if any(size is not None for size in getattr(problem, "batch_size", (None, None))):
        raise TypeError(
            "an outer method compares outer values: expected a problem without batch_size, got "
            f"{problem.batch_size}. Use an optax rule with batches."
        )
    if getattr(problem, "per_step", None) is not None:
        raise TypeError(
            "an outer method compares outer values: expected Tasks(per_step=None), got per_step="
            f"{problem.per_step}. Use an optax rule with tasks that are drawn."
        )
    linear = engine.linear_solver if isinstance(engine, Implicit) else None
    if not isinstance(engine, Implicit) or not (linear is None or hasattr(linear, "rtol")):
        raise TypeError(
            "an outer method sets the tolerances of its solves: expected the engine Implicit with a linear "
            f"solver that has an rtol, such as CG, got {engine!r}."
        )
    if engine.target is not None:
        raise TypeError(
            "an outer method sets the tolerances of its solves: expected Implicit(target=None), got "
            f"target={engine.target}."
        )
    if not isinstance(solver, AbstractInnerSolver):
        raise TypeError(
            f"an outer method needs an inner solver with a tolerance, not a function of lam: {solver!r}."
        )


def at_accuracy(
    method: OuterMethod, state: Any, solver: AbstractInnerSolver, engine: Any
) -> tuple[AbstractInnerSolver, Implicit]:
    """The inner solver and the engine with the tolerances of the next evaluation."""
    tol, rtol = method.accuracy(state)
    linear = CG() if engine.linear_solver is None else engine.linear_solver
    linear = dataclasses.replace(linear, rtol=rtol)
    # One digit of a correction is enough to see the error and to remove most of it.
    engine = dataclasses.replace(
        engine, linear_solver=linear, refine=method.corrects, refine_rtol=0.1
    )
    return dataclasses.replace(solver, tol=tol), engine


def floors(u: Array) -> tuple[Scalar, Scalar]:
    """The smallest tolerances that make sense in the precision of `u`."""
    eps = jnp.finfo(u.dtype).eps
    return jnp.asarray(100 * eps, u.dtype), jnp.asarray(10 * eps, u.dtype)
