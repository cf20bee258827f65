"""WorkingSet: the Lasso of coordinate descent, whatever the size, the restriction or the start."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import Lasso

from solvers import Objective, ProximalGradient, Status, WorkingSet, loops, prox
from solvers.separable import coupling
from solvers.types import constant_sampler

ROWS, DIM = 40, 200


def squares(w, penalty, batch):
    X, y = batch
    return 0.5 * jnp.mean((X @ w - y) ** 2)


def l1(v, step, penalty):
    return prox.l1(v, step, penalty)


def columns(penalty, batch, indices):
    return penalty[indices], (batch[0][:, indices], batch[1])


def first_penalties(penalty, batch, indices):
    return penalty[: indices.size], (batch[0][:, indices], batch[1])


@eqx.filter_jit
def run(solver, penalty, w, batch, restrict=columns, state=None):
    objective = Objective(squares, penalty, prox=l1, restrict=restrict)
    if state is None:
        state = solver.init(objective, w, batch)
    else:
        state = solver.restart(objective, w, state, batch)
    return loops.solve(solver, objective, w, state, constant_sampler(batch))


def draw(seed):
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(ROWS, DIM)) * np.geomspace(0.2, 2, DIM)
    return X, X[:, ::50].sum(1) + 0.3 * rng.normal(size=ROWS), 0.2 + 0.1 * rng.random(DIM)


def reference(X, y, penalty):
    """Coordinate descent in `v_j = penalty_j w_j`."""
    model = Lasso(alpha=1.0, fit_intercept=False, tol=1e-15, max_iter=10**6)
    return model.fit(X / penalty, y).coef_ / penalty


def solve(X, y, penalty, size=20, start=0.0, tol=1e-10, restrict=columns, state=None, **settings):
    solver = WorkingSet(size, ProximalGradient(20_000), tol=tol, **settings)
    batch = jnp.asarray(X), jnp.asarray(y)
    w = jnp.full(DIM, start, batch[0].dtype)
    return run(solver, jnp.asarray(penalty), w, batch, restrict, state)


def test_weighted_lasso_is_that_of_coordinate_descent(seed):
    X, y, penalty = draw(seed)
    w, state, info = solve(X, y, penalty)
    expected = reference(X, y, penalty)
    assert 2 <= np.count_nonzero(expected) <= 17
    assert info.status == Status.OK and info.residual <= 1e-10
    assert 2 <= info.num_steps < 15  # one round would be the whole problem
    assert not state.whole
    np.testing.assert_allclose(w, expected, atol=1e-8)
    np.testing.assert_array_equal(np.asarray(w) == 0, expected == 0)
    gradient = X.T @ (X @ w - y) / ROWS
    by_hand = np.where(
        w == 0, np.maximum(np.abs(gradient) - penalty, 0), gradient + penalty * np.sign(w)
    )
    np.testing.assert_allclose(info.residual, np.linalg.norm(by_hand), atol=1e-13)
    np.testing.assert_allclose(info.value, 0.5 * np.mean((X @ w - y) ** 2), rtol=1e-12)
    again, _, info = run(
        WorkingSet(20, ProximalGradient(20_000), tol=1e-10), jnp.asarray(penalty * 0.9), w,
        (jnp.asarray(X), jnp.asarray(y)), columns, state,
    )  # fmt: skip
    assert info.status == Status.OK and 1 <= info.num_steps < 10
    np.testing.assert_allclose(again, reference(X, y, penalty * 0.9), atol=1e-8)


@pytest.mark.parametrize("size", [2, DIM, DIM + 1])
def test_more_support_than_size_and_no_more_coordinates_than_size(size, seed):
    X, y, penalty = draw(seed)
    w, _, info = solve(X, y, penalty, size)
    assert info.status == Status.OK and info.residual <= 1e-10
    np.testing.assert_allclose(w, reference(X, y, penalty), atol=1e-8)
    assert info.num_steps <= (3 if size < DIM else 1)


def test_what_is_not_zero_stays_in_though_others_are_further_off(seed):
    X, y, _ = draw(seed)
    start, penalty = np.zeros(DIM), np.full(DIM, 0.01)
    start[:5] = np.linalg.lstsq(X[:, :5], y)[0]
    gradient = X.T @ (X @ start - y) / ROWS
    assert np.count_nonzero(np.abs(gradient) > 0.05) > 8 > 5 == np.count_nonzero(start)
    w, _, info = solve(X, y, penalty, 8, start=start, max_steps=1)
    assert info.num_steps == 1 and np.count_nonzero(w) == 8 and np.all(w[:5] != 0)


def test_from_a_dense_start(seed):
    X, y, penalty = draw(seed)
    w, _, info = solve(X, y, penalty, start=1.0)
    assert info.status == Status.OK and info.num_steps == 1
    np.testing.assert_allclose(w, reference(X, y, penalty), atol=1e-8)


def test_a_restriction_to_another_problem_gives_the_right_answer_all_the_same(seed):
    X, y, penalty = draw(seed)
    penalty = np.where(np.arange(DIM) % 2, 5.0, penalty)
    w, state, info = solve(X, y, penalty, restrict=first_penalties)
    assert info.status == Status.OK and state.whole
    np.testing.assert_allclose(w, reference(X, y, penalty), atol=1e-8)


def test_vmap_over_penalties_and_float32(seed):
    X, y, penalty = draw(seed)
    many = jnp.asarray([penalty, 1.5 * penalty, 0.3 * penalty])
    w, _, info = jax.vmap(lambda p: solve(X, y, p))(many)
    for row, own in zip(w, many, strict=True):
        np.testing.assert_allclose(row, reference(X, y, np.asarray(own)), atol=1e-8)
    assert np.all(info.status == Status.OK)
    single = lambda x: np.asarray(x, np.float32)
    rough, state, info = solve(single(X), single(y), single(penalty), tol=1e-5)
    assert rough.dtype == state.residual.dtype == info.residual.dtype == jnp.float32
    assert info.status == Status.OK and not state.whole
    np.testing.assert_allclose(rough, w[0], atol=1e-4)
    # More than float32 allows.
    X, y, penalty = draw(0)
    *_, info = solve(single(X), single(100 * y), single(300 * penalty), tol=1e-12)
    assert info.status == Status.OK and info.num_steps < 20


def test_budgets_and_nan_are_statuses(seed):
    X, y, penalty = draw(seed)
    assert solve(X, y, penalty, max_steps=1)[2].status == Status.MAX_STEPS
    assert solve(X, y, penalty, tol=0.0, max_steps=1)[2].status == Status.OK
    X[0, 0] = np.nan
    assert solve(X, y, penalty)[2].status == Status.NONFINITE


def test_what_cannot_be_restricted_is_refused(seed):
    X, y, penalty = draw(seed)
    with pytest.raises(TypeError, match="must be a ProximalGradient"):
        WorkingSet(solver="lbfgs")
    with pytest.raises(ValueError, match="inner_restrict="):
        solve(X, y, penalty, restrict=None)
    with pytest.raises(ValueError, match="inner_restrict must take"):
        solve(X, y, penalty, restrict=lambda penalty, batch, i: (penalty, batch))
    with pytest.raises(ValueError, match="inner_restrict must take"):
        solve(X, y, penalty, restrict=lambda penalty, batch: (penalty, batch))
    solver, batch = WorkingSet(8), (jnp.asarray(X), jnp.asarray(y))
    with pytest.raises(ValueError, match=r"one array \(d,\)"):
        run(solver, jnp.asarray(penalty), {"w": jnp.zeros(DIM)}, batch)
    with pytest.raises(ValueError, match="inner_prox="):
        solver.init(Objective(squares, restrict=columns), jnp.zeros(DIM), batch)
    for coupled in (lambda v, s, a: prox.group_lasso(v, s, 0.1), lambda v, s, a: prox.simplex(v)):
        with pytest.raises(ValueError, match="acts on each coordinate by itself"):
            solver.init(Objective(squares, prox=coupled, restrict=columns), jnp.zeros(DIM), batch)


def test_which_maps_act_on_each_entry_by_itself():
    v, numbers = jnp.ones(6), jnp.ones(6)
    apart = {
        "l1": lambda v: prox.l1(v, 0.1, jnp.sum(numbers)),
        "elastic net": lambda v: prox.elastic_net(v, 0.1, 0.2, numbers),
        "box": lambda v: prox.box(v, -1.0, numbers),
        "jit": jax.jit(jax.nn.relu),
        "entry by entry": lambda v: jax.lax.map(lambda x: 2 * x, v),
    }
    together = {
        "group": lambda v: prox.group_lasso(v, 0.1, 0.2),
        "groups": lambda v: prox.group_lasso(v, 0.1, 0.2, np.arange(6) // 2),
        "sparse group": lambda v: prox.sparse_group_lasso(v, 0.1, 0.1, 0.2),
        "simplex": prox.simplex,
        "jit": jax.jit(lambda v: v / jnp.linalg.norm(v)),
        "branch": lambda v: jax.lax.cond(numbers[0] > 0, lambda v: v * v.sum(), lambda v: v, v),
    }
    assert [name for name, fn in apart.items() if coupling(fn, v) is not None] == []
    assert [name for name, fn in together.items() if coupling(fn, v) is None] == []
