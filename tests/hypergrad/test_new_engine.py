"""What CONTRIBUTING promises: an engine is one class, and registering it is enough."""

import jax
import jax.numpy as jnp
import numpy as np
import problems

import bilevel as bl
from hypergrad import registry
from hypergrad.base import make_info, make_solver
from hypergrad.derivatives import outer_value_and_grads
from solvers.loops import solve


class DirectOnly(bl.AbstractEngine):
    """Ignores the inner solution's dependence on lam: dF/dlam alone."""

    estimates = False

    def init(self, problem, solver, w, lam, key):
        return None

    def step(self, problem, solver, w, lam, state, key):
        solver, sampler = make_solver(solver, lam), problem.inner_sampler(key)
        objective = problem.inner_objective(lam)
        begin = solver.init(objective, w, sampler(0))
        w, _, inner = solve(solver, objective, w, begin, sampler)
        value, _, grad = outer_value_and_grads(problem, w, lam, problem.outer_batch(key))
        return bl.Hypergradient(grad, w, make_info(value, inner, grad)), None


def test_a_registered_engine_runs_by_name(monkeypatch):
    monkeypatch.setitem(registry.ENGINES, "directonly", DirectOnly)
    case = problems.make("quadratic")
    problem = bl.Problem(case.inner, case.outer, case.inner_data, case.outer_data)
    h = bl.hypergradient(problem, case.lam, case.w, engine="directonly")
    direct = jax.grad(case.outer, argnums=1)(h.w, case.lam, case.outer_data)
    np.testing.assert_allclose(h.grad, direct)
    assert bl.run(problem, case.lam, case.w, engine="directonly", num_steps=3).status == 0
    assert jnp.all(jnp.isfinite(h.grad))
