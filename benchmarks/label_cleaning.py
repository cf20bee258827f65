"""Label cleaning by hypergradients alone: every engine with its settings on the same rows, beside baselines.

Half of the training labels are wrong; a weight for each is learned on trusted rows, by the loss of the model on
them. An engine is judged by two models which are solved for anew with what it found, whatever its own model:
the inner solution at its weights ("accuracy"), and a fit to the trusted rows and the training rows of a weight above
one half, with the same penalty ("refit"). F1 is that of the rows kept. A gradient is one backward pass on one batch
of one loss, a product one with a Hessian, its cross derivative included; of engines with inner solvers
evaluations of the losses are counted as they run, of single loops it is `engine.cost()`.

    python benchmarks/label_cleaning.py [--data digits] [--seeds 0-4] [--engines implicit ...]
    python benchmarks/label_cleaning.py --model network [--out benchmarks/results/label_cleaning_network_cpu.json]
    python benchmarks/label_cleaning.py --data DIRECTORY_OF_IDX_FILES [--trusted 5000] [--seeds 0-1]
        [--picture thrown_out.png] [--out benchmarks/results/label_cleaning_mnist_cpu.json]

Seeds 100 and up with `--validate` (a fifth of the trusted rows is the test) are for settings.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import harness
import jax
import jax.numpy as jnp
import label_cleaning_engines
import numpy as np
from label_cleaning_data import Rows, draw, load
from label_cleaning_engines import Setting, inner, network_settings, outer, settings
from label_cleaning_fits import Fit, accuracy, baselines, counted, loss
from label_cleaning_models import start

import bilevel as bl
from bilevel.tuning.errors import InputError

IMAGES = ("soba", "saba", "f2sa_loop", "meha", "implicit", "unrolled")
"""Engines on IDX files where none are named."""

LARGE = 2000
"""With more training rows the cold run is cut after its first chunk of steps (at most a tenth of them)."""


MODEL = "softmax"
"""That of the whole run: `--model`."""


def begin(rows: Rows, seed: int):
    return start(MODEL, rows.train["X"].shape[1], seed)


def run(setting: Setting, rows: Rows, seed: int, losses=(inner, outer), callback=None) -> bl.Result:
    size = setting.batch
    sizes = (size, None if size is None else min(size, len(rows.trusted["y"])))
    own = setting.gauss_newton
    problem = bl.Problem(
        *losses, rows.train, rows.trusted, batch_size=sizes, inner_gauss_newton=own
    )
    return bl.run(
        problem,
        jnp.zeros(len(rows.truth)),
        begin(rows, seed),
        engine=setting.engine,
        solver=setting.solver,
        outer=setting.outer,
        num_steps=setting.num_steps,
        key=jax.random.key(seed),
        callback=callback,
        progress=False,
        throw=False,
    )


def timed(setting: Setting, rows: Rows, seed: int, callback=None) -> tuple[bl.Result, float, float]:
    """The run, its seconds of wall clock and of CPU."""
    start, cpu_start = time.perf_counter(), time.process_time()
    result = jax.block_until_ready(run(setting, rows, seed, callback=callback))
    return result, time.perf_counter() - start, time.process_time() - cpu_start


def oracles(setting: Setting, result: bl.Result, rows: Rows, seed: int) -> dict[str, int]:
    """Gradients and Hessian-vector products of a run."""
    steps = result.history
    products = int(np.sum(steps.adjoint_steps))
    if setting.solver is None:  # as `engine.cost()` has it
        return {"gradients": int(np.sum(steps.inner_steps)), "products": products}
    if isinstance(
        setting.solver, bl.GradientDescent
    ):  # as many as the unrolled steps, by their budget
        evaluations = setting.num_steps * (setting.solver.max_steps + 1)
        return {"gradients": evaluations, "products": products}
    *losses, count = counted(inner, outer)
    count.update(inner=0, outer=0)
    run(setting, rows, seed, losses)
    jax.effects_barrier()
    return {"gradients": sum(count.values()), "products": products}


def judge(result: bl.Result, rows: Rows, seed: int) -> dict:
    """What the weights are worth."""
    lam = np.asarray(result.lam)
    weights, kept = 1 / (1 + np.exp(-lam.astype(float))), lam > 0
    first = begin(rows, seed)
    # The inner loss divides by the number of rows, `Fit` by the sum of the weights.
    alone = Fit(jnp.asarray(rows.train["X"]))
    w = alone(rows.train["y"], weights, label_cleaning_engines.PENALTY / weights.mean(), first)
    together = Fit(jnp.asarray(np.concatenate([rows.train["X"], rows.trusted["X"]])))
    labels = np.concatenate([rows.train["y"], rows.trusted["y"]])
    refit = together(
        labels,
        np.concatenate([kept, np.ones(len(rows.trusted["y"]))]),
        label_cleaning_engines.PENALTY,
        first,
    )
    hits = np.sum(kept & ~rows.wrong)
    return {
        "accuracy": accuracy(w, rows.test),
        "loss": loss(w, rows.test),
        "refit": accuracy(refit, rows.test),
        "f1": float(2 * hits / (np.sum(kept) + np.sum(~rows.wrong))),
        "kept": float(np.mean(kept)),
        "status": result.status.name,
    }


def table(found: dict, fits: list[dict]) -> str:
    """Means over seeds."""

    def spread(values: list[float]) -> str:
        error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
        return f"{statistics.mean(values):.3f} ± {error:.3f}"

    lines = [
        f"{'':12s} {'accuracy':15s} {'refit':15s} {'F1 kept':15s} gradients products rows/batch "
        "warm s (CPU)   cold s"
    ]
    lines += [f"{name:12s} {spread([fit[name]['accuracy'] for fit in fits])}" for name in fits[0]]
    for name, entry in found.items():
        runs = entry["runs"]
        column = lambda key, runs=runs: [one[key] for one in runs]
        warm = [statistics.median(entry["warm"][key]) for key in ("wall", "cpu")]
        bad = sorted({status for status in column("status") if status != "OK"})
        lines.append(
            f"{name:12s} {spread(column('accuracy'))}   {spread(column('refit'))}   {spread(column('f1'))}   "
            f"{entry['gradients']:9d} {entry['products']:8d} {entry['batch'] or 'all':>10} "
            f"{warm[0]:6.2f} ({warm[1]:5.2f}) {entry['cold']['wall']:7.2f}  {' '.join(bad)}"
        )
    return "\n".join(lines)


def draw_picture(path: Path, rows: Rows, lam: np.ndarray, name: str) -> None:
    """The images of the least weights with the labels that were given to them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    picture = Figure(figsize=(9, 5.6), layout="constrained")
    side = round((rows.train["X"].shape[1] - 1) ** 0.5)
    for panel, row in zip(picture.subplots(4, 10).flat, np.argsort(lam), strict=False):
        panel.imshow(rows.train["X"][row, :-1].reshape(side, side), cmap="gray_r")
        color, mark = ("#0072B2", "wrong") if rows.wrong[row] else ("#E69F00", "right")
        panel.set_title(f"“{rows.train['y'][row]}”\n{mark}", color=color, fontsize=9)
        panel.set(xticks=[], yticks=[])
    picture.suptitle(
        f"Lowest weights ({name}): the label given, and whether it was right", fontsize=10
    )
    picture.savefig(path, dpi=100)
    print(f"picture: {path}")


