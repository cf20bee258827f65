"""Descent along lines with hypergradients that are as exact as the step at hand needs."""

from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array

from bilevel.outer.base import Evaluation, OuterMethod, floors
from solvers.fields import Number, cast, number, static
from solvers.types import Scalar

_ARMIJO = 1e-4


class _LineSearch(OuterMethod):
    """What the two methods share. Subclasses say in which direction, and how tolerances move."""

    tol: eqx.AbstractVar[Number]
    rtol: eqx.AbstractVar[Number]
    largest_error: eqx.AbstractVar[Number]
    tighten: eqx.AbstractVar[Number]
    first_step: eqx.AbstractVar[Number]
    max_move: eqx.AbstractVar[Number]
    memory: eqx.AbstractVar[int]
    max_tries: eqx.AbstractVar[int]

    def init(self, u: Array) -> "State":
        zero = jnp.zeros((), u.dtype)
        return State(
            u=u,
            grad=jnp.zeros_like(u),
            corrected=zero,
            slack=zero,
            direction=jnp.zeros_like(u),
            step=cast(self.first_step, u),
            tries=jnp.int32(0),
            fresh=jnp.asarray(True),
            tol=cast(self.tol, u),
            rtol=cast(self.rtol, u),
            memory=_Memory(
                s=jnp.zeros((self.memory, u.size), u.dtype),
                y=jnp.zeros((self.memory, u.size), u.dtype),
                count=jnp.int32(0),
            ),
        )

    def accuracy(self, state: "State") -> tuple[Scalar, Scalar]:
        return state.tol, state.rtol

    def point(self, state: "State") -> Array:
        return state.u

    def update(
        self, at: Evaluation, state: "State", project: Callable[[Array], Array]
    ) -> tuple[Array, "State"]:
        low_tol, low_rtol = floors(at.u)
        at_floor = (state.tol <= low_tol) & (state.rtol <= low_rtol)
        # What the projection holds where it is has no part in the direction (Bertsekas 1982), nor in the
        # norm that the error is compared with.
        nudge = 1e-4 / _positive(jnp.max(jnp.abs(at.grad)))
        free = jnp.where(jnp.abs(project(at.u - nudge * at.grad) - at.u) > 0, at.grad, 0.0)
        share = jnp.linalg.norm(at.grad) / _positive(jnp.linalg.norm(free))
        error = jnp.where(jnp.isnan(at.error), jnp.inf, at.error * share).astype(at.u.dtype)
        trusted = (error <= self.largest_error) | at_floor

        # What the second-order correction of a value may still be wrong by.
        size = 10 * jnp.finfo(at.u.dtype).eps * _positive(jnp.abs(at.corrected))
        slack = jnp.minimum(error, 1.0) * jnp.abs(at.corrected - at.value) + size
        slope = jnp.minimum(state.grad @ (at.u - state.u), 0.0)
        allowed = state.corrected + _ARMIJO * slope + state.slack + slack
        falls = at.corrected <= allowed
        accepts = trusted & (state.fresh | falls)
        rejects = trusted & ~accepts
        gives_up = rejects & (state.tries + 1 >= self.max_tries)

        memory = self._remember(at, state, accepts & ~state.fresh)
        # Along a projected path only steepest descent is sure to lead down.
        memory = memory._replace(count=jnp.where(gives_up, 0, memory.count))
        direction = jnp.where(free == 0, 0.0, self._direction(free, memory))
        downhill = free @ direction < 0
        direction = jnp.where(downhill, direction, -free)
        longest = self.max_move * (1 + jnp.max(jnp.abs(at.u)))
        direction = direction * jnp.minimum(1.0, longest / _positive(jnp.max(jnp.abs(direction))))
        first = memory.count == 0
        step = self._first_trial(at, state, first)

        # Not trusted: here again, more exactly. Rejected: a shorter step, and after too many of those back
        # to the last good point, more exactly and without the memory. Accepted: on.
        shrink = cast(self.tighten, at.u)
        factor = jnp.where(accepts, self._factor(error), 1.0)
        factor = jnp.where(~trusted | gives_up, shrink, factor)
        # A tolerance far above the residual does not bind, and would let the next point go unsolved.
        loosest = jnp.maximum(100 * at.residual, low_tol)
        shorter = state.step * self._shrink(at.corrected - state.corrected, slope)
        following = jnp.where(accepts, at.u + step * direction, state.u + shorter * state.direction)
        following = jnp.where(gives_up, state.u, following)
        following = jnp.where(trusted, following, at.u)
        pick = lambda new, old: jnp.where(accepts, new, old)
        return following, State(
            u=pick(at.u, state.u),
            grad=pick(at.grad, state.grad),
            corrected=pick(at.corrected, state.corrected),
            slack=pick(slack, state.slack),
            direction=pick(direction, state.direction),
            step=jnp.where(accepts, step, jnp.where(rejects, shorter, state.step)),
            tries=jnp.where(accepts | gives_up, 0, state.tries + rejects.astype(jnp.int32)),
            fresh=jnp.where(accepts, False, state.fresh | gives_up),
            tol=jnp.maximum(jnp.minimum(state.tol * factor, loosest), low_tol),
            rtol=jnp.clip(state.rtol * factor, low_rtol, 0.1),
            memory=memory,
        )

    def _remember(self, at: Evaluation, state: "State", when: Array) -> "_Memory":
        s, y = at.u - state.u, at.grad - state.grad
        good = when & (s @ y > 1e-8 * jnp.linalg.norm(s) * jnp.linalg.norm(y))
        old = state.memory
        push = lambda rows, row: jnp.where(good, jnp.roll(rows, -1, axis=0).at[-1].set(row), rows)
        count = jnp.minimum(old.count + good.astype(jnp.int32), self.memory)
        return _Memory(push(old.s, s), push(old.y, y), count)

    def _direction(self, grad: Array, memory: "_Memory") -> Array:
        raise NotImplementedError

    def _first_trial(self, at: Evaluation, state: "State", first: Array) -> Scalar:
        raise NotImplementedError

    def _shrink(self, rise: Scalar, slope: Scalar) -> Scalar:
        raise NotImplementedError

    def _factor(self, error: Scalar) -> Scalar:
        raise NotImplementedError


