"""Arithmetic on trees: reductions of small and of large trees are different programs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from solvers import CG, Status, tree

SIZES = (7, tree.TOGETHER - 3, tree.TOGETHER + 5)


def sample(size: int, seed: int) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    return {
        "a": jnp.asarray(rng.normal(size=size), jnp.float32),
        "b": jnp.asarray(rng.normal(size=3)),
    }


def flat(x: dict[str, jax.Array]) -> np.ndarray:
    return np.concatenate([np.asarray(leaf, np.float64) for leaf in x.values()])


@pytest.mark.parametrize("size", SIZES)
def test_norms_and_products(size):
    x, y = sample(size, 0), sample(size, 1)
    products = tree.vdots((x, y), (x, x), (y, y))
    expected = [flat(a) @ flat(b) for a, b in ((x, y), (x, x), (y, y))]
    np.testing.assert_allclose(products, expected, rtol=1e-10)
    lengths, finite = jax.jit(tree.norms_and_finite)(x, y)
    np.testing.assert_allclose(lengths, np.sqrt(expected[1:]), rtol=1e-10)
    assert bool(finite)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_one_entry_that_is_no_number_is_seen(size, bad):
    x, y = sample(size, 0), sample(size, 1)
    worse = {**x, "a": x["a"].at[size // 2].set(bad)}
    lengths, finite = jax.jit(tree.norms_and_finite)(worse, y)
    assert not finite and not jnp.isfinite(lengths[0])
    np.testing.assert_allclose(lengths[1], np.linalg.norm(flat(y)), rtol=1e-10)
    _, finite = jax.jit(tree.norms_and_finite)(y, worse)  # it is asked of the first alone
    assert bool(finite)


def test_squares_that_overflow_are_finite():
    x = jnp.full(5, 1e30, jnp.float32)
    lengths, finite = tree.norms_and_finite(x)
    assert bool(finite) and jnp.isinf(lengths[0])


@pytest.mark.parametrize("size", [20, 6000])
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, 1e200])
def test_a_start_that_is_no_number_is_dropped(size, bad):
    """In arrays of thousands of entries XLA's maximum on CPU does not see a NaN."""
    b, scale = jnp.ones(size), jnp.linspace(1.0, 2.0, size)
    start = jnp.zeros(size).at[size // 2].set(bad)
    x, info = CG().solve(lambda v: scale * v, b, start, None, jax.random.key(0))
    assert int(info.status) == Status.OK
    np.testing.assert_allclose(x, b / scale, rtol=1e-8)
