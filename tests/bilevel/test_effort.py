"""How much work goes into which outer step and which task."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel as bl
from bilevel import chunks
from bilevel.schedules import periodic

RATE, H = 0.2, np.array([1.0, 3.0])
TARGET = np.array([0.3, -0.4])


def inner(w, lam, batch):
    """w* = lam / H, and a step of gradient descent is `w - RATE (H w - lam)`."""
    return 0.5 * w @ (H * w) - jnp.sum(lam * w)


def outer(w, lam, batch):
    return 0.5 * jnp.sum((w - TARGET) ** 2)


def one_step(lam, w, steps):
    for _ in range(int(steps)):
        w = w - RATE * (H * w - lam)
    return w, lam - 0.1 * np.sum((w - TARGET) / H)


def by_hand(lam, w, steps):
    """Outer values of a run with so many inner steps in each outer step."""
    values = []
    for count in steps:
        w, following = one_step(lam, w, count)
        values.append(0.5 * np.sum((w - TARGET) ** 2))
        lam = following
    return values


def run(problem, solver, **kwargs):
    given = {"engine": bl.Implicit(bl.Dense(), estimate=False), "outer": optax.sgd(0.1)} | kwargs
    return bl.run(problem, 0.7, jnp.zeros(2), solver=solver, **given)


def descent(**kwargs):
    return bl.GradientDescent(RATE, max_steps=9, **kwargs)


def test_steps_follow_a_schedule_in_one_program(count_traces):
    loss = count_traces(inner)
    problem = bl.Problem(loss, outer)
    growing = lambda step: 1 + 2 * step
    result = run(problem, descent(tol=0.0, steps=growing), num_steps=6, chunk=6)
    np.testing.assert_array_equal(result.history.inner_steps, [1, 3, 5, 7, 9, 9])
    expected = by_hand(0.7, np.zeros(2), result.history.inner_steps)
    np.testing.assert_allclose(result.history.outer_value, expected, rtol=1e-12)
    traces = loss.count
    for steps in (3, 2.9):
        counted = run(problem, descent(tol=0.0, steps=steps), num_steps=2, chunk=6)
        np.testing.assert_array_equal(counted.history.inner_steps, int(steps))
        if steps == 3:  # a number where a schedule was: another program
            traces = loss.count
    assert loss.count == traces


def test_a_refresh_every_few_steps():
    """Exact solves at times, and nothing in between: w stays, the outer variable moves."""
    rare = descent(tol=0.0, steps=periodic(0, 4, 3))
    result = run(bl.Problem(inner, outer), rare, num_steps=5)
    np.testing.assert_array_equal(result.history.inner_steps, [4, 0, 0, 4, 0])
    expected = by_hand(0.7, np.zeros(2), [4, 0, 0, 4, 0])
    np.testing.assert_allclose(result.history.outer_value, expected, rtol=1e-12)
    tight = periodic(bl.schedules.power(1e-1, 1.0), 1e-9, 2)
    solver = bl.GradientDescent(RATE, max_steps=300, tol=tight)
    result = run(bl.Problem(inner, outer), solver, num_steps=5)
    assert np.all(result.history.inner_residual[::2] < 1e-9)
    assert np.all(result.history.inner_residual[1::2] > 1e-9)
    assert np.all(result.history.inner_residual[1::2] < [0.05, 0.025])


def test_adjoint_steps_follow_a_schedule():
    """Of conjugate gradients on a 2 x 2 system, from the last adjoint on: at least one; two solve it."""
    adjoint = bl.CG(rtol=0.0, steps=lambda step: step)
    engine = bl.Implicit(adjoint, estimate=False)
    result = run(bl.Problem(inner, outer), bl.Newton(tol=1e-12), engine=engine, num_steps=3)
    np.testing.assert_array_equal(result.history.adjoint_steps, [1, 1, 2])
    c = 0.7 / H - TARGET
    q = (c @ c) / (c @ (H * c)) * c  # one step of steepest descent
    np.testing.assert_allclose(result.history.grad_norm[0], abs(np.sum(q)), rtol=1e-9)
    np.testing.assert_allclose(result.history.adjoint_residual[2], 0, atol=1e-12)
    assert result.status == bl.Status.OK  # rtol=0: the number is what was asked for


def test_steps_of_minibatches_and_of_tasks_on_lanes():
    rows = np.random.default_rng(0).normal(size=(12, 2))
    noisy = lambda w, lam, batch: inner(w, lam, batch) - w @ jnp.mean(batch, axis=0)
    problem = bl.Problem(noisy, outer, rows, batch_size=(3, None))
    growing = lambda step: 1 + step
    result = run(problem, descent(steps=growing), num_steps=3)
    np.testing.assert_array_equal(result.history.inner_steps, [1, 2, 3])
    same = run(problem, descent(steps=2.0), num_steps=1)
    fixed = run(problem, bl.GradientDescent(RATE, max_steps=2), num_steps=1)
    np.testing.assert_array_equal(same.w, fixed.w)
    scaled = lambda w, lam, task: inner(w, lam * task, None)
    tasks = bl.Tasks(bl.Problem(scaled, outer), np.array([0.5, 1.0, 2.0]), lanes=2)
    result = run(tasks, descent(tol=0.0, steps=growing), num_steps=3)
    np.testing.assert_array_equal(result.history.inner_steps, [3, 6, 9])


@pytest.mark.parametrize("engine", ["unrolled", "forward", "iaptt", bl.ES(persistent=True)])
def test_engines_that_take_all_steps_refuse_a_bound(engine):
    with pytest.raises(ValueError, match=r"GradientDescent\(steps=...\) bounds a loop that stops"):
        run(bl.Problem(inner, outer), descent(steps=3), engine=engine)


def test_bad_settings_of_effort():
    with pytest.raises(ValueError, match="every must be at least 1, got 0"):
        periodic(1.0, 2.0, 0)
    with pytest.raises(ValueError, match=r"LBFGS\(steps=...\) must be at least 0"):
        bl.LBFGS(steps=-1)


def quartic(w, lam, task):
    """Curved, so that an inexact solution has an inexact hypergradient."""
    return 0.25 * jnp.sum(w**4) + 0.5 * task * w @ (H * w) - jnp.sum(lam * w)


def true_slopes(lam, tasks):
    """By Newton's method, and the implicit function theorem on diagonal Hessians."""
    grads = []
    for task in tasks:
        w = np.zeros(2)
        for _ in range(50):
            w = w - (w**3 + task * H * w - lam) / (3 * w**2 + task * H)
        grads.append(np.sum((w - TARGET) / (3 * w**2 + task * H)))
    return np.array(grads)


