"""Numeric settings are arguments of the compiled program: they can be swept, and trace nothing anew."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from hypergrad_cases import CASES

import bilevel as bl
from solvers.fields import Settings

# Two values of every number of every engine, linear solver and inner solver.
NUMBERS = {type(row.engine): {} for row in CASES.values()}
for row in CASES.values():
    NUMBERS[type(row.engine)].update(row.numbers)
NUMBERS |= {
    bl.SABA: NUMBERS[bl.SOBA],
    bl.SRBA: NUMBERS[bl.SOBA],
    bl.F3SA: {"step_size": (0.2, 0.3), "penalty": (10.0, 20.0), "ratio": (0.5, 0.6)},
    bl.BAMM: {"step_size": (0.2, 0.3), "adjoint_step": (0.1, 0.2), "mu": (0.2, 0.3)},
    bl.AmIGO: NUMBERS[bl.SOBA],
    bl.StocBiO: NUMBERS[bl.SOBA],
    bl.FSLA: NUMBERS[bl.SOBA],
    **dict.fromkeys((bl.TTSA, bl.BSA, bl.MRBO, bl.SUSTAIN, bl.VRBO), NUMBERS[bl.SOBA]),
    bl.BOREP: {**NUMBERS[bl.SOBA], "radius": (0.5, 0.6)},
    bl.BSVRB: {
        "step_size": (0.1, 0.2),
        "adjoint_step": (0.1, 0.2),
        "rate": (0.1, 0.2),
        "outer_rate": (0.1, 0.2),
        "correction": (1.0, 2.0),
        "floor": (1e-3, 1e-2),
    },
    bl.CGD: {"step_size": (0.1, 0.2), "outer_step": (0.1, 0.2)},
    bl.Extragradient: {"step_size": (0.1, 0.2), "outer_step": (0.1, 0.2)},
    bl.VPBGD: {"step_size": (0.2, 0.3), "penalty": (5.0, 6.0), "outer_step": (0.1, 0.2)},
    bl.GPBGD: {"step_size": (0.01, 0.02), "penalty": (5.0, 6.0)},
    bl.BOME: {"step_size": (0.2, 0.3), "eta": (0.5, 0.6), "outer_step": (0.1, 0.2)},
    bl.BDA: {**NUMBERS[bl.Unrolled], "weight": (0.5, 0.8)},
    bl.IAPTT: {"start_step": (0.1, 0.2)},
    bl.LVHBA: {
        "step_size": (0.2, 0.3),
        "c": (10.0, 20.0),
        "gamma": (3.0, 4.0),
        "dual_gamma": (2.0, 3.0),
        "theta_step": (0.1, 0.2),
        "zeta_step": (0.1, 0.2),
        "limit": (10.0, 20.0),
    },
    bl.PZOBO: {"step_size": (0.2, 0.3), "smoothing": (0.1, 0.2)},
    bl.MEHA: {
        "step_size": (0.2, 0.3),
        "c": (10.0, 20.0),
        "gamma": (3.0, 4.0),
        "theta_step": (0.1, 0.2),
    },
    bl.ES: {"sigma": (0.1, 0.2)},
    bl.Plain: {},
    bl.EMA: {"rate": (0.2, 0.3)},
    bl.STORM: {"rate": (0.2, 0.3)},
    bl.SAGA: {},
    bl.SPIDER: {},
    bl.CG: {"rtol": (1e-8, 1e-9), "atol": (1e-12, 1e-11), "steps": (20, 30)},
    bl.Neumann: {"rtol": (1e-8, 1e-9), "atol": (1e-12, 1e-11), "step": (0.3, 0.4)},
    bl.Dense: {},
    bl.MINRES: {"rtol": (1e-8, 1e-9), "atol": (1e-12, 1e-11)},
    bl.GMRES: {"rtol": (1e-8, 1e-9), "atol": (1e-12, 1e-11)},
    bl.Chebyshev: {
        "rtol": (1e-8, 1e-9),
        "atol": (1e-12, 1e-11),
        "mu": (0.3, 0.2),
        "L": (5.0, 6.0),
    },
    bl.Nystrom: {"damping": (1e-8, 1e-7)},
    bl.Jacobi: {},
    bl.NystromPreconditioner: {},
    bl.GradientDescent: {
        "learning_rate": (0.3, 0.4),
        "momentum": (0.1, 0.2),
        "tol": (1e-8, 1e-9),
        "steps": (20, 30),
    },
    bl.FixedPoint: {"tol": (1e-8, 1e-9), "steps": (20, 30)},
    bl.LBFGS: {"tol": (1e-8, 1e-9), "steps": (20, 30)},
    bl.Solved: {"tol": (1e-8, 1e-9), "steps": (20, 30)},
    bl.Newton: {"tol": (1e-8, 1e-9), "steps": (20, 30)},
    bl.OptaxSolver: {"tol": (1e-8, 1e-9), "steps": (20, 30)},
    bl.JaxoptSolver: {"tol": (1e-8, 1e-9), "steps": (20, 30)},
    bl.WorkingSet: {"tol": (1e-1, 1e-6), "steps": (1, 2)},
    bl.ProximalGradient: {"learning_rate": (0.3, 0.4), "tol": (1e-8, 1e-9), "steps": (20, 30)},
}


def subclasses(cls):
    """The library's own concrete subclasses (a test may define more)."""
    found = {sub for child in cls.__subclasses__() for sub in {child} | subclasses(child)}
    return {sub for sub in found if sub.__module__.split(".")[0] in ("solvers", "hypergrad")}


