"""Hypergradients of nonsmooth inner problems: by hand, by differences, and a status where there is none."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems.nonsmooth import NONSMOOTH, diabetes, squares
from sklearn.linear_model import Lasso

import bilevel as bl
from hypergrad.nonsmooth import fixed_point
from solvers import loops, tree
from solvers.types import constant_sampler

SOLVER = bl.ProximalGradient(max_steps=50_000, tol=2e-13)
each = pytest.mark.parametrize("name", NONSMOOTH)


def problem_of(case, **changes):
    case = dataclasses.replace(case, **changes)
    data = case.inner_data, case.outer_data
    return bl.Problem(case.inner, case.outer, *data, inner_prox=case.inner_prox)


def as_arrays(lam):
    return jax.tree.map(jnp.asarray, lam)


def flat(x):
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(x)])


@eqx.filter_jit
def outer_at(problem, lam, w):
    """The outer value at the inner solution near `w`, by three dense Newton steps for `w = T(w)`."""
    objective, batch = problem.inner_objective(lam), problem.inner_data
    solver = bl.ProximalGradient(max_steps=20_000, tol=1e-8)
    w, _, info = loops.solve(
        solver, objective, w, solver.init(objective, w, batch), constant_sampler(batch)
    )
    defect = lambda w: bl.ProximalGradient(learning_rate=0.1).optimality(objective, w, batch)
    newton = lambda _, w: w - jnp.linalg.solve(jax.jacfwd(defect)(w), defect(w))
    w = jax.lax.fori_loop(0, 3, newton, w)
    return problem.outer(w, lam, problem.outer_data), info.status, tree.norm(defect(w))


def difference(problem, lam, w, direction, h):
    """Central, of order 4."""
    values = []
    for step in (h, -h, 2 * h, -2 * h):
        value, status, residual = outer_at(problem, tree.axpy(step, direction, lam), w)
        assert status == bl.Status.OK and residual < 1e-13
        values.append(float(value))
    return (8 * (values[0] - values[1]) - (values[2] - values[3])) / (12 * h)


@each
def test_matches_differences_and_the_formula(name, seed):
    case = NONSMOOTH[name]
    problem, lam = problem_of(case), as_arrays(case.lam)
    h = bl.hypergradient(problem, lam, jnp.asarray(case.w), solver=SOLVER)
    assert float(h.info.error_estimate) < 1e-7
    assert 3e-4 < float(h.info.margin) < 100
    np.testing.assert_allclose(h.info.corrected_value, h.info.outer_value, rtol=1e-9)
    rng = np.random.default_rng(seed)
    direction = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)), lam)
    numeric = difference(problem, lam, h.w, direction, 1e-4)
    found = float(tree.vdot(h.grad, direction))
    scale = np.linalg.norm(flat(h.grad)) * np.linalg.norm(flat(direction))
    assert abs(found - numeric) < 1e-7 * max(abs(numeric), 0.1 * scale)
    if case.by_hand is not None:
        by_hand = flat(case.by_hand(case, np.asarray(h.w)))
        np.testing.assert_allclose(flat(h.grad), by_hand, rtol=1e-7, atol=1e-9 * scale)
