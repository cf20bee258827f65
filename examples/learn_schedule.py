"""The learning rate of each step of a short training, learned, against the best constant rate.

Outer variable: the 20 rates of 20 steps of gradient descent on a small network; the derivative goes
through the training itself. Judged by the validation loss after the last step, which is what the rates
and the constant were chosen on, and by the loss on unseen digits.

Full run, 3 seeds: validation loss 0.336 and test loss 0.356; best constant of 20: 0.469 and 0.475.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import BLUE, GREY, descend, figure, network, options, save, untrained
from sklearn.datasets import load_digits

import bilevel as bl

STEPS = 20
CONSTANTS = jnp.geomspace(0.05, 5, 20)


def loss(w, rates, batch):
    """Both levels: cross-entropy of a network with one hidden layer; the rates act through `solver`."""
    logits = network(w, batch["X"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()


def start(rates, batch):
    """Each training starts from the same untrained network."""
    return batch["untrained"]


def solver(rates):
    return bl.OptaxSolver(optax.sgd(lambda step: rates[step]), max_steps=STEPS)


@jax.jit
def curves(rates, train, *others):
    """Losses on the data sets after each step, (sets, steps)."""
    path = descend(lambda w: loss(w, None, train), train["untrained"], rates)
    on = lambda data: jax.vmap(lambda w: loss(w, None, data))(path)
    return jnp.stack([on(data) for data in (train, *others)])


def split(seed):
    X, y = load_digits(return_X_y=True)
    rng = np.random.default_rng(seed)
    parts = np.split(rng.permutation(len(X)), [500, 1000])
    train, valid, test = ({"X": np.float32(X[rows] / 16), "y": y[rows]} for rows in parts)
    train["untrained"] = untrained(rng, 64, 32, 10)
    return train, valid, test


def main(argv=None):
    args = options(__file__, __doc__, argv)
    found, rates = {"constant": [], "learned": []}, {}
    for seed in range(args.seed, args.seed + (1 if args.quick else 3)):
        data = split(seed)
        constants = [curves(jnp.full(STEPS, rate), *data) for rate in CONSTANTS]
        best = min(range(len(CONSTANTS)), key=lambda i: constants[i][1, -1])
        result = bl.run(
            bl.Problem(loss, loss, data[0], data[1], inner_init=start),
            jnp.full(STEPS, 0.5),
            solver=solver,
            engine=bl.Unrolled(),
            outer=optax.chain(optax.clip_by_global_norm(0.1), optax.adam(0.02)),
            transform=bl.transforms.Exp(),
            num_steps=100 if args.quick else 300,
        )
        rates = {"constant": jnp.full(STEPS, CONSTANTS[best]), "learned": result.best.lam}
        found["constant"].append(np.asarray(constants[best]))
        found["learned"].append(np.asarray(curves(rates["learned"], *data)))
        gap = abs(found["learned"][-1][1, -1] - float(result.best.outer_value))
        assert gap < 1e-3, f"the two ways to train differ by {gap}"

    ends = {name: np.array([curve[1:, -1] for curve in found[name]]) for name in found}
    print(f"loss after {STEPS} steps, mean of {len(found['learned'])} seeds")
    for name in found:
        print(f"{name:9s} validation {ends[name].mean(0)[0]:.3f}  test {ends[name].mean(0)[1]:.3f}")

    picture = figure(9, 3.4)
    left, right = picture.subplots(1, 2)
    steps = np.arange(1, STEPS + 1)
    for name, color in (("constant", GREY), ("learned", BLUE)):
        label = {"constant": "best constant of 20", "learned": "learned"}[name]
        left.plot(steps, rates[name], drawstyle="steps-mid", color=color, label=label)
        _, valid, test = found[name][-1]
        right.semilogy(steps, valid, color=color, label=f"{label}, validation")
        right.semilogy(steps, test, "--", color=color, label=f"{label}, test")
    left.set(
        xlabel="step", ylabel="learning rate", ylim=(0, None), title="Learning rates (last seed)"
    )
    right.set(xlabel="step", ylabel="cross-entropy", title="Training with them")
    for panel in (left, right):
        panel.set_xticks(steps[::2] + 1)
        panel.legend(fontsize=8)
    save(picture, args.picture)
    return {
        "seeds": len(found["learned"]),
        "validation_loss": {name: ends[name][:, 0].tolist() for name in ends},
        "test_loss": {name: ends[name][:, 1].tolist() for name in ends},
    }


if __name__ == "__main__":
    main()
