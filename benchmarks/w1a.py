"""W1a: one hypergradient at a given inner solution, float32, against jaxopt in the same process.

Softmax regression on digits (640 unknowns) and logistic regression on breast_cancer (30), one
penalty of 1e-3 for each feature, outer loss on held-out rows, conjugate gradients to a relative
residual of 1e-6 (jaxopt's by the recursion, ours by the true residual). Every entry but the "plain
call" is one compiled program with the data as its arguments, and all start from the same inner
solution; ours also checks that solution and fills in its report. The error of each is measured
against a float64 hypergradient from the dense Hessian before anything is timed.

Digits runs twice, with logits (n, classes) and (classes, n): on CPU the second layout turns the
slow product X'u of every derivative into the fast u'X. Ours does so by itself in the first.

    python benchmarks/w1a.py [--repeats 25] [--out benchmarks/results/w1a_cpu.json]
"""

import argparse
import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import harness
import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_breast_cancer, load_digits

import bilevel as bl

with warnings.catch_warnings():  # jaxopt says at import that it is unmaintained
    warnings.simplefilter("ignore", DeprecationWarning)
    from jaxopt import implicit_diff, linear_solve

RTOL = 1e-6
LAM = 1e-3
LARGEST_ERROR = 1e-5  # of a hypergradient by conjugate gradients to RTOL


def softmax_outer(w, lam, batch):
    """Mean cross-entropy; batch["Y"] is one-hot."""
    logits = batch["X"] @ w
    return jnp.mean(jax.nn.logsumexp(logits, axis=1) - jnp.sum(batch["Y"] * logits, axis=1))


def softmax_inner(w, lam, batch):
    """Mean cross-entropy and a penalty for each feature."""
    return softmax_outer(w, lam, batch) + jnp.sum(lam[:, None] * w**2)


def softmax_hvp(w, lam, batch, v):
    """The Hessian of `softmax_inner` times v: two products once the probabilities are known.

    In the layout (classes, n); the barriers keep the compiler from turning it back.
    """
    X, fixed = batch["X"], jax.lax.optimization_barrier
    p, u = jax.nn.softmax(fixed(w.T) @ X.T, axis=0), fixed(v.T) @ X.T
    u = p * (u - jnp.sum(p * u, axis=0, keepdims=True))
    return fixed(fixed(u) @ X).T / X.shape[0] + 2 * lam[:, None] * v


def class_major_outer(w, lam, batch):
    """`softmax_outer` with logits (classes, n)."""
    logits = w.T @ batch["X"].T
    return jnp.mean(jax.nn.logsumexp(logits, axis=0) - jnp.sum(batch["Y"].T * logits, axis=0))


def class_major_inner(w, lam, batch):
    """`softmax_inner` with logits (classes, n)."""
    return class_major_outer(w, lam, batch) + jnp.sum(lam[:, None] * w**2)


def logistic_outer(w, lam, batch):
    """Mean logistic loss; batch["Y"] is -1 or 1."""
    return jnp.mean(jax.nn.softplus(-batch["Y"] * (batch["X"] @ w)))


def logistic_inner(w, lam, batch):
    """Mean logistic loss and a penalty for each feature."""
    return logistic_outer(w, lam, batch) + jnp.sum(lam * w**2)


def logistic_hvp(w, lam, batch, v):
    """The Hessian of `logistic_inner` times v."""
    X = batch["X"]
    p = jax.nn.sigmoid(X @ w)
    return X.T @ (p * (1 - p) * (X @ v)) / X.shape[0] + 2 * lam * v


class Workload(NamedTuple):
    inner: Callable
    outer: Callable
    hvp: Callable
    train: dict[str, np.ndarray]
    validation: dict[str, np.ndarray]
    lam: np.ndarray
    w_shape: tuple[int, ...]


def digits(inner: Callable = softmax_inner, outer: Callable = softmax_outer) -> Workload:
    X, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(X))
    X, Y = X[order] / 16, np.eye(10)[y[order]]
    half = (len(X) + 1) // 2 - 1
    train, validation = {"X": X[:half], "Y": Y[:half]}, {"X": X[half:], "Y": Y[half:]}
    lam = np.full(X.shape[1], LAM)
    return Workload(inner, outer, softmax_hvp, train, validation, lam, (X.shape[1], 10))


def breast_cancer() -> Workload:
    X, y = load_breast_cancer(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(X))
    X, Y = X[order], 2.0 * y[order] - 1
    half = len(X) // 2
    X = (X - X[:half].mean(axis=0)) / X[:half].std(axis=0)
    train, validation = {"X": X[:half], "Y": Y[:half]}, {"X": X[half:], "Y": Y[half:]}
    lam = np.full(X.shape[1], LAM)
    return Workload(
        logistic_inner, logistic_outer, logistic_hvp, train, validation, lam, (X.shape[1],)
    )


