"""Label cleaning on digits, half of 1000 training labels wrong, 100 trusted: every engine, many seeds.

Test accuracy against baselines whose penalties are chosen on the same trusted examples in the same
way, F1 of the kept and of the thrown examples, seconds of the whole optimisation (learning weights
on four folds and on all trusted examples, choosing penalties, second look, refit). Every engine runs on
`--seeds`, the first one on `--fresh` too, in a table of its own.

    python benchmarks/cleaning.py [--seeds 0-4] [--fresh 5-24] [--engines implicit ...]
        [--data digits] [--trusted 100] [--flip .5] [--out benchmarks/results/cleaning_cpu.json]
        [--steps 10] [--learning-penalty .2]
"""

import argparse
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import harness
import jax
import numpy as np

from bilevel.tuning import clean, clean_rows
from bilevel.tuning.clean_findings import KEEP, SIMPLE, judge, selection_scores
from bilevel.tuning.clean_fits import Fit, baselines, raw_model
from bilevel.tuning.clean_rows import Rows
from bilevel.tuning.data import Table, load_table
from bilevel.tuning.scores import log_probabilities, scores
from bilevel.tuning.splits import clean_split, flip_labels

ENGINES = ("implicit", "unrolled", "f2sa", "moreau", "onestep")


def run(table: Table, trusted: int, flip: float, seeds: Sequence[int], engines: list[str]) -> dict:
    """Scores by method, one entry for each seed."""
    assert table.classes is not None
    found: dict[str, list[dict]] = {}
    for seed in seeds:
        split = clean_split(table, trusted, None, seed)
        truth = table.y[split.train]
        labels, wrong = flip_labels(truth, len(table.classes), flip, seed)
        rows = Rows(table, split, labels, seed)

        def tested(fit: Fit, rows: Rows = rows, test=split.test, seed=seed) -> dict:
            model = raw_model(rows, fit)
            f = table.X[test] @ model["coef"] + model["intercept"]
            return {
                "seed": seed,
                "penalty": fit.choice.penalty,
                **scores(table, log_probabilities(f, "softmax"), table.y[test]),
            }

        fits = baselines(rows, truth)
        for name, fit in fits.items():
            found.setdefault(name, []).append(tested(fit))
        for engine in engines:
            start, cpu_start = time.perf_counter(), time.process_time()
            cleaned = clean.optimise(rows, engine, lambda _: None)
            seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
            kept = cleaned.weights > KEEP
            entry = tested(cleaned.fit) | {
                **selection_scores(kept, ~wrong, "kept"),
                **selection_scores(~kept, wrong, "thrown"),
                **judge(rows, cleaned.fit.choice, {name: fits[name].choice for name in SIMPLE}),
                "first_f1_kept": selection_scores(cleaned.learned > KEEP, ~wrong, "kept")[
                    "f1_kept"
                ],
                "status": cleaned.steps.status.name,
                "seconds": seconds,
                "cpu_seconds": cpu_seconds,
            }
            found.setdefault(engine, []).append(entry)
            print(f"seed {seed}  {engine:9s} {entry['test_accuracy']:.4f}", flush=True)
    return found


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """Mean and its standard error (nan for one value)."""
    error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(values.mean()), float(error)


def summary(found: dict, engines: list[str]) -> str:
    """Accuracy of each method; for each engine its paired gain, F1, seconds (median, warm), verdicts."""

    def column(name: str, key: str = "test_accuracy") -> np.ndarray:
        return np.asarray([entry[key] for entry in found[name]])

    lines = []
    for name in found:
        mean, error = mean_and_error(column(name))
        lines.append(f"{name:13s} accuracy {mean:.4f} +- {error:.4f}")
    for name in engines:
        gains = []
        for other in (other for other in found if other not in (*engines, "oracle")):
            mean, error = mean_and_error(column(name) - column(other))
            gains.append(f"{other} {mean:+.4f} +- {error:.4f}")
        f1 = ", ".join(
            f"{what} {column(name, key).mean():.3f}"
            for what, key in (
                ("kept", "f1_kept"),
                ("thrown", "f1_thrown"),
                ("kept before the second look", "first_f1_kept"),
            )
        )
        warm = found[name][1:] or found[name]
        seconds, cpu = (
            statistics.median(entry[key] for entry in warm) for key in ("seconds", "cpu_seconds")
        )
        opinions = [entry["verdict"].split(",")[0].split(" (")[0] for entry in found[name]]
        counts = ", ".join(f"{opinions.count(one)} x {one}" for one in sorted(set(opinions)))
        lines += [
            f"{name}: paired gain over {'; '.join(gains)}",
            f"    F1 {f1}",
            f"    warm {seconds:.2f} s (CPU {cpu:.2f}), cold {found[name][0]['seconds']:.1f} s",
            f"    verdicts without the test split: {counts}",
        ]
    return "\n".join(lines)


def seed_range(text: str) -> range:
    """`5-24`: both ends included."""
    first, last = text.split("-")
    return range(int(first), int(last) + 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="digits")
    parser.add_argument("--trusted", type=int, default=100)
    parser.add_argument("--flip", type=float, default=0.5)
    parser.add_argument("--seeds", type=seed_range, default="0-4")
    parser.add_argument("--fresh", type=seed_range, help="more seeds for the first engine alone")
    parser.add_argument("--engines", nargs="+", default=list(ENGINES))
    default = Path(__file__).parent / "results" / f"cleaning_{jax.default_backend()}.json"
    parser.add_argument("--out", type=Path, default=default)
    parser.add_argument("--steps", type=int, default=clean.NUM_STEPS)
    parser.add_argument("--learning-penalty", type=float, default=clean_rows.LEARNING_PENALTY)
    args = parser.parse_args()
    clean.NUM_STEPS, clean_rows.LEARNING_PENALTY = args.steps, args.learning_penalty
    record: dict = {
        key: getattr(args, key) for key in ("data", "trusted", "flip", "steps", "learning_penalty")
    }
    table = load_table(args.data, None)
    plans = [("results", args.seeds, args.engines), ("fresh", args.fresh, args.engines[:1])]
    for key, seeds, engines in plans:
        if seeds is not None:
            record[key] = run(table, args.trusted, args.flip, seeds, engines)
            text = summary(record[key], engines)
            print(f"\nseeds {seeds[0]} to {seeds[-1]}\n{text}\n")
            record[f"{key}_summary"] = text.split("\n")
    harness.write(args.out, record)


if __name__ == "__main__":
    main()
