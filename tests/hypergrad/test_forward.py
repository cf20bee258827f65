"""Forward mode: its refusals, and what its estimates along few directions are worth."""

import jax
import jax.numpy as jnp
import numpy as np
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
