"""Products with a narrow variable, computed the other way round."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel as bl
from bilevel.rows_last import NARROW, rows_last

ROWS, FEATURES = 24, 7


def fitted(product):
    """A softmax regression, whose weights come from `lam`, with this product."""

    def loss(w, lam, batch):
        X, y = batch
        f = product(X, w)
        own = jnp.take_along_axis(f, y[:, None], axis=1)[:, 0]
        weights = jax.nn.sigmoid(lam[: len(y)])
        return jnp.mean(weights * (jax.nn.logsumexp(f, axis=1) - own)) + jnp.sum(jnp.square(w))

    return loss


def network(w, lam, batch):
    """The second layer's inputs vary with `w`."""
    X, y = batch
    f = jnp.tanh(X @ w) @ (w.T @ w)
    return jnp.mean(jnp.square(f[:, 0] - y.astype(f.dtype))) + jnp.sum(lam**2)


LOSSES = {
    "matmul": fitted(lambda X, w: X @ w),
    "einsum": fitted(lambda X, w: jnp.einsum("nd,dc->nc", X, w)),
    "rows by vmap": fitted(lambda X, w: jax.vmap(lambda x: x @ w)(X)),
    "jit": fitted(jax.jit(lambda X, w: jnp.tanh(2 * X) @ (w + w))),
    "from lam": fitted(lambda X, w: X @ (w * w.shape[0])),
    "network": network,
}


def instance(columns, dtype=float):
    rng = np.random.default_rng(0)
    batch = (
        jnp.asarray(rng.normal(size=(ROWS, FEATURES)), dtype),
        jnp.asarray(rng.integers(0, 2, ROWS)),
    )
    w, v = (jnp.asarray(rng.normal(size=(FEATURES, columns)), dtype) for _ in range(2))
    return w, jnp.asarray(rng.normal(size=ROWS), dtype), batch, v


def derivatives(loss, w, lam, batch, v):
    """Value, slopes, and the Hessian-vector product with the cross derivative."""
    gradients = jax.value_and_grad(loss, argnums=(0, 1))
    found = jax.jit(lambda w, v: jax.jvp(lambda w: gradients(w, lam, batch), (w,), (v,)))
    return found(w, v)


@pytest.mark.parametrize("columns", [5, NARROW + 1])
@pytest.mark.parametrize("name", LOSSES)
def test_same_derivatives(name, columns):
    w, lam, batch, v = instance(columns)
    turned = rows_last(bl.Problem(LOSSES[name], network, batch, batch))
    for one, loss in ((turned.inner, LOSSES[name]), (turned.outer, network)):
        found, expected = (derivatives(f, w, lam, batch, v) for f in (one, loss))
        assert jax.tree.structure(found) == jax.tree.structure(expected)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)


def packed_again(loss, columns) -> int:
    """Products in the compiled gradient for which a matrix is read along its other axis."""
    w, lam, batch, _ = instance(columns, jnp.float32)
    text = jax.jit(jax.grad(loss)).lower(w, lam, batch).compile().as_text()
    assert text is not None
    return text.count("lhs_contracting_dims={0}")


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="what it does on CPU")
@pytest.mark.parametrize("name", [name for name in LOSSES if name != "network"])
def test_no_matrix_is_packed_again(name):
    loss = LOSSES[name]
    turned = rows_last(bl.Problem(loss, loss)).inner
    assert packed_again(loss, 5) == 1
    assert packed_again(turned, 5) == 0
    assert packed_again(turned, NARROW + 1) == 1


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="what it does on CPU")
@pytest.mark.parametrize("engine", ["implicit", "unrolled", "f2sa", "moreau"])
def test_every_engine_has_it(engine):
    """Nor is a matrix packed again in any derivative of a hypergradient."""
    w, lam, batch, _ = instance(5, jnp.float32)
    loss = LOSSES["matmul"]

    def grad(w, lam, batch):
        problem = bl.Problem(loss, loss, batch, batch)
        return bl.hypergradient(problem, lam, w, engine=engine, throw=False).grad

    text = jax.jit(grad).lower(w, lam, batch).compile().as_text()
    assert text is not None
    assert "dot(" in text and "lhs_contracting_dims={0}" not in text


def test_one_trace_of_a_loss_serves_all_its_derivatives(count_traces):
    w, lam, batch, _ = instance(5)
    loss = count_traces(LOSSES["matmul"])
    turned = rows_last(bl.Problem(loss, loss)).inner
    for _ in range(3):
        derivatives(turned, w, lam, batch, w)
    assert loss.count == 1


def test_a_mapping_stays_one():
    problem = bl.Problem(bl.Mapping(lambda w, lam, batch: 0.5 * w + lam), network)
    assert rows_last(problem).inner is problem.inner
