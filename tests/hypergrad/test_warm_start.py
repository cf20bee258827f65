"""`Implicit(warm_start=...)`: where inner solves start."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel as bl
from hypergrad.warm_start import extrapolated_start, newton_start

KEY = jax.random.key(0)


def start(problem, solver, w, lam):
    linear = bl.CG(rtol=1e-12) if solver.symmetric else bl.GMRES(rtol=1e-12)
    call = lambda w, lam: newton_start(problem, solver, linear, w, lam, problem.inner_data, KEY)
    return jax.jit(call)(w, jnp.asarray(lam))


def logistic(seed):
    rng = np.random.default_rng([seed, 29])
    X = rng.normal(size=(40, 6))
    y = (X @ rng.normal(size=6) + rng.normal(size=40) > 0).astype(float)
    return bl.glm.logistic(X, y, X, y)


def test_the_error_of_the_start_is_of_second_order(seed):
    """Halving the move of `lam` divides the error by four, where that of the last `w` halves."""
    problem, solver = logistic(seed), bl.Newton(tol=1e-12)
    at = jax.jit(
        lambda lam: (
            bl.hypergradient(
                problem,
                lam,
                jnp.zeros(6),
                solver=solver,
                engine=bl.Implicit(estimate=False),
                throw=False,
            ).w
        )
    )
    w = at(0.05)
    line = jax.jit(
        lambda before, lam: extrapolated_start(problem, solver, w, before, lam, problem.inner_data)
    )
    errors = {"last": [], "newton": [], "extrapolated": []}
    for move in (0.01, 0.005):
        lam = 0.05 + move
        moved, products = start(problem, solver, w, lam)
        assert int(products) > 0
        secant = line(at(0.05 - move), lam)
        for found, point in zip(errors.values(), (w, moved, secant), strict=True):
            found.append(np.linalg.norm(point - at(lam)))
    for name, order in {"last": 2, "newton": 4, "extrapolated": 4}.items():
        assert order == 2 or errors[name][0] < 0.3 * errors["last"][0]
        np.testing.assert_allclose(errors[name][0] / errors[name][1], order, rtol=0.3)


def test_the_lasso_path_is_followed_exactly(seed):
    """Piecewise linear in the penalty: exact while the support stays."""
    rng = np.random.default_rng([seed, 31])
    X, y = rng.normal(size=(30, 8)), rng.normal(size=30)
    problem = bl.Problem(
        lambda w, lam, batch: 0.5 * jnp.mean((X @ w - y) ** 2),
        lambda w, lam, batch: jnp.sum(w**2),
        inner_prox=lambda v, step, lam: bl.prox.l1(v, step, lam),
    )
    solver = bl.ProximalGradient(learning_rate=0.1)

    @jax.jit
    def solve(lam):
        step = 1 / np.linalg.eigvalsh(X.T @ X / 30)[-1]
        forward = lambda w: w - step * X.T @ (X @ w - y) / 30
        shrink = lambda v: jnp.sign(v) * jnp.maximum(jnp.abs(v) - step * lam, 0)
        return jax.lax.fori_loop(0, 2000, lambda _, w: shrink(forward(w)), jnp.zeros(8))

    w, target = solve(0.1), solve(0.1001)
    assert 0 < np.sum(w == 0) < 8 and np.all((w == 0) == (target == 0))
    moved, _ = start(problem, solver, w, 0.1001)
    assert np.linalg.norm(w - target) > 1e-5
    np.testing.assert_allclose(moved, target, atol=1e-9)


def test_a_fixed_point_and_a_step_that_does_not_help(seed):
    rng = np.random.default_rng([seed, 37])
    A, b = jnp.asarray(0.2 * rng.normal(size=(5, 5))), jnp.asarray(rng.normal(size=5))
    affine = bl.Problem(bl.Mapping(lambda w, lam, batch: A @ w + lam * b), lambda w, l, batch: w[0])
    moved, _ = start(affine, bl.FixedPoint(), jnp.zeros(5), 0.7)
    np.testing.assert_allclose(moved, np.linalg.solve(np.eye(5) - A, 0.7 * b), rtol=1e-10)
    # Newton's method diverges on sqrt(1 + w^2) from |w| > 1.
    flat = bl.Problem(lambda w, lam, batch: jnp.sqrt(1 + w**2), lambda w, lam, batch: w)
    moved, _ = start(flat, bl.LBFGS(), jnp.asarray(2.0), 1.0)
    assert float(moved) == 2.0
    far = extrapolated_start(flat, bl.LBFGS(), jnp.asarray(2.0), jnp.asarray(-1.0), None, None)
    assert float(far) == 2.0


def test_a_run_of_gradient_descent_takes_fewer_steps(seed):
    found = {}
    for warm_start in ("last", "newton", "extrapolated"):
        found[warm_start] = bl.run(
            logistic(seed),
            0.05,
            jnp.zeros(6),
            num_steps=6,
            solver=bl.GradientDescent(0.5, max_steps=3000, tol=1e-6),
            engine=bl.Implicit(warm_start=warm_start, estimate=False),
            outer=optax.adam(0.02),
            transform=bl.transforms.Exp(),
        ).history
    steps = {name: history.inner_steps for name, history in found.items()}
    print(steps)
    assert steps["last"][0] > 100
    assert np.all(steps["newton"][1:] < 0.2 * steps["last"][0])
    # The first secant goes through the start, which is no solution.
    np.testing.assert_array_equal(steps["extrapolated"][:2], steps["last"][:2])
    assert np.all(steps["extrapolated"][2:] < 0.7 * steps["last"][2:])
    # Two systems, with an exact preconditioner; else one.
    products = [history.adjoint_steps for history in found.values()]
    np.testing.assert_array_equal(products, [[1] * 6, [2] * 6, [1] * 6])
    with pytest.raises(ValueError, match="'last', 'newton' or 'extrapolated'"):
        bl.Implicit(warm_start="tangent")


def test_a_run_takes_a_quarter_of_the_products_of_cold_adjoints(seed):
    """Scaled features: warm adjoints, preconditioned by the diagonal, against CG from zero at each `lam` of the run."""
    rng = np.random.default_rng([seed, 41])
    scales = np.geomspace(0.05, 5, 30)
    X = rng.normal(size=(2, 90, 30)) * scales
    y = X @ (rng.normal(size=30) / scales) + rng.normal(size=(2, 90))
    loss = lambda w, batch: 0.5 * jnp.mean((batch[0] @ w - batch[1]) ** 2)
    inner = lambda w, lam, batch: loss(w, batch) + 0.5 * jnp.sum(jnp.exp(lam) * w**2)
    outer = lambda w, lam, batch: loss(w, batch)
    diagonal = lambda w, lam, batch: lambda r: r / (jnp.mean(batch[0] ** 2, axis=0) + jnp.exp(lam))
    plain = bl.Problem(inner, outer, (X[0], y[0]), (X[1], y[1]))
    scaled = dataclasses.replace(plain, inner_preconditioner=diagonal)
    lams, w = [np.full(30, -4.0)], np.zeros(30)
    solver, rtol = bl.Newton(tol=1e-10), 1e-4
    settings = {"solver": solver, "engine": bl.Implicit(bl.CG(rtol), estimate=False)}
    history = bl.run(
        scaled, lams[0], w, num_steps=12, chunk=1, outer=optax.adam(0.02), **settings,
        callback=lambda state, rows: lams.append(np.asarray(state.lam)),
    ).history  # fmt: skip
    cold = []
    for lam in lams[:-1]:
        h = bl.hypergradient(plain, lam, w, **settings)
        w, cold = h.w, [*cold, h.info]
    residuals = [*history.adjoint_residual, *(info.adjoint_residual for info in cold)]
    assert len(cold) == 12 and np.max(residuals) < rtol
    products = sum(int(info.adjoint_steps) for info in cold)
    assert 4 * np.sum(history.adjoint_steps) <= products
