"""The inner solvers through `solvers.loops.solve`, on problems solved by NumPy."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from solvers import (
    LBFGS,
    GradientDescent,
    JaxoptSolver,
    Newton,
    Objective,
    OptaxSolver,
    ProximalGradient,
    Sampler,
    Status,
)
from solvers import loops as solver_loops
from solvers.types import constant_sampler

ROWS, DIM, TOL = 30, 4, 1e-8

# Budgets long enough; `build(max_steps, tol)`.
SOLVERS = {
    "gd": lambda steps, tol: GradientDescent(1.0, max_steps=steps, tol=tol),
    "gd_auto": lambda steps, tol: GradientDescent(max_steps=steps, tol=tol),
    "heavy_ball": lambda steps, tol: GradientDescent(1.0, momentum=0.5, max_steps=steps, tol=tol),
    "nesterov": lambda steps, tol: GradientDescent(
        1.0, momentum=0.5, nesterov=True, max_steps=steps, tol=tol
    ),
    "lbfgs": lambda steps, tol: LBFGS(max_steps=steps, tol=tol),
    "newton": lambda steps, tol: Newton(max_steps=steps, tol=tol),
    "fista": lambda steps, tol: ProximalGradient(max_steps=steps, tol=tol),
    "prox_plain": lambda steps, tol: ProximalGradient(
        steps, tol, learning_rate=1.0, accelerate=False
    ),
    "optax": lambda steps, tol: OptaxSolver(optax.sgd(1.0, momentum=0.5), max_steps=steps, tol=tol),
    "jaxopt": lambda steps, tol: JaxoptSolver(
        "LBFGS", max_steps=steps, tol=tol, options={"linesearch": "zoom", "maxls": 10}
    ),
}
ENOUGH = 500
names = pytest.mark.parametrize("name", SOLVERS)


def loss(w, args, batch):
    """l2-regularised logistic loss of a nested `w`, in float64 whatever its leaves are."""
    x, y = batch
    weight = w["layers"][0].astype(jnp.float64)
    bias = w["bias"].astype(jnp.float64)
    logits = x @ weight + bias
    penalty = 0.5 * args * (weight @ weight + bias**2)
    return jnp.mean(jax.nn.softplus(-y * logits)) + penalty


def start(dtype=jnp.float64, values=None):
    values = np.zeros(DIM + 1) if values is None else values
    return {"layers": [jnp.asarray(values[:DIM])], "bias": jnp.asarray(values[DIM], dtype)}


def flat(w):
    return np.concatenate([np.asarray(w["layers"][0]), [np.float64(w["bias"])]])


def draw(seed):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(ROWS, DIM))
    y = np.sign(x @ rng.normal(size=DIM) + 0.5 * rng.normal(size=ROWS))
    return x, y


def design(x):
    return np.concatenate([x, np.ones((len(x), 1))], axis=1)


def gradient(x, y, reg, w):
    x = design(x)
    return -x.T @ (y / (1 + np.exp(y * (x @ w)))) / len(y) + reg * w


def solution(x, y, reg):
    """Newton's method in NumPy; from zero with this much l2 it needs no line search."""
    w = np.zeros(DIM + 1)
    for _ in range(50):
        p = 1 / (1 + np.exp(-(design(x) @ w)))
        hessian = design(x).T * (p * (1 - p)) @ design(x) / len(y) + reg * np.eye(DIM + 1)
        w = w - np.linalg.solve(hessian, gradient(x, y, reg, w))
    assert np.linalg.norm(gradient(x, y, reg, w)) < 1e-13
    return w


# One program for each solver, budget and kind of `w`: data, start and tolerance are arguments.
@eqx.filter_jit
def run(solver, w, reg, batch):
    objective = Objective(loss, reg)
    state = solver.init(objective, w, batch)
    return solver_loops.solve(solver, objective, w, state, constant_sampler(batch))


def solve(name, steps, tol, w, reg, batch):
    x, y = batch
    solver = SOLVERS[name](steps, tol)
    w, state, info = run(solver, w, jnp.asarray(reg), (jnp.asarray(x), jnp.asarray(y)))
    assert all(field.shape == () for field in info)
    return w, state, info