class Adaptive(_LineSearch):
    """L-BFGS on the hypergradient, with the accuracy that its error estimate asks for.

    After each accepted step both tolerances are multiplied by `target / error`, within 0.1 and 4: the
    hypergradient keeps a relative error near `target` before its Newton correction (and near its square
    after), so early steps are cheap and late ones exact. An estimated error above `largest_error` moves
    nothing: the same point is solved more exactly. Steps are shortened, to the minimum of a parabola, until
    the corrected outer value falls (Armijo, up to what the correction may be wrong by). Entries that the
    problem's `outer_projection` holds at a bound are left out of the direction.

    `tol` and `rtol` are the first inner and adjoint tolerances; what they are matters little.
    Cost per evaluation: an inner solve, and three linear solves of few digits.
    Source: the line search follows MAID; the control by the defect estimate is ours.
    """

    tol: Number = number(1e-2, low=0.0, strict=True, infinite=False)
    rtol: Number = number(1e-1, low=0.0, strict=True, infinite=False)
    target: Number = number(0.1, low=0.0, strict=True)
    largest_error: Number = number(0.5, low=0.0, strict=True)
    tighten: Number = number(0.1, low=0.0, strict=True)
    first_step: Number = number(1.0, low=0.0, strict=True)
    max_move: Number = number(2.0, low=0.0, strict=True)
    memory: int = static(10, low=1)
    max_tries: int = static(8, low=1)

    def _direction(self, grad: Array, memory: "_Memory") -> Array:
        return -inverse_hessian(memory, grad)

    def _first_trial(self, at: Evaluation, state: "State", first: Array) -> Scalar:
        size = _positive(jnp.linalg.norm(at.grad))
        return jnp.where(first, cast(self.first_step, at.u) * jnp.minimum(1.0, 1 / size), 1.0)

    def _shrink(self, rise: Scalar, slope: Scalar) -> Scalar:
        """To the minimum of the parabola through both values and the slope."""
        factor = jnp.clip(-slope / (2 * _positive(rise - slope)), 0.02, 0.5)
        return jnp.where(jnp.isfinite(rise), factor, 0.02)

    def _factor(self, error: Scalar) -> Scalar:
        return jnp.clip(cast(self.target, error) / _positive(error), 0.1, 4.0)


