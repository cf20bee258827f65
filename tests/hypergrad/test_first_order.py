"""Problems without second derivatives: who may be asked to solve them, and who does."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel as bl
from hypergrad import ENGINES
from solvers import SOLVERS


@jax.custom_vjp
def square(x):
    """`|x|^2 / 2`, whose gradient is a call to the host that JAX cannot differentiate."""
    return 0.5 * jnp.sum(x**2)


def backward(x, cotangent):
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return (cotangent * jax.pure_callback(np.array, shape, x, vmap_method="sequential"),)


square.defvjp(lambda x: (square(x), x), backward)


def inner(w, lam, batch):
    return square(w - 0.5 * lam)


def outer(w, lam, batch):
    return square(w - 1.0) + 0.1 * square(lam)


PROBLEM = bl.Problem(inner, outer, second_order=False)
LAM, W = jnp.array([1.0, 2.0]), jnp.array([0.1, 0.2])
MISSING = "callback|forward-mode"
"""What JAX says of the second derivative."""
SETTINGS = {"moreau": {"gamma": 5.0}}


def traced(engine, solver):
    """Traces a first step."""

    def step(w, lam, key):
        state = engine.init(PROBLEM, solver, w, lam, key)
        return engine.step(PROBLEM, solver, w, lam, state, key)

    eqx.filter_eval_shape(step, W, LAM, jax.random.key(0))


@pytest.mark.parametrize("name", ENGINES)
def test_engines_are_refused_that_need_second_derivatives_and_no_others(name):
    cls = ENGINES[name]
    numbers = SETTINGS.get(name, {})
    if "step_size" in {field.name for field in dataclasses.fields(cls)}:
        numbers = numbers | {"step_size": 0.3}
    engine, solver = cls(**numbers), bl.GradientDescent(0.5, max_steps=3)
    call = lambda engine=engine: bl.hypergradient(PROBLEM, LAM, W, engine=engine)
    if not cls.second_order:
        traced(engine, solver)
        if cls.measured:
            with pytest.raises(ValueError, match=f"{cls.__name__}.{cls.measured[0]}='auto'"):
                call(cls())
        with pytest.raises(ValueError, match="estimate=True"):
            call(dataclasses.replace(engine, estimate=True))
        return
    with pytest.raises(
        ValueError, match=f"second_order=False, and {cls.__name__} needs .* Use F2SA"
    ):
        call()
    if cls is bl.CGD:  # takes the outer loss's mixed derivative, and this one has none
        return
    with pytest.raises((ValueError, TypeError), match=MISSING):
        traced(engine, solver)


@pytest.mark.parametrize("name", sorted({*SOLVERS} - {"fixedpoint", "optaxsolver", "workingset"}))
def test_solvers_too(name):
    cls, engine = SOLVERS[name], bl.F2SA()
    solver = cls() if cls is bl.Solved else cls(max_steps=3)
    if not cls.second_order and not cls.measured:
        traced(engine, solver)
        return
    with pytest.raises(ValueError, match=f"second_order=False, and {cls.__name__}"):
        bl.hypergradient(PROBLEM, LAM, W, engine=engine, solver=solver)
    with pytest.raises((ValueError, TypeError), match=MISSING):
        traced(engine, solver)


def test_first_order_engines_give_the_gradient():
    """`w = lam / 2`, so the hypergradient is `(lam / 2 - 1) / 2 + lam / 10`."""
    h = bl.hypergradient(PROBLEM, LAM, W, engine="auto")
    np.testing.assert_allclose(h.grad, (LAM / 2 - 1) / 2 + LAM / 10, atol=1e-3)
    with pytest.raises(ValueError, match="second_order=False, and Implicit"):
        bl.run(PROBLEM, LAM, W, num_steps=1)
