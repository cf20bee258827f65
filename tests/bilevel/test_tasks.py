"""Tasks: the mean of the single hypergradients, with any engine, on lanes or all at once."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel as bl

COUNT, DIM = 5, 3


def inner(w, lam, task):
    """w* = (H + lam I)^-1 b."""
    return 0.5 * w @ task["H"] @ w - task["b"] @ w + 0.5 * lam * w @ w


def outer(w, lam, task):
    return 0.5 * jnp.sum((w - task["c"]) ** 2) + 0.1 * lam**2


def shared_inner(w, lam, batch):
    shift, task = batch
    return inner(w, lam, task) - shift @ w


@pytest.fixture
def data(seed):
    rng = np.random.default_rng(seed)
    A = rng.standard_normal((COUNT, DIM, DIM)) / 2
    scales = np.linspace(1.0, 4.0, COUNT)[:, None, None]  # tasks of different difficulty
    return {
        "H": scales * (A @ A.swapaxes(1, 2) + np.eye(DIM)),
        "b": rng.standard_normal((COUNT, DIM)),
        "c": rng.standard_normal((COUNT, DIM)),
    }


LAM = 0.7


def closed_form(data, shift=0.0):
    """Mean value and hypergradient, and all inner solutions."""
    values, grads, ws = [], [], []
    for H, b, c in zip(data["H"], data["b"], data["c"], strict=True):
        inverse = np.linalg.inv(H + LAM * np.eye(DIM))
        w = inverse @ (b + shift)
        values.append(0.5 * np.sum((w - c) ** 2) + 0.1 * LAM**2)
        grads.append(0.2 * LAM - (w - c) @ inverse @ w)
        ws.append(w)
    return np.mean(values), np.mean(grads), np.stack(ws)


# Cheap to compile; the rest of the suite has the other solvers.
SOLVER = bl.GradientDescent(0.05, momentum=0.6, max_steps=2000, tol=1e-12)
PLAIN = bl.Implicit(estimate=False)
ENGINES = {
    "implicit": (bl.Implicit(bl.CG(rtol=1e-13)), SOLVER, 1e-10),
    "unrolled": (bl.Unrolled(estimate=False), bl.GradientDescent(0.05, 0.6, max_steps=300), 1e-10),
    "f2sa": (bl.F2SA(nu=1e-2, estimate=True), SOLVER, 1e-2),
}


@pytest.mark.parametrize(
    ("name", "lanes"),
    [("implicit", None), ("implicit", 2), ("implicit", 1), ("unrolled", 3), ("f2sa", None)],
)
def test_the_mean_of_closed_forms(name, lanes, data):
    engine, solver, tol = ENGINES[name]
    tasks = bl.Tasks(bl.Problem(inner, outer), data, lanes=lanes)
    h = bl.hypergradient(
        tasks, LAM, np.zeros(DIM), engine=engine, solver=solver, throw=name != "f2sa"
    )
    value, grad, w = closed_form(data)
    np.testing.assert_allclose(h.grad, grad, rtol=tol)
    np.testing.assert_allclose(h.w, w, atol=1e-9)
    np.testing.assert_allclose(h.info.outer_value, value, rtol=1e-9)
    each = h.info.tasks
    assert each.status.shape == (COUNT,)
    assert int(h.info.inner.num_steps) == int(jnp.sum(each.inner.num_steps)) > COUNT
    if name == "f2sa":  # its bias, and that of the mean is not the mean of the biases' sizes
        error = abs(float(h.grad) - grad) / abs(float(h.grad))
        np.testing.assert_allclose(h.info.error_estimate, error, rtol=0.05)
    elif name == "implicit":
        np.testing.assert_allclose(h.info.corrected_value, value, rtol=1e-10)
        assert 0 < h.info.error_estimate < 1e-8


def test_shared_data_come_first_in_the_batch(data):
    """Levels with data of their own get `(data, slice)`, others the slice; minibatches of them too."""
    shift = np.array([0.3, -0.2, 0.5])
    tasks = bl.Tasks(bl.Problem(shared_inner, outer, shift), data, lanes=2)
    h = bl.hypergradient(tasks, LAM, np.zeros(DIM), solver=SOLVER, engine=PLAIN)
    np.testing.assert_allclose(h.grad, closed_form(data, shift)[1], rtol=1e-7)


def test_a_run_carries_each_task_and_counts_the_work(data):
    """Every task goes on from its own solution: later steps cost less, and stacked starts are taken."""
    _, grad, w = closed_form(data)
    problem = bl.Problem(inner, outer)
    tasks = bl.Tasks(problem, data, lanes=2)
    settings = {"solver": dataclasses.replace(SOLVER, tol=1e-6), "outer": optax.sgd(1e-3)}
    result = bl.run(tasks, LAM, np.zeros(DIM), num_steps=3, chunk=2, **settings)
    assert result.w.shape == (COUNT, DIM)
    np.testing.assert_allclose(result.history.grad_norm[0], abs(grad), rtol=1e-4)
    assert result.history.inner_steps[2] < result.history.inner_steps[0] / 2
    assert 1e-12 < result.history.error_estimate[-1] < 1e-3
    started = bl.hypergradient(tasks, LAM, w, solver=SOLVER, engine=PLAIN)
    assert int(started.info.inner.num_steps) == 0


def test_one_bad_task_is_told_and_named(data):
    data["b"][3] = np.nan
    tasks = bl.Tasks(bl.Problem(inner, outer), data)
    settings = {"solver": SOLVER, "engine": PLAIN}
    h = bl.hypergradient(tasks, LAM, np.zeros(DIM), throw=False, **settings)
    expected = [bl.Status.NONFINITE if i == 3 else bl.Status.OK for i in range(COUNT)]
    np.testing.assert_array_equal(h.info.tasks.status, expected)
    assert h.info.status == bl.Status.NONFINITE
    with pytest.raises(bl.BilevelError, match="NONFINITE"):
        bl.hypergradient(tasks, LAM, np.zeros(DIM), **settings)


def test_starts_from_the_outer_variable_and_random_keys(seed):
    """lam is the start of each task, and each draws rows of its own: half a step to the rows' mean."""
    rows = np.arange(20.0)
    loss = lambda w, lam, batch: 0.5 * jnp.mean((w - batch[0] * batch[1]) ** 2)
    problem = bl.Problem(
        loss, loss, rows, rows, batch_size=4, same_rows=True, inner_init=lambda lam, batch: lam
    )
    tasks = bl.Tasks(problem, np.array([1.0, 1.0, 2.0]))
    settings = {"engine": "unrolled", "solver": bl.GradientDescent(0.5, max_steps=1)}
    h = bl.hypergradient(tasks, 3.0, key=jax.random.key(seed), **settings)
    means = 2 * h.w - 3
    assert len(np.unique(np.asarray(means) / [1, 1, 2])) == 3
    np.testing.assert_allclose(h.grad, np.mean(0.5 * (h.w - means)))


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda p: bl.Tasks(1, np.ones(3)), TypeError, "must be a bilevel.Problem"),
        (lambda p: bl.Tasks(p, {"a": np.ones(3), "b": np.ones(2)}), ValueError, "common first"),
        (lambda p: bl.Tasks(p, None), ValueError, "common first axis"),
        (lambda p: bl.Tasks(p, np.ones(())), ValueError, "common first axis"),
        (lambda p: bl.Tasks(p, np.ones(3), lanes=0), ValueError, "at least 1"),
        (lambda p: bl.Tasks(p, np.ones(3), lanes=1.5), TypeError, "integer"),
        (
            lambda p: bl.hypergradient(bl.Tasks(p, np.ones(3)), LAM, np.zeros(2)),
            ValueError,
            "inner loss failed",
        ),
    ],
)
def test_bad_tasks_are_refused(make, error, match):
    with pytest.raises(error, match=match):
        make(bl.Problem(inner, outer))
