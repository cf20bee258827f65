"""Minibatches drawn inside the program, from a key and a step number alone."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array


def num_rows(data: Any) -> int:
    """Length of the leading axis that all leaves share; ValueError where they do not."""
    lengths = {leaf.shape[0] if leaf.ndim else -1 for leaf in jax.tree.leaves(data)}
    if len(lengths) != 1 or -1 in lengths:
        found = sorted("none" if n < 0 else str(n) for n in lengths)
        raise ValueError(
            "batch_size needs data whose arrays share the length of their first axis, "
            f"got lengths {', '.join(found)}."
        )
    return int(lengths.pop())


def minibatch(data: Any, batch_size: int, key: Array) -> Any:
    """`batch_size` rows drawn independently and uniformly: an unbiased estimate of any mean loss."""
    return take(data, random_rows(data, batch_size, key))


def random_rows(data: Any, batch_size: int, key: Array) -> Array:
    """The numbers of these rows, (batch_size,)."""
    return jax.random.randint(key, (batch_size,), 0, num_rows(data))


def take(data: Any, rows: Array) -> Any:
    """The rows with these numbers."""
    return jax.tree.map(lambda leaf: jnp.take(leaf, rows, axis=0), data)
