"""Metasmoothness: its formula on trainings with a closed form, and its verdict on smooth and rough ones."""

import jax.numpy as jnp
import numpy as np
import pytest

import bilevel as bl

ONE_STEP = bl.GradientDescent(1.0, max_steps=1)  # w = f(lam), whatever the start


def towards(w, lam, batch):
    return 0.5 * jnp.sum((w - jnp.stack([lam**2, jnp.sin(3 * lam), -0.01 * lam])) ** 2)


def cubes(w, lam, batch):
    return jnp.sum(w**3) + lam


def test_the_formula():
    """lam^2 turns round between the two halves of the way, the others go on."""
    problem, lam, h = bl.Problem(towards, cubes), -0.05, 0.07
    found = bl.metasmoothness(
        problem, lam, jnp.ones(3), solver=ONE_STEP, step=h, direction=jnp.asarray(1.0)
    )
    at = lam + h * np.arange(3)
    w = np.stack([at**2, np.sin(3 * at), -0.01 * at])
    moved = np.abs(w[:, 2] - w[:, 0])
    expected = (-moved[0] + moved[1] + moved[2]) / moved.sum()
    assert 0.9 < expected < 0.99
    assert found.smoothness == pytest.approx(expected, rel=1e-12)
    values = np.sum(w**3, axis=0) + at
    np.testing.assert_allclose(found.values, values, rtol=1e-12)
    curvature = abs(values[2] - 2 * values[1] + values[0]) / h**2
    assert found.curvature == pytest.approx(curvature, rel=1e-8)


def test_data_weights_of_a_quadratic_are_smooth():
    rng = np.random.default_rng(0)
    X, y = jnp.asarray(rng.normal(size=(30, 5))), jnp.asarray(rng.normal(size=30))
    inner = lambda w, lam, batch: 0.5 * jnp.mean(lam * (batch[0] @ w - batch[1]) ** 2)
    problem = bl.Problem(inner, lambda w, lam, batch: jnp.sum(w**2), (X, y))
    solver = bl.GradientDescent(0.3, max_steps=40)
    found = bl.metasmoothness(problem, jnp.ones(30), jnp.zeros(5), solver=solver, step=1e-3)
    assert found.smoothness == 1.0


def test_chaos_is_not():
    """One step is the logistic map w <- lam w (1 - w): a fixed point at 2.5, chaos at 3.8."""
    inner = lambda w, lam, batch: jnp.sum(0.5 * w**2 - lam * (w**2 / 2 - w**3 / 3))
    problem = bl.Problem(inner, lambda w, lam, batch: jnp.mean(w))
    starts = jnp.linspace(0.1, 0.9, 200)
    call = lambda lam: bl.metasmoothness(
        problem, lam, starts, solver=bl.GradientDescent(1.0, max_steps=60), step=0.01
    )
    assert call(2.5).smoothness == 1.0
    assert abs(call(3.8).smoothness) < 0.3


def test_what_has_no_answer_is_refused():
    problem, w = bl.Problem(towards, cubes), jnp.ones(3)
    call = lambda *args, **options: bl.metasmoothness(*args, w, solver=ONE_STEP, **options)
    with pytest.raises(ValueError, match="step must be"):
        call(problem, 0.1, step=0.0)
    with pytest.raises(ValueError, match="like lam|shapes of lam"):
        call(problem, 0.1, direction=jnp.ones(2))
    with pytest.raises(ValueError, match="no entry of w moved"):
        call(bl.Problem(lambda w, lam, batch: jnp.sum(w**2), cubes), 0.1)
    with pytest.raises(bl.BilevelError, match="NONFINITE"):
        call(bl.Problem(lambda w, lam, batch: jnp.log(lam) * jnp.sum(w), cubes), -1.0)
    with pytest.raises(TypeError, match="Tasks"):
        call(bl.Tasks(problem, jnp.ones((2, 1))), 0.1)
