"""Weak scaling of `Tasks` over a mesh: 1 to 8 virtual devices, what they send, and a model of 1024.

32 logistic regressions of 64 unknowns for each device, one penalty per feature, regularisation spread over e^6,
float32, `Implicit`. Virtual devices share the cores of this machine, so time has to grow once they are all busy:
`cpu_efficiency` is the CPU time per task on one device over that on D, `speed` the tasks per second over those of one.

Volume is read from the compiled outer step: every collective operation and the bytes of its result. A ring of D
devices sends 2 (D - 1) / D times that per device for a sum. The model of 1024 devices, one machine each:

    seconds = those of the busiest device + collectives * 2 log2(D) * latency + 2 * bytes / bandwidth

with the assumed latency and bandwidth below, and tasks drawn from the inner and adjoint steps that they took here.
Fails where results differ from those of one device by more than 1e-6, or a collective is inside of a loop.

    python benchmarks/sharding.py [--repeats 7] [--out benchmarks/results/sharding_cpu.json]
"""

import argparse
import math
import os
import re
from pathlib import Path

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import harness
import jax
import jax.numpy as jnp
import numpy as np

import bilevel as bl
from bilevel import sharding
from bilevel.calls import engine_step, init_engine

PER_DEVICE, ROWS, COLUMNS = 32, 96, 64
LATENCY, BANDWIDTH = 20e-6, 10e9
"""Seconds for a message between two machines, and bytes per second: assumed, of a 100 Gbit network."""
COLLECTIVES = "all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all"
SIZES = {"f64": 8, "s64": 8, "f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "s8": 1, "pred": 1}


def inner(w, lam, task):
    X, y, scale = task
    f = X @ w
    return jnp.mean(jax.nn.softplus(f) - y * f) + 0.5 * scale * jnp.sum(jnp.exp(lam) * w**2)


def outer(w, lam, task):
    X, y, _ = task
    f = X @ w
    return jnp.mean(jax.nn.softplus(-f) + (1 - y) * f)


def make(count: int, columns: int) -> bl.Tasks:
    rng = np.random.default_rng(0)
    X = rng.standard_normal((count, ROWS, columns), dtype=np.float32)
    y = (X @ rng.standard_normal(columns) + rng.standard_normal((count, ROWS)) > 0).astype(
        np.float32
    )
    scale = np.exp(rng.uniform(-6, 0, count)).astype(np.float32)
    return bl.Tasks(bl.Problem(inner, outer), (X, y, scale), lanes=8)


def step(devices: int, columns: int = COLUMNS):
    """The compiled outer step on so many devices, its arguments, and its text."""
    tasks = make(PER_DEVICE * devices, columns)
    if devices > 1:
        tasks = sharding.spread(tasks, jax.sharding.Mesh(np.array(jax.devices()[:devices]), ("d",)))
    solver, engine = bl.GradientDescent(1.0, max_steps=2000, tol=1e-4), bl.Implicit(estimate=False)
    lam, key = sharding.on_all(tasks, (jnp.full(columns, -3.0, jnp.float32), jax.random.key(0)))
    w = sharding.by_task(tasks, jnp.zeros((tasks.count, columns), jnp.float32))
    state = init_engine(tasks, solver, engine, w, lam, key)
    arguments = (tasks, solver, engine, w, lam, state, key, sharding.on_all(tasks, jnp.int32(0)))
    text = engine_step.lower(*arguments).compile().compiled.as_text()
    return (lambda: engine_step(*arguments)[0]), text


def volume(text: str) -> dict[str, list[int]]:
    """Bytes of the results of each kind of collective; fails for one inside of a loop."""
    loops = set(re.findall(r"\bbody=%?([\w.\-]+)", text))
    found: dict[str, list[int]] = {}
    computation = ""
    for line in text.splitlines():
        if head := re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$", line):
            computation = head[1]
        match = re.search(rf"= (.*?) ({COLLECTIVES})(?:-start)?\(", line)
        if match:
            assert computation not in loops, f"{match[2]} inside of the loop {computation}"
            shapes = re.findall(r"(\w+)\[([\d,]*)\]", match[1])
            sizes = [
                SIZES[kind] * math.prod(int(n) for n in dims.split(",") if n)
                for kind, dims in shapes
            ]
            found.setdefault(match[2], []).append(sum(sizes))
    return found


def slowest_share(work: np.ndarray, devices: int, rng: np.random.Generator) -> float:
    """Mean over draws of the work of the busiest device over that of the mean one."""
    shares = rng.choice(work, (200, devices, PER_DEVICE)).sum(axis=2)
    return float(np.mean(shares.max(axis=1)) / (PER_DEVICE * work.mean()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    default = Path(__file__).parent / "results" / f"sharding_{jax.default_backend()}.json"
    parser.add_argument("--out", type=Path, default=default)
    args = parser.parse_args()
    counts = [1, 2, 4, 8]
    steps = {devices: step(devices) for devices in counts}
    timings = harness.compare({str(n): steps[n][0] for n in counts}, args.repeats)
    median = lambda kind: {n: timings[str(n)][kind]["median"] for n in counts}
    seconds, cpu = median("warm_seconds"), median("warm_cpu_seconds")
    rows = []
    for n in counts:
        sent = volume(steps[n][1])
        assert bool(sent) == (n > 1)
        rows.append(
            {
                "devices": n,
                "tasks": n * PER_DEVICE,
                "seconds": seconds[n],
                "speed": n * seconds[1] / seconds[n],
                "cpu_efficiency": n * cpu[1] / cpu[n],
                "collectives": {kind: len(sizes) for kind, sizes in sent.items()},
                "bytes": sum(map(sum, sent.values())),
            }
        )
        print(rows[-1])
    # The same tasks on one device and on eight.
    whole = steps[8][0]()
    tasks = make(8 * PER_DEVICE, COLUMNS)
    settings = {"solver": bl.GradientDescent(1.0, max_steps=2000, tol=1e-4), "throw": False}
    lam, w = jnp.full(COLUMNS, -3.0, jnp.float32), jnp.zeros(COLUMNS, jnp.float32)
    alone = bl.hypergradient(tasks, lam, w, engine=bl.Implicit(estimate=False), **settings)
    difference = float(jnp.linalg.norm(whole.grad - alone.grad) / jnp.linalg.norm(alone.grad))
    np.testing.assert_array_equal(whole.info.tasks.status, alone.info.tasks.status)
    assert difference < 1e-6, difference
    # What the volume depends on: the outer variable, and neither tasks nor unknowns.
    wide = sum(map(sum, volume(step(2, 2 * COLUMNS)[1]).values()))
    per_entry = (wide - rows[1]["bytes"]) / COLUMNS
    fixed = rows[1]["bytes"] - per_entry * COLUMNS
    each = alone.info.tasks
    work = np.asarray(each.inner.num_steps + each.adjoint_steps, float)
    rng = np.random.default_rng(1)
    model = []
    for size in (COLUMNS, 10**6):
        sent = fixed + per_entry * size
        messages = sum(rows[1]["collectives"].values()) * 2 * math.log2(1024)
        talk = messages * LATENCY + 2 * sent / BANDWIDTH
        busiest = slowest_share(work, 1024, rng)
        model.append(
            {
                "devices": 1024,
                "outer_variables": size,
                "bytes": sent,
                "seconds_talking": talk,
                "busiest_over_mean": busiest,
                "seconds_busiest": seconds[1] * busiest,
                "efficiency": seconds[1] / (seconds[1] * busiest + talk),
            }
        )
        print(model[-1])
    print(f"{per_entry:g} bytes per outer variable and {fixed:g} more; differs by {difference:.1e}")
    record = {
        "rows": rows,
        "bytes_per_outer_variable": per_entry,
        "bytes_beside": fixed,
        "difference": difference,
        "steps_of_tasks": {"mean": work.mean(), "max": work.max()},
        "assumed": {"latency_seconds": LATENCY, "bytes_per_second": BANDWIDTH},
        "model": model,
        "timings": timings,
    }
    harness.write(args.out, record)


if __name__ == "__main__":
    main()
