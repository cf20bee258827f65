"""Chebyshev: what it does with a good, a poor and a wrong interval."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from linear_cases import DIM, SOLVERS, SPD, draw, solve, true_residual

from solvers import Chebyshev, Status
from solvers.linear.chebyshev import _Interval

LOW, HIGH, DIMENSION = 0.5, 3.0, 20
SPECTRUM = np.linspace(LOW, HIGH, DIMENSION)


def first_kind(degree, x):
    return np.polynomial.chebyshev.Chebyshev.basis(degree)(x)


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_the_residual_is_a_chebyshev_polynomial_of_the_matrix(steps, seed):
    matrix, vectors, b = draw(seed, SPD)
    low, high = 0.4, 3.5
    x, info = solve(Chebyshev(mu=low, L=high, rtol=0.0, max_steps=steps), matrix, b)
    at = lambda value: first_kind(steps, (high + low - 2 * value) / (high - low))
    residual = vectors @ (at(np.array(SPD)) / at(0.0) * (vectors.T @ b))
    np.testing.assert_allclose(b - matrix @ x, residual, rtol=0, atol=1e-12)
    assert info.num_steps == steps and info.status == Status.OK
    assert info.residual <= 1 / at(0.0)


@pytest.mark.parametrize(
    ("mu", "L", "most"),
    [(LOW, HIGH, 30), (1.5, HIGH, 90), (2.0, 2.0, 90), (LOW, 2.7, 120), (HIGH, LOW, 30)],
    ids=["right", "mu too large", "a point", "L a little too small", "exchanged"],
)
def test_converges_where_no_eigenvalue_is_above_the_sum_of_the_bounds(mu, L, most, seed):
    matrix, _, b = draw(seed, SPECTRUM)
    x, info = solve(Chebyshev(mu=mu, L=L), matrix, b)
    assert info.status == Status.OK and info.num_steps <= most
    np.testing.assert_allclose(x, np.linalg.solve(matrix, b), rtol=0, atol=1e-9)
    assert LOW - 1e-4 <= info.curvature <= HIGH and info.largest <= HIGH + 1e-4


@pytest.mark.parametrize("L", [2.0, 1.0])
def test_an_eigenvalue_above_the_sum_of_the_bounds_is_diverged(L, seed):
    matrix, _, b = draw(seed, SPECTRUM)
    x, info = solve(Chebyshev(mu=LOW, L=L), matrix, b)
    assert info.status == Status.DIVERGED and info.num_steps < 100
    assert info.residual <= 1  # the best point met
    np.testing.assert_allclose(info.residual, true_residual(matrix, b, x), rtol=1e-9)
    # An automatic L that small (say, as Lanczos started badly) is doubled until it is not.
    state = _Interval(jnp.asarray(LOW), jnp.asarray(L), jnp.asarray(jnp.nan))
    run = jax.jit(
        lambda a, b: Chebyshev().solve(lambda v: a @ v, b, 0 * b, state, jax.random.key(0))
    )
    x, info = run(jnp.asarray(matrix), jnp.asarray(b))
    assert info.status == Status.OK
    np.testing.assert_allclose(x, np.linalg.solve(matrix, b), rtol=0, atol=1e-9)


def test_negative_curvature_is_told_from_a_wrong_bound(seed):
    eigenvalues = [-0.3, 0.5, 1.0, 1.7, 2.5, 3.0]
    matrix, vectors, _ = draw(seed, eigenvalues)
    _, info = solve(Chebyshev(mu=LOW, L=HIGH), matrix, vectors @ np.ones(DIM))
    assert info.status == Status.INDEFINITE
    assert -0.3 - 1e-9 <= info.curvature < 0


def test_automatic_bounds_need_few_steps_more_than_the_true_ones(seed):
    eigenvalues = np.logspace(-2, 0, 60)
    matrix, _, b = draw(seed, eigenvalues)
    x, automatic = solve(SOLVERS["chebyshev"], matrix, b)
    _, told = solve(Chebyshev(mu=1e-2, L=1.0), matrix, b)
    assert automatic.status == Status.OK and told.status == Status.OK
    np.testing.assert_allclose(x, np.linalg.solve(matrix, b), rtol=0, atol=1e-7)
    assert automatic.num_steps < 2 * told.num_steps
    _, short = solve(Chebyshev(mu=1e-2, L=1.0, rtol=0.0, max_steps=60), matrix, b)
    rate = (1 - 0.1) / (1 + 0.1)  # with sqrt(mu / L) = 0.1
    assert short.residual <= 2 * rate**60
