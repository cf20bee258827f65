"""Contract of every engine: correct by another route, and well behaved under JAX's transforms."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest
from hypergrad_cases import BLOCKS, CASES, EXACT_LBFGS, INNER_STEPS, MINIMAX, RANDOM, SINGLE_LOOP

import bilevel as bl
from hypergrad.estimate import assess
from hypergrad.registry import ENGINES

NAMES = sorted(CASES)


def problem_of(case, **kwargs):
    return bl.Problem(case.inner, case.outer, case.inner_data, case.outer_data, **kwargs)


def flat(x):
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(x)])


def relative(x, reference):
    return np.linalg.norm(flat(x) - flat(reference)) / np.linalg.norm(flat(reference))


def lean(name):
    """The row's engine; but one without an adjoint and one with are enough where no test looks at the estimate."""
    engine = CASES[name].engine
    keeps = name in ("implicit", "unrolled") or not hasattr(engine, "estimate")
    return engine if keeps else dataclasses.replace(engine, estimate=False)


def test_every_registered_engine_has_a_case():
    engines = [case.engine for case in CASES.values()]
    engines += [*SINGLE_LOOP.values(), *RANDOM.values(), *INNER_STEPS, *BLOCKS, *MINIMAX]
    # Of TTSA and MRBO, by one attribute that the others have a case for.
    variants = {"bsa", "sustain"}
    assert {type(engine).__name__.lower() for engine in engines} | variants == set(ENGINES)


@pytest.mark.parametrize("kind", ["quadratic", "ridge", "weighted_ridge", "softmax"])
@pytest.mark.parametrize("name", NAMES)
def test_matches_the_closed_form(name, kind, seed):
    row, case = CASES[name], problems.make(kind, seed)
    h = bl.hypergradient(
        problem_of(case), case.lam, case.w, engine=lean(name), solver=row.solver, throw=False
    )
    truth = case.hypergradient(case.lam)
    if name != "onestep":  # biased by design
        assert relative(h.grad, truth) < row.tol
    assert jax.tree.structure(h.grad) == jax.tree.structure(case.lam)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "exact"])
def test_error_estimate_bounds_the_true_error(name, seed):
    """Where there is an estimate, the true error is at most twice that (and its own rounding)."""
    row, case = CASES[name], problems.make("logistic", seed)
    if not row.engine.estimates:
        engine = dataclasses.replace(row.engine, estimate=True)
    else:
        engine = row.engine
    h = bl.hypergradient(problem_of(case), case.lam, case.w, engine=engine, solver=row.solver)
    error = relative(h.grad, case.hypergradient(case.lam))
    size = np.linalg.norm(flat(case.hypergradient(case.lam))) / np.linalg.norm(flat(h.grad))
    assert error * size < 2 * float(h.info.error_estimate) + 1e-9
    assert float(h.info.error_estimate) < 2 * error * size + 1e-6


@pytest.mark.parametrize("steps", [1, 10])
def test_short_neumann_series_reports_its_error(steps, seed):
    case = problems.make("quadratic", seed)
    engine = bl.Implicit(bl.Neumann(max_steps=steps))
    h = bl.hypergradient(problem_of(case), case.lam, case.w, engine=engine, solver=EXACT_LBFGS)
    truth = case.hypergradient(case.lam)
    error = np.linalg.norm(flat(h.grad) - flat(truth)) / np.linalg.norm(flat(h.grad))
    assert 0.5 * error < float(h.info.error_estimate) < 2 * error


@pytest.mark.parametrize("name", NAMES)
def test_jit_vmap_and_state(name, seed):
    """jit equals no jit, vmap equals a loop, a step keeps the state's structure and types."""
    row, case = CASES[name], problems.make("quadratic", seed)
    problem = problem_of(case)
    kwargs = {"engine": lean(name), "solver": row.solver, "throw": False}
    one = lambda lam: bl.hypergradient(problem, lam, case.w, **kwargs).grad
    lams = np.stack([case.lam, 2 * case.lam])
    loop = np.stack([one(lam) for lam in lams])
    np.testing.assert_allclose(jax.jit(one)(case.lam), loop[0], rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(jax.jit(jax.vmap(one))(lams), loop, rtol=1e-5, atol=1e-7)

    key = jax.random.key(seed)
    init = lambda: row.engine.init(problem, row.solver, case.w, case.lam, key)
    state = jax.eval_shape(init)
    after = jax.eval_shape(
        lambda s: row.engine.step(problem, row.solver, case.w, case.lam, s, key)[1], state
    )
    shape = lambda t: jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), t)
    assert shape(jax.eval_shape(lambda s: s, state)) == shape(after)


