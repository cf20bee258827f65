"""The number of lanes by measurement, on a clock that is not the machine's."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel as bl
from bilevel import lane_choice

# Milliseconds per step by lanes: small problems; 1024 unknowns; all alike; an accelerator.
SMALL = {1: 100.0, 4: 67.0, 8: 66.0, 16: 61.0, 32: 93.0, 40: 190.0}
LARGE = {1: 100.0, 4: 141.0, 8: 155.0, 16: 150.0, 32: 90.0, 40: 80.0}
EQUAL = dict.fromkeys(SMALL, 50.0)
WIDE = {1: 900.0, 4: 250.0, 8: 130.0, 16: 80.0, 32: 51.0, 40: 50.0}


def loss(w, lam, task):
    return jnp.sum((w - lam * task) ** 2)


class Machine:
    """A clock that only work moves, and work that takes what a table says; the first call compiles."""

    def __init__(self, monkeypatch, times, backend="cpu"):
        self.now, self.times, self.calls = 0.0, times, []
        monkeypatch.setattr(lane_choice.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(lane_choice, "engine_step", self.step)
        monkeypatch.setattr(lane_choice, "init_engine", lambda *args: None)
        monkeypatch.setattr(lane_choice, "_chosen", {})
        monkeypatch.setattr(jax, "default_backend", lambda: backend)

    def step(self, tasks, *args):
        self.now += self.times[tasks.lanes] + (1000.0 if tasks.lanes not in self.calls else 0.0)
        self.now += 30.0 if self.calls.count(tasks.lanes) == 1 else 0.0  # the machine was busy once
        self.calls.append(tasks.lanes)
        return jnp.zeros(())


def tasks(count=40, lanes=None):
    return bl.Tasks(bl.Problem(loss, loss), np.ones((count, 2)), lanes=lanes)


@pytest.mark.parametrize(
    ("times", "backend", "best", "tried"),
    [
        (SMALL, "cpu", 16, [1, 40, 4, 8, 16, 32]),
        (SMALL | {16: 65.0}, "cpu", 4, [1, 40, 4, 8, 16, 32]),  # not faster by a twentieth
        (LARGE | {40: 900.0}, "cpu", 1, [1, 40, 4]),
        (SMALL | {1: 40.0, 40: 30.0}, "cpu", 40, [1, 40, 4]),  # the fastest at an end
        (EQUAL, "cpu", 1, [1, 40, 4, 8, 16, 32]),
        (EQUAL, "gpu", 40, [40, 32, 16, 8, 4, 1]),
        (WIDE, "gpu", 40, [40, 32, 16]),
    ],
)
def test_the_fastest_is_found_with_few_tries(monkeypatch, times, backend, best, tried):
    machine = Machine(monkeypatch, times, backend)
    assert bl.choose_lanes(tasks(), 0.5, np.zeros(2)) == best
    assert list(dict.fromkeys(machine.calls)) == tried
    assert len(machine.calls) == 3 * len(tried)


def test_it_is_measured_once_for_each_problem_and_used(monkeypatch):
    machine = Machine(monkeypatch, {1: 5.0, 2: 9.0, 4: 3.0, 5: 9.0, 3: 9.0})
    auto, w = tasks(5, "auto"), np.zeros(2)
    settings = {"solver": bl.GradientDescent(0.3, max_steps=50), "engine": bl.OneStep()}
    h = bl.hypergradient(auto, 0.5, w, **settings)
    calls = len(machine.calls)
    assert set(machine.calls) == {1, 4, 5}
    other = dataclasses.replace(auto, task_data=2 * auto.task_data)
    bl.hypergradient(other, 0.1, w, **settings)  # other numbers, the same program
    expected = bl.hypergradient(tasks(5, 4), 0.5, w, **settings)
    np.testing.assert_array_equal(h.w, expected.w)
    assert jax.tree.structure(h) == jax.tree.structure(expected)
    assert len(machine.calls) == calls
    bl.choose_lanes(tasks(3), 0.5, w, **settings)
    assert len(machine.calls) > calls
    with pytest.raises(TypeError, match=r"inside jit.*bilevel.choose_lanes"):
        jax.jit(lambda lam: bl.hypergradient(auto, lam, w, throw=False, **settings).grad)(0.5)
    unrolled = bl.Unrolled(memory_budget="1GB")
    with pytest.raises(ValueError, match="memory_budget depend on each other"):
        bl.hypergradient(tasks(4, "auto"), 0.5, w, engine=unrolled)


def test_short_steps_are_timed_more_often(monkeypatch):
    """Two calls of a millisecond may both be slow by chance: the last of ten, the fastest, counts."""
    now, calls = [0.0], []
    monkeypatch.setattr(lane_choice.time, "perf_counter", lambda: now[0])

    def call():
        calls.append(1)
        now[0] += 0.001 if len(calls) == 11 else 0.01
        return jnp.zeros(())

    np.testing.assert_allclose(lane_choice._seconds(call), 0.001)
    assert len(calls) == 11
