"""Methods that differentiate inner steps in ways of their own: PZOBO, BDA, IAPTT."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from hypergrad_cases import INNER_STEPS

import bilevel as bl


def test_the_mean_of_pzobo_is_the_derivative_through_the_steps(seed):
    """On a quadratic the differences are exact: over many directions only the normal law is left."""
    case = problems.make("quadratic", seed, n=7)
    problem = bl.Problem(case.inner, case.outer, case.inner_data, case.outer_data)
    engine = bl.PZOBO(0.2, 0.5, directions=50, inner_steps=3)
    w = jnp.linspace(-1, 1, case.w.size)

    def after(lam):
        A, B, b, *_ = case.means
        now = w
        for _ in range(3):
            now = now - 0.2 * (A @ now - B @ lam - b)
        return case.outer(now, lam, case.outer_data)

    call = lambda key: bl.hypergradient(problem, case.lam, w, engine=engine, key=key, throw=False)
    grads = jax.jit(jax.vmap(lambda key: call(key).grad))(
        jax.random.split(jax.random.key(seed), 400)
    )
    error = np.std(grads, axis=0) / 20
    assert np.all(error < 0.1)
    np.testing.assert_array_less(
        np.abs(np.mean(grads, axis=0) - jax.grad(after)(case.lam)), 5 * error
    )


def test_pzobo_with_every_estimator():
    """On all rows none of them has anything to estimate: each step is that of `Plain`, with the same directions.

    SPIDER does so on batches too where it takes all rows each time; Plain does not.
    """
    case = problems.make("quadratic")

    def three(estimator, **kwargs):
        problem = bl.Problem(case.inner, case.outer, case.inner_data, case.outer_data, **kwargs)
        engine = bl.PZOBO(0.2, 0.5, directions=4, inner_steps=3, estimator=estimator)

        @jax.jit
        def run(lam, w):
            def step(carry, key):
                lam, w, state = carry
                h, state = engine.step(problem, None, w, lam, state, key)
                return (lam - 0.1 * h.grad, h.w, state), (h.grad, h.w)

            keys = jax.random.split(jax.random.key(2), 3)
            state = engine.init(problem, None, w, lam, keys[0])
            return jax.lax.scan(step, (lam, w, state), keys)[1]

        return run(case.lam, jnp.linspace(-1, 1, case.w.size))

    expected = three(bl.Plain())
    for estimator in (bl.STORM(0.3), bl.SPIDER(2), bl.SAGA()):
        for mine, theirs in zip(three(estimator), expected, strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-9)
    batches = {"batch_size": (3, 3)}
    found = three(bl.SPIDER(1), **batches), three(bl.Plain(), **batches)
    off = [np.max(np.abs(each[0] - expected[0])) for each in found]
    assert off[0] < 1e-9 < 1e-3 < off[1]


START = {"y1": jnp.array([0.3, -0.2]), "y2": jnp.array([0.4, 0.1])}


def many(w, lam, batch):
    """P2: inner solutions y1 = x with any y2."""
    return 0.5 * jnp.sum(w["y1"] ** 2) - lam @ w["y1"]


def chooser(w, lam, batch):
    return 0.5 * jnp.sum((lam - w["y2"]) ** 2) + 0.5 * jnp.sum((w["y1"] - 1) ** 2)


def test_bda_takes_part_of_the_outer_step():
    """Steps and their derivatives by hand; the outer loss's own part in lam enters each step."""
    s, weight, T = 0.4, 0.8, 7
    x = np.array([0.5, 1.5])
    y1, y2, d1, d2 = *(np.asarray(START[k]) for k in ("y1", "y2")), 0.0, 0.0
    for t in range(T):
        a = weight / (t + 1)
        y1, d1 = (
            y1 - s * ((1 - a) * (y1 - x) + a * (y1 - 1)),
            d1 - s * ((1 - a) * (d1 - 1) + a * d1),
        )
        y2, d2 = y2 - s * a * (y2 - x), d2 - s * a * (d2 - 1)
    grad = (x - y2) * (1 - d2) + (y1 - 1) * d1
    solver = bl.GradientDescent(s, max_steps=T)
    call = lambda problem, w, engine: bl.hypergradient(
        problem, jnp.asarray(x), w, engine=engine, solver=solver
    )
    h = call(bl.Problem(many, chooser), START, bl.BDA(weight=weight))
    np.testing.assert_allclose(h.grad, grad, rtol=1e-12)
    np.testing.assert_allclose(h.w["y2"], y2, rtol=1e-12)
    np.testing.assert_allclose(h.info.inner.residual, np.linalg.norm(y1 - x), rtol=1e-12)
    afresh = bl.Problem(many, chooser, inner_init=lambda lam, batch: START)
    far = {"y1": START["y1"], "y2": START["y2"] + 5}
    for engine in (bl.BDA(weight=weight), bl.BDA(weight=weight, truncate=T)):
        np.testing.assert_allclose(call(afresh, far, engine).grad, grad, rtol=1e-12)
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        bl.BDA(weight=1.5)