@pytest.mark.parametrize("name", NAMES)
def test_keeps_float32(name, seed):
    row, case = CASES[name], problems.make("quadratic", seed, jnp.float32)
    solver = row.solver and dataclasses.replace(row.solver, tol=1e-5)
    h = bl.hypergradient(
        problem_of(case), case.lam, case.w, engine=lean(name), solver=solver, throw=False
    )
    assert {leaf.dtype for leaf in jax.tree.leaves((h.grad, h.w))} == {jnp.dtype("float32")}
    if name not in ("onestep", "moreau", "f2sa-1", "f2sa"):  # penalties magnify rounding by 1/nu
        assert relative(h.grad, case.hypergradient(case.lam)) < 1e-3


def test_first_call_trace_count_is_pinned(count_traces):
    case = problems.make("quadratic")
    inner, outer = count_traces(case.inner), count_traces(case.outer)
    problem = bl.Problem(inner, outer, case.inner_data, case.outer_data)
    bl.hypergradient(problem, case.lam, case.w)
    # On CPU one trace serves all derivatives of a program's part: its start, its step, its estimate.
    on_cpu = jax.default_backend() == "cpu"
    assert (inner.count, outer.count) == ((4, 3) if on_cpu else (11, 4))


@pytest.mark.parametrize("name", NAMES)
def test_nan_in_data_is_nonfinite(name, seed):
    row, case = CASES[name], problems.make("quadratic", seed)
    bad = jax.tree.map(lambda x: x.at[(0,) * x.ndim].set(jnp.nan), case.inner_data)
    problem = bl.Problem(case.inner, case.outer, bad, case.outer_data)
    engine = lean(name)
    h = bl.hypergradient(problem, case.lam, case.w, engine=engine, solver=row.solver, throw=False)
    assert int(h.info.status) == bl.Status.NONFINITE
    with pytest.raises(bl.BilevelError, match="NONFINITE.*NaN"):
        bl.hypergradient(problem, case.lam, case.w, engine=engine, solver=row.solver)


@pytest.mark.parametrize("linear", [bl.CG(), bl.Dense()], ids=["cg", "dense"])
@pytest.mark.parametrize("kind", sorted(problems.JUDGED))
def test_statuses_at_a_stationary_point(kind, linear, seed):
    case = problems.make_judged(kind, seed)
    h = bl.hypergradient(
        problem_of(case), case.lam, case.w, engine=bl.Implicit(linear), throw=False
    )
    assert bl.Status(int(h.info.status)).name == case.status
    if case.status == "OK":
        np.testing.assert_allclose(h.grad, case.hypergradient(case.lam), rtol=1e-8, atol=1e-12)


def test_zero_right_hand_side_takes_no_steps():
    case = problems.make_judged("zero right-hand side")
    h = bl.hypergradient(problem_of(case), case.lam, case.w, engine=bl.Implicit(bl.CG()))
    assert int(h.info.adjoint_steps) == 0


def test_negative_curvature_that_the_outer_gradient_does_not_see():
    """c = (1, 0) in the positive eigenvector of H = diag(1, -1): CG alone would be content."""
    inner = lambda w, lam, batch: 0.5 * (w[0] ** 2 - w[1] ** 2) - lam[0] * w[0]
    outer = lambda w, lam, batch: w[0]
    h = bl.hypergradient(bl.Problem(inner, outer), jnp.array([0.0]), jnp.zeros(2), throw=False)
    assert int(h.info.status) == bl.Status.INDEFINITE


@pytest.mark.parametrize("linear", [bl.MINRES(), bl.GMRES()], ids=["minres", "gmres"])
def test_a_solver_that_takes_an_indefinite_hessian_does_not_make_it_a_hypergradient(linear):
    """H = diag(-0.3, 1, 2) at the saddle point w = lam / H: solved, and still INDEFINITE."""
    diagonal = jnp.asarray([-0.3, 1.0, 2.0])
    inner = lambda w, lam, batch: 0.5 * jnp.sum(diagonal * w**2) - jnp.sum(lam * w)
    outer = lambda w, lam, batch: jnp.sum(w)
    problem, lam = bl.Problem(inner, outer), jnp.ones(3)

    def run(damping):
        engine = bl.Implicit(linear, damping=damping, estimate=False)
        solver = bl.GradientDescent(max_steps=1, learning_rate=1e-9, tol=0.0)
        return bl.hypergradient(
            problem, lam, lam / diagonal, engine=engine, solver=solver, throw=False
        )

    h = run(0.0)
    assert int(h.info.status) == bl.Status.INDEFINITE and float(h.info.adjoint_residual) < 1e-9
    assert -0.3 - 1e-9 <= float(h.info.curvature) < -0.01
    np.testing.assert_allclose(h.grad, 1 / diagonal, rtol=1e-6)  # dw/dlam of the saddle point
    # A damping above the negative curvature makes the system definite, and the result one of its own.
    h = run(0.5)
    assert int(h.info.status) == bl.Status.OK
    np.testing.assert_allclose(h.grad, 1 / (diagonal + 0.5), rtol=1e-6)


