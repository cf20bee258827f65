"""MINRES and GMRES: systems that conjugate gradients refuse, and what they say of the matrix."""

import jax.numpy as jnp
import numpy as np
import pytest
from linear_cases import DIM, SOLVERS, SPD, draw, dtypes, solve, true_residual

from solvers import GMRES, MINRES, Status

LARGE = 60
FULL_GMRES = GMRES(restart=LARGE)
SOLVERS_OF_LARGE = {"minres": SOLVERS["minres"], "gmres": FULL_GMRES}
large_solvers = pytest.mark.parametrize("name", SOLVERS_OF_LARGE)

SPECTRA = {
    "one negative": [-0.3, *np.linspace(1, 100, LARGE - 1)],
    "both signs": [*np.linspace(-5, -0.1, LARGE // 2), *np.linspace(0.1, 5, LARGE // 2)],
    "ill-conditioned": [*-np.logspace(-3, 0, LARGE // 2), *np.logspace(-3, 0, LARGE // 2)],
}


@pytest.mark.parametrize("spectrum", SPECTRA)
@large_solvers
def test_indefinite_system_of_many_steps_matches_numpy(name, spectrum, seed):
    matrix, _, b = draw(seed, SPECTRA[spectrum])
    x, info = solve(SOLVERS_OF_LARGE[name], matrix, b)
    assert info.status == Status.OK and info.residual <= 1e-10
    np.testing.assert_allclose(info.residual, true_residual(matrix, b, x), rtol=1e-3, atol=1e-14)
    np.testing.assert_allclose(x, np.linalg.solve(matrix, b), rtol=0, atol=1e-5)
    assert min(SPECTRA[spectrum]) - 1e-9 <= info.curvature < 0
    # MINRES has no long memory, and pays for rounding in steps.
    assert info.num_steps <= (LARGE if name == "gmres" else 9 * LARGE)


@large_solvers
def test_definite_ill_conditioned_system_matches_numpy(name, seed):
    matrix, _, b = draw(seed, np.logspace(-5, 0, LARGE))
    x, info = solve(SOLVERS_OF_LARGE[name], matrix, b)
    assert info.status == Status.OK and info.residual <= 1e-10
    np.testing.assert_allclose(x, np.linalg.solve(matrix, b), rtol=0, atol=2e-5)
    assert 1e-5 * (1 - 1e-6) <= info.curvature <= 1


@dtypes
@large_solvers
def test_singular_indefinite_system(name, dtype, seed):
    """Consistent: the solution of least norm. Not consistent: BREAKDOWN, with `x` of sane size."""
    eigenvalues = [*[0.0] * 10, *np.linspace(-1, -0.1, 25), *np.linspace(0.1, 1, 25)]
    matrix, vectors, z = draw(seed, eigenvalues)
    x, info = solve(SOLVERS_OF_LARGE[name], matrix, matrix @ z, dtype=dtype)
    assert info.status == Status.OK and info.curvature < -0.1
    least = np.linalg.pinv(matrix, rcond=1e-6) @ matrix @ z
    np.testing.assert_allclose(x, least, rtol=0, atol=1e-8 if dtype == jnp.float64 else 1e-3)

    b = vectors @ np.ones(LARGE)
    x, info = solve(SOLVERS_OF_LARGE[name], matrix, b, dtype=dtype)
    assert info.status == Status.BREAKDOWN
    assert abs(float(info.residual) - np.sqrt(10 / LARGE)) < 1e-3
    assert np.linalg.norm(x) < 1e4


def test_minres_sees_a_negative_eigenvalue_as_soon_as_its_krylov_space_does(seed):
    """All three Lanczos diagonals are positive: only the Rayleigh quotient of a residual shows it."""
    diagonal = np.array([-0.1, 1.0, 2.0])
    x, info = solve(SOLVERS["minres"], np.diag(diagonal), np.array([0.3, 1.0, 1.0]))
    assert info.status == Status.OK
    np.testing.assert_allclose(x, np.array([0.3, 1.0, 1.0]) / diagonal, rtol=1e-10)
    assert -0.1 <= info.curvature < -0.01


def nonsymmetric(seed, dim):
    rng = np.random.default_rng(seed)
    return 2 * np.eye(dim) + 1.5 * rng.normal(size=(dim, dim)) / dim**0.5, rng.normal(size=dim)


@dtypes
@pytest.mark.parametrize("solver", [GMRES(), FULL_GMRES], ids=["restarted", "full"])
def test_gmres_of_a_nonsymmetric_system_matches_numpy(solver, dtype, seed):
    matrix, b = nonsymmetric(seed, LARGE)
    x, info = solve(solver, matrix, b, dtype=dtype)
    tol = 1e-10 if dtype == jnp.float64 else 1e-5
    assert info.status == Status.OK and info.residual <= tol
    np.testing.assert_allclose(x, np.linalg.solve(matrix, b), rtol=0, atol=50 * tol)
    np.testing.assert_allclose(
        info.residual, true_residual(matrix, b, x, dtype), rtol=1e-3, atol=1e-6
    )
    if solver is FULL_GMRES:
        assert info.num_steps <= LARGE
    else:
        assert info.num_steps > 20


@pytest.mark.parametrize("steps", [1, 4])
def test_gmres_has_the_smallest_residual_over_the_krylov_space(steps, seed):
    matrix, b = nonsymmetric(seed, DIM)
    _, info = solve(GMRES(max_steps=steps), matrix, b)
    krylov = np.stack([np.linalg.matrix_power(matrix, k) @ b for k in range(steps)], axis=1)
    y, *_ = np.linalg.lstsq(matrix @ krylov, b)
    least = np.linalg.norm(b - matrix @ krylov @ y) / np.linalg.norm(b)
    np.testing.assert_allclose(info.residual, least, rtol=1e-9)
    assert info.num_steps == steps


@pytest.mark.parametrize("steps", [1, 4])
def test_minres_has_the_smallest_residual_over_the_krylov_space(steps, seed):
    matrix, _, b = draw(seed, [-1.5, -0.5, 0.7, 1.0, 2.0, 3.0])
    _, info = solve(MINRES(max_steps=steps), matrix, b)
    krylov = np.stack([np.linalg.matrix_power(matrix, k) @ b for k in range(steps)], axis=1)
    y, *_ = np.linalg.lstsq(matrix @ krylov, b)
    least = np.linalg.norm(b - matrix @ krylov @ y) / np.linalg.norm(b)
    np.testing.assert_allclose(info.residual, least, rtol=1e-9)
    # The smallest Rayleigh quotient of the residuals, the last one's not among them, and Lanczos vectors.
    lanczos, _ = np.linalg.qr(krylov)
    tried = list(lanczos.T)
    for k in range(steps):
        y, *_ = np.linalg.lstsq(matrix @ krylov[:, :k], b) if k else (np.zeros(0),)
        tried.append(b - matrix @ krylov[:, :k] @ y)
    met = min(v @ matrix @ v / (v @ v) for v in tried)
    np.testing.assert_allclose(info.curvature, met, rtol=0, atol=1e-8)


def test_gmres_that_gains_nothing_stops():
    """A cyclic shift moves nothing towards b before the last dimension."""
    shift, b = np.roll(np.eye(LARGE), 1, axis=0), np.eye(LARGE)[0]
    _, info = solve(GMRES(), shift, b)
    assert info.status == Status.MAX_STEPS and info.num_steps == 20 and info.residual == 1
    x, info = solve(FULL_GMRES, shift, b)
    assert info.status == Status.OK and info.num_steps == LARGE
    np.testing.assert_allclose(shift @ x, b, atol=1e-14)


@dtypes
def test_gmres_of_a_singular_nonsymmetric_matrix(dtype, seed):
    rng = np.random.default_rng(seed)
    matrix = rng.normal(size=(DIM, 4)) @ rng.normal(size=(4, DIM))
    _, info = solve(SOLVERS["gmres"], matrix, matrix @ rng.normal(size=DIM), dtype=dtype)
    assert info.status == Status.OK
    _, info = solve(SOLVERS["gmres"], matrix, rng.normal(size=DIM), dtype=dtype)
    assert info.status == Status.BREAKDOWN
    nilpotent = np.diag(np.ones(DIM - 1), 1)
    _, info = solve(SOLVERS["gmres"], nilpotent, np.eye(DIM)[-1], dtype=dtype)
    assert info.status == Status.BREAKDOWN and info.residual == 1


def test_gmres_curvature_is_the_smallest_eigenvalue_of_the_symmetric_part(seed):
    matrix, b = nonsymmetric(seed, DIM)
    _, info = solve(SOLVERS["gmres"], matrix, b)
    np.testing.assert_allclose(
        info.curvature, np.linalg.eigvalsh((matrix + matrix.T) / 2)[0], rtol=1e-9
    )
    symmetric, _, b = draw(seed, SPD)
    _, info = solve(SOLVERS["gmres"], symmetric, b)
    np.testing.assert_allclose(info.curvature, SPD[0], rtol=1e-9)
