"""Learning rate and momentum tuned while the network trains, in one run, from a bad start.

Outer variables: the rate and the momentum of gradient descent on minibatches. Every five steps they move along
the derivative of a validation batch's loss, in forward mode and without reset: `Forward(reset=False)`
carries the tangents of weights and momentum through the whole training, so a second training is never run. Beside
it, the same steps at the rate and momentum that it started from, and the best of a grid of 20 constant pairs,
which costs 20 trainings. All are judged by the validation loss at the end, and the loss on unseen digits.

Full run, 3 seeds: validation loss 0.111 and test loss 0.104; the start 0.450 and 0.441; best pair 0.109 and 0.096.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import BLUE, GREY, ORANGE, figure, network, options, save, untrained
from sklearn.datasets import load_digits

import bilevel as bl

PIECE, BATCH = 5, 100
RATES, MOMENTA = np.geomspace(0.01, 1, 5), np.array([0.0, 0.5, 0.9, 0.97])
START = {"rate": np.float32(0.01), "momentum": np.float32(0.5)}
SCALES = {"rate": bl.transforms.Exp(), "momentum": bl.transforms.Sigmoid()}


def loss(w, lam, batch):
    logits = network(w, batch["X"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()


def solver(lam):
    return bl.GradientDescent(lam["rate"], momentum=lam["momentum"], max_steps=PIECE)


def tuned(problem, w, num_steps):
    """Where the run ends, and `(lam, w)` on the way."""
    path = []
    result = bl.run(
        problem,
        START,
        w,
        solver=solver,
        engine=bl.Forward(reset=False),
        outer=optax.adam(0.03),
        transform=SCALES,
        num_steps=num_steps,
        chunk=2,
        callback=lambda state, history: path.append((state.lam, state.w)),
    )
    return result, path


@functools.partial(jax.jit, static_argnames="num_steps")
def constant(data, w, rate, momentum, num_steps):
    """Training at constant settings, by a loop that knows nothing of bilevel: weights on the way."""

    def step(carry, index):
        w, m = carry
        rows = jax.random.randint(jax.random.fold_in(jax.random.key(1), index), (BATCH,), 0, 900)
        batch = jax.tree.map(lambda leaf: leaf[rows], data)
        m = jax.tree.map(lambda a, g: momentum * a + g, m, jax.grad(loss)(w, None, batch))
        return (jax.tree.map(lambda a, b: a - rate * b, w, m), m), None

    def piece(carry, index):
        carry, _ = jax.lax.scan(step, carry, 2 * PIECE * index + jnp.arange(2 * PIECE))
        return carry, carry[0]

    first = w, jax.tree.map(jnp.zeros_like, w)
    return jax.lax.scan(piece, first, jnp.arange(num_steps // 2))[1]


def split(seed):
    X, y = load_digits(return_X_y=True)
    rng = np.random.default_rng(seed)
    parts = np.split(rng.permutation(len(X)), [900, 1350])
    data = ({"X": np.float32(X[rows] / 16), "y": y[rows]} for rows in parts)
    return (*data, untrained(rng, 64, 32, 10))


def main(argv=None):
    args = options(__file__, __doc__, argv)
    num_steps = 100 if args.quick else 200
    judge = jax.jit(lambda w, *data: jnp.stack([loss(w, None, each) for each in data]))
    curve = jax.jit(jax.vmap(judge, in_axes=(0, None, None)))
    losses = {"start": [], "tuned": [], "grid": []}
    for seed in range(args.seed, args.seed + (1 if args.quick else 3)):
        train, valid, test, w = split(seed)
        result, path = tuned(bl.Problem(loss, loss, train, valid, batch_size=BATCH), w, num_steps)
        table = []
        for rate, momentum in itertools.product(RATES, MOMENTA):
            last = jax.tree.map(
                lambda leaf: leaf[-1], constant(train, w, rate, momentum, num_steps)
            )
            table.append(judge(last, valid, test))
        table = np.nan_to_num(np.array(table), nan=np.inf)
        before = curve(constant(train, w, *START.values(), num_steps), valid, test)
        after = curve(
            jax.tree.map(lambda *leaves: jnp.stack(leaves), *(w for _, w in path)), valid, test
        )
        losses["start"].append(before[-1])
        losses["tuned"].append(after[-1])
        losses["grid"].append(table[table[:, 0].argmin()])

    print(f"loss after {PIECE * num_steps} steps, mean of {len(losses['tuned'])} seeds")
    labels = {
        "start": "where it starts from",
        "tuned": "tuned on the way",
        "grid": f"best of {len(table)} constant pairs",
    }
    for name, label in labels.items():
        on_valid, on_test = np.mean(losses[name], axis=0)
        print(f"{label:25s} validation {on_valid:.3f}  test {on_test:.3f}")
    lam = result.lam
    print(f"last seed: from rate 0.01, momentum 0.5 to {lam['rate']:.3f}, {lam['momentum']:.3f}")

    picture = figure(9, 3.4)
    left, right = picture.subplots(1, 2)
    at = 2 * PIECE * np.arange(1, len(path) + 1)
    for name, color in (("rate", BLUE), ("momentum", ORANGE)):
        left.plot(at, [lam[name] for lam, _ in path], color=color, label=name)
    left.set(xlabel="step", title="Settings on the way (last seed)")
    for name, color, values in (("start", GREY, before), ("tuned", BLUE, after)):
        right.semilogy(at, values[:, 0], color=color, label=f"{labels[name]}, validation")
        right.semilogy(at, values[:, 1], "--", color=color, label=f"{labels[name]}, test")
    right.set(xlabel="step", ylabel="cross-entropy", title="Training with them")
    for panel in (left, right):
        panel.legend(fontsize=8)
    save(picture, args.picture)
    return {
        "seeds": len(losses["tuned"]),
        "validation_loss": {name: [float(row[0]) for row in losses[name]] for name in losses},
        "test_loss": {name: [float(row[1]) for row in losses[name]] for name in losses},
    }


if __name__ == "__main__":
    main()