def test_bda_keeps_a_memory_budget():
    """The first number of levels whose program fits, and the derivative of that many."""
    solver = bl.GradientDescent(0.1, momentum=0.5, max_steps=300)
    X = jnp.linspace(-1, 1, 40 * 30).reshape(30, 40)
    inner = lambda w, lam, batch: 0.5 * jnp.mean((jnp.tanh(X @ w) - 0.3) ** 2) + lam * w @ w
    outer = lambda w, lam, batch: 0.5 * jnp.mean((jnp.tanh(X @ w) + 0.1) ** 2)
    args = bl.Problem(inner, outer), 0.1, jnp.full(40, 0.1)
    call = lambda **kwargs: bl.memory(*args, solver=solver, engine=bl.BDA(weight=0.4, **kwargs))
    one, two = call(levels=1), call(levels=2)
    assert two.peak < one.peak
    for budget, fits in ((one.peak, one), (one.peak - 1, two)):
        found = call(memory_budget=budget)
        assert found.engine == fits.engine and found.peak == fits.peak
    engine = bl.BDA(weight=0.4, memory_budget=one.peak - 1)
    plain = bl.BDA(weight=0.4, checkpoint=False)
    grads = [bl.hypergradient(*args, solver=solver, engine=e).grad for e in (engine, plain)]
    np.testing.assert_allclose(grads[0], grads[1], rtol=1e-10)


def test_bda_goes_where_unrolling_does_not():
    """To x = e, up to O(1/T); plain steps end halfway between e and where y2 starts."""
    problem = bl.Problem(many, chooser, inner_init=lambda lam, batch: START)
    solver = bl.GradientDescent(0.5, max_steps=300)
    go = lambda engine: bl.run(
        problem, jnp.zeros(2), engine=engine, solver=solver, outer=optax.sgd(0.5), num_steps=100
    )
    np.testing.assert_allclose(go("unrolled").lam, (1 + START["y2"]) / 2, atol=1e-6)
    assert np.max(np.abs(go(bl.BDA(weight=1.0)).lam - 1)) < 0.05


def waves(w, lam, batch):
    """P9."""
    return -jnp.sin(lam * w)


def tilted(w, lam, batch):
    return lam + lam * w


def box(v, step, lam):
    return jnp.clip(v, -2.0, 2.0)


P9 = bl.Problem(
    waves, tilted, inner_prox=box, outer_projection=lambda lam: jnp.clip(lam, 1.0, 10.0)
)


def test_iaptt_by_hand():
    """Two steps in `lam` and the start: differences of the largest value along a path in NumPy."""
    s, T = 0.02, 6

    def path(x, z):
        found = []
        for _ in range(T):
            z = np.clip(z + s * x * np.cos(x * z), -2, 2)
            found.append(z)
        return np.array(found)

    # An outer loss with its maximum inside the path.
    peaked = lambda w, lam, batch=None: -30.0 * (w - 0.3) ** 2 + lam * w
    worst = lambda x, z: np.max(peaked(path(x, z), x))
    problem = dataclasses.replace(P9, outer=peaked)
    solver = bl.ProximalGradient(max_steps=T, learning_rate=s, accelerate=False)
    x, z, eps = 3.0, 0.2, 1e-6
    seen = []
    for _ in range(2):
        seen.append(int(np.argmax(peaked(path(x, z), x))) + 1)
        by_x = (worst(x + eps, z) - worst(x - eps, z)) / (2 * eps)
        by_z = (worst(x, z + eps) - worst(x, z - eps)) / (2 * eps)
        last = path(x, z)[seen[-1] - 1]
        x, z = x - 0.05 * by_x, z - 0.03 * by_z
    result = bl.run(
        problem, 3.0, 0.2, engine=bl.IAPTT(0.03), solver=solver, outer=optax.sgd(0.05), num_steps=2
    )
    assert all(1 < t < T for t in seen) and list(result.history.inner_steps) == seen
    np.testing.assert_allclose([result.lam, result.state.engine.start], [x, z], rtol=1e-7)
    np.testing.assert_allclose(result.w, last, rtol=1e-7)


@pytest.mark.parametrize("lam", [2.0, 7.0])
def test_iaptt_on_a_nonconvex_problem(lam):
    """P9: x* = 11 pi / 4, y* = -2."""
    solver = bl.ProximalGradient(max_steps=40, learning_rate=5e-4, accelerate=False)
    rule, engine = optax.sgd(0.1), bl.IAPTT(0.1)
    result = bl.run(
        P9, lam, 0.5, engine=engine, solver=solver, outer=rule, num_steps=500, chunk=500
    )
    np.testing.assert_allclose(result.lam, 11 * np.pi / 4, atol=0.1)
    np.testing.assert_allclose(result.w, -2.0, atol=0.02)


@pytest.mark.parametrize("engine", INNER_STEPS, ids=["bda", "iaptt"])
def test_types_stay_and_nan_is_said(engine):
    case = problems.make("quadratic", 0, jnp.float32, n=7)
    problem = bl.Problem(case.inner, case.outer, case.inner_data, case.outer_data, batch_size=3)
    solver = bl.GradientDescent(0.1, max_steps=5)
    start = lambda lam: engine.init(problem, solver, case.w, lam, jax.random.key(0))
    step = lambda lam, state: engine.step(problem, solver, case.w, lam, state, jax.random.key(0))
    state = jax.eval_shape(start, case.lam)
    h, after = jax.eval_shape(step, case.lam, state)
    shape = lambda t: jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), t)
    assert shape(state) == shape(after) and shape((h.grad, h.w)) == shape((case.lam, case.w))
    bad = jax.tree.map(lambda x: np.full_like(x, np.nan), case.inner_data)
    call = lambda p: bl.hypergradient(
        p, case.lam, case.w, engine=engine, solver=solver, throw=False
    )
    assert call(dataclasses.replace(problem, inner_data=bad)).info.status == bl.Status.NONFINITE
