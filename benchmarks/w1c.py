"""W1c: the penalty of a Lasso by its hypergradient, against sparho in the same process where it is given.

Held-out squared error of 250 rows, 250 for training, 2000 features (`--features`) of an AR(0.5) process of which 20
count, start at a tenth of the smallest penalty with the solution zero, 20 outer steps. Ours: `run` with FISTA (1e-3,
`--tol`) on all features and on a working set of 250 (`--size`), the adjoint system on the support by CG (1e-2), Adam of
rate 0.1 on the log-penalty; float64 and float32. sparho: its `hoag_search`
on the Lasso of scikit-learn and of celer, as it comes.

What counts is the held-out error at the penalty found, of scikit-learn's Lasso to 1e-10; beside it the best of 100
penalties on a grid, by the same.

    python benchmarks/w1c.py [--peer DIRECTORY] [--repeats 5] [--out benchmarks/results/w1c_cpu.json]
    python benchmarks/w1c.py --features 20000 --out benchmarks/results/w1c_wide_cpu.json
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.linear_model import Lasso

import bilevel as bl

ROWS, STEPS = 250, 20


def data(features: int) -> tuple[np.ndarray, np.ndarray]:
    """X (500, features) and y; the first half is for training."""
    rng = np.random.default_rng(0)
    X = rng.normal(size=(2 * ROWS, features))
    for j in range(1, features):
        X[:, j] = 0.5 * X[:, j - 1] + np.sqrt(0.75) * X[:, j]
    true = np.zeros(features)
    true[rng.choice(features, 20, replace=False)] = rng.choice([-1.0, 1.0], 20)
    return X, X @ true + 1 * rng.normal(size=2 * ROWS)


def inner(w: jax.Array, lam: jax.Array, batch: Any) -> jax.Array:
    X, y = batch
    return 0.5 * jnp.mean((X @ w - y) ** 2)


def outer(w: jax.Array, lam: jax.Array, batch: Any) -> jax.Array:
    X, y = batch
    return jnp.mean((X @ w - y) ** 2)


def prox(v: jax.Array, step: jax.Array, lam: jax.Array) -> jax.Array:
    return bl.prox.l1(v, step, lam)


def columns(lam: jax.Array, batch: Any, indices: jax.Array) -> tuple[jax.Array, Any]:
    X, y = batch
    return lam, (X[:, indices], y)


def ours(X: np.ndarray, y: np.ndarray, start: float, dtype: Any, solver: Any):
    X, y = X.astype(dtype), y.astype(dtype)
    train, held_out = (X[:ROWS], y[:ROWS]), (X[ROWS:], y[ROWS:])
    with jax.enable_x64(dtype is np.float64):
        problem = bl.Problem(inner, outer, train, held_out, inner_prox=prox, inner_restrict=columns)
    engine = bl.Implicit(linear_solver=bl.CG(rtol=1e-2), estimate=False)

    def call() -> float:
        with jax.enable_x64(dtype is np.float64):
            result = bl.run(
                problem, np.asarray(start, dtype), np.zeros(X.shape[1], dtype), num_steps=STEPS, chunk=STEPS,
                solver=solver, engine=engine, outer=optax.adam(0.1), transform=bl.transforms.Exp(), progress=False,
                throw=False,
            )  # fmt: skip
            return float(result.best.lam)

    return call


def sparhos(folder: Path, X: np.ndarray, y: np.ndarray, start: float) -> dict[str, Any]:
    sys.path.append(str(folder))
    from sparho.adapters.celer import CelerLasso
    from sparho.adapters.sklearn import SklearnLasso
    from sparho.criteria import HeldOutMSE
    from sparho.problem import L1, Problem, SquaredLoss
    from sparho.search import hoag_search

    problem = Problem(SquaredLoss(), L1(), X, y)
    split = HeldOutMSE(np.arange(ROWS), np.arange(ROWS, 2 * ROWS))

    def calling(solver: Any):
        search = lambda: hoag_search(problem, start, solver=solver, criterion=split, n_iter=STEPS)
        return lambda: float(search().best_hyperparam)

    return {"sparho, scikit-learn": calling(SklearnLasso()), "sparho, celer": calling(CelerLasso())}


def held_out(X: np.ndarray, y: np.ndarray, penalty: float) -> float:
    model = Lasso(alpha=penalty, fit_intercept=False, tol=1e-10, max_iter=100_000)
    coef = model.fit(X[:ROWS], y[:ROWS]).coef_
    return float(np.mean((X[ROWS:] @ coef - y[ROWS:]) ** 2))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--peer", type=Path, help="a directory that holds the packages sparho and celer"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--features", type=int, default=2000)
    parser.add_argument("--size", type=int, default=250, help="of the working set")
    parser.add_argument("--tol", type=float, default=1e-3, help="of the inner solvers")
    default = Path(__file__).parent / "results" / f"w1c_{jax.default_backend()}.json"
    parser.add_argument("--out", type=Path, default=default)
    args = parser.parse_args()
    X, y = data(args.features)
    largest = float(np.abs(X[:ROWS].T @ y[:ROWS]).max() / ROWS)
    start = largest / 10
    fista, working_set = bl.ProximalGradient(tol=args.tol), bl.WorkingSet(args.size, tol=args.tol)
    calls = {}
    for dtype in (np.float64, np.float32):
        precision = np.dtype(dtype).name
        calls[f"bilevel, {precision}"] = ours(X, y, start, dtype, fista)
        calls[f"bilevel, working set, {precision}"] = ours(X, y, start, dtype, working_set)
    if args.peer is not None:
        calls |= sparhos(args.peer, X, y, start)
    found = {}

    def check(name: str, penalty: float) -> None:
        found[name] = {"penalty": penalty, "held_out": held_out(X, y, penalty)}

    timings = harness.compare(calls, args.repeats, 1, check)
    grid = min(held_out(X, y, largest * 10 ** (-2 * i / 99)) for i in range(100))
    at_start = held_out(X, y, start)
    column = {name: f"{one['held_out']:.4f}" for name, one in found.items()}
    print(f"held-out error at the start {at_start:.4f}, best of the grid {grid:.4f}")
    print(harness.table(timings, list(calls)[-1], {"held-out": column}))
    chosen = {name: getattr(args, name) for name in ("features", "size", "tol")}
    setting = {"rows": ROWS, **chosen, "steps": STEPS, "start": start}
    levels = {"start": at_start, "grid": grid}
    harness.write(
        args.out,
        {"workload": "W1c", **setting, "levels": levels, "found": found, "timings": timings},
    )


if __name__ == "__main__":
    main()
