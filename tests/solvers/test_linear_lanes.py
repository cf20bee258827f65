"""Linear systems on lanes: the numbers and the verdicts of solving them one by one."""

import equinox as eqx
import jax
import numpy as np
import pytest

import bilevel as bl
from solvers.fields import unchecked
from solvers.linear.lanes import System, solve_systems

COUNT, DIM = 24, 40


def matrices(seed, orders=1.0):
    """Condition numbers from 1 to 10^orders, in random order."""
    rng = np.random.default_rng(seed)
    made = []
    for order in rng.permutation(np.linspace(0, orders, COUNT)):
        Q = np.linalg.qr(rng.standard_normal((DIM, DIM)))[0]
        made.append(Q @ np.diag(np.logspace(-order, 0, DIM)) @ Q.T)
    return np.stack(made), rng.standard_normal((2, COUNT, DIM))


def system(A, b, x0, rtol, steps):
    solver = bl.CG(max_steps=400, preconditioner=bl.Jacobi(num_probes=4))
    solver = unchecked(solver, rtol=rtol, steps=steps)
    return System(lambda v: A @ v, b, x0, solver, jax.random.key(3))


@eqx.filter_jit
def on_lanes(rows, lanes, tail=None):
    return solve_systems(system, rows, lanes=lanes, tail=tail)


@jax.jit
def one_by_one(rows):
    def one(row):
        product, b, x0, solver, key = system(*row)
        return solver.solve(product, b, x0, solver.init(product, b, key), key)

    return jax.lax.map(one, rows)


@pytest.mark.parametrize(("lanes", "tail"), [(1, None), (4, 0), (4, 2), (COUNT, None)])
def test_every_number_of_lanes_gives_what_one_by_one_gives(lanes, tail, seed):
    """Among them an indefinite matrix, a singular one, a budget that ends, zero and NaN: each has its own verdict."""
    A, (b, x0) = matrices(seed)
    A[2] -= 0.5 * np.eye(DIM)
    A[5] = np.diag([0.0, *np.ones(DIM - 1)])
    A[11] = np.linalg.qr(np.random.default_rng(seed).standard_normal((DIM, DIM)))[0]
    A[11] = A[11] @ np.diag(np.logspace(-13, 0, DIM)) @ A[11].T
    b[7], b[9], x0[3] = 0.0, np.nan, 0.0
    x0[4] = np.linalg.solve(A[4], b[4])
    rtol = np.full(COUNT, 1e-5)  # far above rounding, which would decide how many steps it takes
    rtol[8] = 0.3
    # One step leaves what no step removes, which only a product with the remainder tells.
    steps = np.full(COUNT, 400.0)
    steps[5], rtol[5], x0[5], b[5, 0] = 1.0, 1e-12, 0.0, 1e-9
    rows = (A, b, x0, rtol, steps)
    expected, info = one_by_one(rows)
    found, spent = on_lanes(rows, lanes, tail)
    names = [bl.Status(code).name for code in np.asarray(info.status)]
    assert names[2] == "INDEFINITE" and names[5] == "BREAKDOWN" and names[9] == "NONFINITE"
    assert names[11] != "OK" and names[7] == names[0] == "OK"
    steps = np.asarray(info.num_steps)
    assert steps[4] == 0 < steps[8] < np.median(steps)
    np.testing.assert_array_equal(spent.linear.status, info.status)
    # Near the tolerance, rounding may decide on one step.
    apart = np.abs(np.asarray(spent.linear.num_steps) - steps)
    assert np.max(apart) <= 1 and np.sum(apart) <= 2
    met = np.asarray(info.status) == bl.Status.OK
    errors, sizes = (np.linalg.norm(np.asarray(x)[met], axis=1) for x in (found - expected, found))
    assert np.all(errors <= np.where(apart[met], 1e-3, 1e-6) * sizes)
    np.testing.assert_allclose(spent.linear.curvature[met], info.curvature[met], rtol=1e-4)
    assert int(spent.useful) > int(np.sum(steps))  # and what looked at residuals
    assert int(spent.useful) <= int(spent.lane_steps)
    if lanes == 1:
        assert int(spent.useful) == int(spent.lane_steps)


def test_lanes_do_not_wait_for_the_slowest(seed):
    """Condition numbers over six orders of magnitude: little more than the products that are of use."""
    A, (b, x0) = matrices(seed, 6.0)
    rows = (A, b, 0 * x0, np.full(COUNT, 1e-8), np.full(COUNT, 400.0))
    spent = on_lanes(rows, 4)[1]
    waits = on_lanes(rows, COUNT)[1]
    np.testing.assert_allclose(int(spent.useful), int(waits.useful), rtol=0.03)  # rounding
    assert int(spent.lane_steps) <= 1.18 * int(spent.useful) < 0.8 * int(waits.lane_steps)
