"""Accuracy of each single-loop (and first-order) method on problems with closed forms, beside a prototype's figures.

P1 is the finite sum of quadratics of `tests/problems` (64 rows, seed 0; outer dimension 4, inner 6), the others are
in the rows below. An error is a distance from the closed form, relative for P1. A row holds where the error is at
most `max(10 x figure, 1e-12)`. Settings are the figure's; what it does not give stands in the row.

    python benchmarks/single_loop_rows.py [--only NAME ...] [--out benchmarks/results/single_loop_rows_cpu.json]
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel as bl
from bilevel.schedules import power

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import problems

jax.config.update("jax_enable_x64", True)  # before any engine holds a number

F2SA_NOTE = "schedules.penalty with step .25, start 2, xi 1"


class Row(NamedTuple):
    setting: str
    figure: float
    error: Callable[[], float]
    note: str = ""


def optimum(case: Any) -> np.ndarray:
    return case.optimum()


def p1(engine, rate, steps: int, target=optimum, batch=None, **kwargs) -> Callable[[], float]:
    """Relative distance of `lam` from its target after a run; `rate` is that of the outer rule."""

    def error() -> float:
        case = problems.make("quadratic", 0, n=64)
        data = case.inner_data, case.outer_data
        problem = bl.Problem(case.inner, case.outer, *data, batch_size=batch)
        result = run(problem, case.lam, case.w, engine, rate, steps, **kwargs)
        goal = target(case)
        return float(np.linalg.norm(result.lam - goal) / np.linalg.norm(goal))

    return error


def run(problem, lam, w, engine, rate, steps, **kwargs) -> bl.Result:
    kwargs = {"chunk": 5000, "progress": False, "throw": False} | kwargs
    return bl.run(problem, lam, w, engine=engine, outer=optax.sgd(rate), num_steps=steps, **kwargs)


def plain_f2sa(step_size, penalty, ratio, inner_steps):
    return bl.F3SA(step_size, penalty, ratio, inner_steps, estimator=bl.Plain())


def growing(steps: int) -> Callable[[], float]:
    s = bl.schedules.penalty(0.25, noise="none")
    return p1(plain_f2sa(s.step_size, s.penalty, 0.5, 10), s.outer, steps)


def noisy_f2sa(steps: int = 50_000) -> Callable[[], float]:
    s = bl.schedules.penalty(0.25, noise="both")
    last = float(s.penalty(jnp.asarray(steps)))
    engine = plain_f2sa(s.step_size, s.penalty, 0.5, 10)
    return p1(engine, s.outer, steps, lambda case: case.penalised_optimum(last), batch=4)


def order(p: int) -> Callable[[], float]:
    solver = bl.GradientDescent(max_steps=80, learning_rate=0.4, tol=0.0)
    return p1(bl.F2SA(nu=0.02, order=p), 0.3, 300, solver=solver)


def meha_growing() -> Callable[[], float]:
    c = power(2.0, -0.49)
    return p1(bl.MEHA(0.1, c=c, gamma=5.0, theta_step=0.4), lambda k: 0.1 / c(k), 40_000)


def implicit_few() -> Callable[[], float]:
    solver = bl.GradientDescent(max_steps=5, learning_rate=0.4, tol=0.0)
    return p1(bl.Implicit(bl.CG(max_steps=3), estimate=False), 0.3, 200, solver=solver)


def unrolled_warm() -> Callable[[], float]:
    solver = bl.GradientDescent(max_steps=60, learning_rate=0.4, tol=0.0)
    return p1(bl.Unrolled(estimate=False), 0.3, 300, solver=solver)


def p2(
    engine, rate, steps: int, n: int = 10, wrong=None, init=None, **kwargs
) -> Callable[[], float]:
    """Inner solutions y1 = x with any y2: `f = |x - y2|^2 / 2 + |y1 - e|^2 / 2`, `g = |y1|^2 / 2 - x'y1`."""

    def inner(w, lam, batch):
        return 0.5 * jnp.sum(w["y1"] ** 2) - lam @ w["y1"]

    def outer(w, lam, batch):
        return 0.5 * jnp.sum((lam - w["y2"]) ** 2) + 0.5 * jnp.sum((w["y1"] - 1) ** 2)

    def error() -> float:
        start = jnp.full(n, 0.01)
        w = {"y1": start, "y2": start}
        problem = bl.Problem(inner, outer, inner_init=init)
        result = run(problem, start, w, engine, rate, steps, **kwargs)
        goal = 1.0 if wrong is None else wrong(0.01)
        return float(jnp.max(jnp.abs(result.lam - goal)))

    return error


def bamm_s3() -> Callable[[], float]:
    mu = power(0.9, 0.1)
    beta = 0.5  # 1 / L_phi would be 1
    engine = bl.BAMM(beta, power(beta, 1 / 80), mu=mu)
    return p2(engine, lambda k: beta * power(1.0, 3 / 80)(k) * mu(k) ** 3, 20_000)


def p2_itd() -> Callable[[], float]:
    """Unrolling never moves y2, and goes to the midpoint of its start and e: the point predicted."""
    solver = bl.GradientDescent(max_steps=60, learning_rate=0.5, tol=0.0)
    engine = bl.Unrolled(estimate=False)
    return p2(engine, 0.1, 1000, wrong=lambda c: (c + 1) / 2, solver=solver)


def p2_bda() -> Callable[[], float]:
    """Every solve starts afresh, as in the paper."""

    def first(lam, batch):
        start = jnp.full(10, 0.01)
        return {"y1": start, "y2": start}

    solver = bl.GradientDescent(max_steps=1000, learning_rate=0.5, tol=0.0)
    return p2(bl.BDA(weight=1.0), 0.5, 200, init=first, solver=solver)


P9_NOTE = "rate .1 of lam and of the start, from y=.5"


def p9(start: float) -> Callable[[], float]:
    """`f = x + x y`, `g = -sin(x y)`, x in [1, 10], y in [-2, 2]: x* = 11 pi / 4, y* = -2."""

    def error() -> float:
        problem = bl.Problem(
            lambda w, lam, batch: -jnp.sin(lam * w),
            lambda w, lam, batch: lam + lam * w,
            inner_prox=lambda v, step, lam: jnp.clip(v, -2.0, 2.0),
            outer_projection=lambda lam: jnp.clip(lam, 1.0, 10.0),
        )
        solver = bl.ProximalGradient(max_steps=40, learning_rate=5e-4, accelerate=False)
        result = run(problem, start, 0.5, bl.IAPTT(0.1), 0.1, 500, solver=solver)
        return max(abs(float(result.lam) - 11 * np.pi / 4), abs(float(result.w) + 2))

    return error


def p5a(c, steps: int, goal=(-0.3, 0.7, -0.4), n: int = 2) -> Callable[[], float]:
    """`f = |x - y2|^2 / 2 + |y1 - e|^2 / 2`, `g = |y1|^2 / 2 - x'y1 + e'y2`, `e'(x + y1 + y2) = 0`."""

    def project(w, lam):
        shift = (jnp.sum(lam) + jnp.sum(w["y1"]) + jnp.sum(w["y2"])) / (3 * n)
        return {k: w[k] - shift for k in w}, lam - shift

    def error() -> float:
        problem = bl.Problem(
            lambda w, lam, batch: 0.5 * jnp.sum(w["y1"] ** 2) - lam @ w["y1"] + jnp.sum(w["y2"]),
            lambda w, lam, batch: (
                0.5 * jnp.sum((lam - w["y2"]) ** 2) + 0.5 * jnp.sum((w["y1"] - 1) ** 2)
            ),
            equality=lambda w, lam: jnp.sum(lam) + jnp.sum(w["y1"]) + jnp.sum(w["y2"]),
            joint_projection=project,
        )
        start = jnp.linspace(0.1, 0.3, n)
        rate = (lambda k: 0.2 / c(k)) if callable(c) else 0.2 / c
        engine = bl.LVHBA(0.2, c)
        result = run(problem, start, {"y1": start, "y2": start}, engine, rate, steps)
        found = result.lam, result.w["y1"], result.w["y2"]
        return max(float(jnp.max(jnp.abs(x - y))) for x, y in zip(found, goal, strict=True))

    return error


def p5b() -> float:
    """`f = (x - 3)^2 / 2 + y^2 / 2`, `g = (y - x)^2 / 2`, `x + y <= 2`: 2.5, -.5, multiplier 3."""

    def project(w, lam):
        over = jnp.maximum(w + lam - 2.0, 0.0) / 2
        return w - over, lam - over

    problem = bl.Problem(
        lambda w, lam, batch: 0.5 * (w - lam) ** 2,
        lambda w, lam, batch: 0.5 * (lam - 3.0) ** 2 + 0.5 * w**2,
        inequality=lambda w, lam: w + lam - 2.0,
        joint_projection=project,
    )
    engine = bl.LVHBA(0.05, 20.0)
    result = run(problem, 0.0, 0.0, engine, 0.05 / 20.0, 100_000)
    found = result.lam, result.w, engine.multipliers(result.state.engine).values["inequality"]
    return max(abs(float(x) - y) for x, y in zip(found, (2.5, -0.5, 3.0), strict=True))


def p8() -> float:
    """`f = cosh(3 x) + (y - 1)^2 / 2`, `g = (y - x)^2 / 2`, from x = 4; x* solves 3 sinh(3 x) + x = 1."""
    problem = bl.Problem(
        lambda w, lam, batch: 0.5 * (w - lam) ** 2,
        lambda w, lam, batch: jnp.cosh(3 * lam) + 0.5 * (w - 1) ** 2,
    )
    rule = optax.chain(optax.normalize_by_update_norm(), optax.sgd(0.005))
    result = bl.run(
        problem, 4.0, 0.0, engine=bl.BOREP(0.5), outer=rule, num_steps=4000, progress=False
    )
    return abs(float(result.lam) - 0.09869641)


ROWS: dict[str, Row] = {
    "SOBA": Row(".4/.1, 1000 steps", 6e-16, p1(bl.SOBA(0.4), 0.1, 1000)),
    "SABA, batches of 1": Row(".1/.03, 5000", 4e-15, p1(bl.SABA(0.1), 0.03, 5000, batch=1)),
    "SRBA, batches of 4": Row(
        ".2/.06, q=16, 500",
        1e-7,
        p1(bl.SRBA(0.2), 0.06, 500, batch=4),
        "on this draw the same steps without noise contract by .97472: 2.8e-6 after 500",
    ),
    "SRBA, batches of 4, longer": Row(
        ".2/.06, q=16, 700", 1e-7, p1(bl.SRBA(0.2), 0.06, 700, batch=4), "where they reach 2e-8"
    ),
    "SOBA, batches of 4": Row(
        ".5/.2 k^-.5, 2e4",
        2e-2,
        p1(bl.SOBA(power(0.5, 0.5)), power(0.2, 0.5), 20_000, batch=4),
    ),
    "F2SA, penalty 50": Row(
        "T=10, .25/.25, xi=.5, 2e4, against x_penalty",
        7e-12,
        p1(plain_f2sa(0.25, 50.0, 1.0, 10), 0.5 * 0.25 / 50, 20_000, lambda c: c.penalised_optimum(50)),
    ),
    "F2SA growing, 1e3": Row("T=10, exponents 1/3, 0", 3e-2, growing(1000), F2SA_NOTE),
    "F2SA growing, 1e4": Row("T=10, exponents 1/3, 0", 1.4e-2, growing(10_000), F2SA_NOTE),
    "F2SA growing, 1e5": Row("T=10, exponents 1/3, 0", 7e-3, growing(100_000), F2SA_NOTE),
    "F2SA coupled, noise in both": Row(
        "5e4, against x_penalty", 2e-3, noisy_f2sa(), F2SA_NOTE + ", T=10, batches of 4"
    ),
    "F2BA, penalty 1e3": Row(
        "K=60, eta=.2, 400, against x_penalty",
        2e-13,
        p1(plain_f2sa(0.5, 1e3, 0.5, 60), 0.2, 400, lambda c: c.penalised_optimum(1e3)),
        "steps 1 / L and 1 / (2 penalty L)",
    ),
    "F2SA order 1": Row("nu=.02, K=80, 300", 6e-3, order(1), "step .4, rate .3"),
    "F2SA order 2": Row("nu=.02, K=80, 300", 1.3e-4, order(2), "step .4, rate .3"),
    "F2SA order 3": Row("nu=.02, K=80, 300", 8e-6, order(3), "step .4, rate .3"),
    "MEHA, constant c": Row(
        "4e4, against its fixed point",
        1e-14,
        p1(
            bl.MEHA(0.1, c=20.0, gamma=5.0, theta_step=0.4),
            0.1 / 20,
            40_000,
            lambda case: case.moreau_optimum(20.0, 5.0),
        ),
        "c=20, gamma=5 (10 / L), alpha=beta=.1, eta=.4",
    ),
    "MEHA, growing c": Row(
        "c=2 (k+1)^.49, 4e4", 1.7e-3, meha_growing(), "gamma=5, alpha=beta=.1, eta=.4"
    ),
    "sl-BAMM, mu=0": Row("3000", 3e-16, p1(bl.BAMM(0.4), 0.1, 3000), ".4/.1"),
    "sl-BAMM, constant mu": Row(
        "5000, against its fixed point",
        1e-15,
        p1(bl.BAMM(0.4, mu=0.3), 0.04, 5000, lambda case: case.aggregated_optimum(0.3)),
        "mu=.3, .4/.04",
    ),
    "V-PBGD": Row(
        "penalty 10, against its fixed point",
        5e-15,
        p1(bl.VPBGD(0.4, 10.0), 0.04, 20_000, lambda case: case.penalised_optimum(10)),
        ".4/.04, 2e4",
    ),
    "G-PBGD": Row(
        "penalty 20, against its fixed point",
        2e-14,
        p1(bl.GPBGD(0.01, 20.0), 0.01, 20_000, lambda case: case.squared_optimum(20)),
        ".01/.01, 2e4",
    ),
    "BOME": Row(
        "T=20, .2/sqrt(k+10), 5e4",
        6e-4,
        p1(
            bl.BOME(0.4, outer_step=power(0.2 / 10**0.5, 0.5, 10), inner_steps=20),
            power(0.2 / 10**0.5, 0.5, 10),
            50_000,
        ),
        "inner step .4, eta .5",
    ),
    "AID-CG": Row("N=3, T=5, 200", 1e-6, implicit_few(), "step .4, rate .3"),
    "ITD, warm": Row("T=60, 300", 5e-8, unrolled_warm(), "step .4, rate .3"),
    "StocBiO": Row(
        "Q=40, b=4",
        1e-2,
        p1(bl.StocBiO(power(0.3, 0.5, 100), 0.2, 10, 40), power(0.2, 0.7, 100), 5000, batch=4),
        "T=10, steps .3, .2, .2 falling by k^-.5, not, k^-.7 from k=100, 5000",
    ),
    "AmIGO": Row(
        "b=4",
        1e-2,
        p1(bl.AmIGO(power(0.3, 0.5, 100)), power(0.2, 0.7, 100), 5000, batch=4),
        "T=Q=10, .3/.2 falling by k^-.5 and k^-.7 from k=100, 5000",
    ),
    "FSLA": Row(
        "b=4",
        1e-2,
        p1(
            bl.FSLA(power(0.3, 0.5, 100), estimator=bl.STORM(power(0.9, 0.5), everything=False)),
            power(0.2, 0.6, 100),
            20_000,
            batch=4,
        ),
        ".3/.2 falling by k^-.5 and k^-.6 from k=100, momentum .9 k^-.5, 2e4",
    ),
    "TTSA": Row(
        "b=4",
        2e-2,
        p1(bl.TTSA(power(0.4, 0.4, 100), 0.4, 10), power(0.2, 0.6, 100), 20_000, batch=4),
        "Q=10, steps .4, .4, .2 falling by k^-.4, not, k^-.6 from k=100, 2e4",
    ),
    "BSA": Row(
        "b=4",
        2e-2,
        p1(bl.BSA(power(0.4, 0.5, 100), 0.4, 10), power(0.2, 0.6, 100), 20_000, batch=4),
        "T=Q=10, steps .4, .4, .2 falling by k^-.5, not, k^-.6 from k=100, 2e4",
    ),
    "MRBO": Row(
        "b=4",
        2e-2,
        p1(
            bl.MRBO(power(0.4, 1 / 3, 100), 0.4, 20, estimator=bl.STORM(power(0.5, 2 / 3))),
            power(0.2, 1 / 3, 100),
            5000,
            batch=4,
        ),
        "Q=20, steps .4, .4, .2 falling by k^-1/3, not, k^-1/3 from k=100, momentum .5 k^-2/3, 5000",
    ),
    "SUSTAIN": Row(
        "b=4",
        2e-2,
        p1(
            bl.SUSTAIN(power(0.4, 1 / 3, 100), 0.4, 10, estimator=bl.STORM(power(0.5, 2 / 3))),
            power(0.2, 0.5, 100),
            20_000,
            batch=4,
        ),
        "Q=10, steps .4, .4, .2 falling by k^-1/3, not, k^-1/2 from k=100, momentum .5 k^-2/3, 2e4",
    ),
    "VRBO": Row(
        "b=4, q=10, T=5, Q=20, 2000",
        1e-15,
        p1(bl.VRBO(0.2, terms=20, whole_terms=400, estimator=bl.SPIDER(50)), 0.1, 2000, batch=4),
        ".2/.1, 400 terms at the passes in the place of the exact solve",
    ),
    "PZOBO": Row(
        "Q=10, 5000",
        3.5e-2,
        p1(bl.PZOBO(0.4, 0.1, inner_steps=20), power(0.2, 0.5, 100), 5000),
        "T=20, mu=.1, inner step .4, rate .2 falling by k^-.5 from k=100",
    ),
    "BO-REP on P8": Row("eta=.005, 4000", 1.3e-3, p8, "inner and adjoint steps .5, I=2, N=3"),
    "LV-HBA on P5b": Row("c=20, 1e5", 1e-4, p5b, "g1=g2=2, steps .05, with the multiplier"),
    "LV-HBA on P5a, constant c": Row(
        "c=20, against its fixed point",
        1e-4,
        p5a(20.0, 100_000, (-4 / 13, 37 / 52, -21 / 52)),
        "n=2, g1=g2=2, steps .2, 1e5; figure of four digits",
    ),
    "LV-HBA on P5a, growing c": Row(
        "c=10 (k+1)^.49, 1e5", 1e-4, p5a(power(10.0, -0.49), 100_000), "n=2, g1=g2=2, steps .2"
    ),
    "sl-BAMM s3 on P2": Row("mu=.9 k^-1/10, 2e4", 9e-14, bamm_s3(), "n=10, beta=.5, start .01"),
    "MEHA on P2": Row(
        "c=2, 2000", 2e-13, p2(bl.MEHA(0.2, c=2.0, gamma=5.0, theta_step=0.2), 0.1, 2000),
        "n=10, gamma=5, beta=eta=alpha=.2, start .01",
    ),
    "BDA on P2": Row("T=1000", 1e-1, p2_bda(), "a_t = 1 / (t + 1), step .5, rate .5, start .01, 200"),
    "IAPTT on P9, from 2": Row("s=5e-4, T=40, 500", 9e-2, p9(2.0), P9_NOTE),
    "IAPTT on P9, from 7": Row("s=5e-4, T=40, 500", 9e-2, p9(7.0), P9_NOTE),
    "ITD on P2 goes wrong": Row(
        "1000, against (start + e) / 2", 1e-13, p2_itd(), "T=60, step .5, rate .1, start .01"
    ),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="+", help="rows whose name begins so")
    default = Path(__file__).parent / "results" / f"single_loop_rows_{jax.default_backend()}.json"
    parser.add_argument("--out", type=Path, default=default)
    args = parser.parse_args()
    results = []
    for name, row in ROWS.items():
        if args.only and not name.startswith(tuple(args.only)):
            continue
        start = time.perf_counter()
        error = row.error()
        held = bool(error <= max(10 * row.figure, 1e-12))
        seconds = time.perf_counter() - start
        verdict = "holds" if held else "MISSED"
        print(
            f"{name:28s} {error:9.1e}  figure {row.figure:7.0e}  {verdict:6s} {seconds:5.1f} s",
            flush=True,
        )
        results.append({
            "row": name, "setting": row.setting, "ours": row.note, "error": error,
            "figure": row.figure, "holds": held, "seconds": seconds,
        })  # fmt: skip
    print(f"{sum(r['holds'] for r in results)} of {len(results)} rows hold")
    if not args.only:
        harness.write(args.out, {"rows": results})


if __name__ == "__main__":
    main()
