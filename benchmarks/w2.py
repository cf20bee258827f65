"""Label cleaning on digits with single-loop methods: microseconds per outer step, and seconds to a threshold.

1000 training digits, half of the labels redrawn, 397 trusted, 400 test; softmax regression, one sigmoid weight
per training example, `1e-3 ||w||^2`, batches of 64 on both levels, float32. Each method runs from w = lam = 0
as one compiled program. "floor" is the arithmetic of one step alone, in a scan over batches that are slices:
inner gradient, Hessian-vector product with cross derivative, outer gradient, three moves, with the products of the
losses as they are written (runs turn them round on CPU). "bb ..." are the same methods of benchmark_bilevel, from a
checkout of its repository (nothing of it is in this one). They keep two cores busy: under `taskset -c 0` all have one.

    python benchmarks/w2.py [--peer PATH_OF_BENCHMARK_BILEVEL] [--steps 2000] [--repeats 7]
        [--out benchmarks/results/w2_cpu.json]
"""

import argparse
import contextlib
import importlib.util
import sys
import time
import types
from pathlib import Path

import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
from label_cleaning_engines import inner, outer
from sklearn.datasets import load_digits

import bilevel as bl

BATCH, CLASSES = 64, 10
STEP, RATE = 1.0, 100.0
"""Step sizes of SOBA and SABA; a gradient in lam is of the order of one over the number of examples."""


def data(seed: int = 0) -> tuple[dict, dict, dict]:
    """Training (noisy), trusted and test rows."""
    X, y = load_digits(return_X_y=True)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(y))
    X, y = (X[order] / 16).astype(np.float32), y[order]
    noisy = y.copy()
    wrong = rng.random(1000) < 0.5
    noisy[:1000][wrong] = rng.integers(0, CLASSES, wrong.sum())
    rows = lambda part, labels: {"X": X[part], "y": labels[part].astype(np.int32)}
    train = rows(slice(0, 1000), noisy) | {"i": np.arange(1000, dtype=np.int32)}
    return train, rows(slice(1000, 1397), y), rows(slice(1397, 1797), y)


def methods() -> dict[str, tuple[bl.AbstractEngine, optax.GradientTransformation]]:
    c = 2.0  # multiplies the noise of a batch: at 20, no threshold is reached (`w2_thresholds.py` has both)
    return {
        "SOBA": (bl.SOBA(STEP), optax.sgd(RATE)),
        "SABA": (bl.SABA(STEP), optax.sgd(RATE)),
        "F2SA": (bl.F3SA(STEP, 10.0, inner_steps=10, estimator=bl.Plain()), optax.sgd(RATE)),
        "F3SA": (bl.F3SA(STEP, 10.0, estimator=bl.STORM(0.1)), optax.sgd(RATE)),
        "MEHA": (bl.MEHA(STEP, c=c), optax.sgd(RATE)),
        "AmIGO": (bl.AmIGO(STEP), optax.sgd(RATE)),
        "StocBiO": (bl.StocBiO(STEP), optax.sgd(RATE)),
        "MRBO": (bl.MRBO(STEP), optax.sgd(RATE)),
    }


def floor(train: dict, trusted: dict, num_steps: int):
    """The arithmetic of SOBA, on slices in turn."""

    def cut(rows, k):
        num = rows["y"].shape[0] // BATCH
        start = (k % num) * BATCH
        return jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, start, BATCH), rows)

    @jax.jit
    def run(train, trusted, w, v, lam):
        def step(carry, k):
            w, v, lam = carry
            slope = lambda w, lam: jax.grad(inner)(w, lam, cut(train, k))
            g, pull = jax.vjp(slope, w, lam)
            product, cross = pull(v)
            f_w, f_lam = jax.grad(outer, argnums=(0, 1))(w, lam, cut(trusted, k))
            return (w - STEP * g, v - STEP * (product - f_w), lam - RATE * (f_lam - cross)), None

        return jax.lax.scan(step, (w, v, lam), jnp.arange(num_steps))[0]

    w = jnp.zeros((64, CLASSES))
    return lambda: run(train, trusted, w, w, jnp.zeros(1000))


