"""Tasks drawn for each step: which, how often, what they add up to, and what the others keep."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel as bl
from bilevel import pool
from bilevel.outer.base import check

COUNT, DIM, LAM = 6, 3, 0.7
WEIGHTS = np.array([1.0, 4.0, 2.0, 0.5, 1.5, 3.0])
rng = np.random.default_rng(1)
A = rng.standard_normal((COUNT, DIM, DIM)) / 2
DATA = {
    "H": A @ A.swapaxes(1, 2) + np.linspace(1, 3, COUNT)[:, None, None] * np.eye(DIM),
    "b": rng.standard_normal((COUNT, DIM)),
    "c": rng.standard_normal((COUNT, DIM)),
}


def inner(w, lam, task):
    """w* = (H + lam I)^-1 b."""
    return 0.5 * w @ task["H"] @ w - task["b"] @ w + 0.5 * lam * w @ w


def outer(w, lam, task):
    return 0.5 * jnp.sum((w - task["c"]) ** 2) + 0.1 * lam**2


def by_task():
    """Values, hypergradients and inner solutions."""
    inverse = np.linalg.inv(DATA["H"] + LAM * np.eye(DIM))
    w = np.einsum("tij,tj->ti", inverse, DATA["b"])
    values = 0.5 * np.sum((w - DATA["c"]) ** 2, axis=1) + 0.1 * LAM**2
    return values, 0.2 * LAM - np.einsum("ti,tij,tj->t", w - DATA["c"], inverse, w), w


def tasks(per_step, weights=None, **kwargs):
    return bl.Tasks(bl.Problem(inner, outer), DATA, per_step=per_step, weights=weights, **kwargs)


@pytest.mark.parametrize(("per_step", "weights"), [(4, None), (2, WEIGHTS)])
def test_each_task_is_drawn_as_often_as_it_should(per_step, weights, key):
    keys = jax.random.split(key, 20000)
    drawn = np.asarray(jax.jit(jax.vmap(tasks(per_step, weights).drawn))(keys))
    assert drawn.shape == (20000, per_step)
    found = np.bincount(drawn.ravel(), minlength=COUNT) / drawn.size
    chances = np.full(COUNT, 1 / COUNT) if weights is None else weights / weights.sum()
    assert np.all(np.abs(found - chances) < 5 * np.sqrt(chances / drawn.size))
    once = [len(set(row)) == per_step for row in drawn.tolist()]
    assert all(once) == (weights is None)
    # A task's own randomness does not depend on which others are drawn.
    chosen = tasks(per_step, weights)
    part = chosen._part(chosen._draw(key, None))
    own, every = (jax.random.key_data(x._keys(key)) for x in (part, tasks(None)))
    np.testing.assert_array_equal(own, every[part.numbers])


def test_what_is_drawn_adds_up_to_an_unbiased_mean(key):
    """Loosely solved, so that the estimate has an error to find: the one of the tasks drawn."""
    chosen = tasks(3, WEIGHTS)
    values, grads, w = by_task()
    solver = bl.GradientDescent(0.2, max_steps=500, tol=1e-3)
    start = np.arange(COUNT * DIM).reshape(COUNT, DIM) / 10
    for number in range(3):
        own = jax.random.fold_in(key, number)
        rows = np.asarray(chosen.drawn(own))
        h = bl.hypergradient(chosen, LAM, start, solver=solver, engine="implicit", key=own)
        factors = WEIGHTS.mean() / WEIGHTS[rows]  # one over the number of tasks times the chance
        expected = np.mean(factors * grads[rows])
        np.testing.assert_allclose(h.grad, expected, rtol=5e-3)
        np.testing.assert_allclose(h.info.outer_value, np.mean(factors * values[rows]), rtol=1e-2)
        error = abs(float(h.grad) - expected) / abs(float(h.grad))
        np.testing.assert_allclose(h.info.error_estimate, error, rtol=0.1)
        left = np.setdiff1d(np.arange(COUNT), rows)
        np.testing.assert_array_equal(h.w[left], start[left])
        np.testing.assert_allclose(h.w[rows], w[rows], atol=2e-3)
        assert h.info.tasks.status.shape == (3,)


def test_a_run_keeps_every_tasks_own_start(key):
    """Three gradient steps of each task drawn, from where it was left, by hand."""
    chosen = tasks(4)
    settings = {"solver": bl.GradientDescent(0.2, max_steps=3, tol=0.0)}
    settings["engine"] = bl.Implicit(bl.CG(rtol=1e-12), estimate=False)
    run = lambda chunk: bl.run(
        chosen,
        LAM,
        np.zeros(DIM),
        num_steps=3,
        chunk=chunk,
        outer=optax.sgd(0.5),
        key=key,
        **settings,
    )
    found = run(3)
    lam, w, values = LAM, np.zeros((COUNT, DIM)), []
    for step in range(3):
        total, value = 0.0, 0.0
        for i in np.asarray(chosen.drawn(jax.random.fold_in(key, step))):
            H, b, c = (DATA[name][i] for name in "Hbc")
            for _ in range(3):
                w[i] -= 0.2 * (H @ w[i] + lam * w[i] - b)
            adjoint = np.linalg.solve(H + lam * np.eye(DIM), w[i] - c)
            total += 0.2 * lam - adjoint @ w[i]
            value += 0.5 * np.sum((w[i] - c) ** 2) + 0.1 * lam**2
        values.append(value / 4)
        lam -= 0.5 * total / 4
    np.testing.assert_allclose(found.lam, lam, rtol=1e-9)
    np.testing.assert_allclose(found.w, w, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(found.history.outer_value, values, rtol=1e-9)
    np.testing.assert_array_equal(run(1).lam, found.lam)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"per_step": 2.0}, TypeError, "must be an integer or None"),
        ({"per_step": 7}, ValueError, "from 1 to the number of tasks, 6; got 7"),
        ({"per_step": None, "weights": WEIGHTS}, ValueError, "expected per_step"),
        ({"per_step": 2, "weights": WEIGHTS[:3]}, ValueError, r"got shape \(3,\)"),
        ({"per_step": 2, "weights": 0 * WEIGHTS}, ValueError, "must be positive"),
        ({"per_step": 2, "pool": "disk"}, ValueError, "must be 'host' or None, got 'disk'"),
        ({"per_step": None, "pool": "host"}, ValueError, "expected per_step"),
        ({"per_step": 2, "pool": "host", "lanes": "auto"}, ValueError, "and a number of lanes"),
    ],
)
def test_what_cannot_be_drawn_by_is_refused(change, error, match):
    with pytest.raises(error, match=match):
        tasks(**change)


def test_meshes_and_outer_methods_take_all_tasks():
    mesh = jax.make_mesh((1,), ("tasks",))
    with pytest.raises(ValueError, match="expected per_step=None with a mesh"):
        bl.hypergradient(tasks(2), LAM, np.zeros(DIM), mesh=mesh)
    with pytest.raises(TypeError, match="compares outer values: expected Tasks.per_step=None"):
        check(tasks(2), bl.LBFGS(), bl.Implicit())


def test_a_pool_in_the_hosts_memory_changes_no_number(key, tmp_path):
    settings = {"solver": bl.GradientDescent(0.2, max_steps=3, tol=0.0), "num_steps": 6, "key": key}
    settings |= {"engine": bl.Implicit(estimate=False), "outer": optax.sgd(0.5), "chunk": 2}
    start = np.arange(COUNT * DIM).reshape(COUNT, DIM) / 10
    run = lambda pool, **kw: bl.run(tasks(2, WEIGHTS, pool=pool), LAM, start, **(settings | kw))
    expected, found = run(None), run("host")
    same = lambda a, b: jax.tree.map(lambda *xs: np.testing.assert_allclose(*xs, rtol=1e-12), a, b)
    same((found.lam, found.w, found.history), (expected.lam, expected.w, expected.history))
    same(found.state.engine, expected.state.engine)
    assert all(
        isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves((found.w, found.state.engine))
    )
    same(found.best, expected.best)
    loads = []
    taken = pool.take

    def counted(tree, numbers):
        loads.append(len(numbers))
        return taken(tree, numbers)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool, "take", counted)
        run("host", num_steps=2, checkpoint=tmp_path, log=tmp_path / "log")
        resumed = run("host", checkpoint=tmp_path, log=tmp_path / "log", resume=True)
    assert set(loads) == {4}  # two steps of two tasks
    exact = lambda a, b: jax.tree.map(np.testing.assert_array_equal, a, b)
    further = run("host", num_steps=3, state=run("host", num_steps=3).state)
    exact((further.lam, further.w), (found.lam, found.w))
    exact(
        (resumed.lam, resumed.w, resumed.history, resumed.state.engine),
        (found.lam, found.w, found.history, found.state.engine),
    )
    assert len((tmp_path / "log").read_text().splitlines()) == 6
    with pytest.raises(TypeError, match="w is missing: with a pool"):
        bl.run(tasks(2, pool="host"), LAM)
    with pytest.raises(ValueError, match="pool of tasks is for bilevel.run"):
        bl.hypergradient(tasks(2, pool="host"), LAM, start)