def seed_range(text: str) -> list[int]:
    """`0-4`: both ends included."""
    first, _, last = text.partition("-")
    return list(range(int(first), int(last or first) + 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--data", default="digits", help="digits, mnist, or a directory of IDX files"
    )
    parser.add_argument("--train", type=int, help="training rows (digits 1000, else 5000)")
    parser.add_argument("--trusted", type=int, help="trusted rows (digits 100, else 5000)")
    parser.add_argument("--flip", type=float, default=0.5, help="share of wrong labels")
    parser.add_argument("--seeds", type=seed_range, default=[0, 1, 2, 3, 4], help="such as 0-4")
    parser.add_argument("--engines", nargs="+", metavar="NAME")
    parser.add_argument("--model", choices=("softmax", "network"), default="softmax")
    parser.add_argument("--steps", type=int, default=2000, help="outer steps of single loops")
    parser.add_argument("--penalty", type=float, default=1e-3, help="factor of ||w||^2")
    parser.add_argument("--validate", action="store_true", help="judge by held-out trusted rows")
    parser.add_argument("--picture", type=Path, help="draw what the first engine throws out")
    parser.add_argument("--out", type=Path, help="a JSON file")
    parser.add_argument("--add", action="store_true", help="keep what --out has of the same rows")
    args = parser.parse_args()
    global MODEL
    MODEL, label_cleaning_engines.PENALTY = args.model, args.penalty
    digits = args.data == "digits"
    args.train = args.train or (1000 if digits else 5000)
    args.trusted = args.trusted or (100 if digits else 5000)
    began = time.perf_counter()
    try:
        pool = load(args.data)
        draws = [
            draw(pool, args.train, args.trusted, args.flip, seed, args.validate)
            for seed in args.seeds
        ]
    except InputError as error:
        parser.error(str(error))
    linear = args.model == "softmax"
    known = (
        settings(draws[0].train["X"], args.steps)
        if linear
        else network_settings(args.train, args.steps)
    )
    names = args.engines or (list(known) if digits or not linear else list(IMAGES))
    if unknown := sorted(set(names) - set(known)):
        parser.error(f"no engine {', '.join(unknown)}; expected some of {', '.join(known)}")
    given = ("model", "train", "trusted", "flip", "seeds", "penalty", "validate")
    fits, found = [], {}
    if args.add:
        last = json.loads(args.out.read_text())
        if any(last[key] != getattr(args, key) for key in given):
            parser.error(f"{args.out} has other settings: expected the same {', '.join(given)}")
        fits, found = last["baselines"], last["engines"]
        began -= last["seconds"]
    elif not args.validate:
        fits = [
            baselines(rows, begin(rows, one)) for one, rows in zip(args.seeds, draws, strict=True)
        ]
    for fit in fits:
        print("  ".join(f"{name} {one['accuracy']:.4f}" for name, one in fit.items()), flush=True)
    for name in names:
        setting, runs, walls, cpus = known[name], [], [], []
        # A first run of many rows ends after its first chunk: it has compiled.
        stop = (lambda state, history: True) if args.train > LARGE else None
        result, *cold = timed(setting, draws[0], args.seeds[0], stop)
        for seed, rows in zip(args.seeds, draws, strict=True):
            result, wall, cpu = timed(setting, rows, seed)
            walls.append(wall)
            cpus.append(cpu)
            runs.append({"seed": seed, **judge(result, rows, seed)})
            print(f"{name} {runs[-1]} {cpu:.2f} s CPU", flush=True)
        if args.picture is not None and name == names[0]:
            draw_picture(args.picture, draws[-1], np.asarray(result.lam), name)
        found[name] = {
            "setting": setting.note,
            "outer_steps": setting.num_steps,
            "batch": setting.batch,
            **oracles(setting, result, draws[-1], args.seeds[-1]),
            "cold": dict(zip(("wall", "cpu"), cold, strict=True)),
            "warm": {"wall": walls, "cpu": cpus},
            "runs": runs,
        }
        text = table(found, fits or [{}])
        seconds = time.perf_counter() - began
        if args.out is not None:  # after each engine: a run that is cut short leaves what it has
            record = {
                "data": args.data if args.data in ("digits", "mnist") else "IDX files",
                **{key: getattr(args, key) for key in given},
                "seconds": seconds,
                "baselines": fits,
                "engines": found,
                "table": text.split("\n"),
            }
            harness.write(args.out, record)
    print(f"\n{text}\n{seconds:.0f} s in all")


if __name__ == "__main__":
    main()
