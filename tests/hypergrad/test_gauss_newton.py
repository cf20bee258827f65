"""Gauss-Newton adjoints: the matrix by dense algebra, where it is exact, and its label."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel as bl

N, D, HIDDEN = 30, 3, 4


def network(w, lam, batch):
    return jnp.tanh(batch["X"] @ w["in"]) @ w["out"]


def linear(w, lam, batch):
    return batch["X"] @ w


def weighted_squares(outputs, lam, batch):
    return 0.5 * jnp.mean(jnp.exp(lam["row"]) * (outputs - batch["y"]) ** 2)


def cross_entropy(outputs, lam, batch):
    return jnp.mean(jax.nn.softplus(outputs) - batch["label"] * outputs)


def decay(w, lam, batch):
    return 0.5 * jnp.exp(lam["decay"]) * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(w))


def outer(w, lam, batch):
    model = network if isinstance(w, dict) else linear
    return jnp.mean((model(w, lam, batch) - batch["y"]) ** 2)


NETWORK = bl.gauss_newton(network, weighted_squares, decay)
LINEAR = bl.gauss_newton(linear, cross_entropy, decay)


@pytest.fixture
def case(seed):
    rng = np.random.default_rng([seed, 17])
    X = rng.normal(size=(2 * N, D))
    y = np.sin(2 * X[:, 0]) + 0.5 * rng.normal(size=2 * N)
    rows = {"X": X, "y": y, "label": (y > 0).astype(float)}
    train, held_out = ({k: v[part] for k, v in rows.items()} for part in (slice(N), slice(N, None)))
    lam = {"row": 0.3 * rng.normal(size=N), "decay": jnp.asarray(-3.0)}
    w = {"in": rng.normal(size=(D, HIDDEN)), "out": rng.normal(size=HIDDEN)}
    return train, held_out, jax.tree.map(jnp.asarray, lam), jax.tree.map(jnp.asarray, w)


def problem_of(parts, train, held_out):
    return bl.Problem(parts.inner, outer, train, held_out, inner_gauss_newton=parts.product)


def test_matrix_and_hypergradient_are_those_of_dense_algebra(case):
    """At a point that is no minimiser: `J' diag(weights / n) J + decay I` in NumPy, by a Jacobian of the model."""
    train, held_out, lam, w = case
    problem = problem_of(NETWORK, train, held_out)
    engine = bl.Implicit(bl.CG(rtol=1e-12), gauss_newton=True, estimate=False)
    h = bl.hypergradient(problem, lam, w, solver=bl.Solved(tol=1e3), engine=engine)
    flat, unravel = jax.flatten_util.ravel_pytree(w)

    @jax.jit
    def pieces(flat):
        gradient = lambda flat, lam: jax.grad(
            lambda flat: NETWORK.inner(unravel(flat), lam, train)
        )(flat)
        return (
            jax.jacobian(lambda flat: network(unravel(flat), lam, train))(flat),
            jax.grad(lambda flat: outer(unravel(flat), lam, held_out))(flat),
            jax.jacobian(gradient, argnums=1)(flat, lam),
            jax.jacobian(gradient)(flat, lam),
        )

    J, c, C, H = jax.tree.map(np.asarray, pieces(flat))
    G = (J.T * np.exp(lam["row"]) / N) @ J + np.exp(-3.0) * np.eye(flat.size)
    assert np.isnan(h.info.curvature)  # G's is none of the inner loss
    assert np.linalg.norm(G - H) > 0.1 * np.linalg.norm(H)  # there is something left out
    q = np.linalg.solve(G, c)
    np.testing.assert_allclose(h.grad["row"], -q @ C["row"], rtol=1e-8, atol=1e-12)
    np.testing.assert_allclose(h.grad["decay"], -q @ C["decay"], rtol=1e-8)
    product = NETWORK.product(w, lam, train)
    image = product(unravel(jnp.arange(flat.size) / flat.size))
    expected = G @ (np.arange(flat.size) / flat.size)
    np.testing.assert_allclose(jax.flatten_util.ravel_pytree(image)[0], expected, rtol=1e-8)


def test_where_the_hessian_is_indefinite_it_goes_on_and_says_what_it_did(case):
    train, held_out, lam, w = case
    problem = problem_of(NETWORK, train, held_out)
    w = {"in": w["in"], "out": -3 * w["out"]}  # far from a fit: the model's curvature counts
    given = bl.Solved(tol=1e3)
    plain = bl.hypergradient(problem, lam, w, solver=given, throw=False)
    assert int(plain.info.status) == bl.Status.INDEFINITE and not plain.info.gauss_newton
    h = bl.hypergradient(problem, lam, w, solver=given, engine=bl.Implicit(gauss_newton=True))
    assert bool(h.info.gauss_newton)
    assert np.isnan(h.info.error_estimate)
    assert float(h.info.curvature) < 0  # met by the estimate: the Hessian's


def test_the_estimate_is_the_bias_at_a_minimum(case):
    """A network fitted well: the Hessian is definite, so that its hypergradient is there to compare with."""
    train, held_out, lam, w = case
    lam = lam | {"decay": jnp.asarray(-2.0)}
    problem = problem_of(NETWORK, train, held_out)
    solver = bl.LBFGS(max_steps=500)
    exact = bl.hypergradient(problem, lam, w, solver=solver)
    h = bl.hypergradient(problem, lam, w, solver=solver, engine=bl.Implicit(gauss_newton=True))
    difference = jax.tree.map(lambda a, b: np.ravel(a - b), h.grad, exact.grad)
    error = np.linalg.norm(np.concatenate(list(difference.values())))
    size = np.linalg.norm(np.concatenate([np.ravel(x) for x in h.grad.values()]))
    assert error > 1e-3 * size
    np.testing.assert_allclose(h.info.error_estimate, error / size, rtol=1e-2)


def test_for_a_linear_model_it_is_the_hessian(case):
    train, held_out, lam, _ = case
    problem, w = problem_of(LINEAR, train, held_out), jnp.zeros(D)
    exact = bl.hypergradient(problem, lam, w)
    h = bl.hypergradient(problem, lam, w, engine=bl.Implicit(gauss_newton=True))
    np.testing.assert_allclose(h.grad["decay"], exact.grad["decay"], rtol=1e-6)
    assert float(exact.grad["decay"]) != 0 and float(h.info.error_estimate) < 1e-6


def test_what_is_missing_is_named(case):
    train, held_out, lam, w = case
    problem = bl.Problem(NETWORK.inner, outer, train, held_out)
    with pytest.raises(ValueError, match="inner_gauss_newton"):
        bl.hypergradient(problem, lam, w, engine=bl.Implicit(gauss_newton=True))
    with pytest.raises(TypeError, match=r"gauss_newton\(loss=...\)"):
        bl.gauss_newton(network, 3.0)
    with pytest.raises(TypeError, match="inner_gauss_newton"):
        bl.Problem(NETWORK.inner, outer, inner_gauss_newton=1.0)
