"""What a stochastic estimator may ask of one level's data: a fresh batch, a numbered one, all of it."""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array


class Slots(eqx.Module):
    """The rows of one level cut into numbered batches; the last one is shorter where they do not fit.

    A slot is drawn with the probability that a row falls into it, so the gradient on it is unbiased.
    """

    stored: Any
    """The data in `parts` blocks; where they are shuffled, each with its first rows once more at the end, one less than
    its share of a batch."""
    size: int | None = eqx.field(static=True)
    num_rows: int = eqx.field(static=True)
    """1 where there are no batches: all data are one slot."""
    shuffled: bool = eqx.field(static=True, default=False)
    parts: int = eqx.field(static=True, default=1)
    """Blocks of rows, each on a device of its own, that a batch takes equally many rows from."""

    @property
    def data(self) -> Any:
        """All rows once."""
        if self.size is None or not self.shuffled:
            return self.stored
        return self._cut(0, self.num_rows // self.parts)

    def _cut(self, start: Array | int, length: int) -> Any:
        """`length` rows from `start` on, of each block."""

        def one(leaf: Array) -> Array:
            if self.parts == 1:
                return jax.lax.dynamic_slice_in_dim(leaf, start, length)
            blocks = leaf.reshape(self.parts, -1, *leaf.shape[1:])
            cut = jax.lax.dynamic_slice_in_dim(blocks, start, length, axis=1)
            return cut.reshape(-1, *leaf.shape[1:])

        return jax.tree.map(one, self.stored)

    @property
    def num(self) -> int:
        return -(-self.num_rows // (self.size or 1))

    def draw(self, bits: Array) -> Array:
        """A slot's number, int32, from 32 random bits."""
        if self.num == 1:
            return jnp.int32(0)
        row = (bits % jnp.uint32(self.num_rows)).astype(jnp.int32)
        return row // jnp.int32(self.size or 1)

    def turn(self, seed: Array, count: Array) -> Any:
        """The batch of turn `count` of passes over shuffled rows, each pass without repeats.

        A pass begins at a row drawn from `seed` and takes batches in a circle; rows that do not fill a batch
        sit it out. One slice, and no random bits but a hash.
        """
        assert self.shuffled
        if self.size is None:
            return self.stored
        return self._cut(self.turn_start(seed, count), self.size // self.parts)

    def turn_start(self, seed: Array, count: Array) -> Array:
        """The row, of those of a block, that the batch of `turn` begins with, int32."""
        assert self.size is not None
        size, num_rows = self.size // self.parts, self.num_rows // self.parts
        rows, fit = jnp.uint32(num_rows), jnp.uint32(num_rows // size)
        count = count.astype(jnp.uint32)
        start = mixed(seed, count // fit) % rows + count % fit * jnp.uint32(size)
        return jnp.where(start >= rows, start - rows, start).astype(jnp.int32)

    def share(self, index: Array) -> Array:
        """The part of all rows that is in this slot."""
        rows = self.num_rows - index * (self.size or 1)
        return jnp.minimum(rows, self.size or 1).astype(float) / self.num_rows

    def on(self, index: Array, fn: Callable[[Any], Any]) -> Any:
        """`fn(batch)` for this slot's batch; it is compiled for each of the two lengths."""
        if self.size is None:
            return fn(self.stored)
        size, short = (rows // self.parts for rows in (self.size, self.num_rows % self.size))
        rows = lambda length: self._cut(index * size, length)
        if short == 0:
            return fn(rows(size))
        last = index == self.num - 1
        return jax.lax.cond(last, lambda: fn(rows(short)), lambda: fn(rows(size)))


class Loaded(Slots):
    """Shuffled rows that stay on the host, of which some batches are on the device.

    `stored` has shape (len(starts) + 1, size, ...), batch by batch. The last is for a batch that is not among them:
    NaN, so that a step which asks for it fails.
    """

    starts: Array = eqx.field(kw_only=True)
    """The row that each of these batches begins with, int32, ascending."""

    @property
    def data(self) -> Any:
        raise ValueError(
            "the problem has data='host', so that batches alone are on the device, but all rows at once were asked "
            "for (SRBA, VRBO and every engine with the estimator SPIDER do): expected an engine that works on "
            "batches, or data=None."
        )

    def _cut(self, start: Array | int, length: int) -> Any:
        index = jnp.sum(self.starts < start, dtype=jnp.int32)
        last = len(self.starts)
        there = self.starts[jnp.minimum(index, last - 1)] == start
        index = jnp.where(there, index, last)
        batch = lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False)[:length]
        return jax.tree.map(batch, self.stored)


class Level(NamedTuple):
    """One level's data, at one place of one step."""

    draw: Callable[[], Any]
    """A fresh batch, the same at every call."""
    slots: Slots | None
    """None where the problem has none."""
    bits: Array
    """For the slot, uint32."""


def seeds(key: Array, places: int) -> Array:
    """What `levels` draws with, for each place of a cycle: two inner batches, an outer one, slots."""
    return jax.random.bits(key, (places, 5), jnp.uint32)


def levels(
    problem: Any, key: Array, seeds: Array, count: Array, index: Array | int, pairs: bool = False
) -> tuple[Level, Level]:
    """The inner and the outer data at the `index`-th place of step `count`, which `key` belongs to.

    Shuffled rows are taken in passes, each place in its own order; else batches are drawn from `key`.
    `pairs`: an inner batch is two batches, drawn independently.
    """
    own = seeds[index]
    bits = mixed(own[3], count), mixed(own[4], count)
    slots = getattr(problem, "slots", None)
    inner, outer = (None, None) if slots is None else slots()
    if inner is None or outer is None or not inner.shuffled:
        sampler = problem.inner_sampler(key)

        def draw() -> Any:
            return (sampler(2 * index), sampler(2 * index + 1)) if pairs else sampler(index)

        place = jax.random.fold_in(key, index)
        return Level(draw, inner, bits[0]), Level(
            lambda: problem.outer_batch(place), outer, bits[1]
        )

    def turn() -> Any:
        first = inner.turn(own[0], count)
        return (first, inner.turn(own[1], count)) if pairs else first

    return Level(turn, inner, bits[0]), Level(lambda: outer.turn(own[2], count), outer, bits[1])


class Both(NamedTuple):
    """Batches of both levels, for oracles that join them."""

    inner: Callable[[Array | int], Any]
    """By number, each drawn independently."""
    outer: Any
    bits: Array
    """For a number that the oracle draws, uint32."""
    whole: bool
    """Whether every batch is all of the data."""


class _AllRows(NamedTuple):
    inner: Slots
    outer: Slots
    bits: Array

    @property
    def data(self) -> Both:
        below = self.inner.data
        return Both(lambda _: below, self.outer.data, self.bits, True)


def both_levels(problem: Any, key: Array, seeds: Array, count: Array, index: Array | int) -> Level:
    """`levels` as one, whose batch is a `Both`; it has all of the data, but no slots."""
    inner, outer = levels(problem, key, seeds, count, index)
    own = seeds[index]
    if inner.slots is not None and inner.slots.shuffled:
        rows = inner.slots
        draw = lambda number: rows.turn(joint_seed(own, number), count)
    else:
        # The batches of single oracles have the keys 0, 1, ... of this step.
        draw = problem.inner_sampler(jax.random.fold_in(jax.random.fold_in(key, index), 1))
    slots = None
    if inner.slots is not None and outer.slots is not None:
        slots = _AllRows(inner.slots, outer.slots, own[4])
    return Level(
        lambda: Both(draw, outer.draw(), mixed(own[3], count), False), cast(Any, slots), own[4]
    )


def joint_seed(own: Array, number: Array | int) -> Array:
    """Of the passes that inner batch `number` of a `Both` is taken from."""
    return mixed(own[0], jnp.asarray(number) + 1)


def mixed(seed: Array, count: Array | int) -> Array:
    """32 bits of a hash of both (the finaliser of MurmurHash3): a few integer operations, fused into one."""
    x = seed ^ (jnp.asarray(count).astype(jnp.uint32) * jnp.uint32(0x9E3779B9))
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
