"""Fields: what is refused, what is a leaf, what is static, and schedules."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from solvers import (
    CG,
    GMRES,
    LBFGS,
    MINRES,
    Chebyshev,
    GradientDescent,
    Jacobi,
    JaxoptSolver,
    Neumann,
    Newton,
    Nystrom,
    NystromPreconditioner,
    OptaxSolver,
    ProximalGradient,
    Status,
)
from solvers.fields import Schedule, at_step
from solvers.loops import solve
from solvers.static_function import StaticFunction
from solvers.types import Objective, constant_sampler


@pytest.mark.parametrize(
    ("cls", "field", "value"),
    [
        (CG, "rtol", -1e-3),
        (CG, "atol", -1.0),
        (Neumann, "rtol", -1e-3),
        (Neumann, "step", 0.0),
        (GradientDescent, "learning_rate", 0.0),
        (GradientDescent, "learning_rate", -0.1),
        (GradientDescent, "momentum", -0.1),
        (GradientDescent, "tol", -1e-8),
        (LBFGS, "tol", -1e-8),
        (Newton, "tol", jnp.asarray([1.0, -1.0])),
        (CG, "rtol", float("nan")),
        (Neumann, "step", float("nan")),
        (GradientDescent, "momentum", np.float32("nan")),
        (JaxoptSolver, "tol", float("nan")),
        (CG, "max_steps", 0),
        (Newton, "max_steps", -3),
        (MINRES, "rtol", -1.0),
        (GMRES, "restart", 0),
        (Chebyshev, "mu", 0.0),
        (Chebyshev, "L", -1.0),
        (Nystrom, "damping", 0.0),
        (Nystrom, "rank", 0),
        (NystromPreconditioner, "rank", 0),
        (Jacobi, "num_probes", 0),
        (LBFGS, "memory", 0),
        # Any point would be a solution.
        (LBFGS, "tol", float("inf")),
        (CG, "rtol", float("inf")),
        (GMRES, "atol", float("inf")),
    ],
)
def test_values_out_of_bounds_are_refused_by_name(cls, field, value):
    with pytest.raises(ValueError, match=rf"{cls.__name__}\({field}=\.\.\.\)"):
        cls(**{field: value})


@pytest.mark.parametrize("value", [2.0, 1.5, True, False, "3"])
@pytest.mark.parametrize(
    ("cls", "field"), [(CG, "max_steps"), (GradientDescent, "max_steps"), (LBFGS, "memory")]
)
def test_integers_are_refused_as_anything_else(cls, field, value):
    with pytest.raises(TypeError, match=rf"{cls.__name__}\({field}=\.\.\.\) must be an integer"):
        cls(**{field: value})


def test_flags_are_refused_as_anything_else():
    with pytest.raises(TypeError, match=r"\(accelerate=\.\.\.\) must be True or False, got 'no'"):
        ProximalGradient(accelerate="no")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_schedule_that_gives_no_tolerance_solves_nothing(value):
    """Any point would be within it."""
    at_zero = lambda settings: at_step(settings, 0)
    schedule = lambda step: jnp.asarray(value)
    w, batch = jnp.zeros(3), None
    loss = lambda w, lam, batch: jnp.sum((w - 1) ** 2)
    for cls in (LBFGS, Newton, GradientDescent):
        solver, objective = at_zero(cls(tol=schedule)), Objective(loss, w)
        state = solver.init(objective, w, batch)
        info = solve(solver, objective, w, state, constant_sampler(batch))[2]
        assert info.status == Status.NONFINITE
    for cls in (CG, MINRES, GMRES, Chebyshev, Neumann):
        for field in ("rtol", "atol"):
            solver, key = at_zero(cls(**{field: schedule})), jax.random.key(0)
            product, b = lambda v: jnp.array([1.0, 2.0, 5.0]) * v, jnp.ones(3)
            info = solver.solve(product, b, w, solver.init(product, b, key), key)[1]
            assert info.status == Status.MAX_STEPS


@pytest.mark.parametrize(("cls", "field"), [(LBFGS, "steps"), (CG, "steps"), (CG, "rtol")])
def test_words_are_refused_where_no_number_is_measured(cls, field):
    with pytest.raises(TypeError, match=rf"{cls.__name__}\({field}=\.\.\.\) must be a number or"):
        cls(**{field: "auto"})


@pytest.mark.parametrize(
    "value", [True, False, np.bool_(True), np.ones(2, bool), jnp.zeros(2, bool)]
)
def test_booleans_are_no_numbers(value):
    for cls, field in ((CG, "rtol"), (GradientDescent, "learning_rate")):
        with pytest.raises(TypeError, match=rf"{cls.__name__}\({field}=\.\.\.\) must be a number"):
            cls(**{field: value})


@pytest.mark.parametrize(
    ("cls", "field", "value", "expected"),
    [
        (
            GradientDescent,
            "learning_rate",
            None,
            "a number or a function of the outer step, got None",
        ),
        (CG, "rtol", 1j, "a number or a function of the outer step, got 1j"),
        (LBFGS, "max_steps", None, "an integer, got None"),
        (Newton, "linear_solver", "cg", "an instance of AbstractLinearSolver, got 'cg'"),
        (Newton, "linear_solver", CG, "an instance of AbstractLinearSolver, got <class"),
        (Newton, "linear_solver", LBFGS(), "an instance of AbstractLinearSolver, got LBFGS"),
    ],
)
def test_the_kind_that_is_expected_is_named(cls, field, value, expected):
    with pytest.raises(TypeError, match=rf"{cls.__name__}\({field}=\.\.\.\) must be {expected}"):
        cls(**{field: value})


def test_integers_above_what_a_counter_holds_are_refused():
    """A step counter of int32 would stop before the first step."""
    with pytest.raises(ValueError, match=r"LBFGS\(max_steps=\.\.\.\) must be at most 2147483647"):
        LBFGS(max_steps=2**31)


def test_numpy_integers_become_python_ones():
    assert type(CG(max_steps=np.int64(7)).max_steps) is int  # and equinox has nothing to warn of


def test_optax_solver_bounds_are_checked_too():
    with pytest.raises(ValueError, match=r"OptaxSolver\(tol=\.\.\.\)"):
        OptaxSolver(optax.sgd(0.1), tol=-1.0)
    with pytest.raises(TypeError, match=r"OptaxSolver\(max_steps=\.\.\.\)"):
        OptaxSolver(optax.sgd(0.1), max_steps=2.5)


def test_words_and_rules_that_mean_nothing_are_refused():
    with pytest.raises(ValueError, match=r"Neumann\(step=\.\.\.\).*'fast'"):
        Neumann(step="fast")
    with pytest.raises(ValueError, match=r"Chebyshev\(mu=\.\.\.\).*'fast'"):
        Chebyshev(mu="fast")
    with pytest.raises(TypeError, match=r"CG\(preconditioner=\.\.\.\).*Jacobi'>"):
        CG(preconditioner=Jacobi)
    with pytest.raises(ValueError, match=r"GradientDescent\(learning_rate=\.\.\.\).*'fast'"):
        GradientDescent(learning_rate="fast")
    with pytest.raises(ValueError, match=r"JaxoptSolver\(name=\.\.\.\).*'NoSuch'"):
        JaxoptSolver("NoSuch")
    with pytest.raises(TypeError, match=r"OptaxSolver\(tx=\.\.\.\).*0\.1"):
        OptaxSolver(0.1)
    with pytest.raises(TypeError, match=r"OptaxSolver\(tx=\.\.\.\)"):
        OptaxSolver()


def test_bounds_themselves_are_accepted():
    CG(rtol=0, atol=0, max_steps=1)
    Neumann(max_steps=5, step=1e-30)
    GradientDescent(momentum=0, tol=0, learning_rate=np.float32(0.5))


def test_numbers_become_strongly_typed_leaves():
    solver = GradientDescent(learning_rate=1, momentum=jnp.float32(0.5), tol=1e-3)
    leaves = (solver.learning_rate, solver.momentum, solver.tol)
    assert [leaf.dtype for leaf in leaves] == [jnp.float64, jnp.float32, jnp.float64]
    assert not any(leaf.weak_type for leaf in leaves)
    assert len(jax.tree.leaves(solver)) == 3
    assert GradientDescent().learning_rate == "auto" and GradientDescent().tol is None


def test_schedules_are_resolved_by_the_outer_step():
    solver = Neumann(step=optax.linear_schedule(1.0, 0.5, 10), rtol=lambda k: 10.0 ** -(k + 1))
    assert isinstance(solver.step, Schedule) and isinstance(solver.rtol, Schedule)
    tree = {"linear": solver, "inner": [GradientDescent(learning_rate=lambda k: 0.1 * (k + 1.0))]}
    for step, rate in [(0, 1.0), (5, 0.75), (20, 0.5)]:
        resolved = at_step(tree, step)
        np.testing.assert_allclose(resolved["linear"].step, rate, rtol=1e-7)
        np.testing.assert_allclose(resolved["linear"].rtol, 10.0 ** -(step + 1), rtol=1e-6)
        np.testing.assert_allclose(resolved["inner"][0].learning_rate, 0.1 * (step + 1), rtol=1e-7)
        assert resolved["linear"].max_steps == solver.max_steps
    jitted = jax.jit(lambda k: at_step(tree, k)["linear"].step)
    np.testing.assert_allclose(jitted(5), 0.75, rtol=1e-7)


def test_tree_without_schedules_is_left_alone():
    solver = CG(rtol=1e-3)
    assert eqx.tree_equal(at_step(solver, 3), solver)


def test_sweep_over_a_number_traces_once(count_traces):
    def work(solver, x):
        return x * solver.learning_rate + solver.momentum

    counted = count_traces(work)
    compiled = eqx.filter_jit(lambda solver, x: counted(solver, x))
    for rate in (0.1, 0.2, 1):
        for momentum in (0.0, 0.9):
            solver = GradientDescent(learning_rate=rate, momentum=momentum)
            np.testing.assert_allclose(compiled(solver, jnp.asarray(2.0)), 2 * rate + momentum)
    assert counted.count == 1
    compiled(GradientDescent(learning_rate=0.1, max_steps=7), jnp.asarray(2.0))
    assert counted.count == 2  # a static field compiles anew


def test_sweep_over_a_number_by_vmap():
    rates = jnp.asarray([0.1, 0.2, 0.4])

    def work(rate):
        return GradientDescent(learning_rate=rate).learning_rate * 2

    np.testing.assert_allclose(jax.vmap(work)(rates), 2 * rates)


def test_equal_schedules_and_rules_trace_once(count_traces):
    counted = count_traces(lambda solver, x: x + 1)
    compiled = eqx.filter_jit(lambda solver, x: counted(solver, x))
    for _ in range(3):
        compiled(OptaxSolver(optax.adam(1e-2)), jnp.asarray(0.0))
        compiled(Neumann(step=optax.cosine_decay_schedule(1.0, 10)), jnp.asarray(0.0))
    assert counted.count == 2


@pytest.mark.parametrize(
    "build",
    [
        lambda: optax.adam(1e-2),
        lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1, momentum=0.9)),
        lambda: optax.adam(optax.exponential_decay(1e-2, 10, 0.9)),
    ],
    ids=["adam", "chain", "schedule"],
)
def test_rules_built_alike_are_equal(build):
    first, second = StaticFunction(build()), StaticFunction(build())
    assert first.value is not second.value
    assert first == second and hash(first) == hash(second)
    assert OptaxSolver(build()) == OptaxSolver(build())


def test_rules_that_differ_are_not_equal():
    assert StaticFunction(optax.adam(1e-2)) != StaticFunction(optax.adam(2e-2))
    assert StaticFunction(optax.adam(1e-2)) != StaticFunction(optax.adamw(1e-2))
    assert StaticFunction(optax.adam(1e-2)) != StaticFunction(optax.adam(1e-2, b1=0.8))
    assert StaticFunction(optax.adam(1e-2)) != optax.adam(1e-2)


def test_static_function_calls_and_unwraps():
    wrapped = StaticFunction(lambda x, y=1: x + y)
    assert wrapped(2) == 3 and wrapped(2, y=5) == 7
    assert StaticFunction(wrapped) == wrapped


def test_functions_over_different_values_are_not_equal():
    def build(value):
        return StaticFunction(lambda x: x + value)

    assert build(1) == build(1)
    assert build(1) != build(2)
    assert build(1) != build(1.0)  # another type computes another thing
    array = np.ones(2)
    assert build(array) == build(array)
    assert build(array) != build(np.ones(2))  # arrays may change: by identity


def test_function_that_closes_over_itself():
    def build():
        def recurse(n):
            return 0 if n == 0 else recurse(n - 1)

        return StaticFunction(recurse)

    assert build() == build() and hash(build()) == hash(build())
