"""The problem of label cleaning, and how `label_cleaning.py` runs each engine on it.

Outer variable: the logit of a weight for each training label. Inner problem: weighted softmax regression, or a
network, with a penalty. Settings are the defaults of the engines and what their papers document (see the notes); what
has no documented value was settled on held-out trusted rows (`label_cleaning.py --validate`).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from label_cleaning_models import cross_entropies, scores, squares

import bilevel as bl
from bilevel.schedules import power

PENALTY = 1e-3
BATCH = 64
RATE = 0.1
"""Rate of plain outer steps, for each training row: a derivative in one of n weights is of the order 1 / n."""


def losses(w, batch):
    return cross_entropies(scores(w, batch["X"]), batch["y"])


def inner(w, lam, batch):
    """Train on the weighted labels."""
    weights = jax.nn.sigmoid(lam[batch["i"]])
    return jnp.mean(weights * losses(w, batch)) + PENALTY * squares(w)


def outer(w, lam, batch):
    """Fit the trusted labels."""
    return jnp.mean(losses(w, batch))


class Setting(NamedTuple):
    """How one engine is run."""

    engine: bl.AbstractEngine
    outer: optax.GradientTransformation
    num_steps: int
    batch: int | None
    """Rows of a batch on either level; None takes all."""
    solver: bl.AbstractInnerSolver | None
    note: str
    gauss_newton: Callable | None = None
    """The problem's `inner_gauss_newton`."""


def step_size(X: np.ndarray) -> float:
    """1 / (2 L), L the largest curvature of the inner loss at w = 0 and weights of one half."""
    largest = np.linalg.norm(X, 2) ** 2 / len(X)
    classes = 10
    return float(0.5 / (0.5 / classes * largest + 2 * PENALTY))


def settings(X: np.ndarray, loop_steps: int) -> dict[str, Setting]:
    """By name; `X` are the training rows, `loop_steps` the outer steps of single loops."""
    n, s = len(X), step_size(X)
    steady = None if n <= 2000 else 8 * BATCH  # for methods without noise in their papers

    def whole(engine, note, solver=None):
        solver = bl.LBFGS(max_steps=200) if solver is None else solver
        return Setting(engine, optax.adam(0.3), 50, None, solver, f"Adam .3; {note}")

    def loop(engine, note, batch: int | None = BATCH, falling=0.0, offset=100.0):
        """Plain steps, which fall like `(k + offset)^-falling`."""
        rate = power(RATE * n, falling, offset) if falling else RATE * n
        return Setting(engine, optax.sgd(rate), loop_steps, batch, None, note)

    def fall(exponent, start=s, offset=100.0):
        return power(start, exponent, offset)

    descent = bl.GradientDescent(max_steps=100, tol=0.0)
    storm = lambda rate: bl.STORM(rate, everything=False)
    normalised = optax.chain(optax.normalize_by_update_norm(), optax.sgd(0.05))
    return {
        "implicit": whole(bl.Implicit(estimate=False), "CG"),
        "unrolled": whole(
            bl.Unrolled(truncate=25, estimate=False), "the last 25 of T=100 steps", descent
        ),
        "onestep": whole(bl.OneStep(estimate=False), "defaults"),
        "f2sa": whole(bl.F2SA(estimate=False), "order 2, nu .02"),
        "moreau": whole(bl.Moreau(estimate=False), "c 1000"),
        "soba": loop(bl.SOBA(fall(0.5)), "steps fall by k^-1/2", falling=0.5),
        "masoba": loop(bl.SOBA(estimator=bl.EMA(0.1)), "average .1"),
        "saba": loop(bl.SABA(), "constant steps"),
        "srba": loop(bl.SRBA(), "constant steps"),
        "bamm": loop(bl.BAMM(), "mu 0", batch=steady),
        "amigo": loop(bl.AmIGO(), "T=Q=10, constant steps"),
        "stocbio": loop(bl.StocBiO(), "T=Q=10, constant steps"),
        "fsla": loop(
            bl.FSLA(fall(0.5), estimator=storm(power(0.9, 0.5, 100.0))),
            "steps and momentum fall by k^-1/2",
            falling=0.5,
        ),
        "bsa": loop(bl.BSA(fall(0.5), s), "T=Q=10; exponents .5, 0, .5", falling=0.5),
        "ttsa": loop(bl.TTSA(fall(0.4), s), "exponents .4, 0, .6", falling=0.6),
        "mrbo": loop(
            bl.MRBO(fall(1 / 3), s, estimator=bl.STORM(power(0.5, 2 / 3, 100.0))),
            "Q=10, momentum .5 k^-2/3, steps k^-1/3",
            falling=1 / 3,
        ),
        "sustain": loop(
            bl.SUSTAIN(fall(1 / 3), s, estimator=bl.STORM(power(0.5, 2 / 3, 100.0))),
            "as mrbo",
            falling=1 / 3,
        ),
        "vrbo": loop(bl.VRBO(terms=10), "T=5, constant steps"),
        "borep": Setting(
            bl.BOREP(inner_steps=10), normalised, loop_steps, BATCH, None, "I=2, N=10, normalised step .05"
        ),
        "f2sa_loop": loop(
            bl.F3SA(penalty=power(2.0, -1 / 7, 10.0), inner_steps=10, estimator=bl.Plain()),
            "T=10, penalty 2 growing by k^1/7",
        ),
        "f3sa": loop(
            bl.F3SA(penalty=power(2.0, -1 / 5, 100.0), estimator=bl.STORM(power(1.0, 4 / 5, 100.0))),
            "penalty 2 growing by k^1/5, momentum k^-4/5",
        ),
        "meha": loop(bl.MEHA(c=power(2.0, -0.25)), "c = 2 (k + 1)^1/4", batch=steady),
        "vpbgd": loop(bl.VPBGD(), "penalty 10", batch=steady),
        "bome": loop(bl.BOME(), "eta .5, T=10", batch=steady),
        "bda": whole(bl.BDA(truncate=25, estimate=False), "a_t = .5 / (t + 1), T=100", descent),
        "iaptt": whole(bl.IAPTT(estimate=False), "start step .1, T=100", descent),
    }  # fmt: skip


