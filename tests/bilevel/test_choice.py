"""`bilevel.choose` and `engine="auto"`."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel as bl

X = np.random.default_rng(0).normal(size=(20, 3))
y = X[:, 0]


def inner(w, lam, batch):
    return 0.5 * jnp.mean((X @ w - y) ** 2) + 0.5 * jnp.sum(lam * w**2)


def outer(w, lam, batch):
    return jnp.sum((w - 1) ** 2)


CONVEX = bl.Problem(inner, outer)
W = jnp.zeros(3)


@pytest.mark.parametrize(
    ("problem", "lam", "options", "engine", "solver", "reason"),
    [
        (CONVEX, 0.1, {}, bl.Implicit, bl.LBFGS, "no curvature"),
        (bl.glm.ridge(X, y, X, y), 0.1, {}, bl.Implicit, bl.Newton, "knows its Hessian"),
        (CONVEX, 0.1, {"solver": "newton"}, bl.Implicit, bl.Newton, "no curvature"),
        (
            bl.Problem(lambda w, lam, batch: inner(w, lam, batch) - jnp.sum(w**2), outer),
            *(0.1, {}, bl.Unrolled, bl.GradientDescent, "negative curvature"),
        ),
        (
            bl.Problem(inner, outer, inner_prox=lambda v, s, lam: bl.prox.l1(v, s, lam)),
            *(0.1, {}, bl.Implicit, bl.ProximalGradient, "prox"),
        ),
        (
            bl.Problem(bl.Mapping(lambda w, lam, batch: 0.5 * w + lam), outer),
            *(0.1, {}, bl.Implicit, bl.FixedPoint, "fixed point"),
        ),
        (
            bl.Problem(inner, outer, inner_init=lambda lam, batch: lam),
            *(jnp.ones(3), {}, bl.Forward, bl.GradientDescent, "forward for 3"),
        ),
        (
            bl.Problem(
                lambda w, lam, batch: inner(w, lam[3:6], batch),
                outer,
                inner_init=lambda lam, batch: lam[:3],
            ),
            *(jnp.ones(21), {}, bl.Unrolled, bl.GradientDescent, "in reverse for 21"),
        ),
    ],
)
def test_each_rule(problem, lam, options, engine, solver, reason):
    choice = bl.choose(problem, lam, W, **options)
    assert type(choice.engine) is engine and type(choice.solver) is solver
    assert reason in choice.reason and engine.__name__ in str(choice)


def test_auto_is_the_choice_and_says_why(caplog):
    with caplog.at_level(logging.INFO, "bilevel"):
        found = bl.hypergradient(CONVEX, 0.1, W, engine="auto")
    assert "Implicit with LBFGS" in caplog.text
    np.testing.assert_array_equal(found.grad, bl.hypergradient(CONVEX, 0.1, W).grad)
    rate = lambda lam: bl.GradientDescent(lam, max_steps=3)
    choice = bl.choose(CONVEX, 0.1, W, solver=rate)
    assert "Forward with the solver made from lam" in str(choice) and choice.solver is rate


def test_what_cannot_be_chosen_for():
    with pytest.raises(TypeError, match="do not call it inside jit"):
        jax.jit(lambda lam: bl.choose(CONVEX, lam, W).reason)(0.1)
    with pytest.raises(TypeError, match=r"tasks.problem"):
        bl.choose(bl.Tasks(CONVEX, jnp.ones((2, 1))), 0.1, W)
