"""Scales on which the outer rule moves. Losses and results always see the natural scale."""

import abc
import math
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


class AbstractTransform(eqx.Module):
    """A smooth bijection from the real line, where the outer rule works, to the natural scale."""

    domain: ClassVar[tuple[float, float]] = (-math.inf, math.inf)
    """The open interval of natural values."""

    @abc.abstractmethod
    def forward(self, u: Array) -> Array:
        """Natural value of an unconstrained one, elementwise."""

    @abc.abstractmethod
    def inverse(self, x: Array) -> Array:
        """Unconstrained value of a natural one, elementwise."""


class Identity(AbstractTransform):
    """`x = u`."""

    def forward(self, u: Array) -> Array:
        return u

    def inverse(self, x: Array) -> Array:
        return x


class Exp(AbstractTransform):
    """`x = exp(u)`: positive values, moved on a log scale."""

    domain = (0.0, math.inf)

    def forward(self, u: Array) -> Array:
        return jnp.exp(u)

    def inverse(self, x: Array) -> Array:
        return jnp.log(x)


class Softplus(AbstractTransform):
    """`x = log(1 + exp(u))`: positive values, on a linear scale where they are large."""

    domain = (0.0, math.inf)

    def forward(self, u: Array) -> Array:
        return jax.nn.softplus(u)

    def inverse(self, x: Array) -> Array:
        return x + jnp.log(-jnp.expm1(-x))


class Sigmoid(AbstractTransform):
    """`x = 1 / (1 + exp(-u))`: values in (0, 1)."""

    domain = (0.0, 1.0)

    def forward(self, u: Array) -> Array:
        return jax.nn.sigmoid(u)

    def inverse(self, x: Array) -> Array:
        return jnp.log(x) - jnp.log1p(-x)


def broadcast(transform: Any, lam: Any) -> Any:
    """One transform for each leaf of `lam`, from a prefix tree of transforms (None is identity)."""
    is_leaf = lambda t: t is None or isinstance(t, AbstractTransform)

    def fill(t: Any, subtree: Any) -> Any:
        if t is not None and not isinstance(t, AbstractTransform):
            raise TypeError(
                "transform must be a tree of bilevel.transforms (such as Exp()) or None, "
                f"got {t!r}."
            )
        return jax.tree.map(lambda _: Identity() if t is None else t, subtree)

    try:
        return jax.tree.map(fill, transform, lam, is_leaf=is_leaf)
    except ValueError as error:
        raise ValueError(
            f"transform must be a prefix of the tree of lam: {jax.tree.structure(lam)}."
        ) from error


def _apply(method: str, transform: Any, tree: Any) -> Any:
    return jax.tree.map(lambda t, x: getattr(t, method)(x), transform, tree, is_leaf=_is_transform)


def forward(transform: Any, u: Any) -> Any:
    """Natural `lam` of an unconstrained tree; `transform` as made by `broadcast`.

    A value that rounds to an end of its domain stays next to it: from the end itself, whose unconstrained value is
    infinite, no step would lead back.
    """
    return jax.tree.map(_inside, transform, _apply("forward", transform, u), is_leaf=_is_transform)


def _is_transform(node: Any) -> bool:
    return isinstance(node, AbstractTransform)


def _inside(transform: AbstractTransform, x: Array) -> Array:
    """The nearest number inside of the open domain, with the derivative of the transform."""
    limits, held = jnp.finfo(x.dtype), jax.lax.stop_gradient(x)
    below, above = transform.domain
    # So far from zero that a slope times the value is no denormal.
    near = lambda end: abs(end) * float(limits.eps) or float(limits.tiny / limits.eps)
    low = below + near(below) if math.isfinite(below) else None
    high = above - near(above) if math.isfinite(above) else None
    if low is None and high is None:
        return x
    nearest = jnp.clip(held, low, high)
    return x + jnp.where(nearest == held, jnp.zeros_like(held), nearest - held)


def inverse(transform: Any, lam: Any) -> Any:
    """Unconstrained tree of a natural `lam`."""
    return _apply("inverse", transform, lam)


def check_domain(transform: Any, lam: Any) -> None:
    """Raise ValueError where a start lies outside its transform's domain."""
    transforms = jax.tree.leaves(transform, is_leaf=_is_transform)
    for own, value in zip(transforms, jax.tree.leaves(lam), strict=True):
        (low, high), x = own.domain, np.asarray(value)
        if np.isfinite(x).all() and not ((low < x) & (x < high)).all():
            raise ValueError(
                "lam lies outside the domain of its transform (Exp and Softplus take positive "
                f"values, Sigmoid values in (0, 1)); got values from {value.min()} to {value.max()}."
            )