def peer(path: Path, name: str, train: dict, trusted: dict, step: float, rate: float):
    """A solver of benchmark_bilevel ("soba", "saba", ...) on this problem, with these step sizes."""
    fake = types.ModuleType("benchopt")
    base = type("BaseSolver", (), {"run_once": lambda self, _: None})
    vars(fake).update(BaseSolver=base, safe_import_context=contextlib.nullcontext)
    criterion = types.ModuleType("benchopt.stopping_criterion")
    vars(criterion).update(SufficientProgressCriterion=lambda *_, **__: None)
    sys.modules |= {"benchopt": fake, "benchopt.stopping_criterion": criterion}
    # Their package of solvers has the name of ours: it is loaded by its files.
    if str(path) not in sys.path:
        sys.path.append(str(path))
    rows, features = train["X"].shape

    def on_slices(loss, data):
        def f(w, lam, start=0, batch_size=1):
            take = lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, start, batch_size)
            return loss(w.reshape(features, CLASSES), lam, jax.tree.map(take, data))

        return f

    spec = importlib.util.spec_from_file_location(f"bb_{name}", path / "solvers" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    solver = module.Solver()
    for key, values in solver.parameters.items():
        setattr(solver, key, values[0])
    solver.step_size, solver.outer_ratio, solver.batch_size = step, step / rate, BATCH
    solver.set_objective(
        on_slices(inner, train), on_slices(outer, trusted), rows, len(trusted["y"]),
        jnp.zeros(features * CLASSES), jnp.zeros(rows),
    )  # fmt: skip
    return solver


def peers(path: Path, train: dict, trusted: dict, num_steps: int) -> dict:
    """Calls of benchmark_bilevel's methods on this problem."""
    calls = {}
    for name in ("soba", "saba", "f2sa", "amigo", "stocbio", "mrbo"):
        solver = peer(path, name, train, trusted, STEP, RATE)

        def call(solver=solver, saba=name == "saba"):
            if saba:  # its table is given away at each call
                memory, carry = solver.init()
                return solver.one_epoch(carry, memory, num_steps)
            return solver.one_epoch(solver.init(), num_steps)

        calls[f"bb {name.upper()}"] = call
    return calls


def seconds_to(
    problem, engine, rule, trusted, test, chunk=50, limit=4000
) -> dict[str, float | None]:
    """Seconds of a warm run until the loss on trusted and on test rows is first below its threshold."""
    marks = {"v90": (trusted, 0.3226), "t90": (test, 0.3837)}
    value = jax.jit(lambda w, rows: outer(w, None, rows))

    def run() -> dict[str, float | None]:
        found: dict[str, float | None] = dict.fromkeys(marks)
        seconds, start = 0.0, time.perf_counter()

        def look(state, history):
            nonlocal seconds, start
            jax.block_until_ready(state)
            seconds += time.perf_counter() - start
            for name, (rows, level) in marks.items():
                if found[name] is None and float(value(state.w, rows)) < level:
                    found[name] = seconds
            start = time.perf_counter()
            return None not in found.values()

        bl.run(
            problem, jnp.zeros(1000), jnp.zeros((64, CLASSES)), engine=engine, outer=rule,
            num_steps=limit, chunk=chunk, callback=look, progress=False, throw=False,
        )  # fmt: skip
        return found

    run()
    return run()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--peer", type=Path)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/w2_cpu.json"))
    args = parser.parse_args()
    train, trusted, test = (jax.tree.map(jnp.asarray, part) for part in data())
    problem = bl.Problem(inner, outer, train, trusted, batch_size=BATCH)
    lam, w = jnp.zeros(1000), jnp.zeros((64, CLASSES))

    def ours(engine, rule):
        run = lambda: bl.run(
            problem, lam, w, engine=engine, outer=rule, num_steps=args.steps, chunk=args.steps,
            progress=False, throw=False,
        ).state.lam  # fmt: skip
        return run

    calls = {"floor": floor(train, trusted, args.steps)}
    calls |= {name: ours(*method) for name, method in methods().items()}
    if args.peer is not None:
        calls |= peers(args.peer, train, trusted, args.steps)
    timings = harness.compare(calls, args.repeats)
    for timing in timings.values():
        for kind in ("warm_seconds", "warm_cpu_seconds"):
            timing[kind] = {key: value / args.steps for key, value in timing[kind].items()}
    print(harness.table(timings, "floor"))
    costs = {name: engine.cost()._asdict() for name, (engine, _) in methods().items()}
    thresholds = {}
    for name, method in methods().items():
        thresholds[name] = seconds_to(problem, *method, trusted, test)
        print(f"{name:6s} {thresholds[name]}  oracles per step {costs[name]}")
    record = {
        "setting": {"steps": args.steps, "batch": BATCH, "step": STEP, "rate": RATE},
        "per_step": timings,
        "over_floor": harness.ratios(timings, "floor"),
        "oracles_per_step": costs,
        "seconds_to": thresholds,
    }
    harness.write(args.out, record)


if __name__ == "__main__":
    main()
