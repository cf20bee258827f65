"""What a stochastic estimator may ask of one level's data: a fresh batch, a numbered one, all of it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array


class Slots(eqx.Module):
    """The rows of one level cut into numbered batches; the last one is shorter where they do not fit.

    A slot is drawn with the probability that a row falls into it, so the gradient on it is unbiased.
    """

    data: Any
    size: int | None = eqx.field(static=True)

    @property
    def num_rows(self) -> int:
        """1 where there are no batches: all data are one slot."""
        return 1 if self.size is None else jax.tree.leaves(self.data)[0].shape[0]

    @property
    def num(self) -> int:
        return -(-self.num_rows // (self.size or 1))

    def draw(self, key: Array) -> Array:
        """A slot's number, int32."""
        if self.num == 1:
            return jnp.int32(0)
        row = jax.random.randint(key, (), 0, self.num_rows, jnp.int32)
        return row // jnp.int32(self.size or 1)

    def share(self, index: Array) -> Array:
        """The part of all rows that is in this slot."""
        rows = self.num_rows - index * (self.size or 1)
        return jnp.minimum(rows, self.size or 1).astype(float) / self.num_rows

    def on(self, index: Array, fn: Callable[[Any], Any]) -> Any:
        """`fn(batch)` for this slot's batch; it is compiled for each of the two lengths."""
        size = self.size
        if size is None:
            return fn(self.data)

        def rows(length: int) -> Any:
            cut = lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, index * size, length)
            return jax.tree.map(cut, self.data)

        short = self.num_rows % size
        if short == 0:
            return fn(rows(size))
        last = index == self.num - 1
        return jax.lax.cond(last, lambda: fn(rows(short)), lambda: fn(rows(size)))


class Level(NamedTuple):
    """One level's data, at one place of one step."""

    draw: Callable[[], Any]
    """A fresh batch, the same at every call."""
    slots: Slots | None
    """None where the problem has none."""
    key: Array
    """For the slot."""


def levels(
    problem: Any, key: Array, index: Array | int, pairs: bool = False
) -> tuple[Level, Level]:
    """The inner and the outer data at the `index`-th place of the step that `key` belongs to.

    `pairs`: an inner batch is two batches, drawn independently.
    """
    sampler = problem.inner_sampler(key)
    place = jax.random.fold_in(key, index)
    slots = getattr(problem, "slots", None)
    inner, outer = (None, None) if slots is None else slots()

    def draw() -> Any:
        return (sampler(2 * index), sampler(2 * index + 1)) if pairs else sampler(index)

    return (
        Level(draw, inner, jax.random.fold_in(place, 4)),
        Level(lambda: problem.outer_batch(place), outer, jax.random.fold_in(place, 5)),
    )