@names
def test_converges_to_the_numpy_solution(name, seed):
    x, y = draw(seed)
    expected = solution(x, y, 0.1)
    w, _, info = solve(name, ENOUGH, TOL, start(), 0.1, (x, y))
    assert info.status == Status.OK and info.residual <= TOL
    assert 0 < info.num_steps < ENOUGH
    np.testing.assert_allclose(flat(w), expected, rtol=0, atol=TOL / 0.1)
    true = np.linalg.norm(gradient(x, y, 0.1, flat(w)))
    np.testing.assert_allclose(info.residual, true, rtol=1e-4, atol=1e-14)
    np.testing.assert_allclose(info.value, loss(w, jnp.asarray(0.1), (x, y)), rtol=1e-12)


# jaxopt's LBFGS refuses a tree of several dtypes.
@pytest.mark.parametrize("name", ["gd_auto", "heavy_ball", "nesterov", "lbfgs", "newton", "optax"])
def test_tree_of_two_precisions(name, seed):
    x, y = draw(seed)
    tol = 1e-5
    w, _, info = solve(name, ENOUGH, tol, start(jnp.float32), 0.1, (x, y))
    assert w["layers"][0].dtype == jnp.float64 and w["bias"].dtype == jnp.float32
    assert info.status == Status.OK and info.residual <= tol
    np.testing.assert_allclose(flat(w), solution(x, y, 0.1), rtol=0, atol=tol / 0.1)


@names
def test_start_at_the_solution_takes_no_step(name, seed):
    x, y = draw(seed)
    expected = solution(x, y, 0.1)
    w, _, info = solve(name, ENOUGH, TOL, start(values=expected), 0.1, (x, y))
    assert info.num_steps == 0 and info.status == Status.OK
    np.testing.assert_array_equal(flat(w), expected)


@pytest.mark.parametrize("where", ["x", "y"])
@names
def test_nan_in_the_data(name, where, seed):
    x, y = draw(seed)
    (x if where == "x" else y)[3] = np.nan
    _, _, info = solve(name, ENOUGH, TOL, start(), 0.1, (x, y))
    assert info.status == Status.NONFINITE
    assert info.num_steps <= 1


@names
def test_budget_too_small(name, seed):
    _, _, info = solve(name, 2, TOL, start(), 0.1, draw(seed))
    assert info.status == Status.MAX_STEPS and info.num_steps == 2
    assert info.residual > TOL


@names
def test_zero_tolerance_is_a_fixed_budget(name, seed):
    x, y = draw(seed)
    w, _, info = solve(name, 2, 0.0, start(), 0.1, (x, y))
    assert info.status == Status.OK and info.num_steps == 2
    assert info.residual > TOL
    true = np.linalg.norm(gradient(x, y, 0.1, flat(w)))
    np.testing.assert_allclose(info.residual, true, rtol=1e-9)


def test_default_tolerance_follows_the_precision():
    assert solver_loops.tolerance(LBFGS(), start()) == 1e-8
    assert solver_loops.tolerance(LBFGS(), start(jnp.float32)) == 1e-4
    assert solver_loops.tolerance(LBFGS(tol=0.5), start()) == 0.5


