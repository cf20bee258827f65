"""Proximal operators against what defines them: no point is better than the one returned."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from solvers import prox
from solvers.kinks import kink_distance

GROUPS = np.array([0, 1, 0, 2, 2, 1])
WEIGHTS = np.array([0.3, 0.0, 0.7, 0.2, 0.5, 0.1])
DIM, STEP = 6, 0.8


def norms(w, weights):
    return sum(weight * np.linalg.norm(w[g == GROUPS]) for g, weight in enumerate(weights))


# Each operator with its penalty psi, infinite outside of the constraints.
CASES = {
    "l1": (lambda v: prox.l1(v, STEP, 0.4), lambda w: 0.4 * np.abs(w).sum()),
    "weighted l1": (lambda v: prox.l1(v, STEP, WEIGHTS), lambda w: WEIGHTS @ np.abs(w)),
    "elastic net": (
        lambda v: prox.elastic_net(v, STEP, WEIGHTS, WEIGHTS[::-1]),
        lambda w: WEIGHTS @ np.abs(w) + WEIGHTS[::-1] @ w**2 / 2,
    ),
    "one group": (lambda v: prox.group_lasso(v, STEP, 0.9), lambda w: 0.9 * np.linalg.norm(w)),
    "groups": (
        lambda v: prox.group_lasso(v, STEP, 0.6, GROUPS),
        lambda w: norms(w, [0.6, 0.6, 0.6]),
    ),
    "weighted groups": (
        lambda v: prox.group_lasso(v, STEP, np.array([0.2, 0.0, 3.0]), GROUPS),
        lambda w: norms(w, [0.2, 0.0, 3.0]),
    ),
    "sparse groups": (
        lambda v: prox.sparse_group_lasso(v, STEP, WEIGHTS, 0.4, GROUPS),
        lambda w: WEIGHTS @ np.abs(w) + norms(w, [0.4, 0.4, 0.4]),
    ),
    "box": (
        lambda v: prox.box(v, -WEIGHTS, 0.5),
        lambda w: 0.0 if np.all((w >= -WEIGHTS) & (w <= 0.5)) else np.inf,
    ),
    "non-negative": (prox.non_negative, lambda w: 0.0 if np.all(w >= 0) else np.inf),
    "simplex": (
        lambda v: prox.simplex(v, 1.5),
        lambda w: 0.0 if np.all(w >= 0) and abs(w.sum() - 1.5) < 1e-9 else np.inf,
    ),
}
CASES = {name: (jax.jit(operator), psi) for name, (operator, psi) in CASES.items()}
each = pytest.mark.parametrize("name", CASES)


def distance(operator, v):
    return jax.jit(lambda v: kink_distance(operator, v))(np.asarray(v))


def feasible(name, rng):
    """A random competitor, inside the constraints where there are any."""
    w = rng.normal(size=DIM)
    if name == "box":
        return -WEIGHTS + (0.5 + WEIGHTS) * rng.uniform(size=DIM)
    if name == "simplex":
        return 1.5 * rng.dirichlet(np.full(DIM, 0.5))
    return np.abs(w) if name == "non-negative" else w


@each
def test_minimises_what_it_says(name, seed):
    operator, psi = CASES[name]
    rng = np.random.default_rng(seed)
    for _ in range(20):
        v = rng.normal(size=DIM)
        w = np.asarray(operator(v))
        best = STEP * psi(w) + 0.5 * np.sum((w - v) ** 2)
        assert np.isfinite(best)
        for _ in range(30):
            other = feasible(name, rng)
            # Convexity: points close by, on the way to the competitor, are the sharp test.
            for t in (1.0, 0.1, 1e-3):
                z = w + t * (other - w)
                if name in ("box", "non-negative", "simplex"):  # rounding on the way
                    value = 0.5 * np.sum((z - v) ** 2)
                else:
                    value = STEP * psi(z) + 0.5 * np.sum((z - v) ** 2)
                assert best <= value + 1e-12


@each
def test_jacobian_is_that_of_a_prox(name, seed):
    """Symmetric, eigenvalues in [0, 1], equal to differences."""
    operator, _ = CASES[name]
    rng = np.random.default_rng(seed + 1)
    v = rng.normal(size=DIM)
    jacobian = np.asarray(jax.jit(jax.jacobian(operator))(v))
    np.testing.assert_allclose(jacobian, jacobian.T, atol=1e-14)
    assert -1e-12 < np.linalg.eigvalsh(jacobian)[0] <= np.linalg.eigvalsh(jacobian)[-1] < 1 + 1e-12
    h, direction = 1e-6, rng.normal(size=DIM)
    numeric = (operator(v + h * direction) - operator(v - h * direction)) / (2 * h)
    np.testing.assert_allclose(jacobian @ direction, numeric, atol=1e-8)


@each
def test_nan_dtype_and_the_origin(name):
    operator, _ = CASES[name]
    v = jnp.linspace(-1.0, 1.0, DIM)
    assert np.isnan(operator(v.at[2].set(jnp.nan))).any()
    assert operator(v.astype(jnp.float32)).dtype == jnp.float32
    assert np.isfinite(jax.jit(jax.jacobian(operator))(np.zeros(DIM))).all()


def test_trees_and_penalties_like_them():
    v = {"a": jnp.array([1.0, -0.3]), "b": jnp.array([[2.0, -2.0]], jnp.float32)}
    one = prox.l1(v, 0.5, 1.0)
    np.testing.assert_allclose(one["a"], [0.5, 0.0])
    each_own = prox.l1(v, 0.5, {"a": jnp.array([0.2, 0.0]), "b": 2.0})
    np.testing.assert_allclose(each_own["a"], [0.9, -0.3])
    np.testing.assert_allclose(each_own["b"], [[1.0, -1.0]])
    grouped = prox.group_lasso(v, 1.0, {"a": 10.0, "b": 0.0})
    assert not np.any(grouped["a"])
    np.testing.assert_array_equal(grouped["b"], v["b"])
    rows = prox.simplex(jnp.array([[0.2, 0.8], [3.0, 1.0]]), 1.0)
    np.testing.assert_allclose(rows, [[0.2, 0.8], [1.0, 0.0]], atol=1e-15)
    with pytest.raises(ValueError, match="a penalty must be a number or a tree like"):
        prox.l1(v, 0.5, [1.0, 1.0])
    for groups in (GROUPS[:2], GROUPS / 1.0):
        with pytest.raises(ValueError, match="groups must be integers"):
            prox.group_lasso(jnp.zeros(DIM), 1.0, 1.0, groups)
    with pytest.raises(ValueError, match="one for each group"):
        prox.group_lasso(jnp.zeros(DIM), 1.0, jnp.zeros(2), GROUPS)


@pytest.mark.parametrize(
    "v, expected", [([1.3, -0.2], 0.3), ([1.05, 4.0], 0.05), ([1.0, 3.0], 0.0)]
)
def test_distance_to_a_kink_of_the_soft_threshold(v, expected):
    found = distance(lambda v: prox.l1(v, 1.0, 1.0), v)
    np.testing.assert_allclose(found, expected, rtol=0.03, atol=1e-12)


def test_distance_to_a_kink_of_other_maps():
    v = jnp.array([0.5, 0.2, -3.0])
    found = distance(lambda v: prox.box(v, 0.0, 1.0), v)
    np.testing.assert_allclose(found, 0.2, rtol=0.03)
    assert np.isinf(distance(lambda v: 3 * v, v))
    # Norm 1 is the kink; moving every entry by t moves the norm by at most t sqrt(3).
    group = jnp.array([0.7, 0.7, 0.5])
    found = distance(lambda v: prox.group_lasso(v, 1.0, 1.0), group)
    away = np.linalg.norm(group) - 1
    assert away / 3 < found < 3 * away
    simplex = distance(lambda v: prox.simplex(v), jnp.array([0.9, 0.2, 0.03]))
    assert 0 < simplex < 0.1


@pytest.mark.parametrize(
    "operator",
    [
        lambda v: prox.l1(v, STEP, -1e-3),
        lambda v: prox.elastic_net(v, STEP, 0.1, -1.3),
        lambda v: prox.group_lasso(v, STEP, -1e-3),
        lambda v: prox.sparse_group_lasso(v, STEP, 0.1, jnp.array([0.1, -0.1, 0.2]), GROUPS),
        lambda v: prox.box(v, 0.1, 0.0),
        lambda v: prox.simplex(v, -1e-3),
    ],
)
def test_what_no_convex_term_has_is_nan(operator):
    """The formulas go on below zero, and would give a plausible point of no problem."""
    assert np.isnan(operator(jnp.linspace(-1.0, 2.0, DIM))).any()
