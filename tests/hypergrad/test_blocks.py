"""BSVRB: many inner problems, some of them per step; against steps by hand and the closed form."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest

import bilevel as bl
from bilevel.schedules import power
from hypergrad.bsvrb import _rows

RATE, KEY = 0.05, jax.random.key(4)  # draws some block twice in a row, first and later


def setup(seed, dtype=jnp.float64):
    case = problems.make("blocks", seed, dtype)
    return case, bl.Problem(case.inner, case.outer, case.inner_data, case.outer_data)


def run(problem, case, engine, num_steps, rate=RATE, **kwargs):
    kwargs = {"key": KEY, "chunk": 1000, "throw": False} | kwargs
    rule = optax.sgd(rate)
    return bl.run(
        problem, case.lam, case.w, engine=engine, outer=rule, num_steps=num_steps, **kwargs
    )


def distance(lam, target):
    return np.linalg.norm(lam - target) / np.linalg.norm(target)


def by_hand(case, engine, num_steps, tau=0.1, tau_v=0.2, a=0.3, b=0.4, floor=1.0):
    """`(lam, w)` after steps in NumPy, one block at a time; blocks are drawn two of six."""
    data = jax.tree.map(np.asarray, case.inner_data | case.outer_data)
    A, B, c, t, rho = (data[k] for k in ("A", "B", "b", "t", "rho"))
    lam, w = np.array(case.lam), np.array(case.w)
    count, p = w.shape
    gam = (count - 2) / (2 * (1 - a)) + 1 - a
    v, s, u, H = np.zeros_like(w), np.zeros_like(w), np.zeros_like(w), np.zeros((count, p, p))
    seen, m = {}, np.zeros_like(lam)
    dense = engine.hessian == "dense"

    def raised(matrix):
        values, vectors = np.linalg.eigh(matrix)
        return vectors @ np.diag(np.maximum(values, floor)) @ vectors.T

    before = lam.copy(), w.copy(), v.copy(), H.copy()
    for step in range(num_steps):
        key = jax.random.split(jax.random.fold_in(KEY, step), 3)[0]
        drawn = np.asarray(jax.random.choice(key, count, (2,), replace=False))
        now = lam.copy(), w.copy(), v.copy(), H.copy()
        total, total_before, moves = 0, 0, {}
        for i in drawn:
            first = i not in seen
            if first:  # the first turn takes what it sees
                now[3][i] = before[3][i] = H[i] = raised(A[i])
            pair = []
            for at_lam, at_w, at_v, at_H in (now, before):
                f = at_w[i] - t[i]
                q = np.linalg.solve(at_H[i], f) if dense else at_v[i]
                G = rho[i] * at_lam + B[i].T @ q
                pair.append((A[i] @ at_w[i] - B[i] @ at_lam - c[i], A[i] @ at_v[i] - f, G))
            (g, r, G), (g_, r_, G_) = pair
            total, total_before = total + G / 2, total_before + G_ / 2
            s[i] = g if first else (1 - a) * s[i] + a * g + gam * (g - g_)
            u[i] = r if first else (1 - a) * u[i] + a * r + gam * (r - r_)
            if not first:
                H[i] = raised((1 - a) * H[i] + a * A[i])
            moves[i] = 1 if first else step - seen[i]
            seen[i] = step
        m = total if step == 0 else (1 - b) * (m - total_before) + total
        before = now
        w, v = w.copy(), v.copy()
        for i in range(count):
            if dense:
                w[i] -= tau * s[i]
            elif i in moves:
                w[i] -= tau * moves[i] * s[i]
                v[i] -= tau_v * u[i]
        lam = lam - RATE * m
    return lam, w


@pytest.mark.parametrize("hessian", ["linear", "dense"])
def test_steps_and_solution(hessian, seed):
    case, problem = setup(seed)
    engine = bl.BSVRB(0.1, 0.2, 2, hessian=hessian, rate=0.3, outer_rate=0.4, floor=1.0)
    few = run(problem, case, engine, 9)
    for found, hand in zip((few.lam, few.w), by_hand(case, engine, 9), strict=True):
        np.testing.assert_allclose(found, hand, rtol=1e-9, atol=1e-12)
    whole = bl.BSVRB(0.1, hessian=hessian)
    result = run(problem, case, whole, 4000)
    assert result.status == bl.Status.OK
    assert distance(result.lam, case.optimum()) < 1e-12
    np.testing.assert_allclose(result.w, case.solution(case.optimum()), atol=1e-10)
    hvps = 2 if hessian == "linear" else 10
    assert whole.cost(4)[:2] == (4, hvps) and set(result.history.adjoint_steps) == {hvps}
    steep = dataclasses.replace(problem, inner=lambda *at: 1e9 * problem.inner(*at))
    result = run(steep, case, bl.BSVRB(0.1e-9, 0.2e-9, hessian=hessian), 20)
    assert result.status == bl.Status.OK  # large Hessians are no divergence
    far = run(problem, case, dataclasses.replace(engine, step_size=jnp.asarray(50.0)), 40)
    assert far.status == bl.Status.DIVERGED


def test_few_blocks_and_a_rate_that_decays(seed):
    """With a constant rate there is a floor of noise."""
    case, problem = setup(seed)
    at = lambda rate: run(problem, case, bl.BSVRB(blocks=2, outer_rate=rate), 10_000, 0.01)
    assert distance(at(power(0.1, 2 / 3)).lam, case.optimum()) < 0.03
    constant = at(power(0.1, 0.0)).lam
    assert distance(constant, case.optimum()) > 0.03


def test_breaks_dtypes_and_nan(seed):
    case, problem = setup(seed)
    engine = bl.BSVRB(0.05, blocks=2)
    whole, pieces = run(problem, case, engine, 9), run(problem, case, engine, 5, chunk=3)
    rest = run(problem, case, engine, 4, state=pieces.state)
    np.testing.assert_array_equal(whole.lam, rest.lam)
    np.testing.assert_array_equal(whole.w, rest.w)
    other = run(problem, case, engine, 9, key=jax.random.key(seed + 5))
    assert not np.array_equal(whole.lam, other.lam)
    bad = dataclasses.replace(
        problem, outer_data=jax.tree.map(lambda x: x * np.nan, case.outer_data)
    )
    broken = run(bad, case, engine, 3)
    assert broken.status == bl.Status.NONFINITE
    np.testing.assert_array_equal(broken.lam, case.lam)
    for hessian in ("linear", "dense"):
        small, small_problem = setup(seed, jnp.float32)
        engine = bl.BSVRB(blocks=2, hessian=hessian)
        start = lambda e=engine, p=small_problem, c=small: e.init(p, None, c.w, c.lam, KEY)
        state = jax.eval_shape(start)
        step = lambda s, e=engine, p=small_problem, c=small: e.step(p, None, c.w, c.lam, s, KEY)
        h, after = jax.eval_shape(step, state)
        shape = lambda t: jax.tree.map(lambda x: (x.shape, x.dtype), t)
        assert shape(state) == shape(after)
        assert {leaf.dtype for leaf in jax.tree.leaves((h.grad, h.w))} == {jnp.dtype("float32")}


def test_rows_are_of_their_block_and_the_same_in_every_leaf():
    number = jnp.arange(12.0).reshape(3, 4)
    data = {"x": number, "y": jnp.stack([number, -number], axis=2)}
    taken = _rows(data, 50, KEY)
    assert taken["x"].shape == (3, 50) and taken["y"].shape == (3, 50, 2)
    np.testing.assert_array_equal(taken["y"][..., 1], -taken["x"])
    for block in range(3):
        assert set(np.asarray(taken["x"][block])) == set(np.asarray(number[block]))


def location(w, lam, batch):
    """Blocks of rows: mean over blocks and rows of |w_i - lam - x|^2 / 2."""
    return 0.5 * jnp.mean((w[:, None] - lam - batch) ** 2)


def target(w, lam, batch):
    return 0.5 * jnp.mean((w[:, None] - batch) ** 2) + 0.5 * lam**2


def test_rows_per_step():
    """w_i = lam + mean x_i, so `2 lam + mean x - mean y = 0`; on batches of rows, with steps that decay."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(4, 30)) + 1.0, rng.normal(size=(4, 20))
    problem = bl.Problem(location, target, x, y)
    engine = bl.BSVRB(power(0.3, 0.5), blocks=2, rows=3, outer_rate=power(1.0, 2 / 3))
    rule = optax.sgd(power(0.1, 1 / 3))
    result = bl.run(problem, 0.0, jnp.zeros(4), engine=engine, outer=rule, num_steps=5000)
    goal = (y.mean() - x.mean()) / 2
    assert abs(float(result.lam) - goal) < 0.05 < abs(goal)


