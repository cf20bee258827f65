"""The adjoint system of a small network by CG: products and seconds with each preconditioner, K-FAC among them.

Digits, 898 rows for training, a network 64-32-10 of tanh with cross-entropy and `penalty / 2 ||w||^2`, float64, at a
minimiser that L-BFGS finds (each penalty its own). The system `H q = dF/dw`, F the loss of the other rows, is solved to
1e-6 from zero. Products with H are those of the preparation and of the solve. Seconds are of one compiled call that
prepares and solves.

K-FAC (Martens and Grosse 2015) takes the Gauss-Newton matrix of each layer as `A x G`, the mean products of its inputs
(a one at the end, for the bias) and of the derivatives in its outputs under the model's own labels, and solves
`A Q G + penalty Q = R` by the eigenvectors of both: one decomposition of each per system. It comes as a function to
`CG(preconditioner=...)`. The L-BFGS memory is what the inner solve left, its last 10 pairs.

    python benchmarks/preconditioners.py [--repeats 5] [--out benchmarks/results/preconditioners_cpu.json]
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_digits

import bilevel as bl
from solvers import loops
from solvers.lbfgs import _two_loop
from solvers.tree import flatten, size
from solvers.types import Objective, constant_sampler

jax.config.update("jax_enable_x64", True)  # before any solver holds a number

RTOL, HIDDEN = 1e-6, 32
PENALTIES = (1e-2, 1e-3)


def outputs(w: Any, X: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The hidden values (n, 32) and the logits (n, 10)."""
    hidden = jnp.tanh(X @ w[0][:-1] + w[0][-1])
    return hidden, hidden @ w[1][:-1] + w[1][-1]


def loss(w: Any, batch: Any) -> jax.Array:
    X, y = batch
    logits = outputs(w, X)[1]
    own = jnp.take_along_axis(logits, y[:, None], axis=1)[:, 0]
    return jnp.mean(jax.nn.logsumexp(logits, axis=1) - own)


def inner(w: Any, penalty: jax.Array, batch: Any) -> jax.Array:
    return loss(w, batch) + penalty / 2 * sum(jnp.sum(part**2) for part in w)


def kfac(w: Any, penalty: jax.Array, batch: Any) -> Callable[[Any], Any]:
    """`R -> Q` with `A Q G + penalty Q = R` in each layer."""
    X, _ = batch
    hidden, logits = outputs(w, X)
    p = jax.nn.softmax(logits)
    # The Hessian of the loss in the logits is the sum over labels of p_y (e_y - p)(e_y - p)'.
    labels = jnp.eye(p.shape[1])
    last = jnp.sqrt(p.T)[:, :, None] * (labels[:, None, :] - p[None])  # (labels, n, 10)
    first = (last @ w[1][:-1].T) * (1 - hidden**2)  # (labels, n, 32)
    ones = jnp.ones((len(X), 1))
    layers = []
    for inputs, derivatives in ((X, first), (hidden, last)):
        inputs = jnp.concatenate([inputs, ones], axis=1)
        flat = derivatives.reshape(-1, derivatives.shape[-1])
        layers.append(
            (jnp.linalg.eigh(inputs.T @ inputs / len(X)), jnp.linalg.eigh(flat.T @ flat / len(X)))
        )

    def solve(r: Any) -> Any:
        made = []
        for ((a, U), (g, V)), part in zip(layers, r, strict=True):
            made.append(U @ ((U.T @ part @ V) / (a[:, None] * g[None, :] + penalty)) @ V.T)
        return tuple(made)

    return solve


def minimiser(penalty: float, batch: Any) -> tuple[Any, Any, Any]:
    """`(w, state, info)` of the inner solve."""
    rng = np.random.default_rng(0)
    shapes = ((65, HIDDEN), (HIDDEN + 1, 10))
    w = tuple(jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[0])) for shape in shapes)
    objective, solver = Objective(inner, jnp.asarray(penalty)), bl.LBFGS(5000, 1e-7)

    @jax.jit
    def run(w: Any) -> Any:
        state = solver.init(objective, w, batch)
        return loops.solve(solver, objective, w, state, constant_sampler(batch))

    return run(w)


