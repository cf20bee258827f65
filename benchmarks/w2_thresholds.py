"""Label cleaning with single-loop methods: seconds and outer steps until the test loss is low, on two data sets.

"digits" are the rows of `w2.py`; "images" are 5000 training rows of 784 features, ReLUs of random combinations of
digits with noise, 1000 trusted, 1000 test (digits that are shifted besides are too many for 1000 trusted rows to tell:
learned weights then stay above the threshold, whoever learns them). Threshold: nine tenths of the way from the test
loss of the inner solution at lam = 0 to that with the true weights. "own" is when the method's own `w` is below it,
"solved" when besides the inner solution at its weights is: a `w` that has seen trusted rows may be early. Step
sizes and rates are each method's best of one grid, for either; then all are timed in turn. Beside them
benchmark_bilevel's SABA, and BOAT's MESO, which is its MEHA with all rows (their own `w` is the copy y, of which the
penalty makes a fit of the trusted rows where c is small).

    python benchmarks/w2_thresholds.py [--peer PATH_OF_BENCHMARK_BILEVEL] [--boat PATH_OF_BOAT] [--repeats 5]
        [--data digits images] [--methods PREFIX ...] [--out benchmarks/results/w2_thresholds_cpu.json]
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import boat
import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
import w2
from label_cleaning_engines import inner, outer, step_size
from sklearn.datasets import load_digits

import bilevel as bl

CHUNK, FEW = 50, 5
"""Steps between two looks, with batches and with all rows."""
STEPS, RATES = (1.0, 2.0), (0.03, 0.1, 0.3, 1.0, 3.0)
"""In `1 / (2 L)`, and for each training row."""
LIMIT = {"digits": 1.5, "images": 3.0}
"""Seconds of CPU after which a method is given up."""


def images(seed: int = 0) -> tuple[dict, dict, dict]:
    """Training (half of the labels redrawn), trusted and test rows."""
    X, y = load_digits(return_X_y=True)
    rng = np.random.default_rng(seed)
    chosen = rng.integers(0, len(y), 7000)
    X, y = X[chosen] / 16 + 0.1 * rng.normal(size=(7000, 64)), y[chosen].astype(np.int32)
    X = (X - X.mean(axis=0)) / X.std(axis=0)
    X = np.maximum(X @ rng.normal(size=(64, 784)) / 8, 0).astype(np.float32)
    noisy = y.copy()
    wrong = rng.random(5000) < 0.5
    noisy[:5000][wrong] = rng.integers(0, w2.CLASSES, wrong.sum())
    rows = lambda part, labels: {"X": X[part], "y": labels[part]}
    train = rows(slice(0, 5000), noisy) | {"i": np.arange(5000, dtype=np.int32), "truth": y[:5000]}
    return train, rows(slice(5000, 6000), y), rows(slice(6000, 7000), y)


class Judge:
    """Test losses, and the threshold."""

    def __init__(self, train: dict, test: dict, true: np.ndarray):
        self.rows, self.problem = train, bl.Problem(inner, outer, train, test)
        self.w = jnp.zeros((train["X"].shape[1], w2.CLASSES))
        self.value = jax.jit(lambda w: outer(w, None, test))
        start, end = (self.solved(lam) for lam in (0.0 * true, np.where(true, 30.0, -30.0)))
        self.levels = start, end
        self.threshold = start - 0.9 * (start - end)

    def solved(self, lam) -> float:
        """The test loss of the inner solution at these weights."""
        solver, engine = bl.LBFGS(max_steps=500, tol=1e-5), bl.Implicit(estimate=False)
        lam = jnp.asarray(lam, jnp.float32)
        h = bl.hypergradient(self.problem, lam, self.w, solver=solver, engine=engine, throw=False)
        return float(self.value(h.w))


class Reached(NamedTuple):
    seconds: float
    cpu: float
    steps: int


class Watch:
    """The seconds of a run, of wall clock and of CPU, without those of looking at it after each chunk."""

    def __init__(self, judge: Judge, limit: float, chunk: int):
        self.judge, self.limit, self.chunk = judge, limit, chunk
        self.seconds, self.cpu, self.steps = 0.0, 0.0, 0
        self.found: dict[str, Reached] = {}
        self.go()

    def go(self) -> None:
        self.began, self.cpu_began = time.perf_counter(), time.process_time()

    def look(self, w, lam) -> bool:
        """Whether to stop, after a chunk."""
        jax.block_until_ready((w, lam))
        self.seconds += time.perf_counter() - self.began
        self.cpu += time.process_time() - self.cpu_began
        self.steps += self.chunk
        if float(self.judge.value(w)) < self.judge.threshold:
            now = Reached(self.seconds, self.cpu, self.steps)
            self.found.setdefault("own", now)
            if self.judge.solved(lam) < self.judge.threshold:
                self.found["solved"] = now
        self.go()
        return "solved" in self.found or self.cpu > self.limit


def ours(judge: Judge, trusted: dict, engine, rate: float, batch: int | None, limit: float):
    chunk = FEW if batch is None else CHUNK
    rows = {key: judge.rows[key] for key in ("X", "y", "i")}
    problem = bl.Problem(inner, outer, rows, trusted, batch_size=batch)
    rule = optax.sgd(rate)

    def run(limit: float = limit) -> Watch:
        watch = Watch(judge, limit, chunk)
        bl.run(
            problem, jnp.zeros(len(rows["y"])), judge.w, engine=engine, outer=rule, num_steps=100_000, chunk=chunk,
            callback=lambda state, history: watch.look(state.engine.own.get("y", state.w), state.lam),
            progress=False, throw=False,
        )  # fmt: skip
        return watch

    return run


def theirs(judge: Judge, trusted: dict, path: Path, step: float, rate: float, limit: float):
    """SABA of the peer."""
    rows = {key: judge.rows[key] for key in ("X", "y", "i")}
    solver = w2.peer(path, "saba", rows, trusted, step, rate)

    def run(limit: float = limit) -> Watch:
        watch = Watch(judge, limit, CHUNK)
        memory, carry = solver.init()
        while True:
            memory, carry = solver.one_epoch(carry, memory, CHUNK)
            if watch.look(carry["inner_var"].reshape(judge.w.shape), carry["outer_var"]):
                return watch

    return run


def meso(judge: Judge, peer: boat.Meso, step: float, rate: float, c: float, limit: float):
    """MESO of BOAT."""

    def run(limit: float = limit) -> Watch:
        watch, started = Watch(judge, limit, FEW), peer.started(step, rate, c)
        watch.go()
        while True:
            started.go(FEW)
            if watch.look(*started.point()):
                return watch

    return run


def measured(
    name: str,
    rows: tuple[dict, dict, dict],
    true,
    path: Path | None,
    boat_path: Path | None,
    repeats: int,
    prefixes: list[str],
) -> dict:
    train, trusted, test = (jax.tree.map(jnp.asarray, part) for part in rows)
    judge, limit, n = Judge(train, test, true), LIMIT[name], len(train["y"])
    s = step_size(np.asarray(train["X"]))
    makers = {
        "SOBA": lambda step, rate: ours(judge, trusted, bl.SOBA(step), rate, w2.BATCH, limit),
        "SABA": lambda step, rate: ours(judge, trusted, bl.SABA(step), rate, w2.BATCH, limit),
    }
    for c, batch in ((2.0, w2.BATCH), (20.0, w2.BATCH), (0.2, None), (2.0, None), (20.0, None)):
        label = f"MEHA c={c:g} {'all rows' if batch is None else f'batches of {batch}'}"
        makers[label] = lambda step, rate, c=c, batch=batch: ours(
            judge, trusted, bl.MEHA(step, c=c), rate, batch, limit
        )
    if path is not None:
        makers["bb SABA"] = lambda step, rate: theirs(judge, trusted, path, step, rate, limit)
    if boat_path is not None:
        peer = boat.Meso(boat_path, train, trusted, w2.CLASSES)
        for c in (0.2, 2.0, 20.0):
            makers[f"BOAT MESO c={c:g}"] = lambda step, rate, c=c: meso(
                judge, peer, step, rate, c, limit
            )
    makers = {key: make for key, make in makers.items() if key.startswith(tuple(prefixes))}
    best: dict = {}
    for label, make in makers.items():
        trials: dict[str, list] = {"own": [], "solved": []}
        for step in STEPS:
            for rate in RATES:
                run = make(step * s, rate * n)
                run(0.0)  # compiles
                for mark, at in run().found.items():
                    trials[mark].append((at.cpu, step, rate, run))
        best |= {
            (label, mark): min(some, key=lambda t: t[0]) for mark, some in trials.items() if some
        }
    print(
        f"{name}: test loss {judge.levels} of lam = 0, of true weights; threshold {judge.threshold:.4f}"
    )
    timings: dict = {key: [] for key in best}
    for _ in range(repeats):
        for key, (*_, run) in best.items():
            timings[key].append(run().found[key[1]])
    found: dict = {label: {"own": None, "solved": None} for label in makers}
    for (label, mark), (_, step, rate, _) in best.items():
        times = timings[label, mark]
        found[label][mark] = {
            "seconds": statistics.median(time.seconds for time in times),
            "cpu_seconds": statistics.median(time.cpu for time in times),
            "steps": times[0].steps,
            "seconds_per_step": statistics.median(time.seconds / time.steps for time in times),
            "step": step * s,
            "rate": rate * n,
        }
    for label, one in found.items():
        print(f"{label:26s} {one}", flush=True)
    return {"levels": judge.levels, "threshold": judge.threshold, "limit": limit, "methods": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--peer", type=Path)
    parser.add_argument("--boat", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--data", nargs="+", choices=list(LIMIT), default=["digits"])
    parser.add_argument("--methods", nargs="+", metavar="PREFIX", default=[""])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    record = {}
    for name in args.data:
        if name == "digits":
            rows = w2.data()
            labels = load_digits(return_X_y=True)[1][
                np.random.default_rng(0).permutation(1797)[:1000]
            ]
        else:
            rows = images()
            labels = rows[0].pop("truth")
        true = rows[0]["y"] == labels
        record[name] = measured(name, rows, true, args.peer, args.boat, args.repeats, args.methods)
        if args.out is not None:
            harness.write(args.out, record)


if __name__ == "__main__":
    main()
