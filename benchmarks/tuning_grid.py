"""`bilevel tune` against a fine grid of penalties on the same folds, and against scikit-learn.

For each data set and seed: the cross-validated loss that the hypergradient run ends with, over the
best of 60 penalties from 1e-6 to 1e4, and what each takes.

    python benchmarks/tuning_grid.py [--seeds 3] [--engines implicit ...]
        [--data digits breast_cancer diabetes wine] [--out benchmarks/results/tuning_grid_cpu.json]
"""

import argparse
import time
from pathlib import Path

import harness
import jax
import numpy as np

from bilevel.tuning import search
from bilevel.tuning.baselines import sklearn_baselines
from bilevel.tuning.data import load_table
from bilevel.tuning.folds import BOUNDS, Folds
from bilevel.tuning.splits import tune_split

DATA = ["digits", "breast_cancer", "diabetes", "wine"]


def quiet(_: str) -> None:
    pass


def timed(call):
    """Result, wall seconds and CPU seconds of a call."""
    start, cpu_start = time.perf_counter(), time.process_time()
    result = call()
    return result, time.perf_counter() - start, time.process_time() - cpu_start


def run(data: str, seed: int, engines: list[str]) -> list[dict]:
    """One record for each engine."""
    table = load_table(data, None)
    split = tune_split(table, 5, 0.25, seed)
    folds = Folds(table, split, table.task)
    grid = np.geomspace(*BOUNDS, 60)
    folds.curve(grid[:1])  # compiles the solve
    (values, _), grid_seconds, grid_cpu = timed(lambda: folds.curve(grid))
    sklearn, sklearn_seconds, _ = timed(lambda: sklearn_baselines(table, split))
    records = []
    for engine in engines:
        tuned, cold, _ = timed(lambda e=engine: search.optimise(folds, "single", e, quiet))
        _, warm, warm_cpu = timed(lambda e=engine: search.optimise(folds, "single", e, quiet))
        record = {
            "data": data,
            "seed": seed,
            "engine": engine,
            "status": tuned.steps.status.name,
            "penalty": tuned.level,
            "cv_loss": tuned.cv_loss,
            "grid_cv_loss": float(values.min()),
            "grid_penalty": float(grid[values.argmin()]),
            "ratio": tuned.cv_loss / float(values.min()),
            "sklearn_cv_loss": sklearn["sklearn"]["cv_loss"],
            "seconds": {"cold": cold, "warm": warm, "warm_cpu": warm_cpu},
            "grid_seconds": {"warm": grid_seconds, "warm_cpu": grid_cpu},
            "sklearn_seconds": sklearn_seconds,
        }
        records.append(record)
        print(
            f"{data:14s} seed {seed} {engine:9s} CV {record['cv_loss']:10.5g} "
            f"({100 * (record['ratio'] - 1):+.2f} % of the grid, scikit-learn "
            f"{100 * (record['sklearn_cv_loss'] / record['grid_cv_loss'] - 1):+.2f} %)  "
            f"warm {warm:.2f} s, grid {grid_seconds:.2f} s, scikit-learn {sklearn_seconds:.2f} s",
            flush=True,
        )
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", nargs="+", default=DATA)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--engines", nargs="+", default=["implicit"])
    default = Path(__file__).parent / "results" / f"tuning_grid_{jax.default_backend()}.json"
    parser.add_argument("--out", type=Path, default=default)
    args = parser.parse_args()
    records = []
    with jax.enable_x64(True):
        for data in args.data:
            for seed in range(args.seeds):
                records += run(data, seed, args.engines)
    print(f"largest ratio to the grid: {max(record['ratio'] for record in records):.4f}")
    harness.write(args.out, {"results": records})


if __name__ == "__main__":
    main()
