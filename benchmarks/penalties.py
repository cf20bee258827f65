"""Many penalties against one: test losses on the same splits, cost, and time against scikit-learn.

For each set and seed: the test loss of `--penalty per-feature` (`per-group` where the groups are known,
`free` for two sets) over that of the one penalty which is best on a grid of 60 with the same folds.
Geometric means over paired seeds, with their standard errors. Seeds re-split the real sets, they do not
draw new data; synthetic sets are drawn anew. Then the search and refit are timed against
scikit-learn's search over 20 penalties on the same folds and its refit (first seed, medians).

    python benchmarks/penalties.py [--quick] [--sets sparse ...] [--out benchmarks/results/penalties_cpu.json]
"""

import argparse
import time
import warnings
from pathlib import Path

import harness
import jax
import numpy as np

from bilevel.tuning import baselines, search
from bilevel.tuning.data import Table, load_table
from bilevel.tuning.folds import Folds, raw_model
from bilevel.tuning.scores import log_probabilities, scores
from bilevel.tuning.splits import tune_split

SEEDS = range(300, 308)
TEST_ROWS = 2000
GRID = np.geomspace(1e-6, 1e4, 60)


def bundled(name: str, noise: int = 0):
    """A bundled set, with columns of standard normal noise appended."""

    def make(seed: int) -> tuple[Table, float, None]:
        table = load_table(name, None)
        columns = np.random.default_rng([seed, 1]).normal(size=(len(table.y), noise))
        features = (*table.features, *(f"noise {i}" for i in range(noise)))
        X = np.concatenate([table.X, columns], axis=1)
        # 600 training rows of digits, else three quarters.
        share = 1 - 600 / len(table.y) if name == "digits" else 0.25
        return Table(name, X, table.y, table.classes, features, table.target), share, None

    return make


def linear(num_train: int, coef, r2: float, group: np.ndarray | None = None):
    """`y = X w + noise`: standard normal X, `w = coef(rng)`, population R2 given."""

    def make(seed: int) -> tuple[Table, float, np.ndarray | None]:
        rng = np.random.default_rng([seed, 2])
        w = coef(rng)
        X = rng.normal(size=(num_train + TEST_ROWS, len(w)))
        noise = np.sqrt(w @ w * (1 - r2) / r2) * rng.normal(size=len(X))
        table = Table(
            "synthetic", X, X @ w + noise, None, tuple(f"x{i}" for i in range(len(w))), "y"
        )
        return table, TEST_ROWS / len(X), group

    return make


GROUP = np.repeat(np.arange(4), 20)
GROUP_SCALES = np.array([1.0, 0.3, 0.1, 0.0])


def sparse_coef(rng) -> np.ndarray:
    """Ten standard normal coefficients among 200."""
    w = np.zeros(200)
    w[rng.choice(200, 10, replace=False)] = rng.normal(size=10)
    return w


def group_coef(rng) -> np.ndarray:
    """Four groups of 20 features, coefficients of standard deviation 1, 0.3, 0.1 and 0."""
    return GROUP_SCALES[GROUP] * rng.normal(size=len(GROUP))


# Set: what makes a table, and the upper bar of the ratio for each kind of penalty (None: evidence only).
SETS = {
    "breast_cancer": (bundled("breast_cancer"), {"per-feature": 1.02, "free": None}),
    "breast_cancer + 100 noise": (
        bundled("breast_cancer", 100),
        {"per-feature": 0.70, "free": None},
    ),
    "diabetes": (bundled("diabetes"), {"per-feature": 1.01}),
    "diabetes + 100 noise": (bundled("diabetes", 100), {"per-feature": 0.92}),
    "digits, 600 rows": (bundled("digits"), {"per-feature": 1.02}),
    "sparse": (linear(150, sparse_coef, 0.9), {"per-feature": 0.52}),
    "groups": (linear(120, group_coef, 0.8, GROUP), {"per-feature": 0.94, "per-group": 0.86}),
}


def quiet(_: str) -> None:
    pass


def test_loss(folds: Folds, fit: dict[str, np.ndarray]) -> float:
    table, test = folds.table, folds.split.test
    model = raw_model(folds, fit)
    f = table.X[test] @ model["coef"] + model["intercept"]
    return scores(table, log_probabilities(f, folds.task), table.y[test])["test_loss"]


