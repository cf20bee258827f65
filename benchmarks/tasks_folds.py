"""Ten folds of a cross-validated softmax regression as `Tasks`, against ten single hypergradients.

Digits, one penalty per feature, float64; the rows are shared and a fold is a mask of held-out rows. The ten single
calls share one compiled program. "2 devices" spreads the folds over two CPU devices of JAX, one for each core, one
fold at a time on each. Fails where the two hypergradients differ by more than 1e-10.

    python benchmarks/tasks_folds.py [--repeats 7] [--out benchmarks/results/tasks_folds_cpu.json]
"""

import argparse
from pathlib import Path

import harness
import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_digits

import bilevel as bl

FOLDS, ROWS, DEVICES = 10, 600, 2


def held_out(w, lam, batch):
    (X, y), mask = batch
    losses = jax.nn.logsumexp(X @ w, axis=1) - jnp.sum((X @ w) * y, axis=1)
    return jnp.sum(mask * losses) / jnp.sum(mask)


def training(w, lam, batch):
    data, mask = batch
    return held_out(w, lam, (data, 1 - mask)) + 0.5 * jnp.sum(lam[:, None] * w**2)


def main() -> None:
    jax.config.update("jax_num_cpu_devices", DEVICES)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    default = Path(__file__).parent / "results" / f"tasks_folds_{jax.default_backend()}.json"
    parser.add_argument("--out", type=Path, default=default)
    args = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    X, y = load_digits(return_X_y=True)
    X, y = X[:ROWS] / 8 - 1, np.eye(10)[y[:ROWS]]
    data = jnp.asarray(X), jnp.asarray(y)
    masks = jnp.asarray(np.arange(ROWS) % FOLDS == np.arange(FOLDS)[:, None], float)
    shared = bl.Problem(training, held_out, data, data)
    lam, w = jnp.full(X.shape[1], 1e-2), jnp.zeros((X.shape[1], 10))
    engine = bl.Implicit(bl.CG(rtol=1e-12), estimate=False)
    settings = {"engine": engine, "solver": bl.LBFGS(max_steps=500, tol=1e-11)}
    singles = [bl.Problem(training, held_out, (data, m), (data, m)) for m in masks]

    def single():
        grads = [bl.hypergradient(p, lam, w, **settings).grad for p in singles]
        return jnp.mean(jnp.stack(grads), axis=0)

    def together(lanes, **options):
        tasks = bl.Tasks(shared, masks, lanes=lanes)
        return lambda: bl.hypergradient(tasks, lam, w, **settings, **options).grad

    calls = {"10 single calls": single, "Tasks": together(None)}
    calls |= {f"Tasks, {lanes} lanes": together(lanes) for lanes in (1, 2, 5)}
    if len(jax.devices()) >= DEVICES:
        mesh = jax.make_mesh((DEVICES,), ("tasks",))
        calls[f"Tasks, {DEVICES} devices"] = together(1, mesh=mesh)
    reference = single()
    differences = {}

    def check(name, grad):
        differences[name] = float(jnp.linalg.norm(grad - reference) / jnp.linalg.norm(reference))
        assert differences[name] < 1e-10, (name, differences[name])

    timings = harness.compare(calls, args.repeats, check=check)
    print(harness.table(timings, "10 single calls", {"differs by": differences}))
    ratios = harness.ratios(timings, "10 single calls")
    harness.write(args.out, {"timings": timings, "ratios": ratios, "differences": differences})


if __name__ == "__main__":
    main()