def test_unconverged_inner_solve_is_max_steps_and_its_error_is_estimated(seed):
    case = problems.make("quadratic", seed)
    h = bl.hypergradient(
        problem_of(case), case.lam, case.w, solver=bl.LBFGS(max_steps=2), throw=False
    )
    assert int(h.info.status) == bl.Status.MAX_STEPS
    truth = case.hypergradient(case.lam)
    error = np.linalg.norm(flat(h.grad) - flat(truth)) / np.linalg.norm(flat(h.grad))
    assert error > 1e-3  # the plausible wrong number is really wrong
    assert 0.8 < float(h.info.error_estimate) / error < 1.25
    with pytest.raises(bl.BilevelError, match="MAX_STEPS.*max_steps"):
        bl.hypergradient(problem_of(case), case.lam, case.w, solver=bl.LBFGS(max_steps=2))


def test_refined_hypergradient_is_the_true_one_on_a_quadratic(seed):
    """One Newton step solves both equations there, however early the inner solve was cut."""
    case = problems.make("quadratic", seed)
    problem, solver = problem_of(case), bl.LBFGS(max_steps=2)
    h = bl.hypergradient(problem, case.lam, case.w, solver=solver, throw=False)
    data = case.inner_data, case.outer_data
    found = eqx.filter_jit(assess)(problem, solver, case.lam, h, *data, jax.random.key(seed))
    truth = case.hypergradient(case.lam)
    assert relative(h.grad, truth) > 1e-3
    assert relative(found.refined, truth) < 1e-7


def test_neumann_step_too_long_is_diverged(seed):
    case = problems.make("quadratic", seed)
    engine = bl.Implicit(bl.Neumann(step=3.0))
    h = bl.hypergradient(problem_of(case), case.lam, case.w, engine=engine, throw=False)
    assert int(h.info.status) == bl.Status.DIVERGED


def test_wrong_hessian_product_shows_in_the_estimate(seed):
    case = problems.make("quadratic", seed)
    wrong = lambda w, lam, batch, v: 2.0 * v
    h = bl.hypergradient(problem_of(case, inner_hvp=wrong), case.lam, case.w)
    assert float(h.info.error_estimate) > 0.05


def test_own_hessian_product_equals_autodiff(seed):
    from problems.classification import softmax_hvp

    case = problems.make("softmax", seed)
    own, auto = (
        bl.hypergradient(problem, case.lam, case.w, engine=bl.Implicit(estimate=False))
        for problem in (problem_of(case, inner_hvp=softmax_hvp), problem_of(case))
    )
    np.testing.assert_allclose(own.grad, auto.grad, rtol=1e-8)


@pytest.mark.parametrize("checkpoint", [True, False])
def test_unrolled_learning_rate_and_start(checkpoint):
    """d/d(rate, start) of T gradient steps on h/2 w^2: w_T = (1 - rate h)^T start."""
    h, T = 0.7, 7
    inner = lambda w, lam, batch: 0.5 * h * w**2
    outer = lambda w, lam, batch: w
    problem = bl.Problem(inner, outer, inner_init=lambda lam, batch: lam["start"])
    lam = {"rate": 0.3, "start": 2.0}
    solver = lambda lam: bl.GradientDescent(learning_rate=lam["rate"], max_steps=T)
    engine = bl.Unrolled(checkpoint=checkpoint, estimate=False)
    found = bl.hypergradient(problem, lam, 0.0, solver=solver, engine=engine).grad
    np.testing.assert_allclose(found["start"], (1 - 0.3 * h) ** T, rtol=1e-12)
    np.testing.assert_allclose(found["rate"], -2 * T * h * (1 - 0.3 * h) ** (T - 1), rtol=1e-12)
    with pytest.raises(ValueError, match="Unrolled"):
        bl.hypergradient(problem, lam, 0.0)
    with pytest.raises(ValueError, match="Unrolled"):
        bl.hypergradient(bl.Problem(inner, outer), lam, 0.0, solver=solver)


