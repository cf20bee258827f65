"""Ten thousand tasks whose solutions stay in the host's memory: what the device holds, and what that costs.

Ridge regressions of 2048 unknowns on 4 rows each, one shared penalty, float32, 32 tasks per step and chunks of 5 steps.
`live_bytes` is the most that JAX arrays hold at the end of a chunk (not what a compiled step works with for its tasks),
`pool_bytes` what the tasks, their solutions and states take. On a CPU both lie in the same memory, so the peak of the
process is reported too: a chunk copies the pool, so that a checkpoint of the last one stays whole. Time per step is
beside that of the same run with everything on the device. Fails where the two differ.

    python benchmarks/pool.py [--out benchmarks/results/pool_cpu.json]
"""

import argparse
import resource
import time
from pathlib import Path

import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel as bl

TASKS, UNKNOWNS, ROWS, PER_STEP, CHUNK, STEPS = 10_000, 2048, 4, 32, 5, 60


def inner(w, lam, task):
    X, y = task
    return 0.5 * jnp.mean((X @ w - y) ** 2) + 0.5 * jnp.exp(lam) * jnp.sum(w**2)


def outer(w, lam, task):
    X, y = task
    return jnp.mean((X @ w - 0.9 * y) ** 2)


def nbytes(tree) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def run(pool: str | None, data, num_steps: int) -> tuple[bl.Result, dict]:
    tasks = bl.Tasks(bl.Problem(inner, outer), data, per_step=PER_STEP, pool=pool)
    marks = []

    def callback(state, rows):
        marks.append((time.perf_counter(), nbytes(jax.live_arrays())))

    result = bl.run(
        tasks,
        jnp.float32(-3.0),
        jnp.zeros(UNKNOWNS, jnp.float32),
        num_steps=num_steps,
        chunk=CHUNK,
        solver=bl.GradientDescent(1.0, max_steps=20, tol=0.0),
        engine=bl.Implicit(bl.CG(max_steps=10), estimate=False),
        outer=optax.sgd(0.1),
        callback=callback,
    )
    times = np.diff([when for when, _ in marks]) / CHUNK
    found = {"seconds_per_step": float(np.median(times)), "live_bytes": max(n for _, n in marks)}
    return result, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Path(__file__).parent / "results" / f"pool_{jax.default_backend()}.json"
    parser.add_argument("--out", type=Path, default=default)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    X = rng.standard_normal((TASKS, ROWS, UNKNOWNS), dtype=np.float32) / np.float32(UNKNOWNS**0.5)
    data = X, rng.standard_normal((TASKS, ROWS), dtype=np.float32)
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    before = peak()
    pooled, record = run("host", data, STEPS)
    record["peak_of_process_bytes"], record["peak_before_bytes"] = peak(), before
    record["pool_bytes"] = nbytes((data, pooled.w, pooled.state.engine))
    short, on_device = run(None, data, STEPS)
    np.testing.assert_allclose(pooled.lam, short.lam, rtol=1e-5)
    np.testing.assert_allclose(pooled.w[::100], short.w[::100], rtol=1e-4, atol=1e-6)
    touched = int(np.count_nonzero(np.any(pooled.w != 0, axis=1)))
    assert record["live_bytes"] < 0.1 * record["pool_bytes"]
    record |= {"tasks": TASKS, "tasks_touched": touched, "steps": STEPS, "on_device": on_device}
    for name, value in record.items():
        print(name, value)
    harness.write(args.out, record)


if __name__ == "__main__":
    main()
