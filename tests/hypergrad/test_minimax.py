"""Minimax problems as bilevel ones, `inner = -outer`: saddle points known in closed form, steps by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel as bl
from bilevel.schedules import power

N, P_ = 3, 4


def outer(w, lam, batch):
    """`lam'P lam / 2 + lam'A w + a'lam + b'w - w'Q w / 2`."""
    curved = 0.5 * lam @ batch["P"] @ lam - 0.5 * w @ batch["Q"] @ w
    return curved + lam @ batch["A"] @ w + batch["a"] @ lam + batch["b"] @ w


def inner(w, lam, batch):
    """The opponent's loss; what depends on lam alone changes nothing."""
    return -outer(w, lam, batch) + jnp.sum(lam**2)


def saddle(seed, curved=1.0, size=(N, P_)):
    """The problem, its data, and the saddle point `(lam, w)`."""
    rng = np.random.default_rng(seed)
    n, p = size
    spread = lambda k: curved * np.diag(np.linspace(0.5, 1.5, k))
    A = np.eye(n, p) + 0.3 * rng.normal(size=(n, p))
    data = {
        "P": spread(n),
        "Q": spread(p),
        "A": A,
        "a": rng.normal(size=n),
        "b": rng.normal(size=p),
    }
    system = np.block([[data["P"], A], [A.T, -data["Q"]]])
    z = np.linalg.solve(system, -np.concatenate([data["a"], data["b"]]))
    return bl.Problem(inner, outer, data, data), data, (z[:n], z[n:])


def run(problem, engine, num_steps, rate, size=(N, P_), **kwargs):
    lam, w = jnp.ones(size[0]), jnp.linspace(-1, 1, size[1])
    kwargs = {"chunk": 1000, "throw": False} | kwargs
    rule = optax.sgd(rate)
    return bl.run(problem, lam, w, engine=engine, outer=rule, num_steps=num_steps, **kwargs)


ENGINES = {"extragradient": bl.Extragradient(0.2, 0.1), "cgd": bl.CGD(0.2, 0.1)}


def by_hand(name, data, num_steps, s=0.2, r=0.1):
    P, Q, A, a, b = (data[k] for k in ("P", "Q", "A", "a", "b"))
    n, p = A.shape
    x, y = np.ones(n), np.linspace(-1, 1, p)
    slopes = lambda x, y: (P @ x + A @ y + a, A.T @ x + b - Q @ y)
    for _ in range(num_steps):
        f_x, f_y = slopes(x, y)
        if name == "extragradient":
            f_x, f_y = slopes(x - r * f_x, y + s * f_y)
            x, y = x - r * f_x, y + s * f_y
        else:  # each answers the other: both moves from one linear system
            game = np.block([[np.eye(n), r * A], [-s * A.T, np.eye(p)]])
            move = np.linalg.solve(game, np.concatenate([-r * f_x, s * f_y]))
            x, y = x + move[:n], y + move[n:]
    return x, y


@pytest.mark.parametrize("name", ENGINES)
def test_steps_and_saddle_points(name, seed):
    engine = ENGINES[name]
    problem, data, (x, y) = saddle(seed)
    few = run(problem, engine, 5, 0.1)
    for found, hand in zip((few.lam, few.w), by_hand(name, data, 5), strict=True):
        np.testing.assert_allclose(found, hand, rtol=1e-9, atol=1e-12)
    result = run(problem, engine, 2000, 0.1)
    assert result.status == bl.Status.OK
    np.testing.assert_allclose(result.lam, x, atol=1e-10)
    np.testing.assert_allclose(result.w, y, atol=1e-10)
    assert set(result.history.inner_steps) == {engine.cost().gradients}
    pieces = run(problem, engine, 2, 0.1, state=run(problem, engine, 3, 0.1).state)
    np.testing.assert_array_equal(pieces.lam, few.lam)


@pytest.mark.parametrize("name", ENGINES)
def test_a_bilinear_saddle(name, seed):
    """Where plain descent and ascent, at these very steps, spirals out."""
    size = (N, N)
    problem, data, (x, y) = saddle(seed, 0.0, size)
    result = run(problem, ENGINES[name], 10_000, 0.1, size)
    np.testing.assert_allclose(result.lam, x, atol=1e-8)
    np.testing.assert_allclose(result.w, y, atol=1e-8)
    at = np.ones(N), np.linspace(-1, 1, N)
    for _ in range(2000):
        at = (
            at[0] - 0.1 * (data["A"] @ at[1] + data["a"]),
            at[1] + 0.2 * (data["A"].T @ at[0] + data["b"]),
        )
    assert np.linalg.norm(at[0] - x) > 100 * np.linalg.norm(np.ones(N) - x)


