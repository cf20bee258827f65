"""Lanes: the numbers of solving one by one, whatever the solver, the lanes and the order of finishing."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel as bl
from solvers import loops
from solvers.lanes import solve_many

COUNT, DIM = 7, 3


def objective(w, batch):
    """Minimised where `A w["a"] = b`: a smooth convex function that is not quadratic."""
    A, b = batch
    r = A @ w["a"] - b
    return jnp.sum(jnp.sqrt(1 + r**2)) + 0.5 * r @ r


def problems(seed):
    rng = np.random.default_rng(seed)
    A = np.eye(DIM) + 0.3 * rng.standard_normal((COUNT, DIM, DIM))
    A *= np.linspace(1.0, 2.0, COUNT)[rng.permutation(COUNT), None, None]
    w = {"a": jnp.asarray(rng.standard_normal((COUNT, DIM)))}
    return w, (jnp.asarray(A), jnp.asarray(rng.standard_normal((COUNT, DIM))))


many = eqx.filter_jit(solve_many)


@eqx.filter_jit
def one_by_one(solver, objective, w, batches, state, tol, max_steps):
    def solve(item):
        w, batch, state, tol, max_steps = item
        begin = solver.init if state is None else solver.restart
        begin = begin(objective, w, batch) if state is None else begin(objective, w, state, batch)
        level = loops.stop_level(tol, w)
        w, state, steps = loops.run_until(solver, objective, w, begin, batch, level, max_steps)
        return w, state, loops.judge(solver, objective, w, batch, steps, tol)

    return jax.lax.map(solve, (w, batches, state, tol, max_steps))


SOLVERS = {
    "gd": bl.GradientDescent(0.1, momentum=0.5, max_steps=300, tol=1e-6),
    "lbfgs": bl.LBFGS(max_steps=40, tol=1e-6),
    "optax": bl.OptaxSolver(optax.adam(0.1), max_steps=300, tol=1e-4),
}


@pytest.mark.parametrize("name", SOLVERS)
def test_every_number_of_lanes_gives_what_one_by_one_gives(name, seed):
    """Budgets and tolerances of each problem; some run out, one of these as the last; one is met at the start."""
    solver = SOLVERS[name]
    w, batches = problems(seed)
    tol = jnp.asarray([1e-3, 1e-6, 1e-4, 1e-6, 1e-5, 1e-14, 1e9])
    budget = jnp.asarray([300, 300, 300, 3, 300, 90, 300], jnp.int32)
    expected, states, info = one_by_one(solver, objective, w, batches, None, tol, budget)
    limits = {"tol": tol, "max_steps": budget}
    plan = {1: [None], 3: [0, None, 2], COUNT: [None]} if name == "gd" else {3: [None]}
    for lanes, tails in plan.items() if name != "lbfgs" else ():
        for tail in tails:
            found, none, spent = many(
                solver, objective, w, batches, lanes=lanes, tail=tail, **limits
            )
            assert none is None
            np.testing.assert_array_equal(spent.inner.num_steps, info.num_steps)
            np.testing.assert_array_equal(spent.inner.status, info.status)
            np.testing.assert_allclose(found["a"], expected["a"], rtol=1e-10)
            useful = int(jnp.sum(info.num_steps))
            extra = COUNT * int(jnp.max(info.num_steps)) if lanes == COUNT else lanes * 300
            # A lagged solver sees that a tolerance is met by a step that does not count.
            assert useful <= int(spent.lane_steps) <= useful + extra
    assert info.status[3] == bl.Status.MAX_STEPS and info.num_steps[3] == 3
    assert info.num_steps[6] == 0
    assert name != "gd" or info.num_steps[5] == max(info.num_steps) == 90
    if name == "optax":  # it carries nothing over
        return
    # Elsewhere than the states come from, so that something is left to do.
    again = many(solver, objective, w, batches, lanes=3, state=states, **limits)
    warm = one_by_one(solver, objective, w, batches, states, tol, budget)
    assert int(jnp.sum(warm[2].num_steps)) > 0
    np.testing.assert_array_equal(again[2].inner.num_steps, warm[2].num_steps)
    for a, b in zip(jax.tree.leaves(again[:2]), jax.tree.leaves(warm[:2]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9)


def test_a_problem_that_fails_harms_no_other(seed):
    w, (A, b) = problems(seed)
    b = b.at[2].set(jnp.nan)
    _, _, info = many(SOLVERS["gd"], objective, w, (A, b), lanes=3)
    expected = np.zeros(COUNT, int)
    expected[2] = bl.Status.NONFINITE
    np.testing.assert_array_equal(info.inner.status, expected)
