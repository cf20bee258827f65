"""Inner problems that are fixed points, with a Jacobian that is not symmetric."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel as bl

D = 6


def coefficients(seed, factor):
    rng = np.random.default_rng([seed, 17])
    A = rng.normal(size=(D, D))
    return (jnp.asarray(x) for x in (factor * A / np.linalg.norm(A, 2), *rng.normal(size=(2, D))))


def network(seed, factor=0.8):
    """`w = tanh(A w + lam b)`, a contraction of the given factor; outer `0.5 ||w - t||^2 + lam^2`."""
    A, b, t = coefficients(seed, factor)
    mapping = lambda w, lam, batch: jnp.tanh(A @ w + lam * b)
    outer = lambda w, lam, batch: 0.5 * jnp.sum((w - t) ** 2) + lam**2
    return bl.Problem(bl.Mapping(mapping), outer), mapping, outer


def by_iteration(mapping, outer, lam):
    w = jax.lax.fori_loop(0, 300, lambda _, w: mapping(w, lam, None), jnp.zeros(D))
    return outer(w, lam, None)


def test_engines_agree_with_differences(seed):
    problem, mapping, outer = network(seed)
    lam, h = 0.7, 1e-5
    value = jax.jit(lambda lam: by_iteration(mapping, outer, lam))
    truth = (value(lam + h) - value(lam - h)) / (2 * h)
    assert abs(truth) > 0.1
    found = bl.hypergradient(problem, lam, jnp.zeros(D))
    np.testing.assert_allclose(found.grad, truth, rtol=1e-7)
    np.testing.assert_allclose(found.w, mapping(found.w, lam, None), atol=1e-7)
    assert float(found.info.error_estimate) < 1e-6 and np.isnan(found.info.curvature)
    unrolled = bl.hypergradient(
        problem, lam, jnp.zeros(D), engine="unrolled", solver=bl.FixedPoint(max_steps=100)
    )
    np.testing.assert_allclose(unrolled.grad, truth, rtol=1e-7)
    # As a loss, `0.5 ||T(w) - w||^2`, for engines that need one.
    exact = bl.hypergradient(problem, lam, jnp.zeros(D), engine="exact")
    np.testing.assert_allclose(exact.grad, truth, rtol=1e-5)


def test_the_estimate_is_of_the_true_error(seed):
    """A solve cut short: estimate, refinement and corrected value against the converged one."""
    problem, mapping, outer = network(seed)
    truth = jax.grad(
        lambda lam: (
            bl.hypergradient(
                problem,
                lam,
                jnp.zeros(D),
                engine=bl.Unrolled(),
                solver=bl.FixedPoint(max_steps=200),
                throw=False,
            ).info.outer_value
        )
    )(0.7)
    short = bl.FixedPoint(max_steps=10)
    engine = bl.Implicit(linear_solver=bl.GMRES(rtol=1e-12))
    h = bl.hypergradient(problem, 0.7, jnp.zeros(D), solver=short, engine=engine, throw=False)
    assert int(h.info.status) == bl.Status.MAX_STEPS
    error = abs(float(h.grad) - truth) / abs(float(h.grad))
    assert error > 1e-5
    np.testing.assert_allclose(h.info.error_estimate, error, rtol=0.05)
    refined = bl.hypergradient(
        problem, 0.7, jnp.zeros(D), solver=short, engine=bl.Implicit(refine=True), throw=False
    )
    assert abs(float(refined.grad) - truth) < 0.05 * abs(float(h.grad) - truth)
    value = float(by_iteration(mapping, outer, 0.7))
    info = h.info
    assert abs(float(info.corrected_value) - value) < 0.05 * abs(float(info.outer_value) - value)


def test_a_contraction_is_certified(seed):
    """Affine T: `Constants(strong_convexity=1 - factor, ...)` bounds the error at every stop."""
    A, b, t = coefficients(seed, 0.8)
    problem = bl.Problem(
        bl.Mapping(lambda w, lam, batch: A @ w + lam * b),
        lambda w, lam, batch: 0.5 * jnp.sum((w - t) ** 2),
        constants=bl.Constants(1 - 0.8, 0.0, 0.0, 1.0, 0.0),
    )
    M = np.linalg.inv(np.eye(D) - np.asarray(A))
    truth = float((M @ b) @ (0.7 * M @ b - t))
    for steps in (3, 6, 12):
        solver = bl.FixedPoint(max_steps=steps)
        h = bl.hypergradient(problem, 0.7, jnp.zeros(D), solver=solver, throw=False)
        error, bound = abs(float(h.grad) - truth) / abs(float(h.grad)), float(h.info.bound)
        assert error <= bound < 1e3 * error


def test_anderson_is_as_fast_as_gmres_and_solves_what_is_no_contraction(seed):
    A, b, _ = coefficients(seed, 0.95)
    problem = bl.Problem(
        bl.Mapping(lambda w, lam, batch: A @ w + lam * b), lambda w, lam, batch: jnp.sum(w)
    )
    plain, fast = (
        bl.hypergradient(problem, 1.0, jnp.zeros(D), solver=bl.FixedPoint(memory=m))
        for m in (0, D + 1)
    )
    np.testing.assert_allclose(fast.w, plain.w, atol=1e-6)
    assert int(fast.info.inner.num_steps) <= D + 3 < 0.2 * int(plain.info.inner.num_steps)
    expanding = bl.Problem(
        bl.Mapping(lambda w, lam, batch: -3 * w + 4 * lam * b), lambda w, lam, batch: jnp.sum(w)
    )
    lost = bl.hypergradient(expanding, 0.5, jnp.zeros(D), throw=False)
    assert int(lost.info.status) != bl.Status.OK
    found = bl.hypergradient(expanding, 0.5, jnp.zeros(D), solver=bl.FixedPoint(memory=2))
    np.testing.assert_allclose(found.w, 0.5 * b, atol=1e-6)
    np.testing.assert_allclose(found.grad, jnp.sum(b), rtol=1e-6)


def test_it_keeps_float32(seed):
    A, b, t = (x.astype(jnp.float32) for x in coefficients(seed, 0.8))
    problem = bl.Problem(
        bl.Mapping(lambda w, lam, batch: jnp.tanh(A @ w + lam * b)),
        lambda w, lam, batch: jnp.sum((w - t) ** 2),
    )
    for memory in (0, 3):
        solver = bl.FixedPoint(memory=memory)
        h = bl.hypergradient(problem, jnp.float32(0.7), jnp.zeros(D, jnp.float32), solver=solver)
        assert h.grad.dtype == h.w.dtype == jnp.float32
        assert float(h.info.error_estimate) < 1e-3


def test_wrong_pairs_are_refused(seed):
    problem, *_ = network(seed)
    loss = bl.Problem(lambda w, lam, batch: (w - lam) ** 2, lambda w, lam, batch: w)
    with pytest.raises(ValueError, match=r"bilevel.Mapping\(T\), not a loss"):
        bl.hypergradient(loss, 1.0, 0.0, solver=bl.FixedPoint())
    with pytest.raises(ValueError, match="OneStep needs the derivatives of an inner loss"):
        bl.hypergradient(problem, 1.0, jnp.zeros(D), engine="onestep", solver=bl.FixedPoint())
    with pytest.raises(ValueError, match="damping='auto'"):
        bl.hypergradient(problem, 1.0, jnp.zeros(D), engine=bl.Implicit(damping="auto"))
    with pytest.raises(TypeError, match="takes a function"):
        bl.Mapping(3)
