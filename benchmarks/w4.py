"""Many inner problems at once: refilled lanes against `vmap` and `lax.map` of the same solver.

256 ridge or logistic problems of 128 rows, with 16, 64 or 1024 unknowns and penalties spread evenly on a logarithmic
scale; ridge has feature scales over a factor of 30 as well. W5 is logistic regression by gradient descent with 64
unknowns and penalties over e^8. float32. `lane-steps` is steps of all lanes over the useful ones. "auto" is the number
that `Tasks(lanes="auto")` takes for the same inner problems, by its own measurement.

    python benchmarks/w4.py [--repeats 5] [--cases w5,...] [--out benchmarks/results/w4_cpu.json]

With `--cases` the others that are in the file stay there, with the machine that they were measured on.
"""

import argparse
import json
from pathlib import Path

import equinox as eqx
import harness
import jax
import jax.numpy as jnp
import numpy as np

import bilevel as bl
from solvers.lanes import solve_many

COUNT, ROWS = 256, 128
LANES = (2, 4, 8, 16, 32)


def logistic(w, batch):
    X, y, penalty = batch
    z = X @ w
    return jnp.mean(jnp.logaddexp(0.0, z) - y * z) + 0.5 * penalty * jnp.sum(w**2)


def ridge(w, batch):
    X, y, penalty = batch
    return 0.5 * jnp.mean((X @ w - y) ** 2) + 0.5 * penalty * jnp.sum(w**2)


def problems(loss, unknowns: int, spread: float, top: float):
    """Penalties from `top` down to `top exp(-spread)`, in random order."""
    rng = np.random.default_rng(0)
    X = rng.standard_normal((COUNT, ROWS, unknowns)) / max(unknowns / 64, 1.0) ** 0.5
    if loss is ridge:
        X *= np.exp(rng.uniform(-np.log(30) / 2, np.log(30) / 2, (COUNT, 1, unknowns))) / 3
    signal = np.einsum("nij,nj->ni", X, rng.standard_normal((COUNT, unknowns))) / unknowns**0.5
    y = signal + 0.5 * rng.standard_normal((COUNT, ROWS))
    if loss is logistic:
        y = y > 0
    penalty = top * np.exp(-spread * rng.permutation(COUNT) / COUNT)
    arrays = (X, y, penalty)
    return tuple(jnp.asarray(array, jnp.float32) for array in arrays)


WITHOUT = {
    logistic: lambda w, lam, task: logistic(w, task),
    ridge: lambda w, lam, task: ridge(w, task),
}
"""Inner losses that do not look at the outer variable."""

LBFGS = bl.LBFGS(max_steps=300, tol=1e-4)
DESCENT = bl.GradientDescent(max_steps=2000, tol=1e-3)
SIX_ORDERS = 6 * np.log(10)
CASES = {
    "w5": (logistic, 64, bl.GradientDescent(1.0, max_steps=4000, tol=1e-3), 8.0, 0.1),
    "logistic-gd-16": (logistic, 16, DESCENT, SIX_ORDERS, 1.0),
    "logistic-gd-64": (logistic, 64, DESCENT, SIX_ORDERS, 1.0),
    "logistic-gd-1024": (logistic, 1024, DESCENT, SIX_ORDERS, 1.0),
    "ridge-gd-16": (ridge, 16, DESCENT, SIX_ORDERS, 1.0),
    "ridge-gd-64": (ridge, 64, DESCENT, SIX_ORDERS, 1.0),
    "ridge-gd-1024": (ridge, 1024, DESCENT, SIX_ORDERS, 1.0),
    "logistic-lbfgs-16": (logistic, 16, LBFGS, SIX_ORDERS, 1.0),
    "logistic-lbfgs-64": (logistic, 64, LBFGS, SIX_ORDERS, 1.0),
    "logistic-lbfgs-1024": (logistic, 1024, LBFGS, SIX_ORDERS, 1.0),
    "ridge-lbfgs-16": (ridge, 16, LBFGS, SIX_ORDERS, 1.0),
    "ridge-lbfgs-64": (ridge, 64, LBFGS, SIX_ORDERS, 1.0),
    "ridge-lbfgs-1024": (ridge, 1024, LBFGS, SIX_ORDERS, 1.0),
}


def no_loss(w, lam, task):
    return jnp.mean(w) * lam


