"""Functions over rows of arrays, so many at a time, on each device its own."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, PartitionSpec

from solvers import tree


def on_devices(
    mesh: Mesh | None, fn: Callable[..., Any], shared: Any, rows: tuple[Any, ...]
) -> Any:
    """`fn(shared, *rows) -> rows` on each device's own rows: loops of one device wait for no other.

    What `fn` differentiates in has to be in `shared`, not closed over: its type names the mesh outside, and the zeros
    that reverse mode makes of it would have to lie there.
    """
    if mesh is None:
        return fn(shared, *rows)
    spec = PartitionSpec(mesh.axis_names)
    specs = (PartitionSpec(), *(spec for _ in rows))
    # Every output is a row of its own device: there is nothing to check, and `while` could not be.
    mapped = jax.shard_map(fn, mesh=mesh, in_specs=specs, out_specs=spec, check_vma=False)
    return mapped(shared, *rows)


def map_rows(
    fn: Callable[..., Any], shared: Any, rows: tuple[Any, ...], lanes: int, mesh: Mesh | None
) -> Any:
    """`fn(shared, *row)` of each row, stacked."""

    def here(shared: Any, *rows: Any) -> Any:
        count = jax.tree.leaves(rows)[0].shape[0]
        one = functools.partial(fn, shared)
        if lanes == count:
            return jax.vmap(one)(*rows)
        size = lanes if lanes > 1 else None
        # In a tuple, as JAX takes a None of its own for one of `fn`, which an engine without a state returns.
        return jax.lax.map(lambda row: (one(*row),), rows, batch_size=size)[0]

    return on_devices(mesh, here, shared, rows)


def add_up(
    fn: Callable[..., Any], shared: Any, rows: tuple[Any, ...], lanes: int, mesh: Mesh | None
) -> tuple[Any, Any]:
    """`fn(shared, *row) -> (x, y)`: the sum of x, added up a few rows at a time, and the stacked y."""

    def here(shared: Any, *rows: Any) -> tuple[Any, Any]:
        one = functools.partial(fn, shared)

        def group(rows: Any) -> tuple[Any, Any]:
            x, y = jax.vmap(one)(*rows)
            return jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), x), y

        count = jax.tree.leaves(rows)[0].shape[0]
        whole = count // lanes * lanes
        split = lambda leaf: leaf[:whole].reshape(-1, lanes, *leaf.shape[1:])
        if lanes == count:
            total, y = group(rows)
        elif lanes == 1:
            step = lambda total, row: _added(total, *one(*row))
            total, y = jax.lax.scan(step, _zeros(one, rows), rows)
        else:
            step = lambda total, rows: _added(total, *group(rows))
            total, y = jax.lax.scan(step, _zeros(one, rows), jax.tree.map(split, rows))
            y = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), y)
            if whole < count:
                total, rest = _added(total, *group(jax.tree.map(lambda x: x[whole:], rows)))
                y = jax.tree.map(lambda *parts: jnp.concatenate(parts), y, rest)
        return jax.tree.map(lambda leaf: leaf[None], total), y

    totals, y = on_devices(mesh, here, shared, rows)
    return jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), totals), y


def lane_steps(steps: Array, lanes: int, mesh: Mesh | None) -> Array:
    """Steps of all lanes, idle or not, int32, where rows that took `steps` went `lanes` at a time."""
    own = steps.reshape(1 if mesh is None else mesh.size, -1)
    whole = own.shape[1] // lanes * lanes
    longest = jnp.max(own[:, :whole].reshape(own.shape[0], -1, lanes), axis=2)
    total = lanes * jnp.sum(longest, dtype=jnp.int32)
    if rest := own.shape[1] - whole:
        total += rest * jnp.sum(jnp.max(own[:, whole:], axis=1), dtype=jnp.int32)
    return total


def _added(total: Any, x: Any, y: Any) -> tuple[Any, Any]:
    return tree.add(total, x), y


def _zeros(fn: Callable[..., Any], rows: Any) -> Any:
    first = jax.eval_shape(fn, *jax.tree.map(lambda leaf: leaf[0], rows))[0]
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), first)