def test_changing_minibatches_run_the_whole_budget(seed):
    x, y = draw(seed)
    halves = (jnp.asarray(x).reshape(2, -1, DIM), jnp.asarray(y).reshape(2, -1))
    sampler = Sampler(lambda step: jax.tree.map(lambda h: h[step % 2], halves), varies=True)
    objective = Objective(loss, jnp.asarray(0.1))
    solver = GradientDescent(0.3, max_steps=5)

    @jax.jit
    def steps(w):
        state = solver.init(objective, w, sampler(0))
        return solver_loops.solve(solver, objective, w, state, sampler)

    w, _, info = steps(start())
    assert info.num_steps == 5 and info.status == Status.OK
    expected = np.zeros(DIM + 1)
    for k in range(5):
        half = slice(0, ROWS // 2) if k % 2 == 0 else slice(ROWS // 2, ROWS)
        expected = expected - 0.3 * gradient(x[half], y[half], 0.1, expected)
    np.testing.assert_allclose(flat(w), expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_trajectory_equals_a_loop_in_numpy(nesterov, seed):
    x, y = draw(seed)
    batch = (jnp.asarray(x), jnp.asarray(y))
    objective = Objective(loss, jnp.asarray(0.1))
    solver = GradientDescent(0.7, momentum=0.9, nesterov=nesterov)
    w = start(values=np.linspace(-1, 1, DIM + 1))
    state = solver.init(objective, w, batch)
    step = eqx.filter_jit(solver.step)
    expected, velocity = flat(w), np.zeros(DIM + 1)
    for _ in range(5):
        g = gradient(x, y, 0.1, expected)
        velocity = 0.9 * velocity + g
        expected = expected - 0.7 * (0.9 * velocity + g if nesterov else velocity)
        w, state = step(objective, w, state, batch)
        np.testing.assert_allclose(flat(w), expected, rtol=1e-11, atol=1e-13)
        np.testing.assert_allclose(state.residual, np.linalg.norm(g), rtol=1e-10)  # lagged


def test_automatic_rate_is_the_inverse_curvature(seed):
    x, y = draw(seed)
    objective = Objective(loss, jnp.asarray(0.1))
    state = jax.jit(lambda w: GradientDescent().init(objective, w, (x, y)))(start())
    hessian = design(x).T @ design(x) / (4 * ROWS) + 0.1 * np.eye(DIM + 1)
    largest = np.linalg.eigvalsh(hessian)[-1]
    np.testing.assert_allclose(state.learning_rate, 1 / (1.05 * largest), rtol=1e-9)


def test_lbfgs_restart_with_memory_saves_steps(seed):
    rng = np.random.default_rng(seed)
    dim = 8
    factor, _ = np.linalg.qr(rng.normal(size=(dim, dim)))
    matrix = jnp.asarray(factor * np.logspace(0, 1.5, dim) @ factor.T)
    b = rng.normal(size=dim)
    nearby = b + 0.01 * rng.normal(size=dim)
    solver = LBFGS(max_steps=500, tol=1e-8)

    def quadratic(w, args, batch):
        return 0.5 * w @ (matrix @ w) - args @ w

    @jax.jit
    def first(b):
        objective = Objective(quadratic, b)
        w = jnp.zeros(dim)
        return solver_loops.solve(
            solver, objective, w, solver.init(objective, w, None), constant_sampler(None)
        )

    @eqx.filter_jit
    def second(w, state, b):
        objective = Objective(quadratic, b)
        sampler = constant_sampler(None)
        states = (solver.restart(objective, w, state, None), solver.init(objective, w, None))
        return [solver_loops.solve(solver, objective, w, s, sampler) for s in states]

    w, state, info = first(jnp.asarray(b))
    assert info.status == Status.OK
    (warm, _, warm_info), (cold, _, cold_info) = second(w, state, jnp.asarray(nearby))
    assert warm_info.status == Status.OK and cold_info.status == Status.OK
    assert 0 < warm_info.num_steps < cold_info.num_steps
    expected = np.linalg.solve(matrix, nearby)
    np.testing.assert_allclose(warm, expected, rtol=0, atol=1e-7)
    np.testing.assert_allclose(cold, expected, rtol=0, atol=1e-7)
    # Pairs that are not numbers are dropped: the restart is then a fresh start.
    broken = state._replace(steps=state.steps * jnp.nan)
    (_, _, healed), (_, _, cold_info) = second(w, broken, jnp.asarray(nearby))
    assert healed.status == Status.OK and healed.num_steps == cold_info.num_steps


def _quadratic(w, args, batch):
    matrix, b = batch
    return 0.5 * w @ (matrix @ w) - b @ w


@pytest.mark.parametrize("condition", [1e2, 1e4, 1e6])
def test_lbfgs_reaches_a_tolerance_far_below_what_values_resolve(condition, seed):
    """A gradient of 1e-8 moves the value by less than its rounding error."""
    dim, solver = 8, LBFGS(max_steps=500, tol=1e-8)

    @jax.jit
    def run(matrix, b):
        objective, w, batch = Objective(_quadratic, None), jnp.zeros(dim), (matrix, b)
        state = solver.init(objective, w, batch)
        return solver_loops.solve(solver, objective, w, state, constant_sampler(batch))

    for draw_seed in range(seed, seed + 8):
        rng = np.random.default_rng(draw_seed)
        factor, _ = np.linalg.qr(rng.normal(size=(dim, dim)))
        matrix = factor * np.geomspace(1, condition, dim) @ factor.T
        b = 3 * rng.normal(size=dim)
        w, _, info = run(jnp.asarray(matrix), jnp.asarray(b))
        assert info.status == Status.OK
        assert np.linalg.norm(matrix @ np.asarray(w) - b) < 2e-8


def test_checkpointing_changes_memory_and_nothing_else(seed):
    """107 steps in base 10 (2 levels), 4 (3), 3 (4), 2 (6); 9 levels are cut to 6."""
    rng, steps = np.random.default_rng(seed), 107
    x, y = jnp.asarray(rng.normal(size=(200, DIM))), jnp.asarray(np.sign(rng.normal(size=200)))
    solver = GradientDescent(0.3, momentum=0.8)

    def compiled(levels):
        def outer(reg):
            objective = Objective(loss, reg)
            w = start()
            state = solver.init(objective, w, (x, y))
            # A step that is left out, run twice or out of order gets another weight.
            sampler = Sampler(lambda i: (x, y * (1 + jnp.sin(i))), varies=True)
            w, _ = solver_loops.run_steps(
                solver, objective, w, state, sampler, steps, start=3, levels=levels
            )
            return jnp.sum(w["layers"][0] ** 2) + w["bias"]

        return jax.jit(jax.value_and_grad(outer)).lower(jnp.asarray(0.1)).compile()

    programs = {levels: compiled(levels) for levels in (0, 1, 2, 3, 9)}
    value, derivative = programs[0](jnp.asarray(0.1))
    assert abs(derivative) > 1e-3
    memory = {}
    for levels, program in programs.items():
        same_value, same_derivative = program(jnp.asarray(0.1))
        np.testing.assert_allclose(same_value, value, rtol=1e-12)
        np.testing.assert_allclose(same_derivative, derivative, rtol=1e-12)
        memory[levels] = program.memory_analysis().temp_size_in_bytes
    assert memory[2] < memory[1] < memory[0] and memory[2] < memory[0] / 2


def test_far_out_nothing_counts_as_rounding():
    """An iteration that diverges: values, of which rounding is a fraction, grow as the square of gradients."""
    objective = Objective(lambda w, lam, batch: 0.5 * jnp.sum(w**2), None)
    solver = GradientDescent(3.0, max_steps=60)  # w <- -2 w
    w = jnp.ones(DIM)
    state = solver.init(objective, w, None)
    w, _, info = solver_loops.solve(solver, objective, w, state, constant_sampler(None))
    assert jnp.all(jnp.abs(w) > 1e17)
    assert info.status == Status.MAX_STEPS


@pytest.mark.parametrize("name", SOLVERS)
def test_a_blank_state_is_like_the_first_and_measures_nothing(name):
    """What `restart` ignores is zeros; where it carries something over, it is the state of `init`."""
    solver = SOLVERS[name](3, TOL)
    loss = lambda w, args, batch: jnp.sum((w - 1.0) ** 2)
    objective, w = Objective(loss), jnp.arange(3.0)
    first = jax.jit(lambda w: solver.init(objective, w, None))(w)
    blank = jax.jit(lambda w: solver.blank(objective, w, None))(w)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), blank) == jax.tree.map(
        lambda x: (x.shape, x.dtype), first
    )
    expected = first if name in ("lbfgs", "optax") else jax.tree.map(jnp.zeros_like, first)
    jax.tree.map(np.testing.assert_array_equal, blank, expected)
