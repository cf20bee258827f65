"""Conjugate gradients that report the true residual and the curvature they met."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from solvers import tree
from solvers.fields import Number, cast, number, static
from solvers.linear.base import (
    AbstractLinearSolver,
    LinearInfo,
    accept_fixed_budget,
    finish,
    step_budget,
    target_residual,
)
from solvers.linear.preconditioners import AbstractPreconditioner
from solvers.status import Status
from solvers.types import MatVec, ObjectiveFn, Scalar, Tree


class CG(AbstractLinearSolver):
    """Preconditioned conjugate gradients for a symmetric positive (semi)definite system.

    Stops at `||b - A x|| <= max(rtol ||b||, atol)`; the recursion's residual is checked against the
    recomputed one and the iteration restarted where they disagree. `rtol` defaults to 1e-10 in
    float64 and 1e-5 in float32 (never below 10 eps), `max_steps` to ten times the dimension, within
    100 and 5000. `rtol=0, atol=0` runs `max_steps` steps (or until rounding ends the progress). `steps`
    bounds them too: a number, rounded down and at least 1, that may follow the outer step without another compilation.
    `preconditioner` is a symmetric positive definite approximation of the inverse: a function `r -> z`,
    or `Jacobi`, `NystromPreconditioner` or another `AbstractPreconditioner`, made once per operator.

    Status: INDEFINITE where a direction of negative curvature is met, BREAKDOWN where one of zero
    curvature is (a right-hand side outside the range of a singular matrix), else MAX_STEPS or OK. A
    singular but consistent system is OK. `curvature` is the smallest `p'Ap / p'p` of the directions.

    Cost: one product per step and one to recompute the residual; memory four vectors.
    Source: Hestenes and Stiefel 1952; restart and curvature test as in Nocedal and Wright, chapter 7.
    """

    rtol: Number | None = number(None, low=0.0, infinite=False)
    atol: Number = number(0.0, low=0.0, infinite=False)
    max_steps: int | None = static(None, low=1)
    preconditioner: AbstractPreconditioner | Callable[[Tree], Tree] | None = None
    steps: Number | None = number(None, low=1.0)

    def __check_init__(self) -> None:
        given = self.preconditioner
        if isinstance(given, type) or not (
            given is None or callable(given) or isinstance(given, AbstractPreconditioner)
        ):
            raise TypeError(
                "CG(preconditioner=...) must be a function or an instance such as Jacobi(), "
                f"got {given!r}."
            )

    def init(self, matvec: MatVec, like: Tree, key: Array) -> Any:
        """The preconditioner's state, if it has one."""
        if isinstance(self.preconditioner, AbstractPreconditioner):
            return self.preconditioner.init(matvec, like, key)
        return None

    def solve_unit(
        self, matvec: MatVec, b: Tree, x0: Tree, state: Any, key: Array, unit: Scalar
    ) -> tuple[Tree, LinearInfo]:
        iteration = self.iteration(matvec, b, state, unit)
        carry = jax.lax.while_loop(lambda c: ~is_done(c), iteration.step, iteration.begin(x0))
        return iteration.end(carry)

    def iteration(self, matvec: MatVec, b: Tree, state: Any, unit: Scalar) -> "Iteration":
        """The parts of `solve_unit`, for loops of many systems."""
        b_norm = tree.norm(b)
        dtype = b_norm.dtype
        eps = tree.epsilon(b)
        target = target_residual(b, self.rtol, self.atol, unit)
        most = step_budget(self.max_steps, b)
        max_steps = jnp.asarray(most, dtype)
        if self.steps is not None:
            steps = jnp.asarray(self.steps)  # a schedule may give any dtype
            bound = jnp.clip(steps, jnp.ones_like(steps), jnp.asarray(most, steps.dtype))
            max_steps = jnp.floor(bound.astype(dtype))
        approximate = self.preconditioner

        def precondition(r: Tree) -> Tree:
            if approximate is None:
                return r
            if isinstance(approximate, AbstractPreconditioner):
                return approximate.apply(state, r)
            return approximate(r)

        largest = jnp.zeros((), dtype)
        if isinstance(approximate, AbstractPreconditioner):
            largest = largest + cast(approximate.largest(state), b_norm)

        zero, one = jnp.zeros((), dtype), jnp.ones((), dtype)

        def is_open(residual: Scalar, steps: Scalar, code: Scalar) -> Array:
            return (residual > target) & (steps < max_steps) & (code == Status.OK)

        def step(c: _Carry) -> _Carry:
            """One product: with the direction, or with `x` to recompute the residual.

            Both in one body, since compilation takes as long as the products that are written out.
            """
            s = _unpack(_Scalars, c.scalars)
            recompute = s.recompute > 0
            image = matvec(c.direction)
            kappa, length2, image2 = tree.vdots(
                (c.direction, image), (c.direction, c.direction), (image, image)
            )
            rayleigh = kappa / length2
            stretch = jnp.sqrt(image2 / jnp.where(length2 > 0, length2, one))  # `x` may be zero
            largest = jnp.maximum(s.largest, stretch)
            flat = 10 * eps * largest
            code = jnp.where(
                rayleigh < -flat,
                Status.INDEFINITE,
                jnp.where(rayleigh <= flat, Status.BREAKDOWN, 0),
            )
            moves = ~recompute & (code == Status.OK)
            alpha = jnp.where(moves, s.gamma / kappa, zero)
            met = _pack(
                _Met(
                    move=alpha,
                    fall=jnp.where(recompute, one, alpha),
                    code=jnp.where(recompute, s.code, code.astype(dtype)),
                    curvature=jnp.where(recompute, s.curvature, jnp.minimum(s.curvature, rayleigh)),
                    largest=largest,
                )
            )
            m = _unpack(_Met, met)
            x = tree.axpy(m.move, c.direction, c.x)
            r = tree.axpy(-m.fall, image, tree.where(recompute, b, c.r))
            z = precondition(r)
            if approximate is None:
                gamma = length2 = tree.vdot(r, r)
            else:
                length2, gamma = tree.vdots((r, r), (r, z))
            residual = jnp.sqrt(length2)
            steps = s.steps + jnp.where(recompute, zero, one)
            opened = is_open(residual, steps, m.code)
            # The recomputed residual ends it where it met the target, to within what rounding leaves of
            # `b - A x` (part of the floor that `finish` allows), or no longer falls.
            met_it = residual <= 10 * eps * (jnp.sqrt(image2) + b_norm)
            done = recompute & ~(opened & ~met_it & (residual < 0.5 * s.last_true))
            scalars = _pack(
                _Scalars(
                    gamma=gamma,
                    beta=jnp.where(recompute, zero, gamma / s.gamma),
                    last_true=jnp.where(recompute, residual, s.last_true),
                    recompute=(~recompute & ~opened).astype(dtype),
                    done=done.astype(dtype),
                    steps=steps,
                    code=m.code,
                    curvature=m.curvature,
                    largest=m.largest,
                )
            )
            s = _unpack(_Scalars, scalars)
            direction = tree.where(s.recompute > 0, x, tree.axpy(s.beta, c.direction, z))
            return _Carry(x, r, direction, scalars)

        def begin(x0: Tree) -> _Carry:
            x0 = tree.where(b_norm > 0, x0, tree.zeros_like(x0))
            warm = tree.max_abs(x0) > 0
            z = precondition(b)
            start = _Scalars(
                gamma=tree.vdot(b, z),
                beta=zero,
                last_true=jnp.where(warm, jnp.inf, b_norm),
                recompute=warm.astype(dtype),
                done=(~warm & ~is_open(b_norm, zero, zero)).astype(dtype),
                steps=zero,
                code=zero,
                curvature=jnp.full_like(zero, jnp.inf),
                largest=largest,
            )
            return _Carry(x0, b, tree.where(warm, x0, z), _pack(start))

        def end(carry: _Carry) -> tuple[Tree, LinearInfo]:
            last = _unpack(_Scalars, carry.scalars)
            curvature = jnp.where(jnp.isinf(last.curvature), jnp.nan, last.curvature)
            info = finish(
                matvec,
                b,
                carry.x,
                carry.r,
                num_steps=last.steps.astype(jnp.int32),
                code=last.code.astype(jnp.int32),
                curvature=curvature,
                target=target,
                largest=last.largest,
            )
            return carry.x, accept_fixed_budget(info, self.rtol, self.atol)

        return Iteration(begin, step, end)