def ratios(make, kinds, seed: int) -> list[dict]:
    """One record for each kind of penalty on one seed."""
    table, share, group = make(seed)
    folds = Folds(table, tune_split(table, 5, share, seed), table.task)
    found = {}
    for kind in kinds:
        start = time.perf_counter()
        tuned = search.optimise(folds, kind, "implicit", quiet, group)
        found[kind] = (tuned, time.perf_counter() - start)
    values, _ = folds.curve(GRID)
    best = float(GRID[values.argmin()])
    single = test_loss(folds, folds.fit_part(-1, best))
    return [
        {
            "seed": seed,
            "penalty": kind,
            "ratio": test_loss(folds, tuned.refit) / single,
            "cv_ratio": tuned.cv_loss / float(values.min()),
            "single": {"penalty": best, "test_loss": single},
            "theta": tuned.theta.tolist() if len(tuned.theta) < 10 else None,
            "evaluations": sum(tuned.evaluations.values()),
            "seconds": seconds,
            "status": tuned.steps.status.name,
        }
        for kind, (tuned, seconds) in found.items()
    ]


def summary(records: list[dict], bar: float | None) -> dict:
    logs = np.log([record["ratio"] for record in records])
    mean = float(np.exp(logs.mean()))
    error = float(mean * logs.std(ddof=1) / np.sqrt(len(logs))) if len(logs) > 1 else None
    return {
        "ratio": mean,
        "standard_error": error,
        "worst": float(np.exp(logs.max())),
        "bar": bar,
        "met": None if bar is None else mean <= bar,
        "evaluations": float(np.mean([record["evaluations"] for record in records])),
    }


def timing(make, seed: int, repeats: int) -> dict:
    """The search and the refit against scikit-learn's grid of 20 penalties and its refit."""
    table, share, _ = make(seed)
    split = tune_split(table, 5, share, seed)
    lam = np.geomspace(search.COARSE[0], search.COARSE[-1], 20)
    strengths = lam * len(split.train) if table.classes is None else 1 / (lam * len(split.train))

    def ours():
        return search.optimise(
            Folds(table, split, table.task), "per-feature", "implicit", quiet
        ).penalties

    def sklearn():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            best = baselines.search(table, split, strengths)
            baselines.fit(table, split, best)
            return best

    found = harness.compare({"bilevel": ours, "scikit-learn": sklearn}, repeats)
    return {
        "seconds": {name: record["warm_seconds"] for name, record in found.items()},
        "wall_ratio": harness.ratios(found, "scikit-learn")["bilevel"],
        "cpu_ratio": harness.ratios(found, "scikit-learn", "warm_cpu_seconds")["bilevel"],
    }


def markdown(results: list[dict], timings: dict) -> str:
    """The table of the README."""
    lines = [
        "| set | penalty | test loss ratio | evaluations | time ratio |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in results:
        time_of = timings[row["set"]]["wall_ratio"] if row["penalty"] == "per-feature" else None
        error = "" if row["standard_error"] is None else f" ± {row['standard_error']:.3f}"
        lines.append(
            f"| {row['set']} | {row['penalty']} | {row['ratio']:.3f}{error} | {row['evaluations']:.0f} | "
            f"{'' if time_of is None else format(time_of, '.2f')} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=list(SETS))
    parser.add_argument("--quick", action="store_true", help="one seed, one timing")
    default = Path(__file__).parent / "results" / f"penalties_{jax.default_backend()}.json"
    parser.add_argument("--out", type=Path, default=default)
    args = parser.parse_args()
    seeds = SEEDS[:1] if args.quick else SEEDS
    results, records, timings = [], [], {}

    def write() -> None:
        harness.write(args.out, {"summary": results, "timings": timings, "results": records})

    with jax.enable_x64(True):
        for name in args.sets:
            make, bars = SETS[name]
            found = [{"set": name, **r} for seed in seeds for r in ratios(make, bars, seed)]
            records += found
            for kind, bar in bars.items():
                of_kind = [r for r in found if r["penalty"] == kind]
                row = {"set": name, "penalty": kind, **summary(of_kind, bar)}
                results.append(row)
                print(
                    f"{name:26s} {kind:12s} {row['ratio']:.3f} +- {row['standard_error'] or 0:.3f} "
                    f"(worst {row['worst']:.2f}, bar {bar}), {row['evaluations']:.1f} evaluations",
                    flush=True,
                )
            write()
        for name in args.sets:
            timings[name] = timing(SETS[name][0], seeds[0], 1 if args.quick else 3)
            # The first search of a set compiles.
            cold = next(r["seconds"] for r in records if r["set"] == name)
            timings[name]["cold_seconds"] = cold
            print(
                f"{name:26s} time over scikit-learn's: {timings[name]['wall_ratio']:.2f} "
                f"(CPU {timings[name]['cpu_ratio']:.2f}); compilation included {cold:.1f} s",
                flush=True,
            )
            write()
    print(markdown(results, timings))


if __name__ == "__main__":
    main()
