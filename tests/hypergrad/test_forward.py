"""Forward mode: its refusals, and what its estimates along few directions are worth."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest

import bilevel as bl


def flat(x):
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(x)])


def of(case, **kwargs):
    return bl.Problem(case.inner, case.outer, case.inner_data, case.outer_data, **kwargs)


def test_forward_refuses_many_outer_variables_and_says_what_to_use():
    inner = lambda w, lam, batch: 0.5 * jnp.sum((w - lam) ** 2)
    outer = lambda w, lam, batch: jnp.sum(w**3)
    problem, lam = bl.Problem(inner, outer), jnp.ones(65)
    with pytest.raises(ValueError, match=r"65 entries.*Unrolled.*directions=K"):
        bl.hypergradient(problem, lam, lam, engine="forward")
    for wrong in (0, True, "some", 1.5):
        with pytest.raises(ValueError, match="directions"):
            bl.Forward(directions=wrong)
    with pytest.raises(ValueError, match="line search"):
        bl.hypergradient(problem, lam, lam, engine=bl.Forward(limit=65), solver="lbfgs")


def slope_problem():
    case = problems.make("quadratic")
    solver = bl.GradientDescent(0.2, max_steps=3)
    exact = bl.hypergradient(
        of(case), case.lam, case.w, solver=solver, engine=bl.Unrolled(estimate=False)
    )
    return case, solver, flat(exact.grad), float(exact.info.growth)


@pytest.mark.parametrize("count", [1, 3])
def test_random_directions_are_unbiased_with_the_stated_variance(count, key):
    case, solver, exact, growth = slope_problem()
    engine = bl.Forward(directions=count)
    step = lambda key: engine.step(of(case), solver, case.w, case.lam, None, key)[0]
    N = 4000
    found = jax.jit(jax.vmap(step))(jax.random.split(key, N))
    grads, estimates = np.asarray(found.grad), np.asarray(found.info.error_estimate)
    off = grads - exact
    standard_error = off.std(axis=0) / N**0.5
    assert np.all(np.abs(off.mean(axis=0)) < 4.5 * standard_error)
    assert np.all(standard_error < 0.05 * np.linalg.norm(exact))  # so a factor 1.3 is seen
    variance = np.mean(np.sum(off**2, axis=1)) / np.sum(exact**2)
    assert variance == pytest.approx((exact.size - 1) / count, rel=0.08)
    # The reported error, times ||h||, is that variance in the root mean square.
    reported = np.mean(estimates**2 * np.sum(grads**2, axis=1)) / np.sum(exact**2)
    assert reported == pytest.approx(variance, rel=0.08)
    # So is the growth of the adjoint, from its slope along one direction.
    assert 0.1 < growth < 0.9
    assert np.mean(found.info.growth**2) == pytest.approx(growth**2, rel=0.08)


@pytest.mark.parametrize("batch_size", [None, (4, None)], ids=["rows", "batches"])
def test_the_slope_along_a_guess_is_the_projection_on_it(batch_size):
    """The guess is the derivative of the last step, with that step's batch."""
    case, solver, _, _ = slope_problem()
    kwargs = {} if batch_size is None else {"batch_size": batch_size}
    call = lambda engine: bl.hypergradient(
        of(case, **kwargs), case.lam, case.w, solver=solver, engine=engine, throw=False
    )
    exact = flat(call(bl.Unrolled(estimate=False)).grad)
    u = flat(call(bl.Unrolled(truncate=1, estimate=False)).grad)
    unwatched = call(bl.Forward(directions="guess", max_growth=None))
    assert np.isnan(unwatched.info.growth)
    found = flat(unwatched.grad)
    np.testing.assert_allclose(found, (exact @ u) / (u @ u) * u, rtol=1e-10)
    assert 0.1 < np.linalg.norm(found - exact) / np.linalg.norm(exact) < 1


def test_a_guess_of_zero_is_no_zero_gradient():
    inner = lambda w, lam, batch: 0.5 * w**2
    outer = lambda w, lam, batch: w
    problem = bl.Problem(inner, outer, inner_init=lambda lam, batch: lam)
    h = bl.hypergradient(problem, 2.0, engine=bl.Forward(directions="guess"), throw=False)
    assert int(h.info.status) == bl.Status.BREAKDOWN


# Without reset: training and tuning at once

RNG = np.random.default_rng(0)
CURVATURE, MIX, TARGET = np.diag([0.3, 1.1, 2.0]), RNG.normal(size=(3, 2)), RNG.normal(size=3)
SETTINGS = {"momentum": 0.6, "rate": 0.2, "shift": np.array([0.7, -1.3])}


