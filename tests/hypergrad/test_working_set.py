"""Hypergradients of sparse problems solved on working sets: those of FISTA, and differences of solutions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems.nonsmooth import NONSMOOTH, diabetes
from sklearn.linear_model import ElasticNet

import bilevel as bl
from hypergrad.nonsmooth import fixed_point, narrowed

NOISE = 150
DIM = 10 + NOISE
WEIGHTS = -2.2 + 0.3 * np.sin(np.arange(DIM))
SIZE = 48


def columns(lam, batch, indices):
    own = lam[indices] if getattr(lam, "ndim", 0) else lam
    return own, {"X": batch["X"][:, indices], "y": batch["y"]}


def problem_of(name, restrict=columns, dtype=np.float64):
    case = NONSMOOTH[name]
    data = jax.tree.map(lambda x: x.astype(dtype), diabetes(noise=NOISE))
    functions = {"inner_prox": case.inner_prox, "inner_restrict": restrict}
    return bl.Problem(case.inner, case.outer, *data, **functions)


def penalties(name, lam):
    if name == "elastic net":
        return np.full(DIM, np.exp(lam["l1"])), np.exp(lam["l2"])
    return np.exp(lam) * np.ones(DIM), 0.0


def outer_value(name, lam):
    """Of scikit-learn's solution, in `v_j = l1_j / l1_0 w_j` where the penalties differ."""
    train, held_out = diabetes(noise=NOISE)
    l1, l2 = penalties(name, lam)
    scale, alpha = l1 / l1[0], l1[0] + l2
    model = ElasticNet(
        alpha, l1_ratio=l1[0] / alpha, fit_intercept=False, tol=1e-15, max_iter=10**6
    )
    w = model.fit(train["X"] / scale, train["y"]).coef_ / scale
    return 0.5 * np.mean((held_out["X"] @ w - held_out["y"]) ** 2), w


LAMS = {"lasso": -2.2, "weighted lasso": WEIGHTS, "elastic net": {"l1": -2.3, "l2": -1.0}}


@pytest.mark.parametrize("name", LAMS)
def test_hypergradient_is_that_of_fista_and_the_difference(name, seed):
    problem, lam = problem_of(name), jax.tree.map(np.asarray, LAMS[name])
    w = jnp.zeros(DIM)
    engine = bl.Implicit(estimate=name == "lasso")
    fista = bl.ProximalGradient(50_000, tol=1e-12)
    solver = bl.WorkingSet(SIZE, fista, tol=1e-12)
    h = bl.hypergradient(problem, lam, w, solver=solver, engine=engine)
    of_all = bl.hypergradient(problem, lam, w, solver=fista, engine=bl.Implicit(estimate=False))
    assert int(h.info.inner.num_steps) < 6 and 0 < np.count_nonzero(h.w) < 42
    np.testing.assert_allclose(h.w, of_all.w, atol=1e-10)
    for own, other in zip(jax.tree.leaves(h.grad), jax.tree.leaves(of_all.grad), strict=True):
        np.testing.assert_allclose(own, other, rtol=1e-8, atol=1e-8 * np.max(np.abs(other)))
    np.testing.assert_allclose(h.info.margin, of_all.info.margin, rtol=1e-4)
    assert name != "lasso" or float(h.info.error_estimate) < 1e-8

    rng, step = np.random.default_rng(seed), 2e-6
    direction = jax.tree.map(lambda x: rng.normal(size=x.shape), lam)
    at = lambda t: outer_value(name, jax.tree.map(lambda x, v: x + t * v, lam, direction))
    np.testing.assert_allclose(h.w, at(0)[1], atol=1e-8)
    numeric = (at(step)[0] - at(-step)[0]) / (2 * step)
    found = sum(jax.tree.leaves(jax.tree.map(lambda g, v: np.sum(g * v), h.grad, direction)))
    size = np.sqrt(sum(np.sum(g**2) for g in jax.tree.leaves(h.grad)))
    assert abs(found - numeric) < 1e-6 * size


