"""Tasks: the mean of the single hypergradients, with any engine, on lanes or all at once."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel as bl
from bilevel.calls import engine_step, init_engine
from bilevel.task_report import together
from hypergrad.base import make_info
from solvers import SolveInfo

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


def constants(w, lam, *batches):
    """H is at least 1 + lam, C is w."""
    return bl.Constants(1 + lam, 0.0, 1.0, 1.0, 0.0, cross_norm=jnp.linalg.norm(w))


def judged(data, tol=1e-13, start=None, throw=True):
    """All at once, with error estimate and bound: one compiled program for the tests that use it."""
    solver = dataclasses.replace(SOLVER, tol=tol)
    tasks = bl.Tasks(bl.Problem(inner, outer, constants=constants), data)
    start = np.zeros((COUNT, DIM)) if start is None else start
    engine = bl.Implicit(bl.CG(rtol=tol))
    return bl.hypergradient(tasks, LAM, start, engine=engine, solver=solver, throw=throw)


def test_the_errors_of_the_mean_are_the_truth_and_above_it(data):
    """Where the tasks' hypergradients almost cancel, so that theirs of each add up to much more."""
    data["c"][:] = closed_form(data)[2] - data["c"]  # w - c is what c was: of any sign
    data["c"][0] += 0.9 * COUNT * closed_form(data)[1] * closed_form(data)[2][0]
    value, grad, w = closed_form(data)
    tight = judged(data)
    np.testing.assert_allclose(tight.grad, grad, rtol=1e-9)
    np.testing.assert_allclose(tight.w, w, atol=1e-11)
    np.testing.assert_allclose(tight.info.outer_value, value, rtol=1e-9)
    np.testing.assert_allclose(tight.info.corrected_value, value, rtol=1e-10)
    assert 0 < tight.info.error_estimate < 1e-8 and 0 < tight.info.bound < 1e-8
    loose = judged(data, tol=3e-3, throw=False)
    error = abs(float(loose.grad) - grad) / abs(float(loose.grad))
    assert error > 1e-5
    np.testing.assert_allclose(loose.info.error_estimate, error, rtol=0.05)
    assert error < float(loose.info.bound) < 300 * error
    each = loose.info.tasks
    assert each.status.shape == (COUNT,)
    assert int(loose.info.inner.num_steps) == int(jnp.sum(each.inner.num_steps)) > COUNT
    assert loose.info.inner.residual == jnp.max(each.inner.residual) > 0
    # Relative to each task's own hypergradient, not to how far that is from the mean.
    assert np.all(each.error_estimate < 0.5)