def test_a_closed_loop_keeps_each_task_near_its_target():
    scales = np.array([0.5, 2.0, 8.0, 30.0])
    tasks = bl.Tasks(bl.Problem(quartic, outer), scales, lanes=2)
    solver = bl.GradientDescent(0.01, max_steps=3000, tol=0.0)  # its own tolerance is not used

    def slopes(target, num_steps=12):
        engine = bl.Implicit(bl.CG(), target=target)
        return run(
            tasks, solver, engine=engine, outer=optax.sgd(1e-3), num_steps=num_steps, chunk=12
        )

    loose, tight = slopes(0.1), slopes(1e-3)
    for result, target in ((loose, 0.1), (tight, 1e-3)):
        tols = np.asarray(result.state.engine.own.accuracy.tol)
        assert len(np.unique(tols)) == 4
        h = bl.hypergradient(tasks, result.lam, result.w, solver=solver, engine="implicit")
        assert np.all(np.isfinite(result.history.error_estimate))
        assert np.all(result.history.error_estimate[6:] < 4 * target)
        # The corrected hypergradient, at the last step's own lam.
        before = float(result.lam) + 1e-3 * result.history.grad_norm[-1] * np.sign(h.grad)
        truth = abs(np.mean(true_slopes(before, scales)))
        assert abs(result.history.grad_norm[-1] / truth - 1) < target
    assert np.all(tight.state.engine.own.accuracy.tol < loose.state.engine.own.accuracy.tol)
    assert np.sum(loose.history.inner_steps) < 0.7 * np.sum(tight.history.inner_steps)
    assert np.all(loose.history.adjoint_steps > 0)


def test_a_closed_loop_alone_and_what_it_cannot_be(key):
    from hypergrad.accuracy import Accuracy, following

    at = Accuracy(jnp.asarray(1e-3), jnp.asarray(1e-2))
    moved = lambda error, residual=1e-3: following(
        at, jnp.asarray(error), jnp.asarray(residual), 0.1
    )
    np.testing.assert_allclose(moved(0.2), (5e-4, 5e-3))
    np.testing.assert_allclose(moved(1e-5), (4e-3, 4e-2))
    np.testing.assert_allclose(moved(1e-5, 1e-6), (1e-4, 4e-2))
    np.testing.assert_allclose(moved(np.nan), (1e-4, 1e-3))
    np.testing.assert_allclose(moved(np.inf), (1e-4, 1e-3))
    problem = bl.Problem(inner, outer)
    with pytest.raises(ValueError, match=r"target=...\) sets the rtol .* Dense has none"):
        run(problem, bl.LBFGS(), engine=bl.Implicit(bl.Dense(), target=0.1))
    with pytest.raises(TypeError, match=r"expected Implicit\(target=None\), got target=0.1"):
        run(problem, bl.LBFGS(), engine=bl.Implicit(target=0.1), outer=bl.Adaptive())
    noisy = bl.Problem(inner, outer, np.ones((4, 2)), batch_size=(2, None))
    with pytest.raises(ValueError, match=r"target=...\) sets the tolerance of inner solves"):
        run(noisy, descent(), engine=bl.Implicit(target=0.1))


def test_a_time_limit_ends_at_a_chunk_and_goes_on_with_the_same_bits(monkeypatch, tmp_path):
    """On a clock that chunks move by 10 s, and a look at it by a little."""
    now = [0.0]

    def clock():
        now[0] += 2e-3
        return now[0]

    def tick(state, rows):
        now[0] += 10.0

    monkeypatch.setattr(chunks.time, "perf_counter", clock)

    go = lambda **kwargs: run(
        bl.Problem(inner, outer), descent(tol=0.0), num_steps=9, chunk=2, callback=tick, **kwargs
    )
    whole = go()
    first = go(time_limit=15.0, checkpoint=tmp_path)
    assert first.stopped == "time_limit" and len(first.history.status) == 4
    second = go(time_limit=1e-3, checkpoint=tmp_path, resume=True)  # one chunk at least
    assert second.stopped == "time_limit" and len(second.history.status) == 6
    last = go(time_limit=1e9, checkpoint=tmp_path, resume=True)
    assert last.stopped == "num_steps"
    jax.tree.map(np.testing.assert_array_equal, last.history, whole.history)
    np.testing.assert_array_equal(last.lam, whole.lam)
    for wrong in (0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="time_limit must be a positive number of seconds"):
            go(time_limit=wrong)
