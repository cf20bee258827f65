"""Tasks drawn by difficulty: unbiased, with less variance, the same after a break; and where the work went."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel as bl
from bilevel import on_lanes
from bilevel.calls import engine_step
from bilevel.difficulty import UNIFORM, TaskStates, after, chances
from hypergrad.base import make_info
from solvers import SolveInfo

H = np.array([1.0, 2.0, 4.0, 8.0, 3.0])
B = np.array([9.0, 0.2, 1.0, 0.5, 3.0])
COUNT, LAM = len(H), 0.5


def inner(w, lam, task):
    """w* = b / (h + lam)."""
    h, b = task
    return 0.5 * (h + lam) * w[0] ** 2 - b * w[0]


def outer(w, lam, task):
    return 0.5 * jnp.sum((w - 1) ** 2)


def slopes(lam):
    w = B / (H + lam)
    return -(w - 1) * w / (H + lam)


ENGINE = bl.Implicit(bl.Dense(), estimate=False)
SOLVER = bl.Newton(tol=1e-12)


def tasks(per_step=1, weights="difficulty", **kwargs):
    return bl.Tasks(bl.Problem(inner, outer), (H, B), per_step=per_step, weights=weights, **kwargs)


def run(per_step=1, lr=1e-3, **kwargs):
    given = {"outer": optax.sgd(lr), "solver": SOLVER, "engine": ENGINE, "num_steps": 8} | kwargs
    return bl.run(tasks(per_step), LAM, np.zeros(1), **given)


def test_chances_by_hand():
    known = np.array([1.0, 3.0, 0.0, 4.0])
    expected = (1 - UNIFORM) * known / 8 + UNIFORM / 4
    np.testing.assert_allclose(chances(jnp.asarray(known)), expected)
    unseen = chances(jnp.array([1.0, jnp.nan, 3.0, jnp.nan]))  # as the mean of 1 and 3
    np.testing.assert_allclose(unseen, (1 - UNIFORM) * np.array([1, 2, 3, 2]) / 8 + UNIFORM / 4)
    for nothing in (np.full(4, np.nan), np.zeros(4)):
        np.testing.assert_allclose(chances(jnp.asarray(nothing)), 0.25)


def test_the_mean_over_all_draws_is_the_mean_over_all_tasks(key):
    """Every task that one draw may take, weighted by its chance: exactly the hypergradient of all."""
    chosen = tasks()
    state = run(num_steps=12, key=key).state
    odds, grads = np.asarray(chances(state.engine.difficulty)), {}
    assert odds.max() > 2 / COUNT and np.all(odds >= UNIFORM / COUNT)
    for number in range(200):
        own = jax.random.fold_in(key, 1000 + number)
        (drawn,) = np.asarray(chosen.drawn(own, state.engine)).tolist()
        if drawn in grads:
            continue
        h, after = engine_step(
            chosen, SOLVER, ENGINE, state.w, state.lam, state.engine, own, jnp.int32(0)
        )
        assert h.info.drawn.numbers.tolist() == [drawn]
        grads[drawn] = float(h.grad)
        change = np.asarray(after.difficulty != state.engine.difficulty)
        assert set(np.flatnonzero(change)) <= {drawn}
        np.testing.assert_array_equal(
            after.inner_steps - state.engine.inner_steps > 0, np.arange(COUNT) == drawn
        )
        if len(grads) == COUNT:
            break
    each, truth = np.array([grads[i] for i in range(COUNT)]), slopes(float(state.lam))
    np.testing.assert_allclose(odds @ each, truth.mean(), rtol=1e-9)
    np.testing.assert_allclose(each, truth / (COUNT * odds), rtol=1e-9)
    # The variance of one draw is what chances by the norms are for.
    assert odds @ each**2 - truth.mean() ** 2 < 0.5 * truth.var()


def test_draws_follow_the_chances_and_the_averages_the_norms(key):
    result = run(per_step=2, lr=0.0, num_steps=20, key=key)
    difficulty = np.asarray(result.state.engine.difficulty)
    np.testing.assert_allclose(difficulty, abs(slopes(LAM)), rtol=1e-6)  # lam stays: every norm
    odds = np.asarray(chances(result.state.engine.difficulty))
    draw = lambda key: tasks(2).drawn(key, result.state.engine)
    drawn = np.asarray(jax.jit(jax.vmap(draw))(jax.random.split(key, 20000)))
    found = np.bincount(drawn.ravel(), minlength=COUNT) / drawn.size
    assert np.all(np.abs(found - odds) < 5 * np.sqrt(odds / drawn.size))
    with pytest.raises(TypeError, match=r"expected drawn\(key, state\)"):
        tasks(2).drawn(key)


def test_a_break_changes_no_draw(key, tmp_path):
    settings = {"per_step": 2, "lr": 0.1, "key": key, "chunk": 3}
    whole = run(**settings)
    run(**settings | {"num_steps": 5}, checkpoint=tmp_path)
    resumed = run(**settings, checkpoint=tmp_path, resume=True)
    further = run(**settings | {"num_steps": 3}, state=run(**settings | {"num_steps": 5}).state)
    for other in (resumed, further):
        jax.tree.map(np.testing.assert_array_equal, other.state, whole.state)
    jax.tree.map(np.testing.assert_array_equal, resumed.history, whole.history)


def test_a_step_that_fails_says_nothing_of_difficulty(key):
    zero = jnp.zeros(2, jnp.int32)
    state = TaskStates((), zero, zero, zero, jnp.array([1.0, jnp.nan]))
    each = make_info(zero, SolveInfo(zero, zero, zero, zero), jnp.zeros(2))
    each = each._replace(adjoint_steps=zero, status=zero)
    new = after(state, (), jnp.array([jnp.inf, jnp.nan]), each, None)
    np.testing.assert_array_equal(new.difficulty, [1.0, np.nan])


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"weights": "hard"}, "must be numbers, 'difficulty' or None, got 'hard'"),
        ({"per_step": None}, "expected per_step"),
        ({"per_step": 2, "pool": "host"}, r"expected Tasks\(pool=None\) with"),
    ],
)
def test_what_cannot_be_drawn_by_difficulty_is_refused(change, match):
    with pytest.raises(ValueError, match=match):
        tasks(**change)


def test_the_work_of_lanes_and_of_tasks():
    steps = jnp.array([3, 1, 4, 1, 5])
    for lanes, expected in ((1, 14), (2, 6 + 8 + 5), (3, 12 + 10), (5, 25)):
        assert int(on_lanes.lane_steps(steps, lanes, None)) == expected
    solver = bl.GradientDescent(0.1, max_steps=500, tol=1e-3)
    settings = {"solver": solver, "engine": ENGINE, "outer": optax.sgd(1e-2), "num_steps": 2}
    for lanes in (None, 2):
        all_tasks = bl.Tasks(bl.Problem(inner, outer), (H, B), lanes=lanes)
        result = bl.run(all_tasks, LAM, np.zeros(1), **settings)
        found, history = result.state.engine, result.history
        assert int(jnp.sum(found.inner_steps)) == np.sum(history.inner_steps)
        assert int(jnp.sum(found.adjoint_steps)) == np.sum(history.adjoint_steps)
        assert np.argmax(found.inner_steps) == 0 and np.all(found.inner_steps > 0)
        assert np.all(history.lane_steps >= history.inner_steps)
        if lanes is None:  # all wait for the slowest, which is the same at both steps
            assert np.sum(history.lane_steps) == COUNT * int(jnp.max(found.inner_steps))
            waiting = history.lane_steps
        else:
            assert np.all(history.lane_steps < waiting)


def test_the_error_estimate_is_that_of_the_tasks_drawn(key):
    """At the end of a run, when the averages have moved on from those that the last step drew by."""
    loose = bl.GradientDescent(0.1, max_steps=500, tol=1e-2)
    settings = {"lr": 0.05, "key": key, "engine": bl.Implicit(bl.CG()), "solver": loose, "chunk": 3}
    before = run(per_step=2, num_steps=2, **settings).state
    history = run(per_step=2, num_steps=3, **settings).history
    drawn = np.asarray(tasks(2).drawn(jax.random.fold_in(key, 2), before.engine))
    odds = np.asarray(chances(before.engine.difficulty))
    truth = abs(np.mean(slopes(float(before.lam))[drawn] / (COUNT * odds[drawn])))
    error = abs(history.grad_norm[-1] - truth) / history.grad_norm[-1]
    assert error > 1e-4
    np.testing.assert_allclose(history.error_estimate[-1], error, rtol=0.1)