def network_settings(n: int, loop_steps: int) -> dict[str, Setting]:
    """For the network: inner problems with saddle points, started anew from one draw by each run."""

    def whole(engine, note, solver=None, gauss_newton=None):
        solver = bl.LBFGS(max_steps=200) if solver is None else solver
        rule = optax.adam(0.3)
        return Setting(engine, rule, 50, None, solver, f"Adam .3; {note}", gauss_newton)

    def loop(engine, note):
        return Setting(engine, optax.sgd(RATE * n), loop_steps, BATCH, None, note)

    weighted = lambda f, lam, batch: jnp.mean(
        jax.nn.sigmoid(lam[batch["i"]]) * cross_entropies(f, batch["y"])
    )
    parts = bl.gauss_newton(
        lambda w, lam, batch: scores(w, batch["X"]),
        weighted,
        lambda w, lam, batch: PENALTY * squares(w),
    )
    descent = bl.GradientDescent(max_steps=100, tol=0.0)
    curved = bl.Implicit(gauss_newton=True, estimate=False)
    return {
        "implicit": whole(curved, "Gauss-Newton, CG", gauss_newton=parts.product),
        "damped": whole(bl.Implicit(damping="auto", estimate=False), "damping auto, CG"),
        "damped_fixed": whole(bl.Implicit(damping=0.1, estimate=False), "damping .1, CG"),
        "unrolled": whole(
            bl.Unrolled(truncate=25, estimate=False), "the last 25 of T=100 steps", descent
        ),
        "f2sa": whole(bl.F2SA(estimate=False), "order 2, nu .02"),
        "masoba": loop(bl.SOBA(estimator=bl.EMA(0.1)), "average .1"),
        "f2sa_loop": loop(
            bl.F3SA(penalty=power(2.0, -1 / 7, 10.0), inner_steps=10, estimator=bl.Plain()),
            "T=10, penalty 2 growing by k^1/7",
        ),
    }  # fmt: skip