def test_truncation_is_the_neumann_series(seed):
    """At the inner solution, the last K gradient steps are K terms of the series."""
    case, K = problems.make("quadratic", seed), 6
    w = jnp.asarray(case.solution(case.lam))
    problem = problem_of(case)
    gd = bl.GradientDescent(learning_rate=0.3, max_steps=K + 5)
    unrolled, series = (
        bl.hypergradient(problem, case.lam, w, engine=engine, solver=gd)
        for engine in (
            bl.Unrolled(truncate=K, estimate=False),
            bl.Implicit(bl.Neumann(max_steps=K, step=0.3), estimate=False),
        )
    )
    np.testing.assert_allclose(unrolled.grad, series.grad, rtol=1e-9)


@pytest.mark.parametrize("checkpoint", [True, False])
def test_truncation_continues_from_the_first_steps(checkpoint, seed):
    """Away from the solution: the last K of T steps, the first T - K of them held constant."""
    case, T, K, rate = problems.make("quadratic", seed), 9, 4, 0.2
    gradient = jax.grad(case.inner)

    def trained(lam, w, num_steps):
        for _ in range(num_steps):
            w = w - rate * gradient(w, lam, case.inner_data)
        return w

    final = jax.jit(trained, static_argnums=2)
    head = final(case.lam, case.w, T - K)
    expected = jax.jit(
        jax.grad(lambda lam: case.outer(trained(lam, head, K), lam, case.outer_data))
    )(case.lam)
    h = bl.hypergradient(
        problem_of(case),
        case.lam,
        case.w,
        engine=bl.Unrolled(truncate=K, checkpoint=checkpoint, estimate=False),
        solver=bl.GradientDescent(learning_rate=rate, max_steps=T),
    )
    np.testing.assert_allclose(h.grad, expected, rtol=1e-10)
    np.testing.assert_allclose(h.w, final(case.lam, case.w, T), rtol=1e-10)


def test_one_step_is_one_term_of_the_series(seed):
    """q = step c at the inner solution."""
    case, step = problems.make("quadratic", seed), 0.3
    h = bl.hypergradient(
        problem_of(case),
        case.lam,
        case.w,
        engine=bl.OneStep(step, estimate=False),
        solver=EXACT_LBFGS,
    )
    _, B, _, D, t, rho = case.means
    expected = rho * flat(case.lam) + step * B.T @ (D @ (case.solution(case.lam) - t))
    np.testing.assert_allclose(h.grad, expected, rtol=1e-8)


def test_penalised_hypergradients_match_their_own_closed_forms(seed):
    case = problems.make("quadratic", seed)
    call = lambda engine: (
        bl.hypergradient(problem_of(case), case.lam, case.w, engine=engine, solver=EXACT_LBFGS).grad
    )
    np.testing.assert_allclose(
        call(bl.F2SA(nu=0.02, order=1)), case.penalised_gradient(case.lam, 50.0), rtol=1e-6
    )
    np.testing.assert_allclose(
        call(bl.F2SA(nu=0.05, order=2)), case.central_gradient(case.lam, 0.05), rtol=1e-6
    )
    np.testing.assert_allclose(
        call(bl.Moreau(c=20.0, gamma=3.0)), case.moreau_gradient(case.lam, 20.0, 3.0), rtol=1e-6
    )


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_difference_order(order, seed):
    """Halving nu divides the bias by 2^order."""
    case = problems.make("quadratic", seed)
    truth = case.hypergradient(case.lam)
    errors = [
        np.linalg.norm(
            bl.hypergradient(
                problem_of(case),
                case.lam,
                case.w,
                engine=bl.F2SA(nu=nu, order=order),
                solver=bl.Newton(tol=1e-13, linear_solver=bl.Dense()),
                throw=False,
            ).grad
            - truth
        )
        for nu in (0.04, 0.02)
    ]
    assert abs(np.log2(errors[0] / errors[1]) - order) < 0.35


def test_minibatches_are_unbiased_in_the_mean_and_repeatable(seed):
    case = problems.make("quadratic", seed)
    problem = problem_of(case, batch_size=(None, 4))
    kwargs = {"solver": EXACT_LBFGS, "engine": bl.Implicit(estimate=False), "throw": False}
    call = lambda key: bl.hypergradient(problem, case.lam, case.w, key=key, **kwargs).grad
    draw = jax.jit(jax.vmap(call))
    keys = jax.random.split(jax.random.key(seed), 300)
    draws = np.asarray(draw(keys))
    np.testing.assert_array_equal(draws, draw(keys))
    truth, spread = case.hypergradient(case.lam), np.std(draws, axis=0) / 300**0.5
    assert np.max(spread) > 0
    assert np.all(np.abs(np.mean(draws, axis=0) - truth) < 5 * spread + 1e-9)
    assert np.linalg.norm(draws[0] - draws[1]) > 0