def test_one_bad_task_is_told_and_named(data):
    good_b = data["b"][3].copy()
    data["b"][3] = np.nan
    h = judged(data, throw=False)
    expected = np.array([bl.Status.NONFINITE if i == 3 else bl.Status.OK for i in range(COUNT)])
    np.testing.assert_array_equal(h.info.tasks.status, expected)
    assert h.info.status == bl.Status.NONFINITE
    assert np.isnan([h.grad, h.info.error_estimate, h.info.outer_value]).all()
    assert not h.info.bound < np.inf
    with pytest.raises(bl.BilevelError, match="NONFINITE"):
        judged(data)
    # A saddle of one task along a direction that no right-hand side has: only a probe can tell.
    data["H"][3], data["b"][3] = np.diag([-5.0, 2.0, 3.0]), good_b * [0, 1, 1]
    data["c"][3, 0] = 0
    h = judged(data, start=closed_form(data)[2], throw=False)
    np.testing.assert_array_equal(h.info.tasks.status, expected // 5 * bl.Status.INDEFINITE)
    assert h.info.status == bl.Status.INDEFINITE and np.isnan(h.info.error_estimate)
    assert h.info.curvature == jnp.min(h.info.tasks.curvature) < 0


def test_a_report_of_many_is_that_of_the_worst():
    """`|mean of errors| <= mean of |errors|`, each relative to its own norm; a zero norm hides none."""
    info = jax.eval_shape(lambda: judged_shape())
    fields = jax.tree.map(lambda leaf: jnp.zeros((3,), leaf.dtype), info)
    norms, errors = np.array([2.0, 5.0, 0.0]), np.array([0.1, 0.02, 1e-3 / 2e-154])
    tiny = np.finfo(float).tiny ** 0.5
    errors[2] = 1e-3 / tiny  # an error of 1e-3 where the norm is zero
    each = fields._replace(
        error_estimate=jnp.asarray(errors),
        bound=jnp.asarray(2 * errors),
        status=jnp.array([0, 4, 1], jnp.int32),
        curvature=jnp.array([1.0, -2.0, 3.0]),
        margin=jnp.array([jnp.nan, 2.0, 3.0]),
        adjoint_residual=jnp.array([0.0, 1.0, 0.5]),
        adjoint_steps=jnp.array([1, 2, 3], jnp.int32),
    )
    found = together(each, jnp.asarray(norms), jnp.asarray(0.5))
    mean = (2 * 0.1 + 5 * 0.02 + 1e-3) / 3 / 0.5
    np.testing.assert_allclose(found.error_estimate, mean)
    np.testing.assert_allclose(found.bound, 2 * mean)
    assert (found.status, found.curvature, found.margin) == (bl.Status.INDEFINITE, -2.0, 2.0)
    assert (found.adjoint_residual, found.adjoint_steps) == (1.0, 6)
    unknown = each._replace(error_estimate=each.error_estimate.at[1].set(jnp.nan))
    assert jnp.isnan(together(unknown, jnp.asarray(norms), jnp.asarray(0.5)).error_estimate)


def judged_shape():
    zero = jnp.zeros(())
    inner = SolveInfo(zero, zero, jnp.int32(0), jnp.int32(0))
    return make_info(zero, inner, zero)


OTHERS = {
    "unrolled": (bl.Unrolled(estimate=False), bl.GradientDescent(0.05, 0.6, max_steps=300), 1e-10),
    "f2sa": (bl.F2SA(nu=1e-2, estimate=True), SOLVER, 1e-2),
}


@pytest.mark.parametrize(("name", "lanes"), [("unrolled", 3), ("f2sa", 1), ("f2sa", 2)])
def test_other_engines_and_the_mean_of_closed_forms(name, lanes, data):
    engine, solver, tol = OTHERS[name]
    tasks = bl.Tasks(bl.Problem(inner, outer), data, lanes=lanes)
    h = bl.hypergradient(
        tasks, LAM, np.zeros(DIM), engine=engine, solver=solver, throw=name != "f2sa"
    )
    value, grad, w = closed_form(data)
    np.testing.assert_allclose(h.grad, grad, rtol=tol)
    np.testing.assert_allclose(h.w, w, atol=1e-9)
    np.testing.assert_allclose(h.info.outer_value, value, rtol=1e-9)
    if name == "f2sa":  # its bias, and that of the mean is not the mean of the biases' sizes
        error = abs(float(h.grad) - grad) / abs(float(h.grad))
        np.testing.assert_allclose(h.info.error_estimate, error, rtol=0.05)
        assert np.isnan(h.info.tasks.error_estimate).all()  # no hypergradient of theirs is kept


def test_an_engine_without_a_state_on_lanes_that_divide_the_tasks(data):
    four = {name: rows[:4] for name, rows in data.items()}
    tasks = bl.Tasks(bl.Problem(inner, outer), four, lanes=2)
    solver = bl.GradientDescent(0.05, 0.6, max_steps=300)
    h = bl.hypergradient(
        tasks, LAM, np.zeros(DIM), engine=bl.Forward(estimate=False), solver=solver
    )
    np.testing.assert_allclose(h.grad, closed_form(four)[1], rtol=1e-10)


def test_a_single_loop_on_few_lanes_solves_nothing_before(data):
    tasks = bl.Tasks(bl.Problem(inner, outer), data)
    engine = bl.SOBA(step_size=0.05)
    one, two = (
        bl.hypergradient(
            dataclasses.replace(tasks, lanes=lanes), LAM, np.zeros(DIM), engine=engine, throw=False
        )
        for lanes in (None, 2)
    )
    np.testing.assert_allclose(two.w, one.w, rtol=1e-12)
    np.testing.assert_array_equal(two.info.inner.num_steps, one.info.inner.num_steps)


def test_tasks_of_a_nonsmooth_problem_in_a_single_loop(data):
    """The penalty behind the prox is part of each task's direction."""
    kinks = {
        "inner_prox": bl.prox.l1,
        "inner_penalty": lambda w, lam: lam * jnp.sum(jnp.abs(w)),
    }
    call = lambda problem: bl.hypergradient(
        problem, LAM, np.ones(DIM), engine=bl.MEHA(0.05), throw=False
    )
    each = []
    for i in range(2):
        task = {name: rows[i] for name, rows in data.items()}
        each.append(float(call(bl.Problem(inner, outer, task, task, **kinks)).grad))
    rows = {name: rows[:2] for name, rows in data.items()}
    mean = call(bl.Tasks(bl.Problem(inner, outer, **kinks), rows)).grad
    np.testing.assert_allclose(mean, np.mean(each), rtol=1e-12)


def test_tasks_of_an_engine_that_knows_multipliers(data):
    tasks = bl.Tasks(bl.Problem(inner, outer), data)
    engine = bl.LVHBA(step_size=0.01)
    result = bl.run(tasks, LAM, np.zeros(DIM), engine=engine, num_steps=1, throw=False)
    assert result.multipliers is None and len(result.history.status) == 1


def test_shared_data_come_first_in_the_batch(data):
    """On refilled lanes. Levels with data of their own get `(data, slice)`, others the slice."""
    shift = np.array([0.3, -0.2, 0.5])
    tasks = bl.Tasks(bl.Problem(shared_inner, outer, shift), data, lanes=2)
    h = bl.hypergradient(tasks, LAM, np.zeros(DIM), solver=SOLVER, engine=PLAIN)
    value, grad, w = closed_form(data, shift)
    np.testing.assert_allclose(h.grad, grad, rtol=1e-7)
    np.testing.assert_allclose(h.w, w, atol=1e-9)
    np.testing.assert_allclose(h.info.outer_value, value, rtol=1e-9)
    steps = h.info.tasks.inner.num_steps
    assert int(h.info.inner.num_steps) == int(jnp.sum(steps)) and np.all(steps > 1)


def test_adjoint_systems_on_refilled_lanes_are_those_of_one_by_one(seed):
    """Task 3 has a saddle that its start is on, task 5 more steps to take than CG may, task 6 is not solved."""
    rng = np.random.default_rng([seed, 7])
    count, dim = 12, 8
    # As many steps as there are eigenvalues: four, eight of task 5.
    spread = rng.permutation(np.linspace(0, 2, count))
    H = np.stack([np.diag(np.repeat(np.logspace(0, d, 4), 2)) for d in spread])
    H[5] = np.diag(np.logspace(0, 2, dim))
    H[3, 0, 0] = -5.0
    b, c = rng.standard_normal((2, count, dim))
    b[3, 0], c[3, 0], b[6] = 0.0, 2.0, np.nan
    lam = jnp.asarray(LAM)
    start = np.linalg.solve(H + LAM * np.eye(dim), b[:, :, None])[:, :, 0]
    start[6] = 0.0
    start = jnp.asarray(start)
    data = {"H": H, "b": b, "c": c}
    engine = bl.Implicit(bl.CG(rtol=1e-12, max_steps=7), damping=0.3, estimate=False)
    problem = bl.Problem(inner, outer)
    solver, key = bl.GradientDescent(0.004, max_steps=50, tol=1e-9), jax.random.key(0)
    found = {}
    for lanes in (1, 4, None):
        tasks = bl.Tasks(problem, data, lanes=lanes)
        own = init_engine(tasks, solver, engine, start, lam, key)
        h, own = engine_step(tasks, solver, engine, start, lam, own, key, jnp.int32(0))
        found[lanes] = h.info, own.own.adjoint
    (one, q), (few, q_few), (info, _) = found[1], found[4], found[None]
    names = [bl.Status(code).name for code in np.asarray(one.tasks.status)]
    assert [names[i] for i in (0, 3, 5, 6)] == ["OK", "INDEFINITE", "MAX_STEPS", "NONFINITE"]
    np.testing.assert_array_equal(few.tasks.status, one.tasks.status)
    np.testing.assert_array_equal(few.tasks.adjoint_steps, one.tasks.adjoint_steps)
    np.testing.assert_allclose(few.tasks.curvature, one.tasks.curvature, rtol=1e-6)
    good = [i for i in range(count) if i not in (3, 5, 6)]
    damped = H + (LAM + 0.3) * np.eye(dim)
    exact = np.linalg.solve(damped, (start - c)[:, :, None])[:, :, 0]
    np.testing.assert_allclose(q_few[np.array(good)], exact[good], rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(q_few[5], q[5], rtol=1e-6, atol=1e-9)
    assert one.adjoint_lane_steps is None and info.adjoint_lane_steps is None
    assert int(few.adjoint_lane_steps) >= int(few.adjoint_steps)


def test_warm_adjoints_and_tolerances_of_their_own_on_refilled_lanes(data):
    """The second step begins at the adjoint of the first; with `target` each task has its own tolerances."""
    for engine in (bl.Implicit(bl.CG(rtol=1e-6), estimate=False), bl.Implicit(target=1e-3)):
        histories = []
        for lanes in (1, 2):
            tasks = bl.Tasks(bl.Problem(inner, outer), data, lanes=lanes)
            settings = {"solver": SOLVER, "engine": engine, "outer": optax.sgd(1e-6)}
            result = bl.run(tasks, LAM, np.zeros(DIM), num_steps=3, chunk=3, **settings)
            histories.append(result.history)
        one, two = histories
        np.testing.assert_array_equal(two.adjoint_steps, one.adjoint_steps)
        np.testing.assert_allclose(two.grad_norm, one.grad_norm, rtol=1e-7)
        if engine.target is None:
            assert two.adjoint_steps[0] > 0 == two.adjoint_steps[1]


@pytest.mark.parametrize("memory", [0, 2])
def test_fixed_points_on_refilled_lanes(memory, seed):
    """`w = A w + lam b`, A shared, b the task's: `w = lam M b`, `M = (I - A)^-1`."""
    rng = np.random.default_rng([seed, 41])
    A, b, t = 0.2 * rng.normal(size=(3, 3)), rng.normal(size=(5, 3)), rng.normal(size=3)
    tasks = bl.Tasks(
        bl.Problem(
            bl.Mapping(lambda w, lam, batch: batch[0] @ w + lam * batch[1]),
            lambda w, lam, batch: 0.5 * jnp.sum((w - t) ** 2),
            A,
        ),
        b,
        lanes=2,
    )
    h = bl.hypergradient(
        tasks,
        0.7,
        np.zeros(3),
        solver=bl.FixedPoint(memory=memory),
        engine=bl.Implicit(estimate=False),
    )
    Mb = b @ np.linalg.inv(np.eye(3) - A).T
    np.testing.assert_allclose(h.w, 0.7 * Mb, atol=1e-7)
    np.testing.assert_allclose(h.grad, np.mean(np.sum(Mb * (0.7 * Mb - t), axis=1)), rtol=1e-6)


def test_newton_on_refilled_lanes_uses_the_preconditioner_of_the_slice():
    """The exact inverse of each task's Hessian, shared data first: CG takes one step, so one suffices."""
    scales = jnp.asarray([1.0, 10.0, 100.0])
    curvature = lambda batch: batch[0] * batch[1]
    problem = bl.Problem(
        lambda w, lam, batch: 0.5 * jnp.sum(curvature(batch) * w**2) - lam * jnp.sum(w),
        lambda w, lam, batch: jnp.sum(w),
        scales,
        inner_preconditioner=lambda w, lam, batch: lambda r: r / curvature(batch),
    )
    rates = np.arange(1.0, 6.0)[:, None] * np.ones(3)
    newton = bl.Newton(max_steps=1, linear_solver=bl.CG(rtol=0.0, max_steps=1))
    tasks = bl.Tasks(problem, rates, lanes=2)
    h = bl.hypergradient(tasks, 0.7, np.zeros(3), solver=newton, engine=bl.Implicit(estimate=False))
    np.testing.assert_allclose(h.w, 0.7 / (np.asarray(scales) * rates), rtol=1e-9)


def test_a_run_carries_each_task_and_counts_the_work(data):
    """Every task goes on from its own solution: later steps cost less, and stacked starts are taken."""
    _, grad, w = closed_form(data)
    tasks = bl.Tasks(bl.Problem(inner, outer), data, lanes=2)
    settings = {"solver": dataclasses.replace(SOLVER, tol=1e-6), "outer": optax.sgd(1e-3)}
    settings["engine"] = PLAIN
    result = bl.run(tasks, LAM, np.zeros(DIM), num_steps=3, chunk=2, **settings)
    assert result.w.shape == (COUNT, DIM)
    np.testing.assert_allclose(result.history.grad_norm[0], abs(grad), rtol=1e-4)
    assert result.history.inner_steps[2] < result.history.inner_steps[0] / 2
    again = bl.run(tasks, LAM, w, num_steps=1, chunk=2, **settings)
    assert again.history.inner_steps[0] == 0


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
        (lambda p: bl.Tasks(p, np.ones(3), lanes="all"), TypeError, "'auto' or None, got 'all'"),
        (lambda p: bl.choose_lanes(p, LAM, np.zeros(2)), TypeError, "must be bilevel.Tasks"),
        (
            lambda p: bl.hypergradient(bl.Tasks(p, np.ones(3)), LAM, np.zeros(2)),
            ValueError,
            "inner loss failed",
        ),
        (
            lambda p: bl.hypergradient(
                bl.Tasks(p, {name: np.ones((3, 3, 3)) for name in "Hbc"}), LAM, np.zeros(3)
            ),
            ValueError,
            "one of 3 tasks: a w whose arrays all have that many rows",
        ),
    ],
)
def test_bad_tasks_are_refused(make, error, match):
    with pytest.raises(error, match=match):
        make(bl.Problem(inner, outer))