def single(lam, batch, indices):
    return lam, {"X": batch["X"][:, indices] * 1.01, "y": batch["y"]}


@pytest.mark.parametrize("case", ["fits", "more support than size", "another problem", "box"])
def test_the_adjoint_takes_products_in_the_set_alone(case, seed):
    """Counted by the shape of what is multiplied; the numbers are those of products in all coordinates."""
    sizes = []

    def hvp(w, lam, batch, v):
        jax.debug.callback(lambda v: sizes.append(v.size), v)
        return batch["X"].T @ (batch["X"] @ v) / len(batch["y"])

    size = 6 if case == "more support than size" else SIZE
    restrict = single if case == "another problem" else columns
    problem = dataclasses.replace(problem_of("lasso", restrict), inner_hvp=hvp)
    if case == "box":  # all coordinates are free, those at zero too
        box = lambda v, step, lam: bl.prox.box(v, -5.0, 5.0)
        problem = dataclasses.replace(problem, inner_prox=box)
    lam, solver = jnp.asarray(-2.2), bl.WorkingSet(size, tol=1e-11)
    batch, rng = problem.inner_data, np.random.default_rng(seed)
    w = jnp.asarray(outer_value("lasso", -2.2)[1])
    assert 6 < np.count_nonzero(w) < SIZE
    w = jnp.zeros(DIM) if case == "box" else w

    @jax.jit
    def solved(w):
        at = fixed_point(problem, w, lam, batch, jnp.asarray(0.1), 0.03)
        own = narrowed(problem, solver, w, lam, batch, at, 0.03)
        b = at.project(jax.grad(problem.outer)(w, lam, problem.outer_data))
        x = jnp.asarray(rng.normal(size=DIM))
        start = jnp.zeros(DIM)
        of_all, of_some = (
            bl.CG(rtol=1e-13).solve(product, b, start, None, jax.random.key(0))
            for product in (at.product, own.product)
        )
        return at.product(x), own.product(x), of_all, of_some, jnp.linalg.norm(b)

    product, narrow, (y, info), (own_y, own_info), b_norm = solved(w)
    assert b_norm > 0.1 and np.linalg.norm(y) > 0.1
    np.testing.assert_allclose(narrow, product, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(own_y, y, atol=1e-9 * np.linalg.norm(y))
    assert info.status == own_info.status == bl.Status.OK
    assert info.num_steps == own_info.num_steps > 5
    np.testing.assert_allclose(own_info.curvature, info.curvature, rtol=1e-9)
    jax.effects_barrier()
    products = int(own_info.num_steps) + 2  # the residual's, and that of x
    few = sizes.count(size)
    assert few == (products if case == "fits" else 0)
    assert len(sizes) - few == products * (1 if case == "fits" else 2)


def test_equal_columns_have_a_hypergradient_where_the_outer_loss_sees_their_sum(seed):
    """By differences of the Lasso without the second column; a status where the held-out columns differ."""
    twice = lambda data: {"X": np.append(data["X"], data["X"][:, 2:3], axis=1), "y": data["y"]}
    train, held_out = map(twice, diabetes(noise=NOISE))
    problem = dataclasses.replace(problem_of("lasso"), inner_data=train, outer_data=held_out)
    solver = bl.WorkingSet(SIZE, bl.ProximalGradient(50_000, tol=1e-12), tol=1e-12)
    call = lambda problem, **more: bl.hypergradient(
        problem, -2.2, jnp.zeros(DIM + 1).at[2].set(0.1), solver=solver, **more
    )
    h = call(problem)
    assert h.info.status == bl.Status.OK and abs(h.w[2] - h.w[DIM]) > 0.05
    assert np.all(np.abs(h.w[jnp.array([2, DIM])]) > 0.01) and float(h.info.error_estimate) < 1e-8
    step = 2e-6
    numeric = (outer_value("lasso", -2.2 + step)[0] - outer_value("lasso", -2.2 - step)[0]) / (
        2 * step
    )
    np.testing.assert_allclose(h.grad, numeric, rtol=1e-7)
    held_out = {"X": held_out["X"].copy(), "y": held_out["y"]}
    held_out["X"][:, DIM] *= 1.001
    with pytest.raises(bl.BilevelError, match="BREAKDOWN.*features are the same"):
        call(dataclasses.replace(problem, outer_data=held_out))


def test_a_run_keeps_the_support_and_traces_nothing_anew(count_traces):
    case = NONSMOOTH["lasso"]
    inner = count_traces(case.inner)
    problem = dataclasses.replace(problem_of("lasso", dtype=np.float32), inner=inner)
    w, counts = jnp.zeros(DIM, jnp.float32), []
    for start in (-1.5, -1.8):
        result = bl.run(
            problem,
            np.float32(start),
            w,
            num_steps=10,
            solver=bl.WorkingSet(SIZE, tol=1e-4),
            engine=bl.Implicit(estimate=False),
            outer=optax.adam(0.1),
        )
        counts.append(inner.count)
        steps = np.asarray(result.history.inner_steps)
        assert np.all(np.asarray(result.history.status) == bl.Status.OK)
        assert steps.max() < 8 and result.w.dtype == jnp.float32
        assert result.best.outer_value < result.history.outer_value[0]
    assert counts[0] == counts[1]


def test_tasks_are_the_mean_over_tasks():
    problem, data = problem_of("lasso"), diabetes(noise=NOISE)
    none = dataclasses.replace(problem, inner_data=None, outer_data=None)
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *data)
    engine, solver = bl.Implicit(estimate=False), bl.WorkingSet(SIZE, tol=1e-10)
    settings = {"engine": engine, "solver": solver}
    mean = bl.hypergradient(bl.Tasks(none, stacked), -2.2, jnp.zeros(DIM), **settings)
    each = []
    for half in data:
        one = dataclasses.replace(problem, inner_data=half, outer_data=half)
        each.append(bl.hypergradient(one, -2.2, jnp.zeros(DIM), **settings).grad)
    np.testing.assert_allclose(mean.grad, np.mean(each), rtol=1e-8)
    with pytest.raises(ValueError, match="does not work on lanes"):
        bl.hypergradient(bl.Tasks(none, stacked, lanes=1), -2.2, jnp.zeros(DIM), **settings)