class MAID(_LineSearch):
    """The method of adaptive inexact descent: steepest descent, steps and tolerances by fixed factors.

    An accepted step is followed by one 10/9 times as long and tolerances 1.25 times as large; a
    hypergradient that need not be a descent direction (estimated error above its norm), and `max_tries`
    halved steps, by tolerances half as large. Departs from the paper: errors are those of the defect
    estimate, not of a worst-case bound, and values are compared after their second-order correction.

    Source: Salehi, Mukherjee, Roberts and Ehrhardt, SIAM J. Math. Data Sci. 2025.
    """

    tol: Number = number(1e-2, low=0.0, strict=True, infinite=False)
    rtol: Number = number(1e-2, low=0.0, strict=True, infinite=False)
    largest_error: Number = number(1 - _ARMIJO, low=0.0, strict=True)
    tighten: Number = number(0.5, low=0.0, strict=True)
    loosen: Number = number(1.25, low=1.0)
    first_step: Number = number(1e-2, low=0.0, strict=True)
    grow: Number = number(10 / 9, low=1.0)
    max_move: Number = number(1e3, low=0.0, strict=True)
    memory: int = static(1, low=1)
    max_tries: int = static(5, low=1)

    def _direction(self, grad: Array, memory: "_Memory") -> Array:
        return -grad

    def _first_trial(self, at: Evaluation, state: "State", first: Array) -> Scalar:
        return jnp.where(state.fresh, state.step, state.step * cast(self.grow, at.u))

    def _shrink(self, rise: Scalar, slope: Scalar) -> Scalar:
        return jnp.full_like(rise, 0.5)

    def _factor(self, error: Scalar) -> Scalar:
        return cast(self.loosen, error)


class _Memory(NamedTuple):
    """Last pairs of L-BFGS, newest last."""

    s: Array  # (memory, p)
    y: Array
    count: Array


class State(NamedTuple):
    """The last accepted point and the line from there."""

    u: Array
    grad: Array
    corrected: Scalar
    slack: Scalar
    direction: Array
    step: Scalar
    tries: Array
    fresh: Array  # whether the next evaluation is accepted whatever its value
    tol: Scalar
    rtol: Scalar
    memory: _Memory


def _positive(x: Array) -> Array:
    """Safe to divide by."""
    return jnp.maximum(x, jnp.finfo(x.dtype).tiny)


def inverse_hessian(memory: _Memory, grad: Array) -> Array:
    """The two-loop recursion of L-BFGS: `H grad`. Nocedal and Wright, algorithm 7.4."""
    size = memory.s.shape[0]
    used = jnp.arange(size, dtype=jnp.int32) >= size - memory.count
    curvature = jnp.einsum("mp,mp->m", memory.s, memory.y)
    rho = jnp.where(used, 1 / jnp.where(used, curvature, 1.0), 0.0)

    def backward(q: Array, pair: tuple) -> tuple[Array, Array]:
        s, y, r = pair
        a = r * (s @ q)
        return q - a * y, a

    q, a = jax.lax.scan(backward, grad, (memory.s, memory.y, rho), reverse=True)
    newest = _positive(memory.y[-1] @ memory.y[-1])
    gamma = jnp.where(memory.count > 0, curvature[-1] / newest, 1.0)

    def forward(q: Array, pair: tuple) -> tuple[Array, None]:
        s, y, r, a = pair
        return q + s * (a - r * (y @ q)), None

    q, _ = jax.lax.scan(forward, gamma * q, (memory.s, memory.y, rho, a))
    return q
