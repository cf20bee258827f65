"""Linear systems small enough to share one compiled program per solver and dtype."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from solvers import CG, GMRES, MINRES, Chebyshev, Dense, Neumann

DIM = 6
DTYPES = [jnp.float64, jnp.float32]
CG_SOLVER = CG()
# Both tolerances are leaves: every Neumann below with this budget shares one program per dtype.
SOLVERS = {
    "cg": CG_SOLVER,
    "minres": MINRES(),
    "gmres": GMRES(),
    "chebyshev": Chebyshev(),
    "neumann": Neumann(max_steps=400, rtol=1e-6),
    "dense": Dense(),
}
# An indefinite matrix is no failure for these.
ANY_SIGN = ("minres", "gmres")

solver_names = pytest.mark.parametrize("name", SOLVERS)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["float64", "float32"])


def solve_plain(solver, matrix, b, x0):
    def matvec(v):
        return matrix @ v

    key = jax.random.key(0)
    state = solver.init(matvec, b, key)
    return solver.solve(matvec, b, x0, state, key)


# One program for each solver and dtype: matrix, right-hand side and start are arguments.
solve_jit = eqx.filter_jit(solve_plain)
solve_all = eqx.filter_jit(
    lambda solver, matrices, rhs: jax.vmap(
        lambda matrix, b: solve_plain(solver, matrix, b, jnp.zeros_like(b))
    )(matrices, rhs)
)


def solve(solver, matrix, b, x0=None, dtype=jnp.float64):
    matrix, b = jnp.asarray(matrix, dtype), jnp.asarray(b, dtype)
    x0 = jnp.zeros_like(b) if x0 is None else jnp.asarray(x0, dtype)
    x, info = solve_jit(solver, matrix, b, x0)
    assert x.dtype == dtype
    assert all(field.shape == () for field in info)
    assert info.num_steps.dtype == jnp.int32 and info.status.dtype == jnp.int32
    return np.asarray(x), info


def draw(seed, eigenvalues):
    """A symmetric matrix of that spectrum, its eigenvectors and a right-hand side."""
    rng = np.random.default_rng(seed)
    dim = len(eigenvalues)
    vectors, _ = np.linalg.qr(rng.normal(size=(dim, dim)))
    matrix = vectors * np.asarray(eigenvalues, float) @ vectors.T
    return (matrix + matrix.T) / 2, vectors, rng.normal(size=dim)


SPD = [0.5, 0.8, 1.0, 1.7, 2.5, 3.0]
SINGULAR = [0.0, 0.0, 0.7, 1.0, 2.0, 3.0]
INDEFINITE = [-1.5, -0.5, 0.7, 1.0, 2.0, 3.0]


def true_residual(matrix, b, x, dtype=np.float64):
    """In the precision of the solver's data, but computed in float64."""
    matrix, b = np.asarray(matrix, dtype).astype(float), np.asarray(b, dtype).astype(float)
    return np.linalg.norm(b - matrix @ x.astype(float)) / np.linalg.norm(b)
