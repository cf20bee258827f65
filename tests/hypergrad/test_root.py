"""`bilevel.implicit` and the optimality maps, against closed forms and finite differences."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

import bilevel as bl

maps = bl.optimality
N, D = 30, 5


def ridge_data(seed):
    rng = np.random.default_rng([seed, 3])
    return jnp.asarray(rng.normal(size=(N, D))), jnp.asarray(rng.normal(size=N))


def ridge_loss(w, log_penalty, X, y):
    return 0.5 * jnp.mean((X @ w - y) ** 2) + 0.5 * jnp.exp(log_penalty) * w @ w


def ridge_by_numpy(log_penalty, X, y):
    assert isinstance(X, np.ndarray)  # called from Python
    return np.linalg.solve(X.T @ X / N + np.exp(log_penalty) * np.eye(D), X.T @ y / N)


def ridge_exactly(log_penalty, X, y):
    return jnp.linalg.solve(X.T @ X / N + jnp.exp(log_penalty) * jnp.eye(D), X.T @ y / N)


@pytest.mark.parametrize("symmetric", [True, False])
def test_black_box_in_every_mode(symmetric, seed):
    """First and second derivatives of ridge by NumPy, with respect to the penalty and to the data."""
    X, y = ridge_data(seed)
    wrapped = bl.implicit(
        ridge_by_numpy, maps.stationary(ridge_loss), like=jnp.zeros(D), symmetric=symmetric
    )
    modes = {
        "reverse": jax.grad,
        "forward": jax.jacfwd,
        "reverse over reverse": lambda f: jax.grad(jax.grad(f)),
        "forward over reverse": lambda f: jax.jacfwd(jax.grad(f)),
    }
    if not symmetric:
        modes = dict(list(modes.items())[1:3])
    functions = [
        lambda l, solve=solve: jnp.sum(jnp.sin(3 * solve(l, X, y)))
        for solve in (wrapped, ridge_exactly)
    ]
    for name, mode in modes.items():
        ours, exact = (jax.jit(mode(f))(0.3) for f in functions)
        assert abs(exact) > 1e-3
        np.testing.assert_allclose(ours, exact, rtol=1e-8, err_msg=name)
    if not symmetric:
        return
    ours, exact = (jax.jit(jax.vmap(jax.grad(f)))(jnp.arange(3.0) - 1) for f in functions)
    np.testing.assert_allclose(ours, exact, rtol=1e-8)
    ours, exact = (
        jax.jit(jax.jacobian(lambda y, solve=solve: solve(0.3, X, y)))(y)
        for solve in (wrapped, ridge_exactly)
    )
    np.testing.assert_allclose(ours, exact, rtol=1e-8, atol=1e-12)


def test_maps_of_a_quadratic_programme_on_the_simplex(seed):
    """Projection, exponentiated gradient and KKT: one derivative, that of a re-solved problem."""
    rng = np.random.default_rng([seed, 5])
    A = rng.normal(size=(6, 6))
    Q, b = jnp.asarray(A @ A.T + np.eye(6)), jnp.asarray(2 * rng.normal(size=6))
    loss = lambda w, lam: 0.5 * w @ Q @ w - (b + lam * jnp.sin(jnp.arange(6.0))) @ w

    dense, linear = np.asarray(Q), np.asarray(b)

    def solve(lam):
        """By active sets, all of them."""
        Q, b = dense, linear
        best, value = None, np.inf
        for pattern in range(1, 64):
            on = np.array([pattern >> i & 1 for i in range(6)], bool)
            size = on.sum()
            system = np.block([[Q[np.ix_(on, on)], np.ones((size, 1))], [np.ones(size), 0]])
            rhs = np.append((b + lam * np.sin(np.arange(6.0)))[on], 1)
            found = np.linalg.solve(system, rhs)
            w = np.zeros(6)
            w[on] = found[:size]
            reached = 0.5 * w @ Q @ w - (b + lam * np.sin(np.arange(6.0))) @ w
            if w.min() >= 0 and reached < value:
                best, value = (w, found[size]), reached
        return best

    w, nu = solve(0.7)
    active = w > 0
    assert 1 < active.sum() < 6
    mu = np.where(active, 0, np.asarray(jax.jit(jax.grad(loss))(w, 0.7)) + nu)
    truth = (solve(0.7 + 1e-5)[0] - solve(0.7 - 1e-5)[0]) / 2e-5
    equality, inequality = lambda w, lam: jnp.sum(w) - 1, lambda w, lam: -w
    projected_step = lambda w, lam: bl.prox.simplex(w - 0.3 * jax.grad(loss)(w, lam))
    candidates = {
        "projection": (maps.fixed_point(projected_step), jnp.asarray(w), lambda w: w),
        "exponentiated": (maps.exponentiated(loss, 0.3), jnp.asarray(w), lambda w: w),
        "kkt": (
            maps.kkt(loss, equality, inequality),
            maps.KKT(jnp.asarray(w), jnp.asarray(nu), jnp.asarray(mu)),
            lambda solution: solution.w,
        ),
    }
    for name, (residual, at, pick) in candidates.items():
        solution = bl.implicit(lambda lam, at=at: at, residual, tol=1e-9)
        found = pick(jax.jit(jax.jacfwd(solution))(0.7))
        np.testing.assert_allclose(found, truth, rtol=1e-7, atol=1e-8, err_msg=name)
        weigh = lambda lam: jnp.cos(jnp.arange(6.0)) @ pick(solution(lam))  # noqa: B023
        weighed = np.cos(np.arange(6.0)) @ truth
        np.testing.assert_allclose(jax.jit(jax.grad(weigh))(0.7), weighed, rtol=1e-7)


def test_blocks_with_steps_of_their_own(seed):
    """A lasso and a box, two blocks of one problem, against re-solved ones."""
    rng = np.random.default_rng([seed, 9])
    A = rng.normal(size=(8, 8))
    Q, b = jnp.asarray(A @ A.T / 8 + np.eye(8)), jnp.asarray(rng.normal(size=8))

    def loss(w, lam):
        u = jnp.concatenate(w)
        return 0.5 * u @ Q @ u - b @ u

    proxes = (
        lambda v, step, lam: jnp.sign(v) * jnp.maximum(jnp.abs(v) - step * lam, 0),
        lambda v, step, lam: jnp.clip(v, -0.3 - lam, 0.3 + lam),
    )

    def solve(lam):
        step = 1 / np.linalg.eigvalsh(Q)[-1]

        def body(_, w):
            g = jax.grad(loss)(w, lam)
            return tuple(p(x - step * d, step, lam) for p, x, d in zip(proxes, w, g, strict=True))

        return jax.lax.fori_loop(0, 2000, body, (jnp.zeros(4), jnp.zeros(4)))

    solve = jax.jit(solve)
    residual = maps.proximal(loss, proxes, (0.2, 0.1))
    solution = bl.implicit(solve, residual)
    found = jnp.concatenate(jax.jit(jax.jacrev(solution))(0.2))
    high, low = (jnp.concatenate(solve(0.2 + h)) for h in (1e-5, -1e-5))
    assert np.any(np.asarray(solve(0.2)[0]) == 0) or np.any(np.abs(found) > 0.99)
    np.testing.assert_allclose(found, (high - low) / 2e-5, rtol=1e-6, atol=1e-8)
    with pytest.raises(ValueError, match="2 proxes and 3 steps"):
        maps.proximal(loss, proxes, (1.0, 1.0, 1.0))


def test_scipy_root(seed):
    """A nonsymmetric Jacobian: SciPy's root of a small system, in both modes."""
    rng = np.random.default_rng([seed, 2])
    A = jnp.asarray(0.4 * rng.normal(size=(4, 4)))
    residual = lambda w, lam: w - jnp.tanh(A @ w + lam * jnp.arange(1.0, 5.0))
    function = jax.jit(residual)
    solve = lambda lam: scipy.optimize.root(lambda w: np.asarray(function(w, lam)), np.zeros(4)).x
    solution = bl.implicit(solve, residual, like=jax.ShapeDtypeStruct((4,), float))
    truth = (solve(0.3 + 1e-5) - solve(0.3 - 1e-5)) / 2e-5
    for mode in (jax.jacfwd, jax.jacrev):
        np.testing.assert_allclose(jax.jit(mode(solution))(0.3), truth, rtol=1e-6)