def systems(
    penalty: float, train: Any, held_out: Any
) -> tuple[dict[str, Any], dict[str, int], dict[str, Any]]:
    """A compiled call for each preconditioner, the products that each takes to prepare, and the minimiser."""
    w, state, info = minimiser(penalty, train)
    b = jax.grad(loss)(w, held_out)
    key = jax.random.key(0)

    def calling(make: Callable[[Any, jax.Array, Any], Any]) -> Callable[[], Any]:
        @jax.jit
        def solve(w: Any, b: Any, number: jax.Array, state: Any, batch: Any) -> Any:
            _, product = jax.linearize(lambda w: jax.grad(inner)(w, number, batch), w)
            linear = bl.CG(
                rtol=RTOL, max_steps=5000, preconditioner=make(w, number, (batch, state))
            )
            zero = jax.tree.map(jnp.zeros_like, w)
            return linear.solve(product, b, zero, linear.init(product, w, key), key)

        number = jnp.asarray(penalty)
        return lambda: solve(w, b, number, state, train)

    def memory(w: Any, number: jax.Array, given: Any) -> Callable[[Any], Any]:
        unflatten = flatten(w)[1]
        return lambda r: unflatten(_two_loop(given[1], flatten(r)[0]))

    makers: dict[str, Callable[..., Any]] = {
        "none": lambda *_: None,
        "Jacobi, 32 probes": lambda *_: bl.Jacobi(),
        "Nystrom, rank 10": lambda *_: bl.NystromPreconditioner(10),
        "Nystrom, rank 50": lambda *_: bl.NystromPreconditioner(50),
        "L-BFGS memory, 10 pairs": memory,
        "K-FAC": lambda w, number, given: kfac(w, number, given[0]),
    }
    products = {name: 0 for name in makers}
    products |= {"Jacobi, 32 probes": 32, "Nystrom, rank 10": 10, "Nystrom, rank 50": 50}
    at = {"gradient": float(info.residual), "inner_steps": int(info.num_steps), "unknowns": size(w)}
    return {name: calling(make) for name, make in makers.items()}, products, at


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    default = Path(__file__).parent / "results" / f"preconditioners_{jax.default_backend()}.json"
    parser.add_argument("--out", type=Path, default=default)
    args = parser.parse_args()
    X, y = load_digits(return_X_y=True)
    X = X / 16
    train = jnp.asarray(X[:898]), jnp.asarray(y[:898])
    held_out = jnp.asarray(X[898:]), jnp.asarray(y[898:])
    record: dict[str, Any] = {"workload": "preconditioners", "rtol": RTOL, "levels": {}}
    for penalty in PENALTIES:
        calls, products, at = systems(penalty, train, held_out)
        found: dict[str, Any] = {}
        answers: dict[str, np.ndarray] = {}

        def check(name: str, result: Any, found=found, answers=answers, products=products) -> None:
            q, info = result
            answers[name] = np.asarray(flatten(q)[0])
            found[name] = {
                "steps": int(info.num_steps),
                "products": int(info.num_steps) + products[name],
                "residual": float(info.residual),
                "curvature": float(info.curvature),
                "status": bl.Status(int(info.status)).name,
            }

        timings = harness.compare(calls, args.repeats, 1, check)
        plain = answers["none"]
        for name, answer in answers.items():
            found[name]["apart"] = float(np.linalg.norm(answer - plain) / np.linalg.norm(plain))
        print(f"penalty {penalty:g}: {at}")
        columns = {
            key: {name: one[key] for name, one in found.items()} for key in ("products", "status")
        }
        print(harness.table(timings, "none", columns), flush=True)
        record["levels"][f"{penalty:g}"] = {**at, "found": found, "timings": timings}
    harness.write(args.out, record)


if __name__ == "__main__":
    main()
