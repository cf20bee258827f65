"""Label cleaning on digits, half of 1000 training labels wrong, 100 trusted: every engine, several seeds.

Test accuracy against baselines whose penalties are chosen on the same trusted examples in the same
way, F1 of the kept and of the thrown examples, seconds of the whole optimisation (learning weights
on four folds and on all trusted examples, choosing the penalty, refit).

    python benchmarks/cleaning.py [--seeds 5] [--engines implicit ...] [--data digits]
        [--trusted 100] [--flip .5] [--out benchmarks/results/cleaning_cpu.json]
"""

import argparse
import statistics
import time
from pathlib import Path

import harness
import jax

from bilevel.tuning.clean import KEEP, f1, optimise
from bilevel.tuning.clean_fits import Fit, baselines, raw_model
from bilevel.tuning.clean_rows import Rows
from bilevel.tuning.data import load_table
from bilevel.tuning.scores import log_probabilities, scores
from bilevel.tuning.splits import clean_split, flip_labels

ENGINES = ["implicit", "unrolled", "f2sa", "moreau", "onestep"]


def run(data: str, trusted: int, flip: float, seeds: int, engines: list[str]) -> dict:
    """Scores by method, one entry for each seed."""
    table = load_table(data, None)
    assert table.classes is not None
    found: dict[str, list[dict]] = {}
    for seed in range(seeds):
        split = clean_split(table, trusted, None, seed)
        truth = table.y[split.train]
        labels, wrong = flip_labels(truth, len(table.classes), flip, seed)
        rows = Rows(table, split, labels, seed)

        def tested(fit: Fit, rows: Rows = rows, test=split.test) -> dict:
            model = raw_model(rows, fit)
            f = table.X[test] @ model["coef"] + model["intercept"]
            return {
                "penalty": fit.choice.penalty,
                **scores(table, log_probabilities(f, "softmax"), table.y[test]),
            }

        for name, fit in baselines(rows, truth).items():
            found.setdefault(name, []).append(tested(fit))
        for engine in engines:
            start, cpu_start = time.perf_counter(), time.process_time()
            cleaned = optimise(rows, engine, lambda _: None)
            kept = cleaned.weights > KEEP
            entry = tested(cleaned.fit) | {
                "f1_kept": f1(kept, ~wrong),
                "f1_thrown": f1(~kept, wrong),
                "status": cleaned.steps.status.name,
                "seconds": time.perf_counter() - start,
                "cpu_seconds": time.process_time() - cpu_start,
            }
            found.setdefault(engine, []).append(entry)
            print(f"seed {seed}  {engine:9s} {entry['test_accuracy']:.4f}", flush=True)
    return found


def summary(found: dict) -> str:
    """Means over the seeds; seconds are the median of the warm runs."""
    lines = ["method     accuracy  test loss  F1 kept  F1 thrown  warm s  (CPU)  cold s"]
    for name, entries in found.items():
        mean = {
            key: statistics.mean(entry[key] for entry in entries)
            for key in ("test_accuracy", "test_loss", "f1_kept", "f1_thrown")
            if key in entries[0]
        }
        line = f"{name:10s} {mean['test_accuracy']:.4f}    {mean['test_loss']:.4f}"
        if "f1_kept" in mean:
            warm = entries[1:] or entries
            wall, cpu = (
                statistics.median(entry[key] for entry in warm)
                for key in ("seconds", "cpu_seconds")
            )
            line += (
                f"     {mean['f1_kept']:.3f}    {mean['f1_thrown']:.3f}"
                f"      {wall:5.2f}  {cpu:5.2f}   {entries[0]['seconds']:.1f}"
            )
        lines.append(line)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="digits")
    parser.add_argument("--trusted", type=int, default=100)
    parser.add_argument("--flip", type=float, default=0.5)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--engines", nargs="+", default=ENGINES)
    default = Path(__file__).parent / "results" / f"cleaning_{jax.default_backend()}.json"
    parser.add_argument("--out", type=Path, default=default)
    args = parser.parse_args()
    found = run(args.data, args.trusted, args.flip, args.seeds, args.engines)
    print(summary(found))
    harness.write(
        args.out,
        {
            "data": args.data,
            "trusted": args.trusted,
            "flip": args.flip,
            "seeds": args.seeds,
            "results": found,
        },
    )


if __name__ == "__main__":
    main()
