"""What every problem has."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

Tree = Any


@dataclasses.dataclass(frozen=True)
class Case:
    """What every problem here has."""

    inner_data: Tree
    outer_data: Tree
    lam: Tree
    w: Tree
    inner: ClassVar[Callable[..., jax.Array]]
    outer: ClassVar[Callable[..., jax.Array]]

    def solution(self, lam: Tree) -> Tree:
        """The inner minimiser w*(lam)."""
        raise NotImplementedError

    def hypergradient(self, lam: Tree) -> Tree:
        """The gradient of f(w*(lam), lam)."""
        raise NotImplementedError


def exact(tree: Tree) -> Tree:
    """The leaves as NumPy arrays, floats in float64."""
    return jax.tree.map(
        lambda x: np.asarray(x, np.float64 if jnp.issubdtype(x.dtype, jnp.floating) else None),
        tree,
    )


def cast(tree: Tree, dtype: Any) -> Tree:
    """The leaves as JAX arrays, floats in `dtype`."""
    return jax.tree.map(
        lambda x: jnp.asarray(
            x, dtype if np.issubdtype(np.asarray(x).dtype, np.floating) else None
        ),
        tree,
    )