def preconditioned(
    linear: AbstractLinearSolver, objective: ObjectiveFn, w: Tree, batch: Any
) -> AbstractLinearSolver:
    """The solver with the objective's own preconditioner at `w`, where it is a CG without any."""
    own = getattr(objective, "preconditioner", None)
    if own is None or not isinstance(linear, CG) or linear.preconditioner is not None:
        return linear
    prepared = own(w, getattr(objective, "args", None), batch)
    return dataclasses.replace(linear, preconditioner=prepared)


def is_done(carry: Any) -> Array:
    """Of what the steps of an `Iteration` move."""
    return _unpack(_Scalars, carry.scalars).done > 0


class Iteration(NamedTuple):
    """One solve in parts."""

    begin: Callable[[Tree], Any]
    """From the start `x0`, what the steps move."""
    step: Callable[[Any], Any]
    """One product, with a direction or with `x` to recompute the residual."""
    end: Callable[[Any], tuple[Tree, LinearInfo]]
    """The solution and its report."""


class _Carry(NamedTuple):
    x: Tree
    r: Tree
    direction: Tree  # of the next product; `x` where that is for the residual
    scalars: Array  # `_Scalars`


class _Scalars(NamedTuple):
    gamma: Scalar  # <r, z>
    beta: Scalar
    last_true: Scalar  # the residual when it was last recomputed
    recompute: Scalar  # 1 where the next product is for the residual
    done: Scalar
    steps: Scalar
    code: Scalar
    curvature: Scalar
    largest: Scalar


class _Met(NamedTuple):
    move: Scalar  # of x along the direction
    fall: Scalar  # of the residual along its image
    code: Scalar
    curvature: Scalar
    largest: Scalar


def _pack(scalars: NamedTuple) -> Array:
    """Scalars as one vector: XLA would make a kernel of each, which costs more than a small product."""
    return jax.lax.optimization_barrier(jnp.stack(list(scalars)))


def _unpack(kind: Any, vector: Array) -> Any:
    return kind(*[vector[i] for i in range(len(kind._fields))])
