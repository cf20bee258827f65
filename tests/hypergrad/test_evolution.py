"""Evolution strategies: the mean and the variance of their estimates, and where nothing else has a derivative."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel as bl

RNG = np.random.default_rng(0)
CURVATURE, MIX, TARGET = np.diag([0.3, 1.1, 2.0]), RNG.normal(size=(3, 4)), RNG.normal(size=3)
LAM, RATE, STEPS = np.array([0.7, -1.3, 0.4, 1.1]), 0.25, 3


def shifted(w, lam, batch):
    return 0.5 * w @ CURVATURE @ w - w @ (MIX @ lam)


def distance(w, lam, batch):
    return 0.5 * jnp.sum((w - TARGET) ** 2)


def from_lam(lam, batch):
    return 0.3 * lam[:3]


PROBLEM = bl.Problem(shifted, distance, inner_init=from_lam)
SOLVER = bl.GradientDescent(RATE, max_steps=STEPS, tol=0.0)


def by_window(windows):
    """The derivative of the last outer value in the lam of each window, a row each, by hand."""
    A, w = np.eye(3) - RATE * CURVATURE, 0.3 * LAM[:3]
    D = np.zeros((windows, 3, 4))
    D[0] = 0.3 * np.eye(3, 4)
    for window in range(windows):
        for _ in range(STEPS):
            w = A @ w + RATE * MIX @ LAM
            D = np.einsum("ij,kjl->kil", A, D)
            D[window] += RATE * MIX
    return np.einsum("kil,i->kl", D, w - TARGET)


def steps(engine, count, key):
    """`count` calls at LAM, the last one's outcome."""
    step = eqx.filter_jit(lambda w, state, key: engine.step(PROBLEM, SOLVER, w, LAM, state, key))
    state = engine.init(PROBLEM, SOLVER, jnp.zeros(3), jnp.asarray(LAM), key)
    h, w = None, jnp.zeros(3)
    for index in range(count):
        h, state = step(w, state, jax.random.fold_in(key, index))
        w = h.w
    return h


@pytest.mark.parametrize(
    ("windows", "options"),
    [(1, {}), (3, {"persistent": True}), (2, {"persistent": True, "windows": 3})],
    ids=["es", "pes", "restarted"],
)
def test_unbiased_with_the_stated_variance(windows, options, key):
    """Phi is quadratic: pairs see its slope alone. Windows: k p sum_j ||g_j||^2 + ||sum_j g_j||^2 for a pair."""
    engine, p = bl.ES(pairs=20_000, sigma=0.5, **options), LAM.size
    # With a restart after three windows, the second after it is the fifth.
    h = steps(engine, windows + (3 if "windows" in options else 0), key)
    parts = by_window(windows)
    exact = parts.sum(axis=0)
    size = np.linalg.norm(exact)
    variance = windows * p * np.sum(parts**2) + size**2
    error = np.sqrt(variance / engine.pairs)
    assert np.linalg.norm(h.grad - exact) < 2 * error
    assert 2 * error < 0.06 * size  # so a factor 1.1 is seen
    assert float(h.info.error_estimate) == pytest.approx(error / size, rel=0.05)
    np.testing.assert_allclose(h.info.outer_value, distance(h.w, LAM, None))
    if windows > 1:  # and the window alone is another number
        assert np.linalg.norm(parts[-1] - exact) > 0.3 * size


def test_a_step_function_has_the_slope_of_its_smoothed_self(key):
    """w counts the positive entries: its derivative is zero, that of its mean is a normal density."""
    count = bl.Mapping(lambda w, lam, batch: jnp.sum(jnp.where(lam > 0, 1.0, 0.0)) + 0.0 * w)
    problem, lam = bl.Problem(count, lambda w, lam, batch: 1.7 * w), jnp.asarray([0.3, -0.2])
    solver = bl.FixedPoint(max_steps=5)
    call = lambda engine: bl.hypergradient(
        problem, lam, jnp.zeros(()), solver=solver, engine=engine, key=key, throw=False
    )
    h = call(bl.ES(pairs=40_000, sigma=0.5))
    density = np.exp(-0.5 * (np.asarray(lam) / 0.5) ** 2) / np.sqrt(2 * np.pi) / 0.5
    np.testing.assert_allclose(h.grad, 1.7 * density, rtol=0.05)
    assert 0.002 < float(h.info.error_estimate) < 0.03
    assert int(h.info.status) == bl.Status.OK
    flat = call(bl.ES(pairs=4, sigma=1e-3))
    assert int(flat.info.status) == bl.Status.BREAKDOWN


def test_a_perturbation_outside_the_domain_is_nonfinite_and_bad_options_are_refused():
    inner = lambda w, lam, batch: 0.5 * (w - jnp.log(lam)) ** 2
    problem = bl.Problem(inner, lambda w, lam, batch: w)
    with pytest.raises(bl.BilevelError, match="NONFINITE.*sigma"):
        bl.hypergradient(problem, 0.1, 0.0, solver=SOLVER, engine=bl.ES(sigma=1.0))
    with pytest.raises(ValueError, match="windows"):
        bl.ES(windows=3)


def test_persistent_runs_tune_under_the_driver(key):
    """In float32, with batches, the solver's rate among what is tuned."""
    f32 = lambda *x: jnp.asarray(x, jnp.float32)
    problem = bl.Problem(
        lambda w, lam, batch: 0.5 * jnp.sum((w - jnp.tanh(lam["x"]) - 0.1 * batch.mean()) ** 2),
        lambda w, lam, batch: jnp.sum((w - f32(0.3, -0.2)) ** 2),
        f32(-1.0, -0.5, 0.5, 1.0),
        batch_size=(2, None),
        inner_init=lambda lam, batch: f32(1.0, 1.0),
    )
    result = bl.run(
        problem,
        {"x": f32(-1.0, 1.0), "rate": jnp.float32(0.1)},
        solver=lambda lam: bl.GradientDescent(lam["rate"], momentum=0.3, max_steps=4),
        engine=bl.ES(pairs=64, persistent=True, windows=3),
        num_steps=90,
        key=key,
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(result.lam)} == {jnp.dtype("float32")}
    values = result.history.outer_value
    assert np.mean(values[-9:]) < 0.2 * np.mean(values[:6])
    assert result.status == bl.Status.OK and np.all(np.isfinite(result.history.error_estimate))
