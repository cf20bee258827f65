"""Hypergradients of nonsmooth inner problems: by hand, by differences, and a status where there is none."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
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


def test_two_thousand_columns_of_noise_against_coordinate_descent():
    train, held_out = diabetes(noise=2000)
    case = dataclasses.replace(
        NONSMOOTH["lasso"], inner_data=train, outer_data=held_out, w=np.zeros(2010)
    )

    def value(lam):
        model = Lasso(alpha=np.exp(lam), fit_intercept=False, tol=1e-14, max_iter=10**6)
        w = model.fit(train["X"], train["y"]).coef_
        return 0.5 * np.mean((held_out["X"] @ w - held_out["y"]) ** 2)

    lam, step = -2.5, 3e-5
    h = bl.hypergradient(problem_of(case), lam, jnp.zeros(2010), solver=SOLVER)
    numeric = (value(lam + step) - value(lam - step)) / (2 * step)
    np.testing.assert_allclose(h.grad, numeric, rtol=1e-7)
    np.testing.assert_allclose(h.grad, case.by_hand(case, np.asarray(h.w)), rtol=1e-8)
    assert 0 < np.count_nonzero(h.w) < 200
    assert float(h.info.error_estimate) < 1e-8


def lasso_margin(X, y, w, penalty):
    """Distance to a kink: on the scale of the gradient, and the largest curvature."""
    gradient = X.T @ (X @ w - y) / len(y)
    largest = np.linalg.eigvalsh(X.T @ X / len(y))[-1]
    return np.min(np.where(w == 0, penalty - np.abs(gradient), np.abs(w) * largest))


def test_margin_of_the_lasso_is_its_formula():
    case = NONSMOOTH["lasso"]
    X, y = case.inner_data.values()
    for lam in (-2.5, -3.5, -1.5):
        h = bl.hypergradient(problem_of(case), lam, jnp.asarray(case.w), solver=SOLVER)
        expected = lasso_margin(X, y, np.asarray(h.w), np.exp(lam))
        np.testing.assert_allclose(h.info.margin, expected, rtol=0.05)


def kink(case):
    """The penalty at which the first coefficient leaves zero."""
    X, y = case.inner_data.values()
    return np.log(np.max(np.abs(X.T @ y)) / len(y))


def test_on_a_kink_there_is_a_status_and_beside_it_a_small_margin():
    case = NONSMOOTH["lasso"]
    call = lambda lam: bl.hypergradient(
        problem_of(case), lam, jnp.asarray(case.w), solver=SOLVER, throw=False
    )
    at = call(kink(case))
    assert int(at.info.status) == bl.Status.MAX_STEPS
    assert float(at.info.margin) <= float(at.info.inner.residual) + 1e-14
    with pytest.raises(bl.BilevelError, match="MAX_STEPS.*margin"):
        bl.hypergradient(problem_of(case), kink(case), jnp.asarray(case.w), solver=SOLVER)
    below, above = call(kink(case) - 1e-4), call(kink(case) + 1e-4)
    assert below.info.status == above.info.status == bl.Status.OK
    assert 1e-6 < float(below.info.margin) < 1e-3 and 1e-6 < float(above.info.margin) < 1e-4
    assert abs(float(below.grad)) > 1e-2 and float(above.grad) == 0


def test_a_support_that_is_not_settled_is_no_confident_number():
    """Loose tolerances: either the estimate says how wrong it is, or it is unknown."""
    case = NONSMOOTH["lasso"]
    call = lambda tol: bl.hypergradient(
        problem_of(case),
        -2.5,
        jnp.asarray(case.w),
        solver=bl.ProximalGradient(tol=tol),
        throw=False,
    )
    truth, unknown, errors = call(1e-13).grad, 0, []
    for tol in np.logspace(-0.5, -7, 14):
        h = call(tol)
        error = abs(float(h.grad - truth)) / abs(float(h.grad))
        if np.isnan(float(h.info.error_estimate)):
            unknown += 1
            assert int(h.info.status) == bl.Status.MAX_STEPS
        else:
            errors.append(error)
            assert error < 2 * float(h.info.error_estimate) + 1e-9, tol
            assert float(h.info.error_estimate) < 2 * error + 1e-6
    assert unknown > 1 and max(errors) > 1e-4


@pytest.mark.parametrize("name", ["group lasso", "svr dual", "simplex"])
def test_no_step_of_the_equation_changes_the_derivative(name):
    """The symmetric system solved by dense algebra, at three steps, against the transposed equation."""
    case = NONSMOOTH[name]
    problem, lam, w = problem_of(case), as_arrays(case.lam), jnp.asarray(case.w)

    @eqx.filter_jit
    def matrices(w, size):
        batch = problem.inner_data
        at = fixed_point(problem, w, lam, batch, size)
        c = jax.grad(problem.outer)(w, lam, problem.outer_data)
        identity = jnp.eye(w.size)
        A, P = jax.vmap(at.product)(identity), jax.vmap(at.project)(identity)
        T = lambda w: w - size * optimality(w, size)
        optimality = lambda w, size: bl.ProximalGradient(learning_rate=size).optimality(
            problem.inner_objective(lam), w, batch
        )
        y = jnp.linalg.lstsq(A, at.project(c), rcond=1e-12)[0]
        u = at.adjoint(c, y)
        direct = jnp.linalg.solve((identity - jax.jacobian(T)(w)).T, c)
        return A, P, u, direct, at.pull_back(u)

    w = bl.hypergradient(problem, lam, w, solver=SOLVER).w
    results = [matrices(w, jnp.asarray(size)) for size in (0.01, 0.1, 0.3)]
    for A, P, u, direct, _ in results:
        np.testing.assert_allclose(A, A.T, atol=1e-12 * np.max(np.abs(A)))
        np.testing.assert_allclose(P, P.T, atol=1e-14)
        assert -1e-12 < np.linalg.eigvalsh(P)[0] <= np.linalg.eigvalsh(P)[-1] < 1 + 1e-12
        np.testing.assert_allclose(u, direct, rtol=1e-6, atol=1e-8 * np.max(np.abs(direct)))
    grads = [flat(result[-1]) for result in results]
    for grad in grads[1:]:
        np.testing.assert_allclose(grad, grads[0], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", ["elastic net"])
def test_jit_vmap_and_state(name):
    case = NONSMOOTH[name]
    problem, lam, w = problem_of(case), as_arrays(case.lam), jnp.asarray(case.w)
    engine = bl.Implicit(estimate=False)  # short to compile
    settings = {"engine": engine, "solver": SOLVER, "throw": False}
    one = lambda lam: bl.hypergradient(problem, lam, w, **settings).grad
    lams = jax.tree.map(lambda x: np.stack([x, x + 0.05]), lam)
    loop = [one(jax.tree.map(lambda x, i=i: x[i], lams)) for i in (0, 1)]
    both = jax.jit(jax.vmap(one))(lams)
    for i in (0, 1):
        row = jax.tree.map(lambda x, i=i: np.asarray(x)[i], both)
        np.testing.assert_allclose(flat(row), flat(loop[i]), rtol=1e-7, atol=1e-10)
    np.testing.assert_allclose(flat(jax.jit(one)(lam)), flat(loop[0]), rtol=1e-9)

    key = jax.random.key(0)
    state = jax.eval_shape(lambda: engine.init(problem, SOLVER, w, lam, key))
    after = jax.eval_shape(lambda s: engine.step(problem, SOLVER, w, lam, s, key)[1], state)
    shape = lambda t: jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), t)
    assert shape(jax.eval_shape(lambda s: s, state)) == shape(after)


@pytest.mark.parametrize("name", ["group lasso"])
def test_keeps_float32(name):
    case = NONSMOOTH[name]
    problem = problem_of(case)
    exact = bl.hypergradient(problem, as_arrays(case.lam), jnp.asarray(case.w), solver=SOLVER)
    single = lambda t: jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), t)
    rough = bl.hypergradient(
        problem_of(case, inner_data=single(case.inner_data), outer_data=single(case.outer_data)),
        single(case.lam),
        single(case.w),
        solver=bl.ProximalGradient(max_steps=10_000, tol=1e-5),
        throw=False,
    )
    assert {x.dtype for x in jax.tree.leaves((rough.grad, rough.w))} == {jnp.dtype("float32")}
    assert int(rough.info.status) <= bl.Status.MAX_STEPS
    size = np.linalg.norm(flat(exact.grad))
    assert np.linalg.norm(flat(rough.grad) - flat(exact.grad)) < 3e-3 * size


def test_nan_in_data_or_in_a_penalty_is_nonfinite():
    case = NONSMOOTH["lasso"]
    bad = jax.tree.map(lambda x: x.copy(), case.inner_data)
    bad["X"][0, 0] = np.nan
    w = jnp.asarray(case.w)
    for problem, lam in ((problem_of(case, inner_data=bad), -2.5), (problem_of(case), np.nan)):
        h = bl.hypergradient(problem, lam, w, solver=SOLVER, throw=False)
        assert int(h.info.status) == bl.Status.NONFINITE


def test_negative_curvature_on_the_support_is_indefinite():
    inner = lambda w, lam, batch: 0.5 * (w[0] ** 2 - w[1] ** 2) - w[0]
    problem = bl.Problem(inner, lambda w, lam, batch: w.sum(), inner_prox=bl.prox.l1)
    # w[1] = 0.1 is where the penalty balances the slope: stationary and no minimum.
    h = bl.hypergradient(problem, 0.1, jnp.array([0.9, 0.1]), throw=False)
    assert int(h.info.status) == bl.Status.INDEFINITE
    assert float(h.info.curvature) < 0


def test_all_zero_solution_has_no_derivative_and_no_steps():
    case = NONSMOOTH["lasso"]
    h = bl.hypergradient(problem_of(case), 1.0, jnp.asarray(case.w), solver=SOLVER)
    assert float(h.grad) == 0 and not np.any(h.w) and int(h.info.adjoint_steps) == 0


def test_a_smooth_penalty_as_a_prox_gives_the_smooth_hypergradient():
    """Ridge, its penalty as a prox."""
    case = NONSMOOTH["elastic net"]
    ridge = lambda v, step, lam: bl.prox.elastic_net(v, step, 0.0 * lam, lam)
    problem = bl.Problem(squares, squares, case.inner_data, case.outer_data, inner_prox=ridge)
    h = bl.hypergradient(problem, 0.3, jnp.asarray(case.w), solver=SOLVER)
    X, y = case.inner_data.values()
    V, z = case.outer_data.values()
    H = X.T @ X / len(y) + 0.3 * np.eye(10)
    w = np.linalg.solve(H, X.T @ y / len(y))
    np.testing.assert_allclose(
        h.grad, -w @ np.linalg.solve(H, V.T @ (V @ w - z) / len(z)), rtol=1e-8
    )
    assert np.isnan(float(h.info.margin))  # no kink in a penalty of zero


@pytest.mark.parametrize("name", ["lasso"])
def test_unrolled_goes_through_the_prox(name):
    case = NONSMOOTH[name]
    problem, lam, w = problem_of(case), as_arrays(case.lam), jnp.asarray(case.w)
    exact = bl.hypergradient(problem, lam, w, solver=SOLVER)
    solver = bl.ProximalGradient(max_steps=250)
    h = bl.hypergradient(problem, lam, w, solver=solver, engine=bl.Unrolled())
    np.testing.assert_allclose(flat(h.grad), flat(exact.grad), rtol=1e-6, atol=1e-8)
    assert float(h.info.error_estimate) < 1e-5


def test_who_would_ignore_the_prox_is_refused():
    case = NONSMOOTH["lasso"]
    problem, w = problem_of(case), jnp.asarray(case.w)
    for solver in (
        bl.LBFGS(),
        bl.Newton(),
        bl.GradientDescent(),
        bl.OptaxSolver(optax.sgd(0.1)),
        bl.JaxoptSolver(),
        "lbfgs",
    ):
        with pytest.raises(ValueError, match="ProximalGradient"):
            bl.hypergradient(problem, -2.5, w, solver=solver)
    for engine in ("exact", "f2sa", "moreau", "onestep"):
        with pytest.raises(ValueError, match="Implicit or Unrolled"):
            bl.hypergradient(problem, -2.5, w, engine=engine)
    with pytest.raises(ValueError, match="ProximalGradient"):
        bl.hypergradient(
            problem, -2.5, w, engine="unrolled", solver=lambda lam: bl.GradientDescent()
        )
    with pytest.raises(ValueError, match=r"inner_prox must take .* and return what is like w"):
        bl.hypergradient(
            dataclasses.replace(problem, inner_prox=lambda v, step, lam: v[:3]), 0.1, w
        )
    with pytest.raises(ValueError, match="inner_prox must take"):
        bl.hypergradient(dataclasses.replace(problem, inner_prox=lambda v, lam: v), 0.1, w)
    with pytest.raises(TypeError, match="inner_prox"):
        bl.Problem(squares, squares, inner_prox=1.0)


def test_a_run_lowers_the_outer_loss_with_the_default_solver():
    case = NONSMOOTH["elastic net"]
    lam = as_arrays({"l1": 0.3, "l2": 0.3})
    problem = dataclasses.replace(
        case, inner_prox=lambda v, s, lam: bl.prox.elastic_net(v, s, lam["l1"], lam["l2"])
    )
    result = bl.run(
        problem_of(problem),
        lam,
        jnp.asarray(case.w),
        num_steps=20,
        outer=optax.adam(0.2),
        transform=bl.transforms.Exp(),
    )
    assert result.best.outer_value < 0.9 * result.history.outer_value[0]


def test_a_map_that_is_no_prox_is_no_confident_number():
    """Its Jacobian is not symmetric, and its fixed point depends on the step."""
    case = NONSMOOTH["lasso"]
    skewed = jnp.eye(10) + 0.02 * jnp.triu(jnp.ones((10, 10)), 1)
    problem = problem_of(
        case, inner_prox=lambda v, step, lam: skewed @ case.inner_prox(v, step, lam)
    )
    solver = bl.ProximalGradient(max_steps=20_000, tol=1e-10)
    h = bl.hypergradient(problem, -2.5, jnp.asarray(case.w), solver=solver, throw=False)
    assert h.info.status != bl.Status.OK and np.isnan(float(h.info.error_estimate))


def test_a_penalty_that_a_run_takes_below_zero_is_no_result():
    case = NONSMOOTH["lasso"]
    outer = lambda w, lam, batch: squares(w, lam, batch) + 10 * lam
    prox = lambda v, step, lam: bl.prox.l1(v, step, lam)
    problem = problem_of(case, inner=squares, outer=outer, inner_prox=prox)
    rule = optax.sgd(0.01)
    result = bl.run(problem, 0.05, jnp.zeros(10), outer=rule, num_steps=3, throw=False)
    assert result.lam < 0 and result.status == bl.Status.NONFINITE
    assert result.best.lam == 0.05
