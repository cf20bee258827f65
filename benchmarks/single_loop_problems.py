"""The problems of `single_loop_rows.py`: each function returns a run that gives the error against the closed form."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel as bl
from bilevel.schedules import power

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import problems

jax.config.update("jax_enable_x64", True)  # before any engine holds a number


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


def noiseless_soba(step: float, rate: float, steps: int) -> float:
    """The error of `p1` that SOBA's iteration has with all rows, by powers of its matrix: no run."""
    case = problems.make("quadratic", 0, n=64)
    A, B, _, D, t, rho = case.means
    n, m = B.shape
    lam = optimum(case)
    w = case.solution(lam)
    v = np.linalg.solve(A, D @ (w - t))
    slopes = np.block([
        [A, np.zeros((n, n)), -B],
        [-D, A, np.zeros((n, m))],
        [np.zeros((m, n)), B.T, rho * np.eye(m)],
    ])  # fmt: skip
    sizes = np.repeat([step, step, rate], [n, n, m])
    once = np.eye(2 * n + m) - sizes[:, None] * slopes
    away = np.concatenate([case.w - w, -v, case.lam - lam])
    left = np.linalg.matrix_power(once, steps) @ away
    return float(np.linalg.norm(left[2 * n :]) / np.linalg.norm(lam))


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
    assert result.multipliers is not None
    found = result.lam, result.w, result.multipliers.values["inequality"]
    return max(abs(float(x) - y) for x, y in zip(found, (2.5, -0.5, 3.0), strict=True))


def p7(engine, rate, steps: int) -> Callable[[], float]:
    """Six blocks of quadratics of `tests/problems`, seed 0; relative distance of `lam` from the optimum."""

    def error() -> float:
        case = problems.make("blocks", 0)
        problem = bl.Problem(case.inner, case.outer, case.inner_data, case.outer_data)
        result = run(problem, case.lam, case.w, engine, rate, steps)
        goal = case.optimum()
        return float(np.linalg.norm(result.lam - goal) / np.linalg.norm(goal))

    return error


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
