"""What unrolling takes: compiled memory by levels and units of steps, and settings chosen by a budget."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel as bl
from bilevel import footprint
from solvers import loops
from solvers.loops import unit_steps


def wide(w, lam, batch):
    return 0.5 * jnp.mean((jnp.tanh(batch @ w) - 0.3) ** 2) + lam * jnp.sum(w**2)


def wide_case(T):
    X = np.random.default_rng(0).normal(size=(16, 64))
    problem = bl.Problem(wide, wide, X, X)
    return problem, 0.1, np.full(64, 0.1), bl.GradientDescent(0.1, momentum=0.5, max_steps=T)


def test_compiled_memory_follows_the_model():
    """w and the momentum are 512 B each. A unit of 8 steps, or a block, restarts from both."""

    def temporary(T, **options):
        problem, lam, w, solver = wide_case(T)
        engine = bl.Unrolled(estimate=False, **options)
        return bl.memory(problem, lam, w, solver=solver, engine=engine).temporary

    one = 64 * 8
    few = {L: temporary(256, levels=L) for L in (1, 2)}
    many = {L: temporary(4096, levels=L) for L in (1, 2)}
    assert 0.9 < (many[1] - few[1]) / (2 * one * (4096 - 256) / 8) < 1.3
    grown = many[2] - few[2]  # from 11 blocks of 11 units of 2 steps to 32 of 32 of 4
    assert 0.9 < grown / (3 * one * (32 - 11)) < 1.6, grown
    assert many[2] < 0.8 * 3 * one * 64  # 64 blocks of 64 steps
    assert temporary(4096, checkpoint=False) > 60 * many[2]


def test_a_unit_is_as_long_as_is_cheapest():
    """The least of L (T/u)^(1/L) s + u a, with a = n s for a step of n sines."""

    def chosen(num_sines, num_steps, levels=2):
        def step(x, index):
            for _ in range(num_sines):
                x = jnp.sin(x)
            return x, None

        return unit_steps(step, jnp.ones(100), num_steps, levels)

    assert [chosen(n, 1024) for n in (1, 10, 100)] == [8, 2, 1]
    assert chosen(10, 4096) == 3 and chosen(10, 4096, levels=3) == 1
    assert chosen(1, 255) == 1


def test_blocks_of_two_levels_leave_no_step_over_where_that_is_cheap():
    """250 = 10 blocks of 25: 35 states, not 16 of 15 and 10 more; of 263, and of 2 * 83, no divisor is near."""
    found = {n: loops._base(n, 2) for n in (100, 250, 263, 166, 500, 1000)}
    assert {n: base for n, (base, _) in found.items()} == {
        100: 10, 250: 25, 263: 16, 166: 12, 500: 25, 1000: 40
    }  # fmt: skip
    assert all(levels == 2 for _, levels in found.values())
    assert loops._base(250, 3) == (6, 3) and loops._base(3, 2) == (3, 1)


def test_units_leave_no_step_out(monkeypatch):
    """263 steps, each with its own batch: units of several, blocks of them, units and steps left over.

    The rows of all steps, of a block, or of one step are drawn at once.
    """
    problem, lam, w, _ = wide_case(263)
    solver = bl.GradientDescent(0.01, momentum=0.5, max_steps=263)  # longer steps magnify rounding
    problem = bl.Problem(wide, wide, problem.inner_data, problem.outer_data, batch_size=(4, None))
    call = lambda **options: bl.hypergradient(
        problem, lam, w, solver=solver, engine=bl.Unrolled(estimate=False, **options)
    )
    expected = call(checkpoint=False)
    for levels in (1, 2, 3):
        if levels == 3:
            monkeypatch.setattr(loops, "PLANS", 0)
        h = call(levels=levels)
        np.testing.assert_allclose(h.grad, expected.grad, rtol=1e-9)
        np.testing.assert_allclose(h.w, expected.w, rtol=1e-10)


def test_a_budget_chooses_the_fastest_setting_that_fits():
    problem, lam, w, solver = wide_case(400)
    call = functools.partial(bl.memory, problem, lam, w, solver=solver)
    peaks = {L: call(engine=bl.Unrolled(levels=L, estimate=False)).peak for L in (1, 2)}
    assert peaks[2] < peaks[1]
    for budget, levels in ((peaks[1], 1), (peaks[1] - 1, 2)):
        found = call(engine=bl.Unrolled(memory_budget=budget, estimate=False))
        assert found.engine.levels == levels and found.peak == peaks[levels]
        assert found.engine.memory_budget is None
    engine = bl.Unrolled(memory_budget=peaks[1] - 1, estimate=False)
    free = bl.Unrolled(estimate=False)
    one = bl.hypergradient(problem, lam, w, solver=solver, engine=engine)
    other = bl.hypergradient(problem, lam, w, solver=solver, engine=free)
    assert one.grad == other.grad
    with pytest.raises(TypeError, match=r"bilevel\.memory"):
        jax.jit(
            lambda lam: (
                bl.hypergradient(problem, lam, w, solver=solver, engine=engine, throw=False).grad
            )
        )(lam)


def test_levels_are_tried_until_they_cost_more(monkeypatch):
    peaks, tried = {1: 100, 2: 50, 3: 30, 4: 40}, []

    def measured(program, engine, *args):
        tried.append(engine.levels)
        return footprint.Memory(engine, peaks[engine.levels], 0, 0)

    monkeypatch.setattr(footprint, "measured", measured)
    fitted = lambda budget: footprint.fitted(measured, bl.Unrolled(memory_budget=budget)).engine
    assert fitted(35).levels == 3 and tried == [1, 2, 3]
    assert fitted(35).levels == 3 and tried == [1, 2, 3]  # remembered
    with pytest.raises(ValueError, match="the least is levels=3 with 30 B"):
        fitted(10)
    assert tried[3:] == [1, 2, 3, 4]


def test_a_budget_that_nothing_fits_is_refused_with_advice():
    problem, lam, w, solver = wide_case(2)
    engine = bl.Unrolled(memory_budget="1kB", estimate=False)
    with pytest.raises(ValueError, match=r"1 kB: the least is levels=.*truncate=K.*Forward"):
        bl.run(problem, lam, w, solver=solver, engine=engine, num_steps=1)
    for size, count in (("2GB", 2e9), ("1.5 MiB", 1.5 * 2**20), ("64B", 64), (10**6, 10**6)):
        assert bl.Unrolled(memory_budget=size).memory_budget == count
    for wrong in ("much", "GB"):
        with pytest.raises(ValueError, match="memory_budget"):
            bl.Unrolled(memory_budget=wrong)
    with pytest.raises(ValueError, match="memory_budget"):
        bl.Unrolled(memory_budget="1GB", checkpoint=False)
