"""The linear solvers against NumPy, and the status each kind of system earns."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from linear_cases import (
    ANY_SIGN,
    CG_SOLVER,
    DIM,
    INDEFINITE,
    SINGULAR,
    SOLVERS,
    SPD,
    draw,
    dtypes,
    solve,
    solve_all,
    solver_names,
    true_residual,
)

from solvers import CG, GMRES, MINRES, Chebyshev, Neumann, Status
from solvers.linear.spectrum import largest_eigenvalue, ritz_values


@dtypes
@solver_names
def test_definite_system_matches_numpy(name, dtype, seed):
    matrix, _, b = draw(seed, SPD)
    x, info = solve(SOLVERS[name], matrix, b, dtype=dtype)
    bound = {"neumann": 1e-6, "dense": 1e-13}.get(name, 1e-10) if dtype == jnp.float64 else 1e-5
    np.testing.assert_allclose(x, np.linalg.solve(matrix, b), rtol=0, atol=20 * bound + 1e-11)
    assert info.status == Status.OK
    assert info.residual <= bound
    if name in ("cg", "minres", "gmres"):
        assert 0 < info.num_steps <= (DIM + 1 if dtype == jnp.float64 else 2 * DIM)


@dtypes
@solver_names
def test_reported_residual_is_the_true_one(name, dtype, seed):
    matrix, _, b = draw(seed, SPD)
    x, info = solve(SOLVERS[name], matrix, b, dtype=dtype)
    eps = float(jnp.finfo(dtype).eps)
    expected = true_residual(matrix, b, x, dtype)
    np.testing.assert_allclose(info.residual, expected, rtol=1e-6, atol=50 * eps)


@pytest.mark.parametrize("cls", [CG, MINRES, GMRES, Chebyshev, Neumann])
def test_residual_of_an_unfinished_solve_is_the_true_one(cls, seed):
    matrix, _, b = draw(seed, SPD)
    x, info = solve(cls(max_steps=2, rtol=1e-6), matrix, b)
    assert info.num_steps == 2 and info.residual > 1e-4
    np.testing.assert_allclose(info.residual, true_residual(matrix, b, x), rtol=1e-10)
    assert info.status == Status.MAX_STEPS
    # Zero tolerances ask for the whole budget, so that a residual left is no failure.
    again, info = solve(cls(max_steps=2, rtol=0.0), matrix, b)
    assert info.status == Status.OK and info.num_steps == 2
    np.testing.assert_array_equal(again, x)


@dtypes
def test_isotropic_system_takes_one_step_of_cg(dtype, seed):
    _, _, b = draw(seed, SPD)
    x, info = solve(CG_SOLVER, 3.0 * np.eye(DIM), b, dtype=dtype)
    assert info.num_steps == 1 and info.status == Status.OK
    np.testing.assert_allclose(x, b / 3, rtol=10 * float(jnp.finfo(dtype).eps))
    np.testing.assert_allclose(info.curvature, 3.0, rtol=10 * float(jnp.finfo(dtype).eps))


@dtypes
@solver_names
def test_zero_right_hand_side(name, dtype, seed):
    matrix, _, start = draw(seed, SPD)
    x, info = solve(SOLVERS[name], matrix, np.zeros(DIM), start, dtype=dtype)
    assert info.status == Status.OK and info.num_steps == 0 and info.residual == 0
    np.testing.assert_array_equal(x, 0)


@dtypes
@pytest.mark.parametrize("scale", [1e-35, 1e-18, 1e30])
@solver_names
def test_size_of_the_right_hand_side_does_not_matter(name, scale, dtype, seed):
    """The square of each scale is out of the range of float32."""
    matrix, _, b = draw(seed, SPD)
    x, info = solve(SOLVERS[name], matrix, scale * b, scale * np.ones(DIM), dtype=dtype)
    assert info.status == Status.OK
    lost = float(jnp.finfo(dtype).tiny) / scale  # smaller entries are no floating-point numbers
    np.testing.assert_allclose(x / scale, np.linalg.solve(matrix, b), rtol=0, atol=1e-4 + lost)
    assert 0 < info.residual < 1e-5


@dtypes
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@solver_names
def test_nonfinite_right_hand_side(name, bad, dtype, seed):
    matrix, _, b = draw(seed, SPD)
    b[2] = bad
    _, info = solve(SOLVERS[name], matrix, b, dtype=dtype)
    assert info.status == Status.NONFINITE


@solver_names
def test_nonfinite_matrix(name, seed):
    matrix, _, b = draw(seed, SPD)
    matrix[1, 1] = np.nan
    _, info = solve(SOLVERS[name], matrix, b)
    assert info.status == Status.NONFINITE


@dtypes
@solver_names
def test_indefinite_system(name, dtype, seed):
    matrix, vectors, _ = draw(seed, INDEFINITE)
    b = vectors @ np.ones(DIM)
    x, info = solve(SOLVERS[name], matrix, b, dtype=dtype)
    assert info.status == (Status.OK if name in ANY_SIGN else Status.INDEFINITE)
    if name in ANY_SIGN:
        np.testing.assert_allclose(x, np.linalg.solve(matrix, b), atol=1e-4)
    assert info.curvature < -0.1
    assert info.curvature >= INDEFINITE[0] - 1e-4


@dtypes
@solver_names
def test_singular_but_consistent_system(name, dtype, seed):
    matrix, _, z = draw(seed, SINGULAR)
    b = matrix @ z
    x, info = solve(SOLVERS[name], matrix, b, dtype=dtype)
    assert info.status == Status.OK
    # From a zero start all give the solution of least norm.
    atol = {"neumann": 1e-4, "dense": 1e-11}.get(name, 1e-8) if dtype == jnp.float64 else 1e-3
    np.testing.assert_allclose(x, np.linalg.pinv(matrix) @ b, rtol=0, atol=atol)


@dtypes
@solver_names
def test_right_hand_side_outside_the_range(name, dtype, seed):
    matrix, vectors, _ = draw(seed, SINGULAR)
    _, info = solve(SOLVERS[name], matrix, vectors @ np.ones(DIM), dtype=dtype)
    assert float(info.residual) >= 0.9 * np.sqrt(2 / DIM)
    assert info.status == Status.BREAKDOWN


def test_neumann_step_too_long_diverges(seed):
    matrix, _, b = draw(seed, SPD)
    x, info = solve(Neumann(max_steps=400, step=3 / max(SPD)), matrix, b)
    assert info.status == Status.DIVERGED
    assert info.num_steps < 100 and np.isfinite(x).all()


def test_neumann_given_step_below_the_limit_converges(seed):
    matrix, _, b = draw(seed, SPD)
    x, info = solve(Neumann(max_steps=400, step=1.9 / max(SPD)), matrix, b)
    assert info.status == Status.OK and info.num_steps == 400
    np.testing.assert_allclose(x, np.linalg.solve(matrix, b), rtol=0, atol=1e-10)


@pytest.mark.parametrize("terms", [1, 7])
def test_neumann_is_the_truncated_series(terms, seed):
    matrix, _, b = draw(seed, SPD)
    x, info = solve(Neumann(max_steps=terms), matrix, b)
    step = 1 / (1.05 * np.linalg.eigvalsh(matrix)[-1])  # Lanczos is exact in six dimensions
    term, series = b.copy(), np.zeros(DIM)
    for _ in range(terms):
        series += step * term
        term = term - step * matrix @ term
    np.testing.assert_allclose(x, series, rtol=1e-11, atol=1e-13)
    assert info.num_steps == terms and info.status == Status.OK
    np.testing.assert_allclose(info.residual, np.linalg.norm(term) / np.linalg.norm(b), rtol=1e-9)


@dtypes
@pytest.mark.parametrize("name", ["cg", "minres", "gmres", "chebyshev"])
def test_from_the_solution_no_step_is_taken(name, dtype, seed):
    matrix, _, b = draw(seed, SPD)
    solution, _ = solve(SOLVERS[name], matrix, b, dtype=dtype)
    x, info = solve(SOLVERS[name], matrix, b, solution, dtype=dtype)
    assert info.num_steps == 0 and info.status == Status.OK
    if name != "chebyshev":
        assert np.isnan(info.curvature)  # no direction was tried
    np.testing.assert_array_equal(x, solution)


@pytest.mark.parametrize("name", ["cg", "minres", "gmres", "chebyshev"])
def test_from_another_start_the_solution_is_found(name, seed):
    matrix, _, b = draw(seed, SPD)
    x, info = solve(SOLVERS[name], matrix, b, 100 * b[::-1])
    assert info.status == Status.OK
    np.testing.assert_allclose(x, np.linalg.solve(matrix, b), rtol=0, atol=1e-8)


@pytest.mark.parametrize(("eps_off", "steps"), [(15, 0), (40, 1)])
def test_a_residual_within_rounding_of_the_product_ends_cg(eps_off, steps):
    eps = float(jnp.finfo(jnp.float32).eps)
    b = np.ones(4)
    _, info = solve(CG(rtol=1e-6), np.eye(4), b, (1 - eps_off * eps) * b, dtype=jnp.float32)
    assert info.status == Status.OK and info.num_steps == steps
    np.testing.assert_allclose(info.residual, 0 if steps else eps_off * eps, rtol=0.1, atol=eps)


def test_atol_stops_early(seed):
    matrix, _, b = draw(seed, SPD)
    x, info = solve(CG(atol=0.3), matrix, b / np.linalg.norm(b))
    assert info.status == Status.OK and 0 < info.num_steps < DIM
    assert 1e-6 < true_residual(matrix, b / np.linalg.norm(b), x) <= 0.3


@dtypes
@pytest.mark.parametrize("eigenvalues", [SPD, SINGULAR, INDEFINITE], ids=["spd", "psd", "indef"])
def test_curvature_of_dense_is_the_smallest_eigenvalue(eigenvalues, dtype, seed):
    matrix, _, b = draw(seed, eigenvalues)
    _, info = solve(SOLVERS["dense"], matrix, b, dtype=dtype)
    np.testing.assert_allclose(
        info.curvature, eigenvalues[0], rtol=0, atol=50 * float(jnp.finfo(dtype).eps)
    )


@pytest.mark.parametrize("name", [name for name in SOLVERS if name != "dense"])
def test_curvature_lies_in_the_spectrum(name, seed):
    matrix, _, b = draw(seed, SPD)
    _, info = solve(SOLVERS[name], matrix, b)
    assert SPD[0] - 1e-9 <= info.curvature <= SPD[-1]


@solver_names
def test_vmap_over_matrices_equals_the_loop(name, seed):
    spectra = [SPD, SINGULAR, INDEFINITE, [2.0] * DIM]
    drawn = [draw(seed + i, spectrum) for i, spectrum in enumerate(spectra)]
    matrices = np.stack([matrix for matrix, _, _ in drawn])
    rhs = np.stack([vectors @ np.ones(DIM) for _, vectors, _ in drawn])
    solver = SOLVERS[name]
    xs, infos = solve_all(solver, jnp.asarray(matrices), jnp.asarray(rhs))
    indefinite = Status.OK if name in ANY_SIGN else Status.INDEFINITE
    expected = [Status.OK, Status.BREAKDOWN, indefinite, Status.OK]
    assert infos.status.tolist() == expected
    for i, (matrix, b) in enumerate(zip(matrices, rhs, strict=True)):
        x, info = solve(solver, matrix, b)
        assert info.status == infos.status[i]
        if expected[i] == Status.OK:
            assert abs(int(info.num_steps) - int(infos.num_steps[i])) <= 1
            np.testing.assert_allclose(xs[i], x, rtol=0, atol=1e-8)
            np.testing.assert_allclose(infos.curvature[i], info.curvature, rtol=1e-8)


@solver_names
def test_tree_of_two_precisions(name, seed):
    matrix, _, b = draw(seed, SPD)
    matrix = jnp.asarray(matrix)
    rhs = {"a": jnp.asarray(b[:4]), "b": (jnp.asarray(b[4:], jnp.float32),)}

    def matvec(v):
        image = matrix @ jnp.concatenate([v["a"], v["b"][0].astype(jnp.float64)])
        return {"a": image[:4], "b": (image[4:].astype(jnp.float32),)}

    @eqx.filter_jit
    def run(solver, rhs):
        key = jax.random.key(0)
        x0 = jax.tree.map(jnp.zeros_like, rhs)
        return solver.solve(matvec, rhs, x0, solver.init(matvec, rhs, key), key)

    x, info = run(SOLVERS[name], rhs)
    assert info.status == Status.OK
    assert x["a"].dtype == jnp.float64 and x["b"][0].dtype == jnp.float32
    flat = np.concatenate([x["a"], x["b"][0]])
    np.testing.assert_allclose(flat, np.linalg.solve(matrix, b), rtol=0, atol=1e-4)


ritz = jax.jit(
    lambda matrix, key: ritz_values(lambda v: matrix @ v, jnp.zeros(matrix.shape[0]), key)
)


def test_ritz_values_of_a_small_matrix_are_its_eigenvalues(key, seed):
    for eigenvalues in (SPD, INDEFINITE):
        matrix, _, _ = draw(seed, eigenvalues)
        values = ritz(jnp.asarray(matrix), key)
        np.testing.assert_allclose(values, np.linalg.eigvalsh(matrix), rtol=0, atol=1e-9)


def test_ritz_values_of_a_krylov_space_that_ends_early(key, seed):
    matrix, _, _ = draw(seed, [1.0, 1.0, 1.0, 4.0, 4.0, 4.0])
    values = np.asarray(ritz(jnp.asarray(matrix), key))
    np.testing.assert_allclose([values[0], values[-1]], [1.0, 4.0], rtol=1e-10)
    assert values.shape == (DIM,)


def test_ritz_values_of_a_large_matrix_lie_inside_the_spectrum(key, seed):
    rng = np.random.default_rng(seed)
    factor = rng.normal(size=(60, 60))
    matrix = factor @ factor.T / 60
    eigenvalues = np.linalg.eigvalsh(matrix)
    values = np.asarray(ritz(jnp.asarray(matrix), key))
    assert values.shape == (12,) and (np.diff(values) >= 0).all()
    assert eigenvalues[0] - 1e-12 <= values[0]
    assert eigenvalues[-1] / 1.05 <= values[-1] <= eigenvalues[-1] * (1 + 1e-12)


def test_largest_eigenvalue_is_a_magnitude(key):
    diagonal = jnp.asarray([-5.0, 1.0, 2.0])
    value = jax.jit(lambda k: largest_eigenvalue(lambda v: diagonal * v, jnp.zeros(3), k))(key)
    np.testing.assert_allclose(value, 5.0, rtol=1e-10)