def test_the_projection_also_holds_the_point_ahead(seed):
    """On lam >= 9, above the saddle: lam = 9, and w answers."""
    problem, data, _ = saddle(seed)
    problem = dataclasses.replace(problem, outer_projection=lambda lam: jnp.maximum(lam, 9.0))
    result = run(problem, ENGINES["extragradient"], 3000, 0.1)
    np.testing.assert_allclose(result.lam, 9.0)
    np.testing.assert_allclose(
        result.w, np.linalg.solve(data["Q"], data["A"].T @ np.full(N, 9.0) + data["b"]), atol=1e-9
    )
    np.testing.assert_array_equal(result.state.engine.own["lam_ahead"] >= 9.0, True)
    with pytest.raises(ValueError, match="CGD has w answer the whole move of lam"):
        run(problem, ENGINES["cgd"], 1, 0.1)


@pytest.mark.parametrize("engine", [bl.Implicit(), bl.Unrolled(), bl.F2SA(1e-3)], ids=repr)
def test_ordinary_engines_by_danskin(engine, seed):
    """`d max_w F = dF/dlam` at `w = Q^-1 (A'lam + b)`."""
    problem, data, _ = saddle(seed)
    lam = np.linspace(-1, 2, N)
    w = np.linalg.solve(data["Q"], data["A"].T @ lam + data["b"])
    truth = data["P"] @ lam + data["A"] @ w + data["a"]
    solver = bl.GradientDescent(max_steps=200, learning_rate=0.5, tol=1e-12)
    h = bl.hypergradient(problem, lam, jnp.zeros(P_), engine=engine, solver=solver, throw=False)
    np.testing.assert_allclose(h.grad, truth, rtol=1e-5, atol=1e-6)


def test_what_is_said(seed):
    problem, data, _ = saddle(seed)
    other = dataclasses.replace(problem, inner_data=data | {"b": data["b"] + 0.1})
    for engine in ENGINES.values():
        assert run(other, engine, 3, 0.1).status == bl.Status.BREAKDOWN
        nan = jax.tree.map(lambda x: x * np.nan, data)
        broken = run(dataclasses.replace(problem, outer_data=nan), engine, 3, 0.1)
        assert broken.status == bl.Status.NONFINITE
        with pytest.raises(ValueError, match="must be a positive number, got 'auto'"):
            type(engine)("auto")
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), data)
    with pytest.raises(ValueError, match="the lam of Tasks moves for all of them"):
        tasks = bl.Tasks(bl.Problem(inner, outer), stacked)
        bl.run(tasks, jnp.zeros(N), jnp.zeros(P_), engine=bl.Extragradient())
    short = bl.CGD(0.2, 0.1, bl.CG(max_steps=1))
    assert run(problem, short, 3, 0.1).status == bl.Status.MAX_STEPS
    far = run(problem, bl.Extragradient(9.0), 100, 9.0)
    assert far.status == bl.Status.DIVERGED
    dense = run(problem, bl.CGD(0.2, 0.1, bl.Dense()), 5, 0.1)
    np.testing.assert_allclose(dense.lam, run(problem, ENGINES["cgd"], 5, 0.1).lam, rtol=1e-8)


def test_only_plain_steps_at_the_engines_own_rate(seed):
    problem, *_ = saddle(seed)
    start = jnp.ones(N), jnp.linspace(-1, 1, P_)
    some = {"throw": False, "num_steps": 3}
    for engine in ENGINES.values():
        own = bl.run(problem, *start, engine=engine, **some)
        np.testing.assert_array_equal(own.lam, run(problem, engine, 3, 0.1).lam)
        late = optax.sgd(power(0.1, 1.0))
        for rule in (
            optax.adam(0.1),
            optax.sgd(0.2),
            optax.sgd(0.1, momentum=0.9),
            optax.chain(optax.clip(1.0), optax.sgd(0.1)),
            late,
        ):
            with pytest.raises(ValueError, match="plain gradient steps at the engine's own rate"):
                bl.run(problem, *start, engine=engine, outer=rule, **some)
        falling = type(engine)(0.2, power(0.1, 1.0))
        assert bl.run(problem, *start, engine=falling, outer=late, **some).status == bl.Status.OK
    two = [bl.CGD(0.2, 0.1), bl.CGD(0.2, 0.05)]
    with pytest.raises(ValueError, match="plain steps at different rates"):
        bl.run_population(problem, jnp.ones((2, N)), start[1], engine=two, num_steps=3)