def automatic(loss, solver, w, batches) -> int:
    """The lanes that are chosen for the first step of a run on these inner problems."""
    tasks = bl.Tasks(bl.Problem(WITHOUT[loss], no_loss), batches)
    return bl.choose_lanes(tasks, jnp.float32(1.0), w, solver=solver, engine=bl.OneStep(0.1))


def measure(name: str, repeats: int) -> dict:
    loss, unknowns, solver, spread, top = CASES[name]
    batches = problems(loss, unknowns, spread, top)
    w = jnp.zeros((COUNT, unknowns), jnp.float32)
    solve = eqx.filter_jit(
        lambda w, batches, lanes: solve_many(solver, loss, w, batches, lanes=lanes)
    )
    found = {}

    def call(lanes: int):
        return lambda: solve(w, batches, lanes)

    calls = {"lax.map": call(1), "vmap": call(COUNT)}
    calls |= {f"{lanes} lanes": call(lanes) for lanes in LANES}
    timings = harness.compare(calls, repeats, check=found.__setitem__)
    reference = found["lax.map"]
    steps = np.asarray(reference[2].inner.num_steps)
    seconds = {key: timing["warm_seconds"]["median"] for key, timing in timings.items()}
    best = min((key for key in calls if "lanes" in key), key=lambda key: seconds[key])
    lanes = automatic(loss, solver, w, batches)
    chosen = {1: "lax.map", COUNT: "vmap"}.get(lanes, f"{lanes} lanes")

    def over(kind: str, others: list[str]) -> float:
        """Ratio of medians, of what was chosen and the best of the others."""
        median = lambda key: timings[key][kind]["median"]
        return median(chosen) / min(map(median, others))

    record = {
        "auto": {
            "lanes": lanes,
            "over_better_of_vmap_and_map": over("warm_seconds", ["lax.map", "vmap"]),
            "cpu_over_better_of_vmap_and_map": over("warm_cpu_seconds", ["lax.map", "vmap"]),
            "over_best": over("warm_seconds", list(calls)),
        },
        "steps": {"mean": float(steps.mean()), "max": int(steps.max())},
        "met": int(np.sum(np.asarray(reference[2].inner.status) == 0)),
        "timings": timings,
        "best": best,
        "over_lax_map": seconds[best] / seconds["lax.map"],
        "over_vmap": seconds[best] / seconds["vmap"],
        "lane_steps_over_useful": {
            key: float(out[2].lane_steps / out[2].inner.num_steps.sum())
            for key, out in found.items()
        },
        "steps_that_differ": {
            key: int(np.sum(np.asarray(out[2].inner.num_steps) != steps))
            for key, out in found.items()
        },
        "largest_difference": {
            key: float(jnp.max(jnp.abs(out[0] - reference[0]))) for key, out in found.items()
        },
    }
    work = {key: f"{value:.2f}" for key, value in record["lane_steps_over_useful"].items()}
    print(f"\n{name}: steps mean {steps.mean():.0f}, max {steps.max()}; met {record['met']}")
    print(harness.table(timings, "lax.map", {"lane-steps": work}))
    print(
        f"best {best}: {record['over_lax_map']:.2f} of lax.map, {record['over_vmap']:.2f} of vmap"
    )
    auto = record["auto"]
    print(
        f"auto takes {chosen}: {auto['over_better_of_vmap_and_map']:.2f} of the better of vmap and lax.map "
        f"(CPU {auto['cpu_over_better_of_vmap_and_map']:.2f}), {auto['over_best']:.2f} of the best",
        flush=True,
    )
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cases", default=",".join(CASES))
    default = Path(__file__).parent / "results" / f"w4_{jax.default_backend()}.json"
    parser.add_argument("--out", type=Path, default=default)
    args = parser.parse_args()
    names = args.cases.split(",")
    if unknown := set(names) - set(CASES):
        parser.error(f"no case {', '.join(sorted(unknown))}; expected some of {', '.join(CASES)}")
    cases = {} if set(names) == set(CASES) else measured_before(args.out)
    for name in names:
        cases[name] = measure(name, args.repeats)
        harness.write(args.out, {"cases": {name: cases[name] for name in CASES if name in cases}})


def measured_before(path: Path) -> dict:
    """The cases in that file, each with the machine and the versions that it was measured with."""
    if not path.exists():
        return {}
    record = json.loads(path.read_text())
    origin = {key: record[key] for key in ("machine", "versions")}
    return {name: origin | case for name, case in record["cases"].items()}


if __name__ == "__main__":
    main()
