"""What the examples share: their options, their pictures, a small network and a plain loop."""

import argparse
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib.figure import Figure

# Okabe and Ito's colours: told apart with any colour vision.
BLUE, ORANGE, GREEN, PINK, GREY = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#666666"


def options(file: str, doc: str | None, argv: list[str] | None) -> argparse.Namespace:
    """`quick`, `seed` and `picture`, the file to write; ends with one line where that cannot be."""
    name = Path(file).stem
    parser = argparse.ArgumentParser(prog=f"{name}.py", description=(doc or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small version, in seconds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("results") / name, metavar="DIR")
    parser.add_argument("--force", action="store_true", help="replace an older picture")
    args = parser.parse_args(argv)
    args.picture = args.out / f"{name}.png"
    if args.seed < 0:
        parser.error(f"--seed must be at least 0, got {args.seed}")
    if args.picture.exists() and not args.force:
        parser.error(f"{args.picture} exists; expected a new --out, or --force to replace it")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"cannot write to {args.out} ({error.strerror}); expected a directory")
    return args


def figure(width: float, height: float) -> Figure:
    """An empty figure, in inches, that keeps labels apart."""
    return Figure(figsize=(width, height), layout="constrained")


def save(picture: Figure, path: Path) -> None:
    picture.savefig(path, dpi=100)
    print(f"picture: {path}")


def untrained(rng, *sizes):
    """Weights of a network with these layer sizes: a list of (weight, bias), float32."""
    draw = lambda rows, columns: np.float32(rng.normal(size=(rows, columns)) / rows**0.5)
    return [(draw(a, b), np.zeros(b, np.float32)) for a, b in itertools.pairwise(sizes)]


def network(w, X):
    """Outputs (rows, outputs) of a fully connected network with tanh between its layers."""
    for weight, bias in w[:-1]:
        X = jnp.tanh(X @ weight + bias)
    return X @ w[-1][0] + w[-1][1]


def descend(loss, w, rates):
    """Weights after each step of gradient descent, stacked; a loop that knows nothing of bilevel."""

    def step(w, rate):
        w = jax.tree.map(lambda p, g: p - rate * g, w, jax.grad(loss)(w))
        return w, w

    return jax.lax.scan(step, w, rates)[1]
