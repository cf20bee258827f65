"""The models of label cleaning: softmax regression (`w` a matrix) and a network of one hidden layer (a dictionary)."""

import jax
import jax.numpy as jnp
from jax import Array

HIDDEN, CLASSES = 64, 10


def start(model: str, features: int, seed: int):
    """Zeros; or, of the network, Gaussian weights of variance one over the inputs."""
    if model == "softmax":
        return jnp.zeros((features, CLASSES))
    first, second = jax.random.split(jax.random.key(seed))
    draw = lambda key, rows, columns: jax.random.normal(key, (rows, columns)) / rows**0.5
    return {
        "hidden": draw(
            first, features, HIDDEN
        ),  # its offsets are the weights of the column of ones
        "scores": draw(second, HIDDEN, CLASSES),
        "offsets": jnp.zeros(CLASSES),
    }


def scores(w, X) -> Array:
    """Of each class, (rows, classes)."""
    if isinstance(w, dict):
        return jnp.tanh(X @ w["hidden"]) @ w["scores"] + w["offsets"]
    return X @ w


def squares(w) -> Array:
    """`||w||^2`."""
    return sum((jnp.sum(leaf**2) for leaf in jax.tree.leaves(w)), jnp.zeros(()))


def cross_entropies(f, y) -> Array:
    own = jnp.take_along_axis(f, y[:, None], axis=1)[:, 0]
    return jax.nn.logsumexp(f, axis=1) - own
