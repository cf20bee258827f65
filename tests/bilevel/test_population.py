"""`run_population`: many runs in one program."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel as bl

STARTS = jnp.asarray([-1.5, 0.3, 1.2, 2.0])


def inner(w, lam, batch):
    return 0.5 * jnp.sum((w - lam) ** 2)


def outer(w, lam, batch):
    """Two valleys, of which the left one is deeper; NaN beyond 3."""
    x = jnp.mean(w)
    return (x**2 - 1) ** 2 + 0.3 * x + jnp.sqrt(3 - lam) - jnp.sqrt(3 - lam)


PROBLEM = bl.Problem(inner, outer)
SETTINGS = {"solver": bl.LBFGS(tol=1e-10), "engine": bl.Implicit(estimate=False)}


def population(lam=STARTS, **changes):
    given = {"num_steps": 16, "outer": optax.adam(0.1), **SETTINGS, **changes}
    return bl.run_population(PROBLEM, lam, jnp.zeros(2), **given)


@pytest.fixture(scope="module")
def whole():
    return population()


def test_members_are_what_runs_on_their_own_are(whole):
    for i, start in enumerate(STARTS):
        alone = bl.run(
            PROBLEM, start, jnp.zeros(2), num_steps=16, chunk=16, outer=optax.adam(0.1), **SETTINGS
        )
        member = whole.members[i]
        np.testing.assert_allclose(member.lam, alone.lam, rtol=1e-12)
        np.testing.assert_allclose(
            member.history.outer_value, alone.history.outer_value, rtol=1e-10, atol=1e-14
        )
        assert member.stopped == "num_steps" and member.status == bl.Status.OK
    assert whole.best == 0 and float(whole.result.lam) < -0.5
    assert float(whole.members[2].lam) > 0.5  # the other valley


def test_the_worse_half_is_given_up(whole):
    halved = population(halvings=2)
    lengths = [len(member.history.outer_value) for member in halved.members]
    values = np.asarray([member.history.outer_value for member in whole.members])
    after_4 = np.argsort(values[:, :4].min(axis=1))
    after_8 = min(after_4[:2], key=lambda i: values[i, :8].min())
    expected = np.full(4, 4)
    expected[after_4[:2]] = 8
    expected[after_8] = 16
    np.testing.assert_array_equal(lengths, expected)
    np.testing.assert_array_equal([member.state.step for member in halved.members], expected)
    reasons = [member.stopped for member in halved.members]
    assert reasons.count("hopeless") == 3 and reasons[halved.best] == "num_steps"
    np.testing.assert_allclose(halved.result.lam, whole.members[after_8].lam, rtol=1e-12)


def test_a_member_that_fails_fails_alone(whole):
    lam = STARTS.at[1].set(3.5)
    found = population(lam, halvings=1)
    assert found.members[1].stopped == "status"
    assert found.members[1].status == bl.Status.NONFINITE
    assert found.members[0].stopped == "num_steps"
    np.testing.assert_allclose(found.members[0].lam, whole.members[0].lam, rtol=1e-12)
    with pytest.raises(bl.BilevelError, match="every member"):
        population(jnp.asarray([3.5, 4.0]))


def test_settings_and_seeds_of_members(count_traces):
    """One program for all: engines that differ in a number, keys that differ."""
    rng = np.random.default_rng(0)
    rows = jnp.asarray(rng.normal(size=(12, 2)))
    loss = count_traces(
        lambda w, lam, batch: 0.5 * jnp.sum((w - lam - jnp.mean(batch, axis=0)) ** 2)
    )
    problem = bl.Problem(loss, lambda w, lam, batch: jnp.sum(w**2), rows, batch_size=(3, None))
    settings = {"num_steps": 3, "outer": optax.sgd(0.1)}
    start = (problem, jnp.ones(3), jnp.zeros(2))
    engines = [bl.SOBA(rate) for rate in (0.1, 0.1, 0.2)]
    found = bl.run_population(*start, engine=engines, **settings)
    first = loss.count
    bl.run_population(*start, engine=[bl.SOBA(0.3)] * 3, **settings)
    assert loss.count == first
    lams = [float(member.lam) for member in found.members]
    assert len(set(lams)) == 3  # the first two differ by their batches alone
    same = bl.run_population(*start, engine=engines, **settings)
    assert [float(member.lam) for member in same.members] == lams


@pytest.mark.parametrize(
    ("lam", "changes", "match"),
    [
        (jnp.float64(1.0), {}, "leading axis of members"),
        ({"a": jnp.ones(2), "b": jnp.ones(3)}, {}, "leading axis of members"),
        (STARTS, {"halvings": 3}, "8 members and steps"),
        (STARTS, {"time_limit": -1.0}, "time_limit must be a positive number of seconds"),
        (STARTS, {"engine": [bl.Implicit()] * 3}, "each of the 4 members, got 3"),
        (STARTS, {"engine": [bl.Implicit(), bl.OneStep()] * 2}, "in their numbers only"),
    ],
)
def test_bad_input(lam, changes, match):
    with pytest.raises(ValueError, match=match):
        population(lam, **changes)


def test_what_a_population_would_not_do_is_refused():
    with pytest.raises(TypeError, match="callback must be a function or None"):
        population(STARTS, callback=1)
    loss = lambda w, lam, batch: lam * batch * w**2
    for settings in ({"pool": "host", "per_step": 2}, {"lanes": "auto"}):
        tasks = bl.Tasks(bl.Problem(loss, loss), np.ones(3), **settings)
        with pytest.raises(ValueError, match="are for bilevel.run"):
            bl.run_population(tasks, STARTS, jnp.zeros(3))


def test_a_break_and_chunks_change_no_bit(tmp_path, monkeypatch):
    """Two halvings, one of them before the break; a callback sees the members, and ends the runs."""
    halved, seen = population(halvings=2), []

    def callback(state, rows):
        seen.append((int(state.step), rows.outer_value.shape, np.sum(state.active).item()))
        assert state.members.lam.shape == (4,)
        return int(state.step) == 7

    settings = {"halvings": 2, "chunk": 3, "checkpoint": tmp_path}
    broken = population(callback=callback, **settings)
    assert seen == [(3, (3, 4), 4), (4, (1, 4), 2), (7, (3, 4), 2)]
    assert (
        sorted(member.stopped for member in broken.members) == ["callback"] * 2 + ["hopeless"] * 2
    )
    with pytest.raises(ValueError, match="holds checkpoints of an earlier run"):
        population(**settings)
    again = population(resume=True, **settings)
    for one, other in zip(again.members, halved.members, strict=True):
        assert one.stopped == other.stopped
        jax.tree.map(np.testing.assert_array_equal, one.state, other.state)
        jax.tree.map(np.testing.assert_array_equal, one.history, other.history)
    monkeypatch.setitem(globals(), "PROBLEM", bl.Problem(inner, outer, outer_projection=jnp.abs))
    with pytest.warns(RuntimeWarning, match="was saved: outer_projection"):
        population(resume=True, **settings)
    monkeypatch.undo()
    late = population(halvings=2, time_limit=1e-9)
    assert [len(member.history.status) for member in late.members] == [4] * 4
    assert [member.stopped for member in late.members].count("time_limit") == 2


def test_ctrl_c_returns_what_is_done(monkeypatch):
    from bilevel import population as module

    advance, calls = module._advance_quick, []

    def twice(*args):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(1)
        return advance(*args)

    for name in ("_advance", "_advance_quick"):
        monkeypatch.setattr(module, name, twice)
    found = population(halvings=2)
    assert {len(member.history.outer_value) for member in found.members} == {4, 8}
    assert [member.stopped for member in found.members].count("interrupted") == 1
    assert jax.tree.leaves(found.result.lam)
