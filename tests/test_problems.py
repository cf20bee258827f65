"""The closed forms of `problems` against problems solved again and differenced."""

import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest
from jax.flatten_util import ravel_pytree


def minimise(fn, w, num_steps=1):
    """Newton's method on a JAX function of a pytree; one step is exact for a quadratic."""
    flat, unflatten = ravel_pytree(w)

    def loss(flat):
        return fn(unflatten(flat))

    def step(flat, _):
        return flat - jnp.linalg.solve(jax.hessian(loss)(flat), jax.grad(loss)(flat)), None

    return unflatten(jax.lax.scan(step, flat, None, length=num_steps)[0])


def numerical_gradient(value, lam, h=1e-4):
    """Differences of order 4 of a function of a pytree, all coordinates at once."""
    flat, unflatten = ravel_pytree(lam)
    shifts = h * jnp.eye(flat.size)
    values = jax.jit(jax.vmap(lambda shift: value(unflatten(flat + shift))))
    near, far = ((values(s * shifts) - values(-s * shifts)) / (2 * s * h) for s in (1, 2))
    return unflatten((4 * near - far) / 3)


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def assert_close(actual, expected, rtol=1e-7):
    actual, expected = flat(actual), flat(expected)
    assert actual.shape == expected.shape
    error = np.linalg.norm(actual - expected)
    assert error <= rtol * max(np.linalg.norm(expected), 1e-3)


@pytest.mark.parametrize("name", problems.FACTORIES)
def test_solution_and_hypergradient(name, seed):
    case = problems.make(name, seed)
    solution = case.solution(case.lam)
    assert jax.tree.structure(solution) == jax.tree.structure(case.w)
    start = jax.tree.map(jnp.asarray, solution)
    residual = jax.jit(jax.grad(case.inner))(start, case.lam, case.inner_data)
    assert flat(residual) == pytest.approx(0, abs=1e-12)

    def value(lam):
        w = minimise(lambda w: case.inner(w, lam, case.inner_data), start, num_steps=4)
        return case.outer(w, lam, case.outer_data)

    hypergradient = case.hypergradient(case.lam)
    assert jax.tree.structure(hypergradient) == jax.tree.structure(case.lam)
    assert_close(hypergradient, numerical_gradient(value, case.lam))


@pytest.mark.parametrize("name", problems.FACTORIES)
def test_float32(name, seed):
    case = problems.make(name, seed, jnp.float32)
    for loss, data in ((case.inner, case.inner_data), (case.outer, case.outer_data)):
        value, gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(case.w, case.lam, data)
        assert value.shape == ()
        assert {x.dtype for x in jax.tree.leaves((value, gradients))} == {jnp.dtype("float32")}
    assert {x.dtype for x in jax.tree.leaves(case.solution(case.lam))} == {np.dtype("float64")}
    exact = problems.make(name, seed)
    assert_close(case.hypergradient(case.lam), exact.hypergradient(exact.lam), rtol=1e-4)


def test_seeds():
    first, same, other = (problems.make("ridge", seed) for seed in (1, 1, 2))
    assert (first.inner_data["X"] == same.inner_data["X"]).all()
    assert (first.inner_data["X"] != other.inner_data["X"]).any()


@pytest.mark.parametrize("name", ["quadratic", "ridge", "softmax"])
def test_hessian_product(name, key):
    case = problems.make(name)
    keys = jax.random.split(key)
    w, v = (jax.random.normal(key, case.w.shape) for key in keys)
    gradient = lambda w: jax.grad(case.inner)(w, case.lam, case.inner_data)
    expected = jax.jit(lambda w, v: jax.jvp(gradient, (w,), (v,))[1])(w, v)
    assert_close(case.inner_hvp(w, case.lam, case.inner_data, v), expected, rtol=1e-12)


# The penalised forms of the quadratic, against penalised problems minimised by brute force.

PENALTY, GAMMA, NU = 3.0, 0.7, 0.2


def losses(case):
    def inner(w, lam):
        return case.inner(w, lam, case.inner_data)

    def outer(w, lam):
        return case.outer(w, lam, case.outer_data)

    return inner, outer


def value_penalty(case, lam):
    """min over w of f + penalty (g - min g), and its argmin."""
    g, f = losses(case)
    lowest = g(minimise(lambda w: g(w, lam), case.w), lam)
    penalised = lambda w: f(w, lam) + PENALTY * (g(w, lam) - lowest)
    w = minimise(penalised, case.w)
    return penalised(w), w


def moreau_penalty(case, lam):
    """min over w of f + penalty (g - v_gamma), and its argmin."""
    g, f = losses(case)

    def envelope(w):
        proximal = lambda z: g(z, lam) + jnp.sum((z - w) ** 2) / (2 * GAMMA)
        return proximal(minimise(proximal, case.w))

    penalised = lambda w: f(w, lam) + PENALTY * (g(w, lam) - envelope(w))
    w = minimise(penalised, case.w)
    return penalised(w), w


