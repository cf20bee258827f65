"""Training that carries more than weights: batch normalisation, whose running statistics the outer loss reads."""

import jax
import jax.numpy as jnp
import numpy as np

import bilevel as bl

STEPS, BATCH = 12, 8


def normalised(params, X, mean, variance):
    return jnp.tanh((X @ params["in"] - mean) / jnp.sqrt(variance + 1e-3)) @ params["out"]


def loss(params, batch):
    """On the statistics of the batch, which it returns."""
    X, y = batch
    hidden = X @ params["in"]
    mean, variance = hidden.mean(axis=0, keepdims=True), hidden.var(axis=0, keepdims=True)
    return jnp.mean((normalised(params, X, mean, variance) - y) ** 2), (mean, variance)


def train_step(w, lam, batch):
    """Gradient descent with momentum, and running means of the statistics."""
    gradient, seen = jax.grad(loss, has_aux=True)(w["params"], batch)
    velocity = jax.tree.map(
        lambda v, g: lam["momentum"] * v + g + lam["decay"] * v, w["velocity"], gradient
    )
    params = jax.tree.map(lambda p, v: p - lam["rate"] * v, w["params"], velocity)
    keep = lam["keep"]
    running = jax.tree.map(lambda old, new: keep * old + (1 - keep) * new, w["running"], seen)
    return {"params": params, "velocity": velocity, "running": running}


TRAINING = bl.Mapping(train_step)


def outer(w, lam, batch):
    X, y = batch
    return jnp.mean((normalised(w["params"], X, *w["running"]) - y) ** 2)


def test_the_derivative_goes_through_running_statistics(seed):
    """Of minibatch training, by plain autodiff over the same batches."""
    rng = np.random.default_rng([seed, 23])
    X = rng.normal(size=(64, 3)) @ rng.normal(size=(3, 3)) + 1
    y = np.sin(X[:, 0])
    problem = bl.Problem(
        TRAINING, outer, (X[:40], y[:40]), (X[40:], y[40:]), batch_size=(BATCH, None)
    )
    params = {"in": jnp.asarray(rng.normal(size=(3, 4))), "out": jnp.asarray(rng.normal(size=4))}
    w = {
        "params": params,
        "velocity": jax.tree.map(jnp.zeros_like, params),
        "running": (jnp.zeros((1, 4)), jnp.ones((1, 4))),
    }
    lam = {"rate": 0.1, "momentum": 0.6, "decay": 0.01, "keep": 0.8}
    lam = jax.tree.map(jnp.asarray, lam)
    key = jax.random.key(seed)
    solver = bl.FixedPoint(max_steps=STEPS, tol=0.0)
    h = bl.hypergradient(problem, lam, w, solver=solver, engine=bl.Unrolled(), key=key)

    @jax.jit
    def trained(lam):
        batches, carry = problem.inner_sampler(key), w
        for step in range(STEPS):
            carry = train_step(carry, lam, batches(step))
        return outer(carry, lam, problem.outer_data)

    expected = jax.jit(jax.grad(trained))(lam)
    assert all(abs(float(g)) > 1e-3 for g in expected.values())
    for name, g in expected.items():
        np.testing.assert_allclose(h.grad[name], g, rtol=1e-10, err_msg=name)