def nan_and_warning(solution, match):
    weighed = lambda l: jnp.vdot(solution(l), 1 + jnp.arange(solution(l).size, dtype=float))
    with pytest.warns(UserWarning, match=match) as seen:
        gradient = jax.jit(jax.grad(weighed))(0.3)
        jax.effects_barrier()
    assert np.isnan(gradient) and len({str(w.message) for w in seen}) == 1


def test_what_cannot_be_trusted_is_nan_and_said(seed):
    X, y = ridge_data(seed)
    off = lambda l: ridge_exactly(l, X, y) + 1e-3
    residual = maps.stationary(lambda w, l: ridge_loss(w, l, X, y))
    nan_and_warning(bl.implicit(off, residual, symmetric=True), "above tol = 1e-06")
    with pytest.warns(UserWarning, match="above tol"):
        forward = jax.jit(jax.jacfwd(bl.implicit(off, residual, symmetric=True)))(0.3)
        jax.effects_barrier()
    assert np.all(np.isnan(forward))
    loose = bl.implicit(off, residual, tol=1.0)
    assert np.isfinite(jax.jit(jax.grad(lambda l: loose(l)[0]))(0.3))

    saddle = maps.stationary(lambda w, l: w[0] ** 2 - 3 * w[1] ** 2 + l * jnp.sum(w))
    at = lambda l: jnp.stack([-l / 2, l / 6])
    nan_and_warning(bl.implicit(at, saddle, symmetric=True), "INDEFINITE")
    # Asked for as a root, it has a derivative.
    root = jax.jit(jax.jacfwd(bl.implicit(at, saddle)))
    np.testing.assert_allclose(root(0.3), [-1 / 2, 1 / 6])

    flat = maps.stationary(lambda w, l: (w[0] + w[1] - l) ** 2 + w[0] * l * 0.0 + l * (w[0] - w[1]))
    singular = bl.implicit(lambda l: jnp.full(2, l / 2), flat, symmetric=True, tol=1.0)
    nan_and_warning(singular, "BREAKDOWN")

    kkt = maps.kkt(lambda w, l: 0.5 * w**2 - l * w, inequality=lambda w, l: w - 1)
    violated = bl.implicit(lambda l: maps.KKT(l + 1.0, mu=jnp.zeros(())), kkt, tol=10.0)
    with pytest.warns(UserWarning, match="above tol"):
        assert np.isnan(jax.jit(jax.grad(lambda l: violated(l).w))(0.3))
        jax.effects_barrier()


def test_bad_input_is_named(seed):
    X, y = ridge_data(seed)
    with pytest.raises(TypeError, match="optimality"):
        bl.implicit(ridge_exactly, 3)
    with pytest.raises(TypeError, match="linear_solver"):
        bl.implicit(ridge_exactly, maps.stationary(ridge_loss), linear_solver="cg")
    with pytest.raises(ValueError, match="tol"):
        bl.implicit(ridge_exactly, maps.stationary(ridge_loss), tol=-1.0)
    with pytest.raises(ValueError, match="must be like w"):
        bl.implicit(ridge_exactly, lambda w, l, X, y: w[:2])(0.3, X, y)
    with pytest.raises(TypeError, match="floating-point"):
        bl.implicit(lambda l: jnp.arange(3), lambda w, l: w)(0.3)
    wrong = bl.implicit(lambda l: np.zeros(3), lambda w, l: w * l, like=jnp.zeros(2))
    with warnings.catch_warnings(), pytest.raises(Exception, match=r"returned \(3,\)"):
        warnings.simplefilter("ignore")
        jax.block_until_ready(wrong(0.3))
