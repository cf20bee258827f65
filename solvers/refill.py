"""Lanes of one compiled loop: one that is done writes its result out and loads the next problem."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

AXIS = "lanes"


class Work(NamedTuple):
    """What one problem is, as functions of a single lane."""

    start: Callable[[Array], tuple[Any, Any]]
    """Problem i at its beginning: what stays, and what its steps move."""
    stepper: Callable[[Any], Callable[[Any], Any]]
    """From what stays, the step `moving -> moving`: prepared anew whenever a lane was loaded."""
    done: Callable[[Any, Any], Array]
    """Of what stays and what moves."""
    write: Callable[[Any, Array, Any, Any], Any]
    """`(out, i, stays, moving) -> out` with the result of problem i; an i beyond the end writes nothing."""


def run_alone(
    work: Work, stays: Any, moving: Any, wanted: Array | bool = True
) -> tuple[Any, Array]:
    """One problem to its end: what moved, and the steps that took. Nothing where it is not `wanted`."""
    step = work.stepper(stays)
    return jax.lax.while_loop(
        lambda c: wanted & ~work.done(stays, c[0]),
        lambda c: (step(c[0]), c[1] + 1),
        (moving, jnp.int32(0)),
    )


def refilled(work: Work, out: Any, count: int, lanes: int, tail: int | None) -> tuple[Any, Array]:
    """All `count` problems on fewer lanes: `out` with every result, and the steps of all lanes, idle or not.

    All lanes step together until one of them is done; its result is written out and the next problem loaded in its
    place. No lane is ever masked. When at most `tail` are still at work, these end one by one. None is half the
    lanes on a CPU, where a step of one costs little, and 0 elsewhere.
    """
    if tail is None:
        tail = lanes // 2 if jax.default_backend() == "cpu" else 0

    def any_done(problem: Array, stays: Any, moving: Any) -> Array:
        return jnp.any(_done(problem, stays, moving))

    def _done(problem: Array, stays: Any, moving: Any) -> Array:
        return (problem < count) & jax.vmap(work.done)(stays, moving)

    def until_one_is_done(problem: Array, stays: Any, moving: Any) -> tuple[Any, Array]:
        """Of one lane, which sees the others: that the loop goes on is the same in all, so that none is masked."""
        step = work.stepper(stays)

        def none_done(carry: tuple[Any, Array]) -> Array:
            ended = (problem < count) & work.done(stays, carry[0])
            return jax.lax.psum(ended.astype(jnp.int32), AXIS) == 0

        return jax.lax.while_loop(
            none_done, lambda c: (step(c[0]), c[1] + 1), (moving, jnp.int32(0))
        )

    together = jax.vmap(until_one_is_done, axis_name=AXIS)

    def refill(carry: Any) -> Any:
        """Write out the first lane that is done, and load the next problem there."""
        problem, stays, moving, out, following = carry
        lane = jnp.argmax(_done(problem, stays, moving))
        out = work.write(out, problem[lane], take(stays, lane), take(moving, lane))

        def load(now: Any) -> Any:
            return put(now, lane, (following, *work.start(following)))

        def rest(now: Any) -> Any:
            problem, stays, moving = now
            return problem.at[lane].set(count), stays, moving

        now = jax.lax.cond(following < count, load, rest, (problem, stays, moving))
        return *now, out, jnp.minimum(following + 1, count)

    def cycle(carry: Any) -> Any:
        problem, stays, moving, out, following, spent = carry
        moving, steps = together(problem, stays, moving)
        carry = (problem, stays, moving, out, following)
        carry = jax.lax.while_loop(lambda c: any_done(*c[:3]), refill, carry)
        return *carry, spent + lanes * jnp.max(steps)

    def busy(carry: Any) -> Array:
        problem, *_, following, _ = carry
        return (following < count) | (jnp.sum(problem < count) > tail)

    first = jnp.arange(lanes, dtype=jnp.int32)
    carry = (first, *jax.vmap(work.start)(first), out, jnp.int32(lanes), jnp.int32(0))
    problem, stays, moving, out, _, spent = jax.lax.while_loop(busy, cycle, carry)
    if not tail:
        return out, spent

    def finish(lane: Array, carry: Any) -> Any:
        out, spent = carry
        i, own, moved = take((problem, stays, moving), lane)
        moved, steps = run_alone(work, own, moved, i < count)
        return work.write(out, i, own, moved), spent + steps

    return jax.lax.fori_loop(0, lanes, finish, (out, spent))


def take(rows: Any, i: Array) -> Any:
    return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, i, keepdims=False), rows)


def put(rows: Any, i: Array, row: Any) -> Any:
    """In place where the buffer is a loop's own. A row number beyond the end writes nothing."""
    return jax.tree.map(lambda leaf, new: leaf.at[i].set(new, mode="drop"), rows, row)
