"""REPLAY: the derivative of a training run from the host, its schedule, and what it keeps."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel as bl
from bilevel.snapshots import binomial, lazy_tree


def flat(x):
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(x)])


def counted(schedule, count, size):
    """Runs forward and the most snapshots at once; states are numbers of steps done."""
    ran, live, most, seen = 0, 0, 0, []

    def forward(state, index):
        nonlocal ran
        assert state == index
        ran += 1
        return state + 1

    def back(state, index, adjoint):
        assert state == index and adjoint == index + 1
        seen.append(index)
        return index

    def put(state):
        nonlocal live, most
        live += 1
        most = max(most, live)
        return state

    def get(state):
        nonlocal live
        live -= 1
        return state

    last = lambda state: state
    assert schedule(count, size, 0, forward, last, back, put, get) == 0
    assert seen == list(range(count))[::-1] and live == 0
    return ran, most


@pytest.mark.parametrize(("count", "arity"), [(256, 4), (256, 2), (81, 3), (7, 3), (1, 2)])
def test_the_tree_visits_every_step_backwards_at_its_own_state(count, arity):
    """Powers of the arity cost what the docstring says."""
    ran, most = counted(lazy_tree, count, arity)
    depth = round(np.log(count) / np.log(arity))
    if arity**depth == count:
        assert ran == count * depth * (arity - 1) // arity + 1  # the last step, for the value
        assert most <= depth * (arity - 1) + 1


@functools.cache
def fewest(steps, snapshots):
    """Runs forward of the best of all schedules, by dynamic programming over where to put the next snapshot."""
    if steps == 1:
        return 0
    if snapshots == 0:
        return np.inf
    cuts = range(1, steps)
    return min(m + fewest(steps - m, snapshots - 1) + fewest(m, snapshots) for m in cuts)


def test_the_binomial_schedule_is_the_best_there_is():
    for snapshots in (1, 2, 3, 4, 7):
        for count in range(1, 41):
            ran, most = counted(binomial, count, snapshots)
            r = next(r for r in range(count) if math.comb(snapshots + r, snapshots) >= count)
            formula = r * count - math.comb(snapshots + r, snapshots + 1)
            assert ran - 1 == formula == fewest(count, snapshots)  # the last step, for the value
            assert most <= snapshots
    assert [counted(binomial, 256, s)[0] - 1 for s in (5, 9, 16)] == [1074, 738, 597]
    assert counted(binomial, 256, 13)[0] < counted(lazy_tree, 256, 4)[0]
    assert counted(binomial, 1500, 1500)[0] == 1500  # all are kept: deeper than Python recurses


RNG = np.random.default_rng(0)
X, Y = jnp.asarray(RNG.normal(size=(20, 3))), jnp.asarray(RNG.normal(size=20))
W = {"in": jnp.asarray(RNG.normal(size=(3, 4))), "out": jnp.asarray(RNG.normal(size=4))}
LAM = {"rate": 0.05, "decay": jnp.asarray([0.01, 0.03]), "scale": 1.1}


def fit(w, batch):
    X, y = batch
    return jnp.mean((jnp.tanh(X @ w["in"]) @ w["out"] - y) ** 2)


def inner(w, lam, batch):
    penalty = lam["decay"][0] * jnp.sum(w["in"] ** 2) + lam["decay"][1] * jnp.sum(w["out"] ** 2)
    return fit(w, batch) + penalty


def outer(w, lam, batch):
    return fit(w, batch) + 0.01 * jnp.sum(lam["decay"])


def start(lam, batch):
    return jax.tree.map(lambda leaf: lam["scale"] * leaf, W)


def adam(lam):
    rule = optax.inject_hyperparams(optax.adam, static_args="eps_root")
    return bl.OptaxSolver(rule(lam["rate"], eps_root=1e-10), max_steps=23)


def test_replay_is_unrolled(monkeypatch):
    """A network with Adam on minibatches; lam in the loss, the start, and a setting that the state holds."""
    problem = bl.Problem(
        inner, outer, (X, Y), (X[:9], Y[:9]), batch_size=(6, None), inner_init=start
    )
    options = {"solver": adam, "key": jax.random.key(3)}
    expected = bl.hypergradient(problem, LAM, engine=bl.Unrolled(levels=1), **options)
    assert np.all(np.abs(flat(expected.grad)) > 1e-6)
    for schedule in ({"arity": 2}, {"arity": 3}, {"snapshots": 2}):
        h = bl.replay(problem, LAM, block=4, **schedule, **options)
        np.testing.assert_allclose(flat(h.grad), flat(expected.grad), rtol=1e-10)
        np.testing.assert_allclose(flat(h.w), flat(expected.w), rtol=1e-12)
        for name in ("outer_value", "growth", "peak_growth"):
            found, there = getattr(h.info, name), getattr(expected.info, name)
            np.testing.assert_allclose(found, there, rtol=1e-10)
    with pytest.raises(bl.BilevelError, match="DIVERGED"):
        bl.replay(problem, LAM, block=4, max_growth=1e-9, **options)


def test_bad_input_is_refused():
    problem = bl.Problem(inner, outer, (X, Y), (X, Y))
    lam = {"decay": LAM["decay"]}
    for options, error in (
        ({"arity": 1}, ValueError),
        ({"snapshots": 0}, ValueError),
        ({"block": 2.5}, TypeError),
    ):
        with pytest.raises(error, match=next(iter(options))):
            bl.replay(problem, lam, W, **options)
    with pytest.raises(ValueError, match="line search"):
        bl.replay(problem, lam, W, solver="lbfgs")
    with pytest.raises(TypeError, match="Tasks"):
        bl.replay(bl.Tasks(problem, jnp.ones((2, 1))), lam, W)