def central_penalty(case, lam):
    """(l(nu) - l(-nu)) / (2 nu), l(nu) = min over w of g + nu f, and the argmin at nu."""
    g, f = losses(case)

    def lowest(nu):
        shifted = lambda w: g(w, lam) + nu * f(w, lam)
        w = minimise(shifted, case.w)
        return shifted(w), w

    (plus, w), (minus, _) = lowest(NU), lowest(-NU)
    return (plus - minus) / (2 * NU), w


@pytest.mark.parametrize(
    ("penalised", "gradient", "optimum"),
    [
        (
            value_penalty,
            lambda case, lam: case.penalised_gradient(lam, PENALTY),
            lambda case: case.penalised_optimum(PENALTY),
        ),
        (
            moreau_penalty,
            lambda case, lam: case.moreau_gradient(lam, PENALTY, GAMMA),
            lambda case: case.moreau_optimum(PENALTY, GAMMA),
        ),
        (
            central_penalty,
            lambda case, lam: case.central_gradient(lam, NU),
            lambda case: case.central_optimum(NU),
        ),
    ],
    ids=["value", "moreau", "central"],
)
def test_penalised_quadratic(penalised, gradient, optimum, seed):
    case = problems.make("quadratic", seed)
    expected = numerical_gradient(lambda lam: penalised(case, lam)[0], case.lam)
    assert_close(gradient(case, case.lam), expected)
    assert np.linalg.norm(gradient(case, case.lam) - case.hypergradient(case.lam)) > 1e-3
    at_optimum = numerical_gradient(lambda lam: penalised(case, lam)[0], optimum(case))
    assert flat(at_optimum) == pytest.approx(0, abs=1e-8)


def test_penalised_solutions(seed):
    case = problems.make("quadratic", seed)
    _, w = jax.jit(lambda lam: value_penalty(case, lam))(case.lam)
    assert_close(case.penalised_solution(case.lam, PENALTY), w)
    _, w = jax.jit(lambda lam: moreau_penalty(case, lam))(case.lam)
    assert_close(case.moreau_solution(case.lam, PENALTY, GAMMA), w)


def test_quadratic_value_and_optimum(seed):
    case = problems.make("quadratic", seed)
    optimum = case.optimum()
    assert_close(case.hypergradient(optimum), np.zeros_like(optimum))
    w = jnp.asarray(case.solution(case.lam))
    expected = case.outer(w, case.lam, case.outer_data)
    assert case.value(case.lam) == pytest.approx(float(expected), rel=1e-12)
    lowest = case.value(optimum)
    for direction in np.eye(len(optimum)):
        assert case.value(optimum + 1e-3 * direction) > lowest


def test_limits_of_the_penalties(seed):
    """A growing penalty and a vanishing nu give the hypergradient, at the orders 1, 1 and 2."""
    case = problems.make("quadratic", seed)
    exact = case.hypergradient(case.lam)

    def error(gradient):
        return np.linalg.norm(gradient - exact)

    for approximate in (
        lambda s: case.penalised_gradient(case.lam, 1 / s),
        lambda s: case.moreau_gradient(case.lam, 1 / s, GAMMA),
        lambda s: case.central_gradient(case.lam, s**0.5),
    ):
        assert error(approximate(1e-4)) / error(approximate(2e-4)) == pytest.approx(0.5, rel=0.02)


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
@pytest.mark.parametrize("kind", problems.JUDGED)
def test_judged(kind, dtype, seed):
    case = problems.make_judged(kind, seed, dtype)
    gradient = jax.jit(jax.grad(case.inner))(case.w, case.lam, case.inner_data)
    assert (gradient == 0).all()
    assert_close(case.solution(case.lam), np.asarray(case.w, np.float64), rtol=1e-12)

    A, *_ = case.means
    c = np.asarray(jax.jit(jax.grad(case.outer))(case.w, case.lam, case.outer_data), np.float64)
    values, vectors = np.linalg.eigh(A)
    singular = np.abs(values) < 1e-12
    reaches_null = np.linalg.norm(vectors[:, singular].T @ c) > 1e-6 * np.linalg.norm(c)
    if values.min() < -1e-12:
        expected = "INDEFINITE"
    elif singular.any() and reaches_null:
        expected = "BREAKDOWN"
    else:
        expected = "OK"
    assert case.status == expected
    assert (kind == "zero right-hand side") == (np.linalg.norm(c) == 0)

    hypergradient = case.hypergradient(case.lam)
    assert np.isnan(hypergradient).all() == (expected == "BREAKDOWN")
    if expected != "BREAKDOWN" and kind != "tiny":
        h, lam = 1e-4, np.asarray(case.lam, np.float64)
        shifts = h * np.eye(len(lam))
        differences = [(case.value(lam + e) - case.value(lam - e)) / (2 * h) for e in shifts]
        assert_close(hypergradient, np.asarray(differences))