def test_the_table_names_every_number():
    named = {cls: set(numbers) for cls, numbers in NUMBERS.items()}
    abstract = {bl.AbstractEngine, bl.AbstractInnerSolver, bl.AbstractLinearSolver}
    abstract |= {bl.AbstractPreconditioner, bl.AbstractEstimator}
    abstract |= {
        cls for cls in subclasses(bl.AbstractEngine) if cls.__name__.startswith("Abstract")
    }
    there = {
        cls: {field.name for field in dataclasses.fields(cls) if "low" in field.metadata}
        for cls in subclasses(Settings) - abstract
    }
    assert named == there


def no_prox(v, step, lam):
    return v


def no_columns(lam, batch, indices):
    """For fewer coordinates than a working set holds: never called."""
    raise AssertionError


def with_numbers(cls, which, **options):
    return cls(**{name: pair[which] for name, pair in NUMBERS[cls].items()}, **options)


def setup_of(cls, which):
    """Engine and inner solver in which every number of `cls` has its value number `which`."""
    # The error estimate has no numbers, and takes long to compile.
    if issubclass(cls, bl.AbstractEngine):
        options = {"estimate": False} if hasattr(cls, "estimate") else {}
        # Seen from the second cycle on.
        if hasattr(cls, "adjoint_step") and hasattr(cls, "inner_steps"):
            options["inner_steps"] = 3
        solver = cls.default_solver() if cls.uses_solver else None
        if isinstance(solver, bl.GradientDescent):  # vmap takes no "auto"
            solver = bl.GradientDescent(0.3)
        return with_numbers(cls, which, **options), solver
    if issubclass(cls, bl.AbstractEstimator):  # seen from the second cycle on
        estimator = with_numbers(cls, which)
        return bl.SOBA(0.1, inner_steps=3, estimator=estimator, estimate=False), None
    if issubclass(cls, bl.AbstractLinearSolver | bl.AbstractPreconditioner):
        part = with_numbers(cls, which)
        linear = part if isinstance(part, bl.AbstractLinearSolver) else bl.CG(preconditioner=part)
        return bl.Implicit(linear, estimate=False), bl.Newton(linear_solver=linear)
    options = {"tx": optax.sgd(0.1)} if cls is bl.OptaxSolver else {}
    if cls is bl.WorkingSet:  # vmap takes no "auto"
        options["solver"] = bl.ProximalGradient(learning_rate=0.3)
    return bl.Implicit(estimate=False), with_numbers(cls, which, **options)


@pytest.mark.parametrize("cls", NUMBERS, ids=lambda cls: cls.__name__)
def test_numbers_lam_and_data_trace_once(cls, seed, count_traces):
    """A call at one set of numbers, lam, start and data, then others: by loop, and by vmap."""
    case = problems.make("blocks" if cls is bl.BSVRB else "quadratic", seed)
    inner, outer = count_traces(case.inner), count_traces(case.outer)

    if cls is bl.FixedPoint:
        descend = lambda w, lam, batch: w - 0.1 * jax.grad(inner)(w, lam, batch)
    level = bl.Mapping(descend) if cls is bl.FixedPoint else inner

    def call(setup, factor):
        engine, solver = setup
        data = jax.tree.map(lambda x: factor * x, case.inner_data)
        problem = bl.Problem(level, outer, data, case.outer_data)
        if cls is bl.WorkingSet:
            problem = dataclasses.replace(problem, inner_prox=no_prox, inner_restrict=no_columns)
        lam, w = factor * case.lam, factor + case.w
        return bl.hypergradient(problem, lam, w, engine=engine, solver=solver, throw=False).grad

    setups, factors = [setup_of(cls, which) for which in (0, 1)], [1.0, 1.1]
    first = call(setups[0], factors[0])
    counts = inner.count, outer.count
    loop = np.asarray([[call(setup, factor) for factor in factors] for setup in setups])
    assert (inner.count, outer.count) == counts
    np.testing.assert_array_equal(loop[0, 0], first)
    assert not np.allclose(loop[:, 0], loop[:, 1], rtol=1e-3)
    if not NUMBERS[cls]:
        return
    exact = {
        bl.ES,  # on a quadratic, whatever sigma
        bl.Exact,
        bl.Implicit,
        bl.Unrolled,
        bl.Forward,
        bl.STORM,
        bl.BAMM,  # its rate says nothing without noise
        bl.IAPTT,  # its start has not moved yet
        bl.BSVRB,  # nor has its adjoint
        bl.CGD,  # the outer loss has no mixed derivative
    }
    if issubclass(cls, bl.AbstractEngine | bl.AbstractEstimator) and cls not in exact:
        assert not np.allclose(loop[0], loop[1], rtol=1e-6)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *setups)
    over_both = jax.vmap(jax.vmap(call, in_axes=(None, 0)), in_axes=(0, None))
    np.testing.assert_allclose(
        jax.jit(over_both)(stacked, jnp.asarray(factors)), loop, rtol=1e-6, atol=1e-9
    )
