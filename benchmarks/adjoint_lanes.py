"""Many adjoint systems at once: refilled lanes of CG against `vmap` and one by one.

256 ridge problems of 128 rows with 16 or 64 unknowns (or others), penalties spread evenly on a logarithmic scale over
six orders of magnitude and feature scales over a factor of 30, each with the adjoint system of a validation loss.
float32. The inner problems are solved beforehand, so that a step of `Implicit` is its adjoint systems, the gradients
they begin with and the derivatives they end in. "auto" is what `Tasks(lanes="auto")` takes by its own measurement of a
step. `lane-steps` is products of all lanes over the useful ones, of the systems alone. `load_average` above 1 means
that other work disturbed the timings.

    python benchmarks/adjoint_lanes.py [--repeats 5] [--unknowns 16,64] [--out benchmarks/results/...json]
"""

import argparse
import dataclasses
import os
from pathlib import Path

import equinox as eqx
import harness
import jax
import jax.numpy as jnp
import numpy as np

import bilevel as bl
from bilevel.calls import engine_step, init_engine
from solvers.linear.lanes import solve_systems

COUNT, ROWS = 256, 128
LANES = (4, 8, 16, 32)
ENGINE = bl.Implicit(bl.CG(rtol=1e-3, max_steps=2000), estimate=False)
SOLVER = bl.LBFGS(max_steps=1, tol=1e9)
"""Takes the solutions as they are."""


def inner(w, lam, task):
    X, y, penalty, _ = task
    return 0.5 * jnp.mean((X @ w - y) ** 2) + 0.5 * lam * penalty * jnp.sum(w**2)


def outer(w, lam, task):
    return 0.5 * jnp.sum((w - task[3]) ** 2)


def problems(unknowns: int) -> tuple[bl.Tasks, jax.Array]:
    """The tasks, and the solutions of their inner problems at `lam = 1`."""
    rng = np.random.default_rng(0)
    X = rng.standard_normal((COUNT, ROWS, unknowns)) / max(unknowns / 64, 1.0) ** 0.5
    X *= np.exp(rng.uniform(-np.log(30) / 2, np.log(30) / 2, (COUNT, 1, unknowns))) / 3
    truth = rng.standard_normal((COUNT, unknowns)) / unknowns**0.5
    y = np.einsum("nij,nj->ni", X, truth) + 0.5 * rng.standard_normal((COUNT, ROWS))
    penalty = 10.0 ** (-6 * rng.permutation(COUNT) / COUNT)
    H = np.einsum("nij,nik->njk", X, X) / ROWS + penalty[:, None, None] * np.eye(unknowns)
    b = np.einsum("nij,ni->nj", X, y) / ROWS
    w = np.linalg.solve(H, b[:, :, None])[:, :, 0]
    arrays = tuple(jnp.asarray(x, jnp.float32) for x in (X, y, penalty, truth))
    return bl.Tasks(bl.Problem(inner, outer), arrays), jnp.asarray(w, jnp.float32)


def measure(unknowns: int, repeats: int) -> dict:
    tasks, w = problems(unknowns)
    lam, key = jnp.float32(1.0), jax.random.key(0)
    found = {}

    def call(lanes: int):
        own = dataclasses.replace(tasks, lanes=lanes)
        state = init_engine(own, SOLVER, ENGINE, w, lam, key)
        return lambda: engine_step(own, SOLVER, ENGINE, w, lam, state, key, jnp.int32(0))[0]

    calls = {"one by one": call(1), "vmap": call(COUNT)}
    calls |= {f"{lanes} lanes": call(lanes) for lanes in LANES}
    timings = harness.compare(calls, repeats, check=found.__setitem__)
    lanes = bl.choose_lanes(tasks, lam, w, solver=SOLVER, engine=ENGINE)
    chosen = {1: "one by one", COUNT: "vmap"}.get(lanes, f"{lanes} lanes")

    def over(kind: str, others: list[str]) -> float:
        median = lambda key: timings[key][kind]["median"]
        return median(chosen) / min(map(median, others))

    state = init_engine(tasks, SOLVER, ENGINE, w, lam, key)
    system = lambda *row: ENGINE.adjoint_system(tasks.task(row[0]), SOLVER, row[1], lam, *row[2:])
    rows = (tasks.task_data, w, state.own, jax.random.split(key, COUNT))
    solve = eqx.filter_jit(lambda lanes: solve_systems(system, rows, lanes=lanes)[1])
    work = {}
    for name, number in {"vmap": COUNT, **{f"{n} lanes": n for n in LANES}}.items():
        info = solve(number)
        work[name] = float(info.lane_steps / info.useful)
    reference = found["one by one"]
    steps = np.asarray(reference.info.tasks.adjoint_steps)
    apart = lambda h: np.abs(np.asarray(h.info.tasks.adjoint_steps) - steps)
    record = {
        "load_average": os.getloadavg()[0],
        "steps": {"mean": float(steps.mean()), "max": int(steps.max())},
        "met": int(np.sum(np.asarray(reference.info.tasks.status) == 0)),
        "timings": timings,
        "auto": {
            "lanes": lanes,
            "over_better_of_vmap_and_one_by_one": over("warm_seconds", ["vmap", "one by one"]),
            "cpu_over_better_of_vmap_and_one_by_one": over(
                "warm_cpu_seconds", ["vmap", "one by one"]
            ),
            "over_best": over("warm_seconds", list(calls)),
        },
        "lane_steps_over_useful": work,
        "steps_that_differ": {
            name: {"systems": int(np.sum(apart(h) > 0)), "total": int(apart(h).sum())}
            for name, h in found.items()
        },
        "relative_difference_of_the_hypergradient": {
            name: float(abs(h.grad - reference.grad) / abs(reference.grad))
            for name, h in found.items()
        },
    }
    shown = {name: f"{value:.2f}" for name, value in work.items()}
    print(f"\n{unknowns} unknowns: steps mean {steps.mean():.0f}, max {steps.max()}; met", end=" ")
    print(record["met"])
    print(harness.table(timings, "one by one", {"lane-steps": shown}))
    auto = record["auto"]
    print(
        f"auto takes {chosen}: {auto['over_better_of_vmap_and_one_by_one']:.2f} of the better of vmap and one by "
        f"one, {auto['over_best']:.2f} of the best",
        flush=True,
    )
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--unknowns", default="16,64")
    default = Path(__file__).parent / "results" / f"adjoint_lanes_{jax.default_backend()}.json"
    parser.add_argument("--out", type=Path, default=default)
    args = parser.parse_args()
    sizes = map(int, args.unknowns.split(","))
    harness.write(args.out, {"unknowns": {n: measure(n, args.repeats) for n in sizes}})


if __name__ == "__main__":
    main()
