"""The cost of one hypergradient against the number of hyperparameters: it should not grow.

Ridge regression with a million weights, float32, and 1, 100, 10,000 or a million penalties, each for as many
neighbouring weights. A fixed budget: 10 steps of L-BFGS and 10 products for the adjoint.

    python benchmarks/num_hyperparameters.py [--repeats 7] [--out benchmarks/results/num_hyperparameters_cpu.json]
"""

import argparse
from pathlib import Path

import harness
import jax
import jax.numpy as jnp
import numpy as np

import bilevel as bl

WEIGHTS, ROWS = 1_000_000, 32
COUNTS = (1, 100, 10_000, 1_000_000)


def held_out(w, lam, batch):
    X, y = batch
    return 0.5 * jnp.mean((X @ w - y) ** 2)


def penalised(w, lam, batch):
    """One penalty for each group of `WEIGHTS / len(lam)` weights."""
    groups = jnp.sum(jnp.square(w.reshape(len(lam), -1)), axis=1)
    return held_out(w, lam, batch) + 0.5 * jnp.sum(lam * groups)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    default = (
        Path(__file__).parent / "results" / f"num_hyperparameters_{jax.default_backend()}.json"
    )
    parser.add_argument("--out", type=Path, default=default)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    batches = []
    for _ in range(2):
        X = rng.standard_normal((ROWS, WEIGHTS), dtype=np.float32) / np.float32(WEIGHTS**0.5)
        batches.append((X, rng.standard_normal(ROWS, dtype=np.float32)))
    problem = bl.Problem(penalised, held_out, *batches)
    solver = bl.LBFGS(max_steps=10, tol=0.0)
    engine = bl.Implicit(bl.CG(rtol=0.0, atol=0.0, max_steps=10), estimate=False)
    w = jnp.zeros(WEIGHTS, jnp.float32)

    def call(count: int):
        lam = jnp.full(count, 0.01, jnp.float32)
        options = {"solver": solver, "engine": engine, "throw": False}
        return lambda: bl.hypergradient(problem, lam, w, **options).grad

    timings = harness.compare({str(count): call(count) for count in COUNTS}, args.repeats)
    ratios = harness.ratios(timings, "1")
    print(harness.table(timings, "1"))
    print(f"slowest over fastest: {max(ratios.values()) / min(ratios.values()):.2f}")
    record = {"weights": WEIGHTS, "rows": ROWS, "timings": timings, "ratios": ratios}
    harness.write(args.out, record)


if __name__ == "__main__":
    main()