def exact(work: Workload) -> tuple[np.ndarray, np.ndarray, float]:
    """Solution, hypergradient and condition number in float64: Newton and the dense Hessian."""
    with jax.enable_x64(True):
        train, validation, lam = jax.tree.map(jnp.asarray, (work.train, work.validation, work.lam))

        def gradient(flat, lam):
            return jax.grad(work.inner)(flat.reshape(work.w_shape), lam, train).ravel()

        hessian = jax.jit(jax.jacfwd(gradient))
        w = jnp.zeros(int(np.prod(work.w_shape)))
        for _ in range(15):
            w = w - jnp.linalg.solve(hessian(w, lam), gradient(w, lam))
        if not jnp.linalg.norm(gradient(w, lam)) < 1e-12:
            raise RuntimeError("Newton's method did not converge")
        H = hessian(w, lam)
        c = jax.grad(work.outer)(w.reshape(work.w_shape), lam, validation).ravel()
        q = jnp.linalg.solve(H, c)
        grad = -jax.vjp(lambda lam: gradient(w, lam), lam)[1](q)[0]
        eigenvalues = jnp.linalg.eigvalsh(H)
        solution = np.asarray(w.reshape(work.w_shape))
        return solution, np.asarray(grad), float(eigenvalues[-1] / eigenvalues[0])


def entries(work: Workload, w: np.ndarray) -> dict[str, Callable[[], jax.Array]]:
    """Calls without arguments that give the hypergradient."""
    arguments = jax.tree.map(
        lambda x: jnp.asarray(x, jnp.float32), (w, work.lam, work.train, work.validation)
    )
    # Takes no step: what is given is the solution, which is checked.
    solver, engine = bl.Solved(), bl.Implicit(linear_solver=bl.CG(rtol=RTOL), estimate=False)

    def ours(hvp: Callable | None) -> Callable:
        @jax.jit
        def program(w, lam, train, validation):
            problem = bl.Problem(work.inner, work.outer, train, validation, inner_hvp=hvp)
            # The report goes out too, so that nothing of its cost is optimised away.
            return bl.hypergradient(problem, lam, w, solver=solver, engine=engine, throw=False)

        return lambda: program(*arguments).grad

    def jaxopts(**options: Any) -> Callable:
        @jax.jit
        def program(w, lam, train, validation):
            c, grad_lam = jax.grad(work.outer, argnums=(0, 1))(w, lam, validation)

            def optimality(w, lam):
                return jax.grad(work.inner)(w, lam, train)

            (vjp,) = implicit_diff.root_vjp(optimality, w, (lam,), c, **options)
            return grad_lam + vjp

        return lambda: program(*arguments)

    lam, train, validation = arguments[1:]
    problem = bl.Problem(work.inner, work.outer, train, validation)
    cg = functools.partial(linear_solve.solve_cg, tol=RTOL)
    return {
        "bilevel": ours(None),
        "bilevel, plain call": lambda: (
            bl.hypergradient(problem, lam, arguments[0], solver=solver, engine=engine).grad
        ),
        "bilevel, analytic product": ours(work.hvp),
        "jaxopt, CG": jaxopts(solve=cg),
        "jaxopt, default": jaxopts(),
    }


def run(name: str, work: Workload, repeats: int) -> dict:
    w, reference, condition = exact(work)
    errors: dict[str, float] = {}

    def check(entry: str, grad: jax.Array) -> None:
        error = float(np.linalg.norm(grad - reference) / np.linalg.norm(reference))
        errors[entry] = error
        if entry != "jaxopt, default" and not error < LARGEST_ERROR:
            raise RuntimeError(f"{name}: the hypergradient of {entry} is off by {error:.1e}")

    inner_repeats = 1 if w.size > 100 else 50
    timings = harness.compare(entries(work, w), repeats, inner_repeats, check)
    shown = {"error": {entry: f"{error:.1e}" for entry, error in errors.items()}}
    print(f"{name}: {w.size} unknowns, condition number {condition:.0f}")
    print(harness.table(timings, "jaxopt, CG", shown), flush=True)
    return {
        "unknowns": int(w.size),
        "condition": condition,
        "errors": errors,
        "timings": timings,
        "ratios": harness.ratios(timings, "jaxopt, CG"),
        "cpu_ratios": harness.ratios(timings, "jaxopt, CG", "warm_cpu_seconds"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=25)
    default = Path(__file__).parent / "results" / f"w1a_{jax.default_backend()}.json"
    parser.add_argument("--out", type=Path, default=default)
    args = parser.parse_args()
    record = {
        name: run(name, work, args.repeats)
        for name, work in (
            ("digits", digits()),
            ("digits, class-major", digits(class_major_inner, class_major_outer)),
            ("breast_cancer", breast_cancer()),
        )
    }
    harness.write(args.out, {"workload": "W1a", "rtol": RTOL, "lam": LAM, "results": record})


if __name__ == "__main__":
    main()
