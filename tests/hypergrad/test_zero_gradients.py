"""Unrolling where a rule or a model has a kink: right by differences, or a status with advice."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel as bl
from solvers.status import explain


def differences(value, x, h):
    """Central differences of `value` in the entries of the vector x."""
    x = np.asarray(x)
    return np.array([(value(x + row) - value(x - row)) / (2 * h) for row in h * np.eye(x.size)])


# Adam. Where lam[0] = 0.7 the gradient of w[1] is zero at the first step alone; where it is 0, at every step, and
# moves with lam[0] and lam[2].


def chained(w, lam, batch):
    return 0.5 * lam[0] * (w[0] - 2) ** 2 + 0.5 * (w[1] - lam[1] * (w[0] - 1) - lam[2] + 0.4) ** 2


def distance(w, lam, batch):
    return 0.5 * jnp.sum((w - jnp.asarray([1.3, 0.9])) ** 2)


def adam(lam):
    eps_root = jax.lax.stop_gradient(lam[3])  # data, so that one program serves all
    return bl.OptaxSolver(optax.adam(0.1, eps_root=eps_root), max_steps=12)


@pytest.mark.parametrize(
    "engine",
    [bl.Unrolled(levels=1, estimate=False), bl.Forward(estimate=False)],
    ids=["reverse", "forward"],
)
def test_adam_at_zero_gradients(engine):
    """Finite and right by differences, or a status whose advice is right."""

    def call(first, eps_root):
        at = lambda x: bl.hypergradient(
            bl.Problem(chained, distance),
            jnp.asarray([*x, eps_root]),
            jnp.asarray([1.0, 0.0]),
            solver=adam,
            engine=engine,
            throw=False,
        )
        x = [first, 1.3, 0.4]
        h = at(x)
        # Differences are right for steps of the gradient below sqrt(eps_root) alone.
        step = 1e-4 * max(eps_root, 1e-12) ** 0.5
        return h, differences(lambda x: float(at(x).info.outer_value), x, step)

    for first in (0.7, 0.0):
        h, _ = call(first, 0.0)
        assert int(h.info.status) == bl.Status.NONFINITE
        assert "eps_root" in explain(h.info.status)
    for first, eps_root in ((0.7, 1e-12), (0.7, 1e-8), (0.0, 1e-3)):
        h, expected = call(first, eps_root)
        assert int(h.info.status) == bl.Status.OK
        assert np.sum(np.abs(expected) > 0.1) >= 2
        np.testing.assert_allclose(h.grad[:3], expected, rtol=1e-4, atol=1e-4)
    # Each of the 12 steps multiplies by up to 0.1 / sqrt(eps_root): right, and no guide to any step.
    h, expected = call(0.0, 1e-8)
    assert np.linalg.norm(h.grad) > 1e30 and np.linalg.norm(expected) < 1e8
    assert int(h.info.status) == bl.Status.DIVERGED
    assert "eps_root" in explain(h.info.status) and float(h.info.growth) > 1e30


def moving(w, lam, batch):
    return 0.5 * jnp.sum((w - lam * jnp.asarray([1.0, 2.0])) ** 2)


@pytest.mark.parametrize(
    ("clip", "right"), [(optax.clip_by_global_norm(2.0), False), (optax.clip(2.0), True)]
)
def test_clipping_at_a_zero_gradient(clip, right):
    """By the norm there is none, and the advice is to clip by value."""
    rule, at = optax.chain(clip, optax.sgd(0.3)), 0.7
    call = lambda lam: bl.hypergradient(
        bl.Problem(moving, distance),
        lam,
        at * jnp.asarray([1.0, 2.0]),
        solver=bl.OptaxSolver(rule, max_steps=4),
        engine=bl.Unrolled(levels=1, estimate=False),
        throw=False,
    )
    h = call(at)
    if right:
        value = lambda x: float(call(x[0]).info.outer_value)
        assert int(h.info.status) == bl.Status.OK
        np.testing.assert_allclose(h.grad, differences(value, [at], 1e-5)[0], rtol=1e-8)
    else:
        assert int(h.info.status) == bl.Status.NONFINITE
        assert "optax.clip" in explain(h.info.status)


def pooled(w, X):
    """A convolution of width 3, then the maximum over windows of 4."""
    rows = jnp.stack([X[:, i : i + 12] for i in range(3)], axis=-1) @ w["filter"] + w["bias"]
    rows = jax.nn.relu(rows)
    pool = jax.lax.reduce_window(rows, -jnp.inf, jax.lax.max, (1, 4), (1, 4), "VALID")
    return pool @ w["out"]


def network(w, lam, batch):
    X, y = batch
    penalty = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(w))
    return jnp.mean((pooled(w, X) - y) ** 2) + lam * penalty


def network_outer(w, lam, batch):
    X, y = batch
    return jnp.mean((pooled(w, X) - y) ** 2)


@pytest.mark.parametrize("bias", [0.3, -0.3])
def test_ties_of_max_pooling(bias):
    """On an empty background all values of a window are one function of w, above zero or below."""
    rng = np.random.default_rng(0)
    X = rng.normal(size=(8, 14)) * (np.arange(14) < 7)
    data = (jnp.asarray(X), jnp.asarray(rng.normal(size=8)))
    w = {"filter": rng.normal(size=3), "bias": bias, "out": rng.normal(size=3)}
    call = lambda lam, engine: bl.hypergradient(
        bl.Problem(network, network_outer, data, data),
        lam,
        jax.tree.map(jnp.asarray, w),
        solver=bl.GradientDescent(0.05, max_steps=9),
        engine=engine,
    )
    engines = bl.Unrolled(levels=1, estimate=False), bl.Forward(estimate=False)
    value = lambda x: float(call(x[0], engines[0]).info.outer_value)
    expected = differences(value, [0.2], 1e-5)[0]
    assert abs(expected) > 0.01
    for engine in engines:
        np.testing.assert_allclose(call(0.2, engine).grad, expected, rtol=1e-7)


def test_ties_of_a_maximum_that_move_apart_get_the_mean_of_the_sides():
    """Two equal features under one maximum: a kink in lam, where each gets half, in both modes."""
    inner = lambda w, lam, batch: 0.5 * jnp.sum((w - jnp.max(lam)) ** 2)
    outer = lambda w, lam, batch: 0.5 * jnp.sum(w**2)
    lam, rate, T = jnp.asarray([1.5, 1.5, 0.2]), 0.25, 6
    shrink = 1 - (1 - rate) ** T  # w_T = shrink max(lam) from 0
    expected = 2 * shrink**2 * 1.5 * np.array([0.5, 0.5, 0.0])
    solver = bl.GradientDescent(rate, max_steps=T)
    for engine in (bl.Unrolled(levels=1, estimate=False), bl.Forward(estimate=False)):
        h = bl.hypergradient(
            bl.Problem(inner, outer), lam, jnp.zeros(2), solver=solver, engine=engine
        )
        np.testing.assert_allclose(h.grad, expected, rtol=1e-12)
