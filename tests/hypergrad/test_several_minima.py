"""Penalty methods where the outer problem has several local minima, and the inner one is not convex (P11)."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel as bl


def inner(w, lam, batch):
    """Minimal, 0, at w = -lam; not convex in w, PL."""
    return (lam + w) ** 2 + lam * jnp.sin(lam + w) ** 2


def outer(w, lam, batch):
    return jnp.cos(4 * w + 2) / (1 + jnp.exp(2 - 4 * lam)) + 0.5 * jnp.log((4 * lam - 2) ** 2 + 1)


P11 = bl.Problem(inner, outer, outer_projection=lambda lam: jnp.clip(lam, 0.0, 3.0))
MINIMA, VALUES = np.array([0.3824, 1.2152, 2.8296]), np.array([0.4427, 0.1999, 1.2435])


def go(engine, lam, w, rate, num_steps):
    return bl.run(
        P11, lam, w, engine=engine, outer=optax.sgd(rate), num_steps=num_steps, chunk=2500
    )


def test_the_minima():
    """Of F(x) = f(x, -x), on a grid of [0, 3]."""
    x = np.linspace(0, 3, 300_001)
    F = np.cos(2 - 4 * x) / (1 + np.exp(2 - 4 * x)) + 0.5 * np.log((4 * x - 2) ** 2 + 1)
    at = 1 + np.flatnonzero((F[1:-1] < F[:-2]) & (F[1:-1] < F[2:]))
    np.testing.assert_allclose(x[at], MINIMA, atol=1e-4)
    np.testing.assert_allclose(F[at], VALUES, atol=1e-4)


def test_value_penalty():
    """Within .05 at penalty 10 from every start; bias a / penalty, so two penalties extrapolate to the minimum."""
    starts = [(0.1, 0.0), (0.9, 0.0), (1.6, -2.0), (2.2, 1.0), (3.0, -1.0)]
    found = set()
    for lam, w in starts:
        ends = []
        for penalty in (10.0, 100.0):
            result = go(bl.VPBGD(0.1, penalty, 0.1), lam, w, 0.1 / penalty, 10_000)
            assert result.status == bl.Status.OK
            np.testing.assert_allclose(result.w, -result.lam, atol=1e-8)
            ends.append(float(result.lam))
        which = int(np.argmin(abs(MINIMA - ends[0])))
        assert abs(ends[0] - MINIMA[which]) < 0.05
        extrapolated = (10 * ends[1] - ends[0]) / 9
        assert abs(extrapolated - MINIMA[which]) < 3e-4
        value = float(outer(-extrapolated, extrapolated, None))
        assert abs(value - VALUES[which]) < 1e-4
        found.add(which)
    assert found == {0, 1, 2}


def test_gradient_penalty():
    """The same from near the inner solution; from afar it may stop where dg/dw is not zero, which is seen."""
    found = set()
    for lam, w in ((0.1, 0.0), (0.9, 0.0), (1.6, -2.0), (2.6, -2.6)):
        ends = []
        for penalty in (20.0, 40.0):
            step = 0.01 / penalty
            result = go(bl.GPBGD(step, penalty), lam, w, step, 30_000)
            assert result.history.inner_residual[-1] < 0.1
            ends.append(float(result.lam))
        errors = abs(2 * ends[1] - ends[0] - MINIMA)
        assert errors.min() < 1e-3
        found.add(int(np.argmin(errors)))
    assert found == {0, 1, 2}
    far = go(bl.GPBGD(1e-3, 20.0), 3.0, -1.0, 1e-3, 30_000)
    assert far.history.inner_residual[-1] > 0.5 and far.lam == pytest.approx(3.0)
