"""Hessian products of the adjoint systems along a tuning run: cold and warm, with and without a preconditioner.

`bl.glm.softmax` on digits (898 rows, 64 features, 10 classes), a penalty per feature, 40 outer steps of Adam of rate
0.1 on the logarithms, L-BFGS for the inner problem, float64; CG to the same tolerance everywhere. A warm row is a run.
A cold row starts each adjoint from zero, at the penalties of the run with both. The preconditioner is the problem's own
(one inverse block per class), which takes no products with the Hessian.

    python benchmarks/adjoint_products.py [--rtol 1e-3] [--out benchmarks/results/adjoint_products_cpu.json]
"""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import harness
import jax
import numpy as np
import optax
from sklearn.datasets import load_digits

import bilevel as bl

jax.config.update("jax_enable_x64", True)  # before any solver holds a number

STEPS = 40


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rtol", type=float, default=1e-3)
    default = Path(__file__).parent / "results" / f"adjoint_products_{jax.default_backend()}.json"
    parser.add_argument("--out", type=Path, default=default)
    args = parser.parse_args()
    X, y = load_digits(return_X_y=True)
    X = X / 16
    scaled = bl.glm.softmax(X[:898], y[:898], X[898:], y[898:])
    plain = dataclasses.replace(scaled, inner_preconditioner=None)
    solver = bl.LBFGS(2000, 1e-7)
    engine = bl.Implicit(bl.CG(args.rtol), estimate=False)
    lam, w = np.full(64, 1e-2), np.zeros((10, 64))
    path: list[np.ndarray] = []

    def along(problem: bl.Problem, callback: Any = None) -> Any:
        return bl.run(
            problem, lam, w, num_steps=STEPS, chunk=1, solver=solver, engine=engine, outer=optax.adam(0.1),
            transform=bl.transforms.Exp(), callback=callback, progress=False,
        )  # fmt: skip

    def cold(problem: bl.Problem) -> tuple[int, float]:
        start, products, residual = w, 0, 0.0
        for at in path:
            h = bl.hypergradient(problem, at, start, solver=solver, engine=engine)
            start, products = h.w, products + int(h.info.adjoint_steps)
            residual = max(residual, float(h.info.adjoint_residual))
        return products, residual

    path.append(lam)
    both = along(scaled, lambda state, rows: path.append(np.asarray(state.lam)))
    path.pop()
    warm = along(plain)
    rows: dict[str, tuple[int, float]] = {"cold": cold(plain), "cold, preconditioned": cold(scaled)}
    for name, result in {"warm": warm, "warm, preconditioned": both}.items():
        history = result.history
        rows[name] = int(history.adjoint_steps.sum()), float(history.adjoint_residual.max())
    for name, (products, residual) in rows.items():
        print(
            f"{name:22s} {products:6d} products  x{rows['cold'][0] / products:.2f}  residual {residual:.1e}"
        )
    found = {name: {"products": n, "residual": r} for name, (n, r) in rows.items()}
    values = [float(both.history.outer_value[i]) for i in (0, -1)]
    record = {"workload": "adjoint products", "steps": STEPS, "rtol": args.rtol, "outer": values}
    harness.write(args.out, {**record, "found": found})


if __name__ == "__main__":
    main()
