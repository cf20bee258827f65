"""Inner problems whose constraints hold `w` and `lam` together."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel as bl
from hypergrad.lvhba import Multipliers


def halfspace(w, lam):
    """On w + lam <= 2."""
    over = jnp.maximum(w + lam - 2.0, 0.0) / 2
    return w - over, lam - over


P5B = bl.Problem(
    lambda w, lam, batch: 0.5 * (w - lam) ** 2,
    lambda w, lam, batch: 0.5 * (lam - 3.0) ** 2 + 0.5 * w**2,
    inequality=lambda w, lam: jnp.stack([w + lam - 2.0, w - 40.0]),
    joint_projection=halfspace,
)
"""Solution 2.5, -0.5, multiplier 3; the second constraint is far away."""
ENGINE = bl.LVHBA(0.1, 20.0, gamma=1.5, dual_gamma=1.2, theta_step=0.08, zeta_step=0.09)


def go(num_steps, engine=ENGINE, **kwargs):
    rule = optax.sgd(0.1 / 20.0)
    return bl.run(
        P5B, 2.9, -0.7, engine=engine, outer=rule, num_steps=num_steps, chunk=1000, **kwargs
    )


def test_steps_by_hand():
    x, y, theta, m, zeta = 2.9, -0.7, -0.7, 0.0, 0.0
    for _ in range(4):
        down = theta - x + m + (theta - y) / 1.5
        up = x + theta - 2 - (m - zeta) / 1.2
        theta, m = theta - 0.08 * down, np.clip(m + 0.08 * up, 0, 100)
        d_x = (x - 3) / 20 + (x - y) - (x - theta) - m
        d_y = y / 20 + (y - x) - (y - theta) / 1.5
        x, y = x - 0.1 * d_x, y - 0.1 * d_y
        over = max(x + y - 2, 0) / 2
        x, y = x - over, y - over
        zeta = zeta + 0.09 * (m - zeta) / 1.2
    result = go(4)
    np.testing.assert_allclose([result.lam, result.w], [x, y], rtol=1e-12)
    own = result.state.engine.own
    found = own["theta"], own["m"]["inequality"][0], own["zeta"]["inequality"][0]
    np.testing.assert_allclose(found, [theta, m, zeta], rtol=1e-12)
    assert m > 0 and over > 0


def test_an_active_inequality():
    """P5b, and what a limit below the multiplier does: it is said, not taken for a solution."""
    result = go(20_000)
    np.testing.assert_allclose([result.lam, result.w], [2.5, -0.5], atol=1e-8)
    multipliers = result.multipliers
    np.testing.assert_allclose(multipliers.values["inequality"], [3.0, 0.0], atol=1e-8)
    assert list(multipliers.active["inequality"]) == [True, False]
    assert "multipliers=Multipliers(active: inequality[0]=3; not active: 1)" in repr(result)
    state, key = result.state, jax.random.key(0)
    step = jax.jit(lambda *at: ENGINE.step(P5B, None, *at, key))
    h, after = step(result.w, result.lam, go(4).state.engine)
    moved = ENGINE.multipliers(after).values["inequality"]  # not those before the step
    np.testing.assert_array_equal(h.info.multipliers.values["inequality"], moved)
    h, _ = step(result.w, result.lam, state.engine)
    np.testing.assert_allclose(h.info.multipliers.values["inequality"], [3.0, 0.0], atol=1e-8)
    assert "active: inequality[0]=3; not active: 1)" in repr(h.info)
    low = dataclasses.replace(ENGINE, limit=jnp.asarray(2.0))
    assert go(2000, low, throw=False).status == bl.Status.DIVERGED


def test_a_coupled_equality():
    """P5a in n entries: the fixed point at a constant c solves the linear system of its conditions."""
    n, c, gamma = 3, 20.0, 2.0
    names = ("y1", "y2")

    def project(w, lam):
        shift = (jnp.sum(lam) + sum(jnp.sum(w[k]) for k in names)) / (3 * n)
        return {k: w[k] - shift for k in names}, lam - shift

    problem = bl.Problem(
        lambda w, lam, batch: 0.5 * jnp.sum(w["y1"] ** 2) - lam @ w["y1"] + jnp.sum(w["y2"]),
        lambda w, lam, batch: (
            0.5 * jnp.sum((lam - w["y2"]) ** 2) + 0.5 * jnp.sum((w["y1"] - 1) ** 2)
        ),
        equality=lambda w, lam: jnp.sum(lam) + jnp.sum(w["y1"]) + jnp.sum(w["y2"]),
        joint_projection=project,
    )
    engine = bl.LVHBA(0.05, c, gamma)
    start = {k: jnp.linspace(0.1, 0.3, n) for k in names}
    result = bl.run(
        problem, jnp.linspace(-0.5, 0.5, n), start,
        engine=engine, outer=optax.sgd(0.05 / c), num_steps=30_000, chunk=5000,
    )  # fmt: skip
    # x, y1, y2, theta1, theta2, m, and the multiplier of the projection, in each entry.
    r = 1 / gamma
    A = np.array([
        [-1, -r, 0, 1 + r, 0, 1, 0],
        [0, 0, -r, 0, r, 1, 0],
        [1, 0, 0, 1, 1, 0, 0],
        [-1, 1 / c + 1 - r, 0, r, 0, 0, 1],
        [-1 / c, 0, 1 / c - r, 0, r, 0, 1],
        [1 / c, -1, -1 / c, 1, 0, -1, 1],
        [1, 1, 1, 0, 0, 0, 0],
    ])  # fmt: skip
    x, y1, y2, *_, m, _ = np.linalg.solve(A, np.array([0, -1, 0, 1 / c, -1, 0, 0]))
    np.testing.assert_allclose(result.lam, x, atol=1e-8)
    np.testing.assert_allclose([result.w["y1"][0], result.w["y2"][0]], [y1, y2], atol=1e-8)
    np.testing.assert_allclose([x, y1, y2, m], [-0.3, 0.7, -0.4, -1.0], atol=0.04)  # P5a itself
    multipliers = result.multipliers
    np.testing.assert_allclose(multipliers.values["equality"], m, atol=1e-8)
    assert bool(multipliers.active["equality"])
    assert repr(multipliers) == f"Multipliers(active: equality={m:.6g}; not active: 0)"


def test_multipliers_by_name():
    """At zero nothing is active; names of a tree of constraints; a long list is cut; none without constraints."""
    start = lambda problem, w: ENGINE.multipliers(
        ENGINE.init(problem, None, w, jnp.asarray(2.0), jax.random.key(0))
    )
    tree = lambda w, lam: {"a": w - lam, "b": jnp.stack([lam, w])[None]}
    at = start(dataclasses.replace(P5B, inequality=tree), jnp.asarray(0.0))
    assert repr(at) == "Multipliers(active: none; not active: 3)"
    raised = Multipliers({"inequality": {"a": np.ones(()), "b": np.arange(12.0).reshape(1, 12)}}, {
        "inequality": {"a": np.ones((), bool), "b": np.arange(12).reshape(1, 12) > 0}
    })  # fmt: skip
    shown = repr(raised)
    assert "inequality['a']=1, inequality['b'][0][1]=1, " in shown
    assert shown.endswith("[0][7]=7, and 4 more; not active: 1)")
    free = dataclasses.replace(P5B, inequality=None)
    assert start(free, jnp.asarray(0.0)) is None


def test_refusals():
    with pytest.raises(ValueError, match="Implicit would ignore. Use LVHBA"):
        bl.run(P5B, 2.0, 0.0, num_steps=1)
    tasks = bl.Tasks(dataclasses.replace(P5B, inner_data=jnp.ones(2)), jnp.ones((2, 2)))
    with pytest.raises(ValueError, match="Tasks cannot have"):
        bl.hypergradient(tasks, 2.0, 0.0, engine=ENGINE)
    with pytest.raises(ValueError, match="OneStep would ignore"):
        bl.hypergradient(tasks, 2.0, 0.0, engine="onestep")
    with pytest.raises(ValueError, match="needs joint_projection"):
        dataclasses.replace(P5B, joint_projection=None)
    with pytest.raises(ValueError, match="must return .w, lam."):
        bl.run(dataclasses.replace(P5B, joint_projection=lambda w, lam: w), 2.0, 0.0, engine=ENGINE)
