"""ProximalGradient: the Lasso against scikit-learn, its safeguards, its derivative."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import Lasso

from solvers import Objective, ProximalGradient, Status, loops, prox
from solvers.types import constant_sampler


def squares(w, penalty, batch):
    X, y = batch
    return 0.5 * jnp.mean((X @ w - y) ** 2)


def l1(v, step, penalty):
    return prox.l1(v, step, penalty)


@eqx.filter_jit
def run(solver, penalty, w, batch):
    objective = Objective(squares, penalty, prox=l1)
    state = solver.init(objective, w, batch)
    w, state, info = loops.solve(solver, objective, w, state, constant_sampler(batch))
    return w, state, info


def draw(seed, n=40, d=60):
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, d)) * np.geomspace(0.1, 2, d)
    return X, X[:, ::20].sum(1) + 0.3 * rng.normal(size=n)


def solve(batch, penalty=0.1, **settings):
    start = jnp.zeros(batch[0].shape[1])
    solver = ProximalGradient(**{"max_steps": 5000, "tol": 1e-10, **settings})
    return run(solver, jnp.asarray(penalty), start, tuple(map(jnp.asarray, batch)))


def test_lasso_is_that_of_coordinate_descent(seed):
    X, y = draw(seed)
    w, _, info = solve((X, y))
    model = Lasso(alpha=0.1, fit_intercept=False, tol=1e-14, max_iter=10**6).fit(X, y)
    assert info.status == Status.OK and info.residual <= 1e-10
    np.testing.assert_allclose(w, model.coef_, atol=1e-8)
    np.testing.assert_array_equal(np.asarray(w) == 0, model.coef_ == 0)
    np.testing.assert_allclose(info.value, 0.5 * np.mean((X @ w - y) ** 2), rtol=1e-12)
    gradient = X.T @ (X @ w - y) / len(y)
    on, off = np.asarray(w) != 0, np.asarray(w) == 0
    np.testing.assert_allclose(gradient[on], -0.1 * np.sign(w[on]), atol=1e-9)
    assert np.all(np.abs(gradient[off]) <= 0.1 + 1e-9)


def test_acceleration_pays(seed):
    batch = draw(seed)
    fast = solve(batch)[2].num_steps
    slow = solve(batch, accelerate=False)[2].num_steps
    assert 3 * fast < slow <= 5000


@pytest.mark.parametrize("accelerate", [True, False])
def test_a_step_too_long_is_shortened(accelerate, seed):
    X, y = draw(seed)
    w, state, info = solve((X, y), learning_rate=100.0, accelerate=accelerate, tol=1e-6)
    assert info.status == Status.OK
    largest = np.linalg.eigvalsh(X.T @ X / len(y))[-1]
    assert 0.1 < float(state.step) * largest < 2
    np.testing.assert_allclose(w, solve((X, y))[0], atol=1e-4)


def test_budget_and_nan_are_statuses(seed):
    X, y = draw(seed)
    assert solve((X, y), max_steps=3)[2].status == Status.MAX_STEPS
    assert solve((X, y), max_steps=3, tol=0.0)[2].status == Status.OK
    X[0, 0] = np.nan
    assert solve((X, y))[2].status == Status.NONFINITE


def test_derivative_through_the_steps_is_the_difference(seed):
    batch = tuple(map(jnp.asarray, draw(seed, 20, 8)))

    @jax.jit
    def after(log_penalty, rate):
        objective = Objective(squares, jnp.exp(log_penalty), prox=l1)
        solver = ProximalGradient(max_steps=12, learning_rate=rate)
        w = jnp.zeros(8)
        state = solver.init(objective, w, batch)
        w, _ = loops.run_steps(solver, objective, w, state, constant_sampler(batch), 12)
        return jnp.sum(jnp.sin(w))

    found = jax.grad(after, argnums=(0, 1))(-2.0, 0.1)
    h = 1e-6
    numeric = (
        (after(-2.0 + h, 0.1) - after(-2.0 - h, 0.1)) / (2 * h),
        (after(-2.0, 0.1 + h) - after(-2.0, 0.1 - h)) / (2 * h),
    )
    np.testing.assert_allclose(found, numeric, rtol=1e-6)


def test_learning_rate_is_checked():
    with pytest.raises(ValueError, match="positive number or 'auto'"):
        ProximalGradient(learning_rate="fast")
    with pytest.raises(ValueError, match="greater than"):
        ProximalGradient(learning_rate=0.0)