def shifted(w, lam, batch):
    return 0.5 * w @ CURVATURE @ w - w @ (MIX @ lam["shift"])


def distance(w, lam, batch):
    return 0.5 * jnp.sum((w - TARGET) ** 2) + 0.1 * jnp.sum(lam["shift"] ** 2)


def heavy_ball(lam):
    return bl.GradientDescent(lam["rate"], momentum=lam["momentum"], max_steps=3)


def from_lam(lam, batch):
    return jnp.asarray([0.2, 0.1, -0.4]) * lam["shift"][0]


ONLINE = bl.Problem(shifted, distance, inner_init=from_lam)


def by_hand(num_calls, rate_of_lam):
    """Z <- A Z + B by hand, three steps a call; the last derivative, and lam after its move."""
    momentum, rate, shift = SETTINGS["momentum"], SETTINGS["rate"], SETTINGS["shift"]
    w, m = np.array([0.2, 0.1, -0.4]) * shift[0], np.zeros(3)
    Zw, Zm = np.zeros((3, 4)), np.zeros((3, 4))  # columns: momentum, rate, shift
    Zw[:, 2] = [0.2, 0.1, -0.4]
    for _ in range(num_calls):
        for _ in range(3):
            g, Zg = CURVATURE @ w - MIX @ shift, CURVATURE @ Zw
            Zg[:, 2:] -= MIX
            Zm = momentum * Zm + Zg
            Zm[:, 0] += m
            m = momentum * m + g
            Zw = Zw - rate * Zm
            Zw[:, 1] -= m
            w = w - rate * m
        grad = Zw.T @ (w - TARGET) + np.concatenate([np.zeros(2), 0.2 * shift])
        momentum, rate = np.array([momentum, rate]) - rate_of_lam * grad[:2]
        shift = shift - rate_of_lam * grad[2:]
    return grad, np.array([momentum, rate, *shift])


def test_online_tangents_go_on_from_step_to_step():
    """Three calls: with lam moved between them, and with lam at rest, where it is the whole run's derivative."""
    engine = bl.Forward(reset=False)
    run = lambda rate: bl.run(
        ONLINE,
        SETTINGS,
        solver=heavy_ball,
        engine=engine,
        outer=optax.inject_hyperparams(optax.sgd)(rate),
        num_steps=3,
        chunk=2,
    )
    result = run(jnp.asarray(0.03))
    grad, after = by_hand(3, 0.03)
    np.testing.assert_allclose(flat(result.lam), after, rtol=1e-11)
    assert abs(result.history.grad_norm[-1] / np.linalg.norm(grad) - 1) < 1e-11
    assert not np.allclose(after, by_hand(3, 0.0)[1], rtol=1e-2)
    still, (grad, _) = run(jnp.asarray(0.0)), by_hand(3, 0.0)
    nine = lambda lam: bl.GradientDescent(lam["rate"], momentum=lam["momentum"], max_steps=9)
    whole = bl.hypergradient(ONLINE, SETTINGS, solver=nine, engine=bl.Unrolled(estimate=False))
    np.testing.assert_allclose(flat(whole.grad), grad, rtol=1e-11)
    assert still.history.grad_norm[-1] == pytest.approx(np.linalg.norm(grad), rel=1e-11)
    np.testing.assert_allclose(still.w, whole.w, rtol=1e-11)


def test_online_refuses_settings_that_would_not_move():
    injected = lambda lam: bl.OptaxSolver(optax.inject_hyperparams(optax.sgd)(lam["rate"]))
    with pytest.raises(ValueError, match=r"Forward\(reset=False\).*inject_hyperparams"):
        bl.hypergradient(ONLINE, SETTINGS, solver=injected, engine=bl.Forward(reset=False))
    with pytest.raises(ValueError, match="leave out directions"):
        bl.Forward(directions=2, reset=False)


def test_online_training_that_explodes_is_diverged():
    """The growth is since the start: below the limit in each call, above it after some."""
    lam = SETTINGS | {"rate": 1.5, "momentum": 0.0}  # (1 - 1.5 * 2)^3 = -8 a call
    result = bl.run(
        ONLINE,
        lam,
        solver=heavy_ball,
        engine=bl.Forward(reset=False, max_growth=1e3),
        outer=optax.inject_hyperparams(optax.sgd)(jnp.asarray(0.0)),
        num_steps=20,
        chunk=20,
        throw=False,
    )
    assert result.status == bl.Status.DIVERGED and 3 <= len(result.history.status) <= 7
