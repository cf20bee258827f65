"""Hypergradients at a solution that another program found."""

import jax.numpy as jnp
import numpy as np
import problems
import pytest

import bilevel as bl


@pytest.fixture
def case(seed):
    return problems.make("ridge", seed)


@pytest.fixture
def problem(case):
    return bl.Problem(case.inner, case.outer, case.inner_data, case.outer_data)


def test_only_the_adjoint_system_is_solved(case, problem):
    w = jnp.asarray(case.solution(case.lam))
    h = bl.hypergradient(problem, case.lam, w, solver=bl.Solved())
    np.testing.assert_array_equal(h.w, w)
    np.testing.assert_allclose(h.grad, case.hypergradient(case.lam), rtol=1e-8)
    assert h.info.inner.num_steps == 0 and h.info.inner.residual < 1e-8


def test_a_point_that_is_no_solution_is_said_to_be_none(case, problem):
    w = jnp.asarray(case.solution(case.lam)) + 1e-3
    h = bl.hypergradient(problem, case.lam, w, solver="solved", throw=False)
    assert h.info.status == bl.Status.MAX_STEPS
    assert h.info.inner.residual > 1e-4
    with pytest.raises(bl.BilevelError, match="MAX_STEPS"):
        bl.hypergradient(problem, case.lam, w, solver="solved")
    loose = bl.hypergradient(problem, case.lam, w, solver=bl.Solved(tol=0.1))
    error = np.linalg.norm(loose.grad - case.hypergradient(case.lam)) / np.linalg.norm(loose.grad)
    np.testing.assert_allclose(loose.info.error_estimate, error, rtol=0.1)


@pytest.mark.parametrize(
    "call, match",
    [
        (lambda problem, lam, w: bl.run(problem, lam, w, num_steps=2, solver="solved"), "follow"),
        (
            lambda problem, lam, w: bl.hypergradient(
                problem, lam, w, engine="unrolled", solver="solved"
            ),
            "differentiates through the inner solver's steps",
        ),
    ],
)
def test_where_steps_are_needed_it_is_refused(case, problem, call, match):
    with pytest.raises(ValueError, match=match):
        call(problem, case.lam, jnp.asarray(case.solution(case.lam)))
