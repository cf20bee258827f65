"""W1b: a whole tuning run, one penalty per feature, to 1 % above the best validation loss found.

The workloads of `w1a.py`, float32, every penalty from 1e-2, within [1e-6, 1]. Ours: `run` with the outer
method `Adaptive`, the analytic Hessian-vector product, all else default. jaxopt: L-BFGS (tolerance 1e-3)
with implicit differentiation by CG (1e-3), warm-started, Adam of rate 0.3 or 1 on the log-penalties, one
jitted step. Each stops where its own validation loss is below the threshold; that counts only where a
float64 solution at its penalties, by Newton from zero, is below it too. The threshold is 1.01 times the best
verified value of 200 float64 steps of `Adaptive` from each of three starts: the problem is not convex.

    python benchmarks/w1b.py [--repeats 3] [--out benchmarks/results/w1b_cpu.json]
"""

import argparse
import functools
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
import w1a

import bilevel as bl

with warnings.catch_warnings():  # jaxopt says at import that it is unmaintained
    warnings.simplefilter("ignore", DeprecationWarning)
    import jaxopt

START, LOW, HIGH = 1e-2, 1e-6, 1.0
STARTS = (1e-3, 1e-2, 1e-1)
MAX_STEPS = 300


SETS = {
    "digits": lambda: w1a.digits(w1a.class_major_inner, w1a.class_major_outer),
    "breast_cancer": w1a.breast_cancer,
}


class Outcome(NamedTuple):
    lam: np.ndarray
    steps: int
    value: float
    """As the run saw it."""


def within_bounds(lam):
    """The box of the penalties."""
    return jnp.clip(lam, LOW, HIGH)


def single(tree: Any) -> Any:
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def ours(
    work: w1a.Workload,
    threshold: float,
    start: float = START,
    dtype: Any = jnp.float32,
    num_steps: int = MAX_STEPS,
):
    convert = lambda x: jnp.asarray(x, dtype)
    data = (work.train, work.validation, np.full_like(work.lam, start))
    train, validation, lam = jax.tree.map(convert, data)
    problem = bl.Problem(
        work.inner,
        work.outer,
        train,
        validation,
        inner_hvp=work.hvp,
        outer_projection=within_bounds,
    )
    w = jnp.zeros(work.w_shape, dtype)

    def call() -> Outcome:
        result = bl.run(
            problem,
            lam,
            w,
            num_steps=num_steps,
            chunk=1,
            outer=bl.Adaptive(),
            transform=bl.transforms.Exp(),
            callback=lambda state, _: float(state.outer.corrected) < threshold,
            progress=False,
            throw=False,
        )
        steps = len(result.history.status)
        return Outcome(np.asarray(result.lam), steps, float(result.state.outer.corrected))

    return call


def jaxopts(work: w1a.Workload, threshold: float, rate: float):
    train, validation = single((work.train, work.validation))
    solver = jaxopt.LBFGS(
        work.inner,
        tol=1e-3,
        implicit_diff_solve=functools.partial(jaxopt.linear_solve.solve_cg, tol=1e-3),
    )
    rule = optax.adam(rate)

    def loss(u, w, train, validation):
        w = solver.run(w, jnp.exp(u), train).params
        return work.outer(w, jnp.exp(u), validation), w

    @jax.jit
    def step(u, w, state, train, validation):
        (value, w), grad = jax.value_and_grad(loss, has_aux=True)(u, w, train, validation)
        updates, state = rule.update(grad, state, u)
        moved = jnp.log(within_bounds(jnp.exp(optax.apply_updates(u, updates))))
        return moved, w, state, value

    def call() -> Outcome:
        u = jnp.full(work.lam.shape, np.log(START), jnp.float32)
        w, state = jnp.zeros(work.w_shape, jnp.float32), rule.init(u)
        for steps in range(1, MAX_STEPS + 1):  # noqa: B007
            following, w, state, value = step(u, w, state, train, validation)
            if float(value) < threshold:
                break
            u = following
        return Outcome(np.exp(u), steps, float(value))

    return call


def verified(work: w1a.Workload, lam: np.ndarray) -> float:
    """The validation loss of the float64 solution."""
    with jax.enable_x64(True):
        at = work._replace(lam=np.asarray(lam, float))
        w, _, _ = w1a.exact(at)
        validation = jax.tree.map(jnp.asarray, work.validation)
        return float(work.outer(jnp.asarray(w), jnp.asarray(at.lam), validation))


def run(name: str, work: w1a.Workload, repeats: int) -> dict:
    with jax.enable_x64(True):
        lams = [ours(work, 0.0, start, jnp.float64, 200)().lam for start in STARTS]
    references = [verified(work, lam) for lam in lams]
    threshold = 1.01 * min(references)
    print(f"{name}: float64 references {references}", flush=True)
    outcomes: dict[str, dict] = {}

    def check(entry: str, found: Outcome) -> None:
        value = verified(work, found.lam)
        outcomes[entry] = {
            "steps": found.steps,
            "value": found.value,
            "verified": value,
            "success": value < threshold,
        }
        print(f"{name} {entry}: {outcomes[entry]}", flush=True)

    calls = {
        "bilevel": ours(work, threshold),
        "jaxopt, rate 0.3": jaxopts(work, threshold, 0.3),
        "jaxopt, rate 1": jaxopts(work, threshold, 1.0),
    }
    timings = harness.compare(calls, repeats, 1, check)
    print(harness.table(timings, "jaxopt, rate 0.3"), flush=True)
    starts = {}
    for start in STARTS:
        starts[str(start)] = verified(work, ours(work, threshold, start)().lam)
    print(f"{name}: verified from other starts {starts}", flush=True)
    record = {"references": references, "threshold": threshold, "starts": starts}
    return {**record, "outcomes": outcomes, "timings": timings}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=list(SETS))
    default = Path(__file__).parent / "results" / f"w1b_{jax.default_backend()}.json"
    parser.add_argument("--out", type=Path, default=default)
    args = parser.parse_args()
    record = {name: run(name, SETS[name](), args.repeats) for name in args.sets}
    harness.write(args.out, {"workload": "W1b", "results": record})


if __name__ == "__main__":
    main()
