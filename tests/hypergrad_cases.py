"""The table of engines. Every contract test runs over every row; a new engine adds one."""

import dataclasses
from typing import Any

import bilevel as bl


@dataclasses.dataclass(frozen=True)
class EngineCase:
    engine: bl.AbstractEngine
    solver: bl.AbstractInnerSolver | None
    """The inner solver of the accuracy tests; None for engines that move `w` themselves."""
    tol: float
    """Relative error allowed against the closed form, in float64."""
    numbers: dict[str, tuple[Any, Any]] = dataclasses.field(default_factory=dict)
    """Two values of each of the engine's numbers (in one of its rows)."""


EXACT_LBFGS = bl.LBFGS(max_steps=300, tol=1e-11)
LONG_GD = bl.GradientDescent(max_steps=2000, learning_rate="auto")

CASES = {
    "exact": EngineCase(bl.Exact(), EXACT_LBFGS, 1e-10),
    "implicit": EngineCase(
        bl.Implicit(), EXACT_LBFGS, 1e-7, {"damping": (1e-9, 1e-8), "target": (0.1, 0.2)}
    ),
    "implicit-dense": EngineCase(bl.Implicit(bl.Dense()), bl.Newton(tol=1e-11), 1e-7),
    "implicit-neumann": EngineCase(bl.Implicit(bl.Neumann(max_steps=2000)), EXACT_LBFGS, 1e-6),
    "unrolled": EngineCase(
        bl.Unrolled(),
        LONG_GD,
        1e-6,
        {"mixture": ([0.2, 0.8], [0.5, 0.5]), "max_growth": (1e6, 1e7)},
    ),
    "unrolled-truncated": EngineCase(bl.Unrolled(truncate=1500), LONG_GD, 1e-6),
    "forward": EngineCase(bl.Forward(), LONG_GD, 1e-6, {"max_growth": (1e6, 1e7)}),
    "onestep": EngineCase(bl.OneStep(), EXACT_LBFGS, 1.0, {"step_size": (0.1, 0.2)}),
    "f2sa": EngineCase(bl.F2SA(nu=1e-3), EXACT_LBFGS, 1e-4, {"nu": (1e-2, 2e-2)}),
    "f2sa-1": EngineCase(bl.F2SA(nu=1e-4, order=1), EXACT_LBFGS, 2e-3),
    "moreau": EngineCase(
        bl.Moreau(c=1e4), EXACT_LBFGS, 2e-3, {"c": (100.0, 200.0), "gamma": (3.0, 4.0)}
    ),
    # Many cycles at one lam: a single-loop method is then a double loop.
    "soba": EngineCase(
        bl.SOBA(inner_steps=5000),
        None,
        1e-6,
        {"step_size": (0.1, 0.2), "adjoint_step": (0.1, 0.2)},
    ),
}

SINGLE_LOOP = {
    "soba": bl.SOBA(0.2, 0.1, inner_steps=2),
    "masoba": bl.SOBA(0.2, estimator=bl.EMA(0.5)),
    "saba": bl.SABA(0.2, adjoint_step=0.1),
    "srba": bl.SRBA(0.2, estimator=bl.SPIDER(period=3)),
    "f3sa": bl.F3SA(0.2, penalty=5.0),
    "f2sa": bl.F3SA(0.2, penalty=5.0, inner_steps=2, coupled=False, estimator=bl.Plain()),
    "meha": bl.MEHA(0.2, c=5.0, gamma=3.0, theta_step=0.1),
    "lvhba": bl.LVHBA(0.1, c=5.0, gamma=3.0),  # without constraints
    "bamm": bl.BAMM(0.2, 0.1, mu=0.3),
    "amigo": bl.AmIGO(0.2, inner_steps=2, adjoint_steps=3),
    "stocbio": bl.StocBiO(0.2, inner_steps=2, adjoint_steps=3),
    "fsla": bl.FSLA(0.2, 0.1, estimator=bl.STORM(0.4, everything=False)),
    "ttsa": bl.TTSA(0.2, 0.1, terms=3),
    "mrbo": bl.MRBO(0.2, 0.1, terms=3, estimator=bl.STORM(0.4)),
    "vrbo": bl.VRBO(0.2, terms=2, inner_steps=2, whole_terms=20, estimator=bl.SPIDER(6)),
    "borep": bl.BOREP(0.2, 0.1, 2, 2, 3, 0.3, estimator=bl.EMA(0.6)),
    "vpbgd": bl.VPBGD(0.2, penalty=5.0, outer_step=0.1, inner_steps=2),
    "gpbgd": bl.GPBGD(0.04, penalty=5.0),
    "bome": bl.BOME(0.2, 0.5, 0.1, inner_steps=2),
    "pzobo": bl.PZOBO(0.2, 0.1, directions=3, inner_steps=2),
}
"""Engines that take one short cycle per outer step, as they are used; they have a contract of their own."""

RANDOM = {"es": bl.ES(), "pes": bl.ES(persistent=True)}
"""Engines whose result is noise around a gradient; they have tests of their own."""
INNER_STEPS = (bl.BDA(), bl.IAPTT())
"""Engines whose steps lead elsewhere than to the inner solution of a strongly convex problem; tested by hand."""
BLOCKS = (bl.BSVRB(),)
"""Engines for problems of many blocks, with tests of their own."""
MINIMAX = (bl.CGD(), bl.Extragradient())
"""Engines for an inner loss that is minus the outer one, with tests of their own."""
