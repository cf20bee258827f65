"""Kill -9 at random moments, resume, and compare with a run without a break, bit for bit.

A child process runs 200 outer steps with a state of a few megabytes and is killed: half of the times at a random
moment, half as soon as a save has begun (so that most of these are killed while writing). Fails where any bit of
`lam`, `w`, the history or the state differs.

    python benchmarks/kill_and_resume.py [--kills 30] [--out benchmarks/results/kill_and_resume_cpu.json]
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel as bl

STEPS, ROWS, COLUMNS = 200, 64, 20_000


def inner(w, lam, batch):
    X, y = batch
    return 0.5 * jnp.mean((X @ w - y) ** 2) + 0.5 * jnp.exp(lam) * jnp.sum(w**2)


def outer(w, lam, batch):
    X, y = batch
    return jnp.mean((X @ w - y) ** 2)


def run(directory: str | None, pause: float = 0.0) -> bl.Result:
    rng = np.random.default_rng(0)
    data = []
    for _ in range(2):
        X = rng.standard_normal((ROWS, COLUMNS), dtype=np.float32) / np.float32(COLUMNS**0.5)
        data.append((X, np.float32(3) * X[:, 0] + rng.standard_normal(ROWS, dtype=np.float32)))
    problem = bl.Problem(inner, outer, *data, batch_size=32)
    return bl.run(
        problem,
        jnp.float32(0.0),
        jnp.zeros(COLUMNS, jnp.float32),
        num_steps=STEPS,
        chunk=2,
        outer=optax.adam(0.05),
        solver=bl.LBFGS(max_steps=20, tol=0.0),
        key=jax.random.key(1),
        callback=lambda state, rows: time.sleep(pause),
        checkpoint=directory,
        resume=directory is not None,
        throw=False,
    )


def kill_once(directory: Path, rng: np.random.Generator, while_writing: bool) -> dict:
    """Starts a child, kills it after its first save at the latest, and says what it left."""
    files = lambda: sorted(path.name for path in directory.glob("step-*"))
    before = files()
    child = subprocess.Popen([sys.executable, __file__, "--child", str(directory)])
    while child.poll() is None and files() == before:
        time.sleep(0.002)
    until = time.monotonic() + rng.uniform(0.0, 1.0)
    while child.poll() is None and time.monotonic() < until:
        time.sleep(0.0005)
    if while_writing:
        while child.poll() is None and not any(directory.glob(".bilevel-*")):
            pass
    alive = child.poll() is None
    child.kill()
    child.wait()
    steps = int(files()[-1][5:-4])
    return {"alive": alive, "half_written": any(directory.glob(".bilevel-*")), "step": steps}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--child", metavar="DIR", help=argparse.SUPPRESS)
    default = Path(__file__).parent / "results" / f"kill_and_resume_{jax.default_backend()}.json"
    parser.add_argument("--out", type=Path, default=default)
    args = parser.parse_args()
    if args.child:
        run(args.child, pause=0.02)
        return
    whole = run(None)
    rng = np.random.default_rng(0)
    kills, runs = [], 0
    while len(kills) < args.kills:
        runs += 1
        with tempfile.TemporaryDirectory() as name:
            directory = Path(name)
            while len(kills) < args.kills:
                kill = kill_once(directory, rng, while_writing=len(kills) % 2 == 1)
                if not kill["alive"]:  # it had ended first: that is no kill
                    break
                kills.append(kill)
                print(kill)
            resumed = run(name)
        for field in ("lam", "w", "history", "state"):
            pair = getattr(whole, field), getattr(resumed, field)
            jax.tree.map(np.testing.assert_array_equal, *pair)
        print(f"run {runs}: the same bits")
    half = sum(kill["half_written"] for kill in kills)
    print(f"{len(kills)} kills, {half} of them while writing, {runs} runs: no bit differs")
    harness.write(args.out, {"kills": kills, "runs": runs, "while_writing": half, "equal": True})


if __name__ == "__main__":
    main()
