"""Arithmetic on pytrees in which every leaf keeps its own dtype.

Scalars (steps, tolerances, settings) are cast to the leaf they meet, so a float64 setting never
promotes a float32 parameter. Inner products accumulate in at least float32.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from solvers.types import Scalar, Tree


def accumulation_dtype(tree: Tree) -> jnp.dtype:
    """The widest dtype among the leaves, at least float32."""
    dtypes = [jnp.result_type(leaf) for leaf in jax.tree.leaves(tree)]
    return max([*dtypes, jnp.dtype("float32")], key=lambda dtype: jnp.finfo(dtype).bits)


def epsilon(tree: Tree) -> float:
    """Machine epsilon of the least precise leaf."""
    return max(float(jnp.finfo(jnp.result_type(leaf)).eps) for leaf in jax.tree.leaves(tree))


def size(tree: Tree) -> int:
    """Number of scalars in the tree."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def vdot(x: Tree, y: Tree) -> Scalar:
    """Inner product over all leaves."""
    dtype = accumulation_dtype(x)
    parts = jax.tree.map(lambda a, b: jnp.vdot(a.astype(dtype), b.astype(dtype)), x, y)
    return jax.tree.reduce(jnp.add, parts, jnp.zeros((), dtype))


TOGETHER = 2**13
"""Entries of a tree up to which several reductions of such trees are one: more cost more to stack than is won."""


def vdots(*pairs: tuple[Tree, Tree]) -> Array:
    """The inner products of several pairs of like trees, of small ones in one reduction: shape (len(pairs),).

    XLA makes four kernels of each reduction on CPU, and these are half of what a short program takes to compile.
    """
    dtype = accumulation_dtype(pairs[0][0])
    if size(pairs[0][0]) > TOGETHER:
        return jnp.stack([vdot(x, y) for x, y in pairs])

    def part(*leaves: Array) -> Array:
        flat = [leaf.ravel().astype(dtype) for leaf in leaves]
        return jnp.sum(
            jnp.stack([a * b for a, b in zip(flat[::2], flat[1::2], strict=True)]), axis=1
        )

    parts = jax.tree.map(part, *[x for pair in pairs for x in pair])
    return jax.tree.reduce(jnp.add, parts, jnp.zeros(len(pairs), dtype))


def norm(x: Tree) -> Scalar:
    """2-norm over all leaves."""
    return jnp.sqrt(vdot(x, x))


def norms(*trees: Tree) -> Array:
    """The 2-norms of several like trees, as `vdots` computes them: shape (len(trees),)."""
    return jnp.sqrt(vdots(*[(x, x) for x in trees]))


def norms_and_finite(x: Tree, *others: Tree) -> tuple[Array, Array]:
    """The `norms` of all, and whether `x` is `all_finite`, of small trees in one reduction."""
    if size(x) > TOGETHER:
        return norms(x, *others), all_finite(x)
    squares = [(y, y) for y in (x, *others)]
    sums = vdots(*squares, (x, zeros_like(x)))  # 0 times infinity is NaN
    return jnp.sqrt(sums[:-1]), sums[-1] == 0


def max_abs(x: Tree) -> Scalar:
    """The largest magnitude of any entry. A NaN may go unseen: XLA's maximum on CPU passes over it in long arrays."""
    dtype = accumulation_dtype(x)
    parts = jax.tree.map(lambda a: jnp.max(jnp.abs(a)).astype(dtype), x)
    return jax.tree.reduce(jnp.maximum, parts)


def add(x: Tree, y: Tree) -> Tree:
    return jax.tree.map(jnp.add, x, y)


def sub(x: Tree, y: Tree) -> Tree:
    return jax.tree.map(jnp.subtract, x, y)


def scale(a: Array | float, x: Tree) -> Tree:
    """`a x`, with `a` cast to each leaf's dtype."""
    return jax.tree.map(lambda leaf: jnp.asarray(a, leaf.dtype) * leaf, x)


def divide(x: Tree, a: Array) -> Tree:
    """`x / a`, right for an `a` so small that `1 / a` overflows."""
    return jax.tree.map(lambda leaf: leaf / a.astype(leaf.dtype), x)


def axpy(a: Array | float, x: Tree, y: Tree) -> Tree:
    """`a x + y`."""
    return jax.tree.map(lambda u, v: jnp.asarray(a, u.dtype) * u + v, x, y)


def where(condition: Array, x: Tree, y: Tree) -> Tree:
    """`x` where the scalar condition holds, else `y`."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), x, y)


def zeros_like(x: Tree) -> Tree:
    return jax.tree.map(jnp.zeros_like, x)


def all_finite(x: Tree) -> Array:
    """Whether no leaf holds a NaN or infinity."""
    checks = jax.tree.map(lambda leaf: jnp.all(jnp.isfinite(leaf)), x)
    return jax.tree.reduce(jnp.logical_and, checks, jnp.asarray(True))


def flatten(x: Tree) -> tuple[Array, Callable[[Array], Tree]]:
    """One vector of the accumulation dtype, and the way back (which restores each leaf's dtype)."""
    leaves, treedef = jax.tree.flatten(x)
    dtype = accumulation_dtype(x)
    vector = jnp.concatenate([leaf.ravel().astype(dtype) for leaf in leaves])
    ends = []
    for leaf in leaves:
        ends.append((ends[-1] if ends else 0) + leaf.size)

    def unflatten(v: Array) -> Tree:
        pieces = jnp.split(v, ends[:-1])
        return jax.tree.unflatten(
            treedef,
            [
                piece.reshape(leaf.shape).astype(leaf.dtype)
                for piece, leaf in zip(pieces, leaves, strict=True)
            ],
        )

    return vector, unflatten