def test_refusals():
    problem, w = problem_of("lasso"), jnp.zeros(DIM)
    call = lambda problem, w, **more: bl.hypergradient(
        problem, -2.2, w, **{"solver": bl.WorkingSet(8), **more}
    )
    with pytest.raises(ValueError, match=r"Problem\(inner_restrict="):
        call(dataclasses.replace(problem, inner_restrict=None), w)
    with pytest.raises(ValueError, match=r"Problem\(inner_restrict="):
        call(dataclasses.replace(problem, inner_restrict=None), w, solver="workingset")
    with pytest.raises(ValueError, match=r"Problem\(inner_prox="):
        call(dataclasses.replace(problem, inner_prox=None), w)
    with pytest.raises(TypeError, match="inner_restrict"):
        dataclasses.replace(problem, inner_restrict=1.0)
    with pytest.raises(ValueError, match="differentiates through"):
        call(problem, w, engine="unrolled")
    bend = lambda lam, batch, i: (lam, batch)
    with pytest.raises(ValueError, match="inner_restrict must take"):
        call(dataclasses.replace(problem, inner_restrict=bend), w)
    group = lambda v, step, lam: bl.prox.group_lasso(v, step, jnp.exp(lam))
    with pytest.raises(ValueError, match="acts on each coordinate by itself"):
        call(dataclasses.replace(problem, inner_prox=group), w)
