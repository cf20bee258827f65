"""Problems on which other libraries return zero, NaN or a plausible wrong hypergradient without a word.

Each was run with the library named, on the versions current in 2026. Here each ends in the right number, or
in a status that is not OK, or in a refusal.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel as bl
from bilevel.problem import shuffled


def bowl(w, lam, batch):
    """H is `batch`, the solution H^-1 lam."""
    return 0.5 * w @ (batch @ w) - w @ lam


def distance(w, lam, batch):
    return 0.5 * jnp.sum((w - jnp.arange(1.0, w.size + 1)) ** 2)


def solved(H, engine, start=None):
    """(hypergradient, the true one H^-1 (w* - t)) for lam = 2 (1, ..., 1)."""
    H = np.asarray(H, float)
    lam = 2 * np.ones(len(H))
    h = bl.hypergradient(
        bl.Problem(bowl, distance, jnp.asarray(H)),
        jnp.asarray(lam),
        jnp.zeros(len(H)) if start is None else start,
        engine=engine,
        throw=False,
    )
    w = np.linalg.solve(H, lam)
    return h, np.linalg.solve(H, w - np.arange(1.0, len(H) + 1))


@pytest.mark.parametrize(
    "engine",
    [bl.Implicit(), bl.Implicit(bl.Neumann(max_steps=200)), bl.Implicit(bl.Dense())],
    ids=["cg", "neumann", "dense"],
)
@pytest.mark.parametrize(
    "H",
    [2 * np.eye(3), np.diag([1.0, 2.0, 3.0]), np.array([[2.0]])],
    ids=["isotropic", "diagonal", "scalar"],
)
def test_solves_that_end_in_one_or_few_steps(H, engine):
    """Betty: NaN on an isotropic H. BOAT, hypertorch: CG returns the iterate before the last (zero after one
    step). TorchOpt: a scalar gets zero steps and a zero gradient; its Neumann series at the default step is
    twice too large on 2 I.
    """
    h, truth = solved(H, engine)
    assert int(h.info.status) == bl.Status.OK
    np.testing.assert_allclose(h.grad, truth, rtol=1e-6, atol=1e-9)


def test_an_indefinite_system_is_a_status():
    """jaxopt: (inf, inf, NaN) or a number; SciPy and lineax: a success, at a point that is no minimiser."""
    saddle = jnp.array([2.0, -2 / 0.3, 1.0])
    h, _ = solved(np.diag([1.0, -0.3, 2.0]), bl.Implicit(), start=saddle)
    assert int(h.info.status) == bl.Status.INDEFINITE


def test_a_neumann_step_too_long_is_a_status():
    """Betty, TorchOpt, hypertorch: 1e13 times too large at a step of 3/L."""
    h, _ = solved(np.diag([0.5, 1.0, 2.0]), bl.Implicit(bl.Neumann(step=1.5)))
    assert int(h.info.status) == bl.Status.DIVERGED


@pytest.mark.parametrize(
    "solver",
    [bl.GradientDescent(max_steps=10), bl.LBFGS(max_steps=3)],
    ids=["gradient descent", "lbfgs"],
)
def test_an_unconverged_inner_solve_is_a_status_and_its_error_is_told(solver, seed):
    """jaxopt: 13 % and 38 % off, signs flipped, no flag; optimistix with throw=False 54 %."""
    rng = np.random.default_rng(seed)
    X, X_val = rng.normal(size=(2, 60, 20)) * np.logspace(0, -1, 20)
    y, y_val = (A @ np.ones(20) + rng.normal(size=60) for A in (X, X_val))
    lam = np.full(20, 0.01)
    h = bl.hypergradient(
        bl.glm.ridge(X, y, X_val, y_val),
        jnp.asarray(lam),
        jnp.zeros(20),
        solver=solver,
        throw=False,
    )
    H = X.T @ X / 60 + np.diag(lam)
    w = np.linalg.solve(H, X.T @ y / 60)
    truth = -w * np.linalg.solve(H, X_val.T @ (X_val @ w - y_val) / 60)
    error = np.linalg.norm(h.grad - truth) / np.linalg.norm(h.grad)
    assert error > 0.01
    assert int(h.info.status) == bl.Status.MAX_STEPS
    np.testing.assert_allclose(h.info.error_estimate, error, rtol=0.02)


def test_an_adjoint_solve_cut_short_is_a_status():
    """jaxopt issue 466: CG gave its zero start, so a zero hypergradient; sparho then reports convergence."""
    h, truth = solved(np.diag([1.0, 10.0, 100.0]), bl.Implicit(bl.CG(max_steps=1)))
    assert int(h.info.status) == bl.Status.MAX_STEPS
    error = np.linalg.norm(h.grad - truth) / np.linalg.norm(h.grad)
    np.testing.assert_allclose(h.info.error_estimate, error, rtol=0.02)


def start_only(w, lam, batch):
    return 0.5 * jnp.sum((w - 1) ** 2)


def test_an_outer_variable_that_is_only_the_start_is_refused():
    """jaxopt, optimistix: the implicit derivative in the start is zero."""
    problem = bl.Problem(start_only, distance, inner_init=lambda lam, batch: lam)
    with pytest.raises(ValueError, match="Unrolled"):
        bl.hypergradient(problem, jnp.ones(2))


@pytest.mark.parametrize(
    ("rule", "right"),
    [
        (optax.adam(0.1), False),
        (optax.adam(0.1, eps_root=1e-12), True),
        (optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)), False),
    ],
    ids=["adam", "adam with eps_root", "clipping"],
)
def test_unrolling_through_a_square_root_at_zero(rule, right):
    """TorchOpt, higher and plain optax: NaN where a gradient entry (for clipping, all of them) is zero."""
    inner = lambda w, lam, batch: 0.5 * lam * w[0] ** 2
    outer = lambda w, lam, batch: jnp.sum((w - 1) ** 2)
    w = jnp.array([0.0 if not right else 1.0, 1.0])
    h = bl.hypergradient(
        bl.Problem(inner, outer),
        0.7,
        w,
        engine=bl.Unrolled(),
        solver=bl.OptaxSolver(rule, max_steps=3),
        throw=False,
    )
    if int(h.info.status) == bl.Status.OK:

        @jax.numpy_dtype_promotion("standard")  # for optax
        def trained(lam):
            v, state = w, rule.init(w)
            for _ in range(3):
                updates, state = rule.update(jax.grad(inner)(v, lam, None), state, v)
                v = optax.apply_updates(v, updates)
            return outer(v, lam, None)

        step = 1e-6
        expected = (trained(0.7 + step) - trained(0.7 - step)) / (2 * step)
        np.testing.assert_allclose(h.grad, expected, rtol=1e-5, atol=1e-9)
    else:
        assert not right and int(h.info.status) == bl.Status.NONFINITE


def shifted(w, lam, batch):
    return (w - lam) ** 2


def close(w, lam, batch):
    return 0.5 * (w - 1) ** 2


@pytest.mark.parametrize(
    "linear_solver", [bl.CG(), bl.Neumann(max_steps=200), bl.Dense(), bl.MINRES(), bl.GMRES()]
)
def test_a_variable_without_an_axis(linear_solver):
    """TorchOpt: RuntimeError from its Neumann series, and a zero gradient from CG."""
    engine = bl.Implicit(linear_solver)
    h = bl.hypergradient(bl.Problem(shifted, close), 3.0, 0.0, engine=engine)
    np.testing.assert_allclose(h.grad, 2.0, rtol=1e-8)


@pytest.mark.parametrize("engine", ["implicit", "unrolled"])
def test_a_fixed_point_iteration_that_diverges_is_a_status(engine):
    """hypertorch: values of -1e9 without a notice."""
    problem = bl.Problem(bl.Mapping(lambda w, lam, batch: 3 * w + lam), distance)
    args = (problem, jnp.ones(2), jnp.zeros(2))
    h = bl.hypergradient(*args, engine=engine, solver=bl.FixedPoint(max_steps=50), throw=False)
    assert int(h.info.status) != bl.Status.OK


def ridge_of_rows(w, lam, batch):
    X, y = batch
    return 0.5 * jnp.mean((X @ w - y) ** 2) + 0.5 * lam * jnp.sum(w**2)


def error_of_rows(w, lam, batch):
    return ridge_of_rows(w, 0.0, batch)


def test_implicit_means_implicit_on_minibatches_too(seed):
    """jaxopt: `OptaxSolver(implicit_diff=True).run_iterator` unrolls its steps instead."""
    rng = np.random.default_rng([seed, 5])
    X = rng.normal(size=(40, 3))
    y = X @ np.ones(3) + rng.normal(size=40)
    problem = bl.Problem(ridge_of_rows, error_of_rows, (X, y), (X, y), batch_size=(10, None))
    h = bl.hypergradient(problem, 0.5, jnp.zeros(3))
    X_batch, y_batch = problem.inner_sampler(jax.random.key(0))(0)
    H = X_batch.T @ X_batch / 10 + 0.5 * np.eye(3)
    w = np.linalg.solve(H, X_batch.T @ y_batch / 10)
    truth = -w @ np.linalg.solve(H, X.T @ (X @ w - y) / 40)
    np.testing.assert_allclose(h.grad, truth, rtol=1e-6)


def test_a_pass_over_the_rows_takes_each_once(key):
    """benchmark_bilevel: the last batch of each permutation comes twice."""
    rows = np.arange(12.0)
    problem = shuffled(bl.Problem(shifted, close, rows, rows, batch_size=3), key)
    sampler = problem.inner_sampler(key)
    drawn = np.concatenate([sampler(step) for step in range(4)])
    np.testing.assert_array_equal(np.sort(drawn), rows)


def test_a_penalty_above_the_largest_that_matters_is_told_by_its_margin(seed):
    """sparho: "converged" at the start. The derivative is zero there; the margin says how far that holds."""
    rng = np.random.default_rng([seed, 6])
    X = rng.normal(size=(30, 4))
    y = X @ np.ones(4)
    prox = lambda v, step, lam: bl.prox.l1(v, step, lam)
    problem = bl.Problem(error_of_rows, error_of_rows, (X, y), (X, y), inner_prox=prox)
    largest = np.abs(X.T @ y / 30).max()
    h = bl.hypergradient(problem, 3 * largest, jnp.zeros(4))
    assert h.grad == 0 and not np.any(h.w)
    np.testing.assert_allclose(h.info.margin, 2 * largest, rtol=0.05)


def test_an_implicit_solution_has_forward_derivatives():
    """jaxopt: TypeError; and the derivative of `state.value` is zero."""
    solve = lambda lam: lam**2 / 2
    solution = bl.implicit(solve, lambda w, lam: 2 * w - lam**2)
    value = lambda lam: (solution(lam) - 1) ** 2
    for derivative in (jax.grad, jax.jacfwd):
        np.testing.assert_allclose(derivative(value)(3.0), 2 * (4.5 - 1) * 3.0, rtol=1e-9)


def test_half_precision_is_worked_in_and_told():
    """optimistix: NotImplementedError from BFGS in bfloat16."""
    H = jnp.diag(jnp.array([1.0, 2.0, 4.0], jnp.bfloat16))
    lam = jnp.full(3, 2, jnp.bfloat16)
    target = jnp.arange(1, 4, dtype=jnp.bfloat16)
    outer = lambda w, lam, batch: 0.5 * jnp.sum((w - target) ** 2)
    h = bl.hypergradient(bl.Problem(bowl, outer, H), lam, jnp.zeros_like(lam), throw=False)
    truth = np.array([1.0, -0.5, -0.625])
    error = np.linalg.norm(np.asarray(h.grad, float) - truth) / np.linalg.norm(truth)
    assert h.grad.dtype == jnp.bfloat16
    assert int(h.info.status) != bl.Status.OK or error <= 3 * float(h.info.error_estimate) < 0.5


def test_losses_with_other_arguments_are_refused():
    """jaxopt: keyword-only or `**kwargs` objectives fail inside."""

    def keywords(**kwargs):
        return jnp.sum(kwargs["w"] ** 2)

    with pytest.raises(TypeError, match=r"the inner loss must take \(w, lam, batch\)"):
        bl.hypergradient(bl.Problem(keywords, distance), jnp.ones(2), jnp.zeros(2))


def test_one_step_is_right_for_vectors():
    """gradhpo: every entry of T1-T2 is the sum of all."""
    h, _ = solved(np.diag([1.0, 2.0, 4.0]), bl.OneStep(0.25))
    w = np.array([2.0, 1.0, 0.5])
    np.testing.assert_allclose(h.grad, 0.25 * (w - np.arange(1.0, 4.0)), rtol=1e-6)


def test_the_hessian_is_not_materialised():
    """optimistix at its default: 13 GB for a network of 16.6 thousand weights."""
    width = 128
    shapes = {"a": (width, 1), "b": (width, width), "c": (1, width)}

    def network(w, x):
        return (w["c"] @ jnp.tanh(w["b"] @ jnp.tanh(w["a"] @ x)))[0]

    def inner(w, lam, batch):
        fit = 0.5 * jnp.mean((network(w, batch) - jnp.sin(3 * batch[0])) ** 2)
        return fit + 0.5 * lam * sum(jnp.sum(leaf**2) for leaf in w.values())

    def outer(w, lam, batch):
        return 0.5 * jnp.mean((network(w, batch) - jnp.sin(3 * batch[0])) ** 2)

    w = {name: jnp.ones(shape) for name, shape in shapes.items()}
    problem = bl.Problem(inner, outer, jnp.zeros((1, 32)), jnp.zeros((1, 32)))
    solver = bl.GradientDescent(learning_rate=0.1, max_steps=5)
    call = lambda w, lam: bl.hypergradient(problem, lam, w, solver=solver, throw=False)
    compiled = jax.jit(call).lower(w, jnp.array(0.1)).compile()
    size = sum(8 * np.prod(shape) for shape in shapes.values())
    assert compiled.memory_analysis().temp_size_in_bytes < 100 * size
