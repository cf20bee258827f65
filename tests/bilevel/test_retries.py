"""Failed steps tried again with shorter ones: where they go, how often, and what is left alone."""

import re
import warnings

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel as bl
from bilevel import outer_steps

SETTINGS = {
    "solver": bl.GradientDescent(1.0, max_steps=5, tol=1e-12),  # exact after one step
    "engine": bl.Implicit(estimate=False),
    "outer": optax.sgd(2.0, momentum=0.5),
}


def inner(w, lam, batch):
    return 0.5 * jnp.sum((w - lam["a"]) ** 2)


def outer(w, lam, batch):
    """Not a number below 1/2; the minimum is at 0.7."""
    return jnp.sum(w - 0.2 * jnp.log(w - 0.5))


def run(**kwargs) -> bl.Result:
    settings = {"num_steps": 40, "chunk": 40, "throw": False} | SETTINGS | kwargs
    return bl.run(bl.Problem(inner, outer), {"a": settings.pop("start", 2.0)}, 0.0, **settings)


def by_hand(steps=40, rate=2.0):
    """Values at which steps were evaluated, NaN where they failed, and the point after the last."""
    lam, before, momentum, values = 2.0, 2.0, 0.0, []
    for _ in range(steps):
        values.append(lam - 0.2 * np.log(lam - 0.5) if lam > 0.5 else np.nan)
        if lam > 0.5:
            momentum = 0.5 * momentum + 1 - 0.2 / (lam - 0.5)
            before, lam = lam, lam - rate * momentum
        else:
            lam, rate = (lam + before) / 2, rate / 2
    return np.array(values), lam


@pytest.fixture(scope="module")
def whole() -> bl.Result:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        result = run(retries=9)
    assert len(told) == result.retries
    expected = r"outer step 1 ended with NONFINITE: .* 0.5 times as long \(retry 1 of 9\)"
    assert re.match(expected, str(told[0].message))
    return result


def test_a_failed_step_is_halved_until_it_holds(whole):
    values, lam = by_hand()
    failures = int(np.isnan(values).sum())
    assert failures > 2
    np.testing.assert_allclose(whole.history.outer_value, values, rtol=1e-9)
    np.testing.assert_allclose(whole.lam["a"], lam, rtol=1e-9)
    np.testing.assert_allclose(lam, 0.7, atol=1e-3)
    assert (whole.status, whole.stopped) == (bl.Status.OK, "num_steps")
    np.testing.assert_array_equal(whole.history.status == bl.Status.NONFINITE, np.isnan(values))
    assert whole.retries == failures


@pytest.mark.filterwarnings("ignore:outer step:RuntimeWarning")
def test_chunks_and_checkpoints_change_no_bit(whole, tmp_path):
    run(retries=9, chunk=3, num_steps=2, checkpoint=tmp_path)  # ends with a failed step
    found = run(retries=9, chunk=3, checkpoint=tmp_path, resume=True)
    np.testing.assert_array_equal(found.lam["a"], whole.lam["a"])
    np.testing.assert_array_equal(found.w, whole.w)
    np.testing.assert_array_equal(found.history.outer_value, whole.history.outer_value)
    assert found.retries == whole.retries


@pytest.mark.filterwarnings("ignore:outer step:RuntimeWarning")
def test_tries_are_bounded_and_the_end_is_honest(whole):
    taken = outer_steps.take_steps, outer_steps._take_quick
    programs: list[list[int]] = []
    for retries in (1, 2):
        ended = run(retries=retries)
        programs.append([program._cached._cache_size() for program in taken])
        assert (ended.status, ended.stopped) == (bl.Status.NONFINITE, "status")
        assert ended.retries == retries and np.count_nonzero(ended.history.status) == retries + 1
        assert float(ended.best.outer_value) == np.nanmin(ended.history.outer_value)
    # A run that ends with a failed step says so, though it could go on.
    last = run(retries=9, num_steps=2)
    assert last.status == bl.Status.NONFINITE and last.stopped == "num_steps"
    with pytest.raises(bl.BilevelError, match="outer step 1 ended with status NONFINITE"):
        run(retries=9, num_steps=2, throw=True)
    # The number of tries is no part of the program. Not counted from before: caches are emptied now and then.
    programs.append([program._cached._cache_size() for program in taken])
    assert programs[0] == programs[1] == programs[2]


def test_nothing_else_changes(whole):
    short = {"start": 0.9, "outer": optax.sgd(0.1, momentum=0.5)}
    plain, guarded = run(**short), run(retries=3, **short)
    np.testing.assert_array_equal(guarded.history.outer_value, plain.history.outer_value)
    np.testing.assert_array_equal(guarded.lam["a"], plain.lam["a"])
    assert guarded.retries == plain.retries == 0
    start = run(retries=3, start=0.4)  # there is no good step to go back to
    assert start.status == bl.Status.NONFINITE and len(start.history.status) == 1
    with pytest.raises(TypeError, match="halves the steps of an optax rule"):
        run(retries=1, outer=bl.Adaptive())
    with pytest.raises(ValueError, match="retries must be at least 0"):
        run(retries=-1)


def test_what_only_the_estimate_finds_ends_the_run():
    """A saddle along a direction that the adjoint system does not see: the last good point is condemned."""
    saddle = lambda w, lam, batch: 0.5 * ((w[1] - lam) ** 2 - w[0] ** 2)
    problem = bl.Problem(saddle, lambda w, lam, batch: jnp.sum(w**2))
    settings = SETTINGS | {"engine": "implicit", "throw": False}
    result = bl.run(problem, 1.0, np.zeros(2), num_steps=4, chunk=2, retries=3, **settings)
    assert result.status == bl.Status.INDEFINITE and result.stopped == "status"
    assert result.retries == 0 and len(result.history.status) == 2