def test_refusals(seed):
    case, problem = setup(seed)
    call = lambda engine, problem=problem, w=case.w: bl.hypergradient(
        problem, case.lam, w, engine=engine
    )
    with pytest.raises(ValueError, match="'linear' or 'dense'"):
        bl.BSVRB(hessian="diagonal")
    with pytest.raises(ValueError, match="correction=.* or 'auto'"):
        bl.BSVRB(correction="best")
    for field in ("rate", "outer_rate"):
        with pytest.raises(ValueError, match=rf"BSVRB\({field}=\.\.\.\) must be at most 1"):
            bl.BSVRB(**{field: 1.01})
        assert bl.BSVRB(**{field: 1.0}) is not None
    for estimator in (bl.EMA, bl.STORM):
        with pytest.raises(ValueError, match="must be at most 1"):
            estimator(1.5)
    with pytest.raises(ValueError, match="blocks=7. of 6 blocks"):
        call(bl.BSVRB(blocks=7))
    with pytest.raises(ValueError, match="draws its own batches"):
        call(bl.BSVRB(), dataclasses.replace(problem, batch_size=6))
    with pytest.raises(ValueError, match="needs size"):
        bl.BSVRB(hessian="dense").cost()
    with pytest.raises(ValueError, match=r"outer_data has shape \(4,\)"):
        bl.hypergradient(
            bl.Problem(location, lambda w, lam, batch: jnp.mean(w) + lam, jnp.ones((4, 3)), jnp.ones(4)),
            1.0, jnp.ones(4), engine=bl.BSVRB(rows=2),
        )  # fmt: skip
    uneven = dict(case.outer_data, rho=jnp.ones(1))
    with pytest.raises(ValueError, match="one block for each entry"):
        call(bl.BSVRB(), dataclasses.replace(problem, outer_data=uneven))
