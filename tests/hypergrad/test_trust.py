"""The trust report: certified bound, estimate, refinement, damping."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest

import bilevel as bl
from hypergrad.certificate import error_bound

N, D = 60, 10


def logistic_data(seed):
    rng = np.random.default_rng([seed, 7])
    X = rng.normal(size=(2 * N, D)) * np.exp(0.3 * rng.normal(size=D))
    y = (X @ rng.normal(size=D) + rng.normal(size=2 * N) > 0).astype(float)
    penalty = np.exp(rng.uniform(-5, -2))
    return X[:N], y[:N], X[N:], y[N:], penalty, 10 ** rng.uniform(-4.5, -2.5)


def dense_reference(X, y, X_val, y_val, lam):
    """Hypergradient of one penalty, by NumPy alone: Newton, then `-w' H^-1 c`."""
    sigmoid = lambda f: 1 / (1 + np.exp(-f))
    w = np.zeros(D)
    for _ in range(50):
        s = sigmoid(X @ w)
        H = (X.T * (s * (1 - s))) @ X / N + lam * np.eye(D)
        w = w - np.linalg.solve(H, X.T @ (s - y) / N + lam * w)
    s = sigmoid(X @ w)
    H = (X.T * (s * (1 - s))) @ X / N + lam * np.eye(D)
    return -w @ np.linalg.solve(H, X_val.T @ (sigmoid(X_val @ w) - y_val) / N)


def held_out(X, y, X_val, y_val, lam):
    """The outer value at the solution, by NumPy."""
    w = np.zeros(D)
    for _ in range(50):
        s = 1 / (1 + np.exp(-X @ w))
        H = (X.T * (s * (1 - s))) @ X / N + lam * np.eye(D)
        w = w - np.linalg.solve(H, X.T @ (s - y) / N + lam * w)
    return np.mean(np.logaddexp(0, X_val @ w) - y_val * (X_val @ w))


def test_certificate_estimate_and_refinement_on_random_logistic_problems(seed):
    """Inner solves cut at random residuals: the bound always holds, the estimate is sharp."""
    estimates, gains, corrections = [], [], []
    for index in range(20):
        *data, lam, tol = logistic_data(20 * seed + index)
        problem, solver = bl.glm.logistic(*data), bl.LBFGS(tol=tol)
        h, refined = (
            bl.hypergradient(problem, lam, jnp.zeros(D), solver=solver, engine=engine, throw=False)
            for engine in (bl.Implicit(), bl.Implicit(refine=True))
        )
        truth, size = dense_reference(*data, lam), abs(float(h.grad))
        error = abs(float(h.grad) - truth) / size
        assert 1e-7 < error < 1  # there is something to bound
        assert error <= float(h.info.bound)
        estimates.append(float(h.info.error_estimate) / error)
        gains.append(error * size / abs(float(refined.grad) - truth))
        np.testing.assert_allclose(refined.info.error_estimate, h.info.error_estimate, rtol=1e-6)
        value = held_out(*data, lam)
        corrections.append(
            abs(float(h.info.corrected_value) - value) / abs(float(h.info.outer_value) - value)
        )
    assert min(estimates) > 0.8 and max(estimates) < 1.25
    assert np.median(gains) > 5
    assert np.median(corrections) < 0.15


@pytest.mark.parametrize(
    ("kind", "shape"),
    [("ridge", "full"), ("logistic", "one"), ("softmax", "feature"), ("softmax", "full")],
)
def test_ready_problems(kind, shape, seed):
    """Product, preconditioner, constants and hypergradient, each by autodiff or dense algebra."""
    rng = np.random.default_rng([seed, 11])
    X = rng.normal(size=(2 * N, 4))
    score = X @ rng.normal(size=(4, 3)) + rng.gumbel(size=(2 * N, 3))
    targets = {
        "ridge": score[:, 0],
        "logistic": (score[:, 0] > 0).astype(float),
        "softmax": score.argmax(axis=1),
    }
    y, w_shape = targets[kind], (3, 4) if kind == "softmax" else (4,)
    problem = getattr(bl.glm, kind)(X[:N], y[:N], X[N:], y[N:])
    lam_shape = {"one": (), "feature": (4,), "full": w_shape}[shape]
    lam = jnp.asarray(np.exp(rng.normal(size=lam_shape) - 2))
    w, v, other = (rng.normal(size=w_shape) for _ in range(3))
    data = problem.inner_data, problem.outer_data

    gradient = jax.grad(problem.inner)
    outer = jax.jit(jax.grad(problem.outer))
    hessian = jax.jit(lambda w: jax.hessian(problem.inner)(w, lam, data[0]).reshape(w.size, w.size))

    @jax.jit
    def found(w, v):
        hvp = jax.jvp(lambda w: gradient(w, lam, data[0]), (w,), (v,))[1]
        dense = jax.jacfwd(problem.inner_preconditioner(w, lam, data[0]))(jnp.zeros(w_shape))
        C = jax.jacobian(gradient, argnums=1)(w, lam, data[0]).reshape(w.size, -1)
        constants = problem.constants(w, lam, *data)
        return problem.inner_hvp(w, lam, data[0], v), hvp, dense, C, constants

    own, hvp, dense, C, constants = found(w, v)
    np.testing.assert_allclose(own, hvp, rtol=1e-10, atol=1e-12)
    dense = np.asarray(dense).reshape(w.size, w.size)
    np.testing.assert_allclose(dense, dense.T, atol=1e-10 * np.abs(dense).max())
    assert np.linalg.eigvalsh(dense)[0] > 0
    H = np.asarray(hessian(w))
    if kind == "softmax":  # far better conditioned than it was, though not the inverse
        spread = lambda M: np.ptp(np.log(np.linalg.eigvals(M).real))
        assert spread(dense @ H) < 0.6 * spread(H)
    else:
        np.testing.assert_allclose(dense @ H, np.eye(w.size), atol=1e-8)
    np.testing.assert_allclose(constants.cross_norm, np.linalg.norm(C, 2), rtol=1e-10)
    assert np.linalg.eigvalsh(hessian(w))[0] >= constants.strong_convexity - 1e-12
    size = np.linalg.norm(w - other)
    change = np.linalg.norm(hessian(w) - hessian(other), 2)
    assert change <= constants.hessian_lipschitz * size + 1e-12
    change = np.linalg.norm(outer(w, lam, data[1]) - outer(other, lam, data[1]))
    assert change <= constants.outer_lipschitz * size + 1e-12

    start = jnp.zeros(w_shape)
    h, truth = (bl.hypergradient(problem, lam, start, engine=e) for e in ("implicit", "exact"))
    np.testing.assert_allclose(h.grad, truth.grad, rtol=1e-5, atol=1e-9)
    assert float(h.info.bound) > 0


@pytest.mark.parametrize(
    ("kind", "w"), [("ridge", (2, 3)), ("logistic", (2, 3)), ("softmax", (3,))]
)
def test_ready_problems_refuse_a_w_of_another_form(kind, w):
    """Several rows of a ridge would be averaged in the loss and not in its Hessian-vector product."""
    X, y = np.ones((4, 3)), np.array([0, 1, 0, 1])
    with pytest.raises(ValueError, match=r"expected w of shape \("):
        bl.hypergradient(getattr(bl.glm, kind)(X, y, X, y), 0.1, jnp.zeros(w))


def test_problems_precondition_their_adjoint_and_newton_systems(seed):
    """With a spread spectrum CG needs fewer products, for the same hypergradient."""
    rng = np.random.default_rng([seed, 13])
    X = rng.normal(size=(2 * N, 12)) @ np.diag(np.logspace(-1.5, 1, 12))
    X = X @ np.linalg.qr(rng.normal(size=(12, 12)))[0]
    y = rng.integers(0, 3, size=2 * N)
    ready = bl.glm.softmax(X[:N], y[:N], X[N:], y[N:])
    plain = dataclasses.replace(ready, inner_preconditioner=None)
    lam, w = jnp.full(12, 1e-4), jnp.zeros((3, 12))
    engine = bl.Implicit(linear_solver=bl.CG(rtol=1e-8))
    with_it, without = (
        bl.hypergradient(problem, lam, w, solver=bl.Newton(), engine=engine)
        for problem in (ready, plain)
    )
    np.testing.assert_allclose(with_it.grad, without.grad, rtol=1e-5, atol=1e-10)
    assert int(with_it.info.adjoint_steps) < 0.7 * int(without.info.adjoint_steps)
    # A preconditioner of the user's own comes first.
    own = bl.Implicit(linear_solver=bl.CG(rtol=1e-8, preconditioner=lambda r: r))
    kept = bl.hypergradient(ready, lam, w, solver=bl.Newton(), engine=own)
    assert int(kept.info.adjoint_steps) > int(with_it.info.adjoint_steps)


def test_bound_knows_the_norm_of_the_cross_derivative(seed):
    """Declared numbers without `cross_norm`: the bound is the one with it."""
    case = problems.make("quadratic", seed)
    A, B, _, outer_hessian, _, _ = case.means
    base = (np.linalg.eigvalsh(A)[0], 0.0, 0.0, np.linalg.norm(outer_hessian, 2), 0.0)
    bounds = []
    for norm in (None, np.linalg.norm(B, 2)):
        problem = bl.Problem(
            case.inner,
            case.outer,
            case.inner_data,
            case.outer_data,
            constants=bl.Constants(*base, cross_norm=norm),
        )
        h = bl.hypergradient(problem, case.lam, case.w, solver=bl.LBFGS(max_steps=2), throw=False)
        bounds.append(float(h.info.bound))
        truth = case.hypergradient(case.lam)
        assert np.linalg.norm(h.grad - truth) / np.linalg.norm(h.grad) <= bounds[-1]
    np.testing.assert_allclose(bounds[0], bounds[1], rtol=1e-6)


def test_the_bound_is_attained():
    """`m/2 (w - lam)^2` and `L/2 (w - t)^2`: the error L (w - lam) is the bound, e = |w - lam|."""
    m, L, t, lam = 0.7, 1.9, -0.4, 0.8
    inner = lambda w, lam, batch: 0.5 * m * (w - lam) ** 2
    outer = lambda w, lam, batch: 0.5 * L * (w - t) ** 2
    problem = bl.Problem(inner, outer, constants=bl.Constants(m, 0.0, 0.0, L, 0.0))
    solver = bl.GradientDescent(learning_rate=0.3, max_steps=4)
    h = bl.hypergradient(problem, lam, 0.0, solver=solver, throw=False)
    error = abs(float(h.grad) - L * (lam - t)) / abs(float(h.grad))
    assert error > 0.1
    np.testing.assert_allclose(h.info.bound, error, rtol=1e-8)


def test_the_bound_counts_what_a_gradient_differs_from_its_adjoint():
    """As above, at the solution, with half as much again: the error is 1/3 of the gradient, and so the bound."""
    m, L, t, lam = 0.7, 1.9, -0.4, jnp.asarray(0.8)
    problem = bl.Problem(
        lambda w, lam, batch: 0.5 * m * (w - lam) ** 2, lambda w, lam, batch: 0.5 * L * (w - t) ** 2
    )
    solver, constants = bl.GradientDescent(1 / m), bl.Constants(m, 0.0, 0.0, L, 0.0)
    h = bl.hypergradient(problem, lam, 0.0, solver=solver)
    np.testing.assert_allclose(h.grad, L * (lam - t), rtol=1e-10)
    adjoint = L * (lam - t) / m
    bound = error_bound(
        problem, solver, lam, h._replace(grad=1.5 * h.grad), adjoint, None, None, constants
    )
    np.testing.assert_allclose(bound, 1 / 3, rtol=1e-8)


def test_the_bound_has_every_term(seed):
    """A logistic problem, the formula with the adjoint and C by dense NumPy."""
    *data, lam, _ = logistic_data(seed)
    problem, solver = bl.glm.logistic(*data), bl.LBFGS(tol=1e-2)
    h = bl.hypergradient(problem, lam, jnp.zeros(D), solver=solver, throw=False)
    X, y, X_val, y_val = data
    w, sigmoid = np.asarray(h.w), lambda f: 1 / (1 + np.exp(-f))
    s = sigmoid(X @ w)
    H = (X.T * (s * (1 - s))) @ X / N + lam * np.eye(D)
    q = np.linalg.norm(np.linalg.solve(H, X_val.T @ (sigmoid(X_val @ w) - y_val) / N))
    e = np.linalg.norm(X.T @ (s - y) / N + lam * w) / lam
    L_H = np.mean(np.linalg.norm(X, axis=1) ** 3) / (6 * np.sqrt(3))
    L_F = np.linalg.norm(X_val, 2) ** 2 / (4 * N)
    bound = e * q + (np.linalg.norm(w) + e) / lam * e * (L_F + L_H * q)
    np.testing.assert_allclose(h.info.bound, bound / abs(float(h.grad)), rtol=1e-5)


def test_the_norm_of_a_large_cross_derivative_is_not_computed():
    inner = lambda w, lam, batch: 0.5 * jnp.sum((w - lam) ** 2)
    outer = lambda w, lam, batch: 0.5 * jnp.sum(w**2)
    problem = bl.Problem(inner, outer, constants=bl.Constants(1.0, 0.0, 0.0, 1.0, 0.0))
    with pytest.raises(ValueError, match="cross_norm"):
        bl.hypergradient(problem, jnp.zeros(2001), jnp.zeros(2001))


def test_constants_below_zero_certify_nothing():
    """Those of a function are seen no earlier than there."""
    inner = lambda w, lam, batch: 0.5 * jnp.sum((w - lam) ** 2)
    outer = lambda w, lam, batch: 0.5 * jnp.sum(w**2)
    for lipschitz, certified in ((1.0, True), (-1.0, False)):
        constants = lambda *_, lipschitz=lipschitz: bl.Constants(1.0, 0.0, 0.0, lipschitz, 0.0)
        problem = bl.Problem(inner, outer, constants=constants)
        h = bl.hypergradient(problem, jnp.ones(2), jnp.zeros(2))
        assert np.isfinite(h.info.bound) == certified


def test_bad_constants_are_refused():
    case = problems.make("quadratic", 0)
    with pytest.raises(TypeError, match="Constants"):
        bl.Problem(case.inner, case.outer, constants=0.1)
    for number in (-1.0, float("nan"), np.ones(2)):
        with pytest.raises(ValueError, match=r"Constants\(cross_lipschitz=...\) must be a number"):
            bl.Problem(case.inner, case.outer, constants=bl.Constants(1.0, 0.0, number, 1.0, 0.0))
    with pytest.raises(ValueError, match="damping"):
        bl.Implicit(damping="some")
    for y in (np.array([0.0, 2.0]), np.array([0.5, 1.0])):
        with pytest.raises(ValueError, match="0 or 1"):
            bl.glm.logistic(np.eye(2), y, np.eye(2), np.ones(2))
    with pytest.raises(ValueError, match="class indices"):
        bl.glm.softmax(np.eye(2), np.array([0.0, 1.0]), np.eye(2), np.array([0, 1]))
    with pytest.raises(ValueError, match="same features"):
        bl.glm.ridge(np.eye(2), np.ones(2), np.eye(3), np.ones(3))
    with pytest.raises(ValueError, match=r"y must|and y \(n,\)"):
        bl.glm.ridge(np.eye(2), np.ones(3), np.eye(2), np.ones(2))


def saddle(w, lam, batch):
    return 0.5 * (w[0] ** 2 - 0.3 * w[1] ** 2 + 0.1 * w[2] ** 2) - w @ lam


def test_automatic_damping(seed):
    """Twice the negative curvature at a saddle, labelled; none at a minimiser."""
    outer = lambda w, lam, batch: w[0] + 2 * w[1] + 3 * w[2]
    lam = jnp.zeros(3)
    plain = bl.hypergradient(bl.Problem(saddle, outer), lam, jnp.zeros(3), throw=False)
    assert int(plain.info.status) == bl.Status.INDEFINITE
    h = bl.hypergradient(
        bl.Problem(saddle, outer), lam, jnp.zeros(3), engine=bl.Implicit(damping="auto")
    )
    np.testing.assert_allclose(h.info.damping, 0.6, rtol=1e-6)
    np.testing.assert_allclose(h.grad, [1 / 1.6, 2 / 0.3, 3 / 0.7], rtol=1e-6)
    assert float(h.info.curvature) < 0
    assert np.isnan(h.info.error_estimate) and np.isnan(h.info.corrected_value)

    case = problems.make("quadratic", seed)
    problem = bl.Problem(case.inner, case.outer, case.inner_data, case.outer_data)
    auto = bl.hypergradient(problem, case.lam, case.w, engine=bl.Implicit(damping="auto"))
    assert float(auto.info.damping) == 0.0
    assert np.isnan(auto.info.bound)  # no constants are declared
    np.testing.assert_allclose(auto.grad, case.hypergradient(case.lam), rtol=1e-6)
