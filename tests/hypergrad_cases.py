"""The table of engines. Every contract test runs over every row; a new engine adds one."""

import dataclasses

import bilevel as bl


@dataclasses.dataclass(frozen=True)
class EngineCase:
    engine: bl.AbstractEngine
    solver: bl.AbstractInnerSolver
    """The inner solver of the accuracy tests."""
    tol: float
    """Relative error allowed against the closed form, on well-conditioned problems in float64."""
    numbers: tuple[dict, ...] = ()
    """Settings to sweep without a new trace."""


EXACT_LBFGS = bl.LBFGS(max_steps=300, tol=1e-11)
LONG_GD = bl.GradientDescent(max_steps=600, learning_rate="auto")

CASES = {
    "exact": EngineCase(bl.Exact(), EXACT_LBFGS, 1e-10),
    "implicit": EngineCase(
        bl.Implicit(), EXACT_LBFGS, 1e-7, ({"damping": 1e-9}, {"damping": 1e-8})
    ),
    "implicit-dense": EngineCase(bl.Implicit(bl.Dense()), bl.Newton(tol=1e-11), 1e-7),
    "implicit-neumann": EngineCase(bl.Implicit(bl.Neumann(max_steps=1500)), EXACT_LBFGS, 1e-6),
    "unrolled": EngineCase(bl.Unrolled(), LONG_GD, 1e-6),
    "unrolled-truncated": EngineCase(bl.Unrolled(truncate=400), LONG_GD, 1e-5),
    "onestep": EngineCase(bl.OneStep(), EXACT_LBFGS, 1.0, ({"step_size": 0.1}, {"step_size": 0.2})),
    "f2sa": EngineCase(bl.F2SA(nu=1e-3), EXACT_LBFGS, 1e-4, ({"nu": 1e-3}, {"nu": 2e-3})),
    "f2sa-1": EngineCase(bl.F2SA(nu=1e-4, order=1), EXACT_LBFGS, 1e-2),
    "moreau": EngineCase(bl.Moreau(c=1e4), EXACT_LBFGS, 1e-2, ({"c": 100.0}, {"c": 200.0})),
}
