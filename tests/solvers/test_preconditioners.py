"""Nystrom's approximate inverse, and preconditioners by the iterations they save."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from linear_cases import CG_SOLVER, INDEFINITE, SPD, draw, dtypes, solve, solve_all, true_residual

from solvers import CG, Jacobi, Nystrom, NystromPreconditioner, Status

OUTLIERS = [*np.linspace(1, 2, 90), *np.logspace(2, 4, 10)]
LOW_RANK = [*[0.0] * 15, 1.0, 2.0, 3.0, 4.0, 5.0]


@dtypes
def test_nystrom_of_low_rank_is_the_damped_inverse(dtype, seed):
    matrix, _, b = draw(seed, LOW_RANK)
    x, info = solve(Nystrom(rank=8, damping=0.1), matrix, b, dtype=dtype)
    inverse = np.linalg.inv(matrix + 0.1 * np.eye(len(LOW_RANK)))
    atol = 1e-11 if dtype == jnp.float64 else 1e-4
    np.testing.assert_allclose(x, inverse @ b, rtol=0, atol=atol)
    assert info.status == Status.OK and info.num_steps == 8
    expected = true_residual(matrix, b, x, dtype)
    assert expected > 0.5  # most of b is outside the range, and the report does not hide it
    np.testing.assert_allclose(info.residual, expected, rtol=1e-5)
    # Another damping is another number of the same program; in the range a small one does no harm.
    x, info = solve(Nystrom(rank=8, damping=1e-9), matrix, matrix @ b)
    np.testing.assert_allclose(x, np.linalg.pinv(matrix) @ matrix @ b, rtol=0, atol=1e-5)
    assert info.residual < 1e-8


def test_nystrom_gets_better_with_the_rank(seed):
    matrix, _, b = draw(seed, np.logspace(-6, 1, 40))
    exact = np.linalg.solve(matrix + 0.1 * np.eye(40), b)
    errors = []
    for rank in (2, 20, 40, 100):
        x, info = solve(Nystrom(rank=rank, damping=0.1), matrix, b)
        # Where more is left than x = 0 leaves, it is no approximate inverse.
        useless = info.residual > 1
        assert useless == (rank == 2) and info.num_steps == min(rank, 40)
        assert info.status == (Status.MAX_STEPS if useless else Status.OK)
        errors.append(np.linalg.norm(x - exact) / np.linalg.norm(exact))
    assert errors[0] > 3 * errors[1] > 1e-4 and max(errors[2:]) < 1e-12


@dtypes
def test_nystrom_verdicts(dtype, seed):
    solver = Nystrom(rank=6, damping=1e-3)
    matrix, _, b = draw(seed, INDEFINITE)
    _, info = solve(solver, matrix, b, dtype=dtype)
    assert info.status == Status.INDEFINITE
    np.testing.assert_allclose(info.curvature, INDEFINITE[0], rtol=1e-5)
    matrix, _, b = draw(seed, SPD)
    x, info = solve(solver, matrix, np.zeros(6), b, dtype=dtype)
    assert info.status == Status.OK and info.num_steps == 0 and info.residual == 0
    np.testing.assert_array_equal(x, 0)
    for scale in (1e-30, 1e30):
        x, info = solve(solver, matrix, scale * b, dtype=dtype)
        assert info.status == Status.OK
        np.testing.assert_allclose(
            x / scale, np.linalg.solve(matrix + 1e-3 * np.eye(6), b), rtol=0, atol=1e-4
        )
    _, info = solve(solver, matrix, np.nan * b, dtype=dtype)
    assert info.status == Status.NONFINITE
    _, info = solve(solver, np.nan * matrix, b, dtype=dtype)
    assert info.status == Status.NONFINITE


PRECONDITIONERS = {
    "jacobi": Jacobi(),
    "nystrom": NystromPreconditioner(rank=3),
    "function": lambda r: r / 2,
}


@pytest.mark.parametrize("name", [*PRECONDITIONERS, "approximate inverse"])
def test_vmap_over_matrices_equals_the_loop(name, seed):
    solver = (
        Nystrom(rank=4) if name not in PRECONDITIONERS else CG(preconditioner=PRECONDITIONERS[name])
    )
    drawn = [draw(seed + i, spectrum) for i, spectrum in enumerate([SPD, [2.0] * 6, LOW_RANK[-6:]])]
    matrices = np.stack([matrix for matrix, _, _ in drawn])
    rhs = np.stack([b for _, _, b in drawn])
    rhs[2] = matrices[2] @ rhs[2]
    xs, infos = solve_all(solver, jnp.asarray(matrices), jnp.asarray(rhs))
    for i, (matrix, b) in enumerate(zip(matrices, rhs, strict=True)):
        x, info = solve(solver, matrix, b)
        assert info.status == infos.status[i]
        assert (info.status == Status.OK) == (info.residual <= 1)
        np.testing.assert_allclose(xs[i], x, rtol=1e-8, atol=1e-8)


def scaled_matrix(seed, dim, orders):
    """D M D with a well-conditioned M, and a D over this many orders of magnitude."""
    core, _, b = draw(seed, np.linspace(1, 3, dim))
    scales = np.logspace(-orders / 2, orders / 2, dim)
    return scales[:, None] * core * scales, scales, b


def test_jacobi_saves_steps_where_variables_differ_in_scale(seed):
    matrix, _, b = scaled_matrix(seed, 100, 3)
    _, plain = solve(CG_SOLVER, matrix, b)
    steps = {}
    for name, preconditioner in {
        "exact": Jacobi(num_probes=100),
        "given": Jacobi(diagonal=jnp.asarray(np.diag(matrix))),
        "estimated": Jacobi(),
        "function": lambda r: r / np.diag(matrix),
    }.items():
        x, info = solve(CG(preconditioner=preconditioner), matrix, b)
        assert info.status == Status.OK
        assert true_residual(matrix, b, x) < 1e-10
        steps[name] = int(info.num_steps)
    assert steps["exact"] == steps["given"] == steps["function"]
    assert steps["exact"] < 40 and steps["estimated"] < 150 < 3 * 150 < plain.num_steps


@dtypes
def test_nystrom_saves_steps_where_a_few_eigenvalues_stand_out(dtype, seed):
    matrix, _, b = draw(seed, OUTLIERS)
    steps = []
    for preconditioner in (None, NystromPreconditioner(rank=5), NystromPreconditioner(rank=15)):
        x, info = solve(CG(preconditioner=preconditioner), matrix, b, dtype=dtype)
        assert info.status == Status.OK
        np.testing.assert_allclose(
            x, np.linalg.solve(matrix, b), rtol=0, atol=1e-8 if dtype == jnp.float64 else 1e-2
        )
        steps.append(int(info.num_steps))
    assert steps[2] < 0.4 * steps[0] and steps[2] < steps[1] < steps[0]


def test_nystrom_preconditioner_is_the_formula(key, seed):
    """Exact eigenvectors: the k largest come down to the smallest of them; too large a rank: no harm."""
    matrix, vectors, b = draw(seed, LOW_RANK)
    preconditioner = NystromPreconditioner(rank=8)

    @jax.jit
    def apply(matrix, r):
        state = preconditioner.init(lambda v: matrix @ v, r, key)
        return preconditioner.apply(state, r)

    weights = np.array([1 / value if value > 0 else 1.0 for value in LOW_RANK])
    expected = vectors @ (weights * (vectors.T @ b))
    np.testing.assert_allclose(apply(jnp.asarray(matrix), jnp.asarray(b)), expected, atol=1e-10)
    full, _, _ = draw(seed, LOW_RANK[-5:] * 4)
    assert np.isfinite(apply(jnp.zeros_like(full), jnp.asarray(b))).all()


def test_jacobi_estimate_is_positive_and_right_where_the_diagonal_dominates(key, seed):
    rng = np.random.default_rng(seed)
    weak = rng.normal(size=(50, 50)) * 0.01
    matrix = np.diag(np.logspace(0, 3, 50)) + weak + weak.T
    diagonal = eqx.filter_jit(
        lambda jacobi, a: jacobi.init(lambda v: a @ v, jnp.zeros(a.shape[0]), key)
    )
    np.testing.assert_allclose(diagonal(Jacobi(), jnp.asarray(matrix)), np.diag(matrix), rtol=0.05)
    dense = rng.normal(size=(50, 50))
    indefinite = dense + dense.T
    assert (np.asarray(diagonal(Jacobi(num_probes=2), jnp.asarray(indefinite))) > 0).all()
    assert (np.asarray(diagonal(Jacobi(num_probes=50), jnp.asarray(indefinite))) > 0).all()
    assert (np.asarray(diagonal(Jacobi(num_probes=50), jnp.zeros((50, 50)))) == 1).all()


@pytest.mark.parametrize("preconditioner", [Jacobi(), NystromPreconditioner(rank=2)])
def test_preconditioner_is_made_once_for_many_right_hand_sides_of_any_tree(preconditioner, seed):
    matrix, _, b = draw(seed, SPD)
    matrix = jnp.asarray(matrix)
    rhs = {"a": jnp.asarray(b[:4]), "b": (jnp.asarray(b[4:], jnp.float32),)}
    solver = CG(preconditioner=preconditioner, rtol=1e-5)

    def matvec(v):
        image = matrix @ jnp.concatenate([v["a"], v["b"][0].astype(jnp.float64)])
        return {"a": image[:4], "b": (image[4:].astype(jnp.float32),)}

    @jax.jit
    def run(rhs):
        key = jax.random.key(0)
        state = solver.init(matvec, rhs, key)
        x0 = jax.tree.map(jnp.zeros_like, rhs)
        both = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), rhs)
        return jax.vmap(lambda b: solver.solve(matvec, b, x0, state, key))(both)

    x, info = run(rhs)
    assert (info.status == Status.OK).all()
    assert x["a"].dtype == jnp.float64 and x["b"][0].dtype == jnp.float32
    flat = np.concatenate([x["a"], x["b"][0]], axis=1)
    expected = np.linalg.solve(matrix, b)
    np.testing.assert_allclose(flat, [expected, 2 * expected], rtol=0, atol=1e-3)
