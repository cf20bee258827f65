"""Single precision: tolerances end at rounding, and the report still says how wrong a hypergradient is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel as bl

N, D = 60, 6


def rows(kind, seed):
    rng = np.random.default_rng([seed, 41])
    X = rng.normal(size=(2 * N, D)) * np.geomspace(1, 0.1, D)
    y = X @ rng.normal(size=D) + rng.normal(size=2 * N)
    if kind == "ridge":  # losses of thousands: their rounding error is above the gradient's norm
        return X[:N], 100 * y[:N], X[N:], 100 * y[N:]
    return 0.03 * X[:N], (y[:N] > 0).astype(float), 0.03 * X[N:], (y[N:] > 0).astype(float)


@pytest.mark.parametrize(("kind", "penalty"), [("ridge", 1e-3), ("logistic", 1e-5)])
def test_tolerances_below_rounding_are_met_and_the_estimate_is_sharp(kind, penalty, seed):
    data, make = rows(kind, seed), getattr(bl.glm, kind)
    lam = np.full(D, penalty)
    tight = bl.Implicit(bl.CG(rtol=1e-12), estimate=False)
    reference = bl.hypergradient(
        make(*data), lam, jnp.zeros(D), solver=bl.Newton(tol=1e-12), engine=tight
    )
    truth = np.asarray(reference.grad)
    problem = make(*[x.astype(np.float32) for x in data])
    for solver in (
        bl.GradientDescent(max_steps=20_000),
        bl.GradientDescent(max_steps=20_000, tol=1e-12),
    ):
        h = bl.hypergradient(
            problem, lam.astype(np.float32), jnp.zeros(D, jnp.float32), solver=solver
        )
        assert {x.dtype for x in jax.tree.leaves((h.grad, h.w))} == {jnp.dtype("float32")}
        assert h.info.inner.num_steps < 20_000
        error = np.linalg.norm(np.asarray(h.grad) - truth) / np.linalg.norm(truth)
        assert error > 1e-5 or solver.tol is not None  # something to estimate
        if error > 1e-5:
            np.testing.assert_allclose(h.info.error_estimate, error, rtol=0.3)
