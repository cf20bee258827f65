"""The compiled part of a run: outer steps in one program."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bilevel import transforms
from bilevel.calls import can_estimate, engine_step, estimated, init_engine
from bilevel.compiler_options import IN_ORDER, ONCE, QUICK, known
from bilevel.compiler_options import jit as jit_with
from bilevel.footprint import fitted
from bilevel.outer.base import Evaluation, OuterMethod, at_accuracy
from bilevel.problem import Problem
from bilevel.result import Best, History, RunState, packed, record
from bilevel.validation import is_traced
from hypergrad import AbstractEngine, Hypergradient
from solvers import Status, tree
from solvers.optax_solver import optax_init, optax_update
from solvers.types import Tree

Rows = dict[str, Array]
"""A history as `packed`, stacked over steps."""
Last = tuple[Tree, Hypergradient] | None
"""The outer variable and hypergradient of the last step, where an estimate may be asked for."""


def first_state(problem, solver, engine, rule, scales, w, lam, key) -> RunState:
    """The state before the first step, compiled."""
    inside = is_traced(problem, w, lam, key)  # of another program, which has its own options
    once = not inside and compiles_quick(engine, problem, (w, lam))
    return (_begin_once if once else _begin)(problem, solver, engine, rule, scales, w, lam, key)


def _first_state(problem, solver, engine, rule, scales, w, lam, key) -> RunState:
    lam = (getattr(problem, "outer_projection", None) or (lambda lam: lam))(lam)
    u = transforms.inverse(scales, lam)
    infinity = jnp.full((), jnp.inf, tree.accumulation_dtype(w))
    return RunState(
        step=jnp.int32(0),
        lam=lam,
        w=w,
        engine=init_engine(problem, solver, engine, w, lam, key),
        outer=rule.init(tree.flatten(u)[0])
        if isinstance(rule, OuterMethod)
        else optax_init(rule, u),
        best=Best(lam, w, infinity, jnp.int32(-1), jnp.zeros_like(infinity)),
        worst=jnp.int32(Status.OK),
    )


def empty_record(problem, solver, engine, state, key) -> History:
    h, _ = eqx.filter_eval_shape(
        engine_step, problem, solver, engine, state.w, state.lam, state.engine, key, state.step
    )
    return eqx.filter_eval_shape(record, h)


def steps(
    engine,
    problem,
    solver,
    rule,
    scales,
    state: RunState,
    key: Array,
    length: Array,
    size: int,
) -> tuple[RunState, Rows, Array, Last]:
    """`length <= size` outer steps (fewer where one fails), their history, how many were taken, and the last one."""

    def engine_at(state: RunState):
        step_key = jax.random.fold_in(key, state.step)
        own = (solver, engine)
        if isinstance(rule, OuterMethod):
            own = at_accuracy(rule, state.outer, solver, engine)
        return engine_step(problem, *own, state.w, state.lam, state.engine, step_key, state.step)

    def is_open(carry) -> Array:
        state, *_, taken = carry
        return (taken < length) & (state.worst <= Status.MAX_STEPS)

    judged = _can_judge(problem, solver, engine, rule)

    def body(carry):
        state, *_, buffer, taken = carry
        h, engine_state = engine_at(state)
        buffer = {
            names: jax.lax.dynamic_update_index_in_dim(buffer[names], row, taken, 0)
            for names, row in packed(record(h)).items()
        }
        good = h.info.status <= Status.MAX_STEPS
        lam, outer_state, *judged_by = _outer_step(problem, rule, scales, state, h)
        last_best = state.best
        value, margin = (x.astype(last_best.outer_value.dtype) for x in judged_by)
        better = good & (value + margin < last_best.outer_value + last_best.margin)
        best = tree.where(better, Best(state.lam, h.w, value, state.step, margin), last_best)
        worst = jnp.where(good, state.worst, h.info.status)
        moved = RunState(state.step + 1, lam, h.w, engine_state, outer_state, best, worst)
        last = (state.lam, h) if judged else None
        return moved, state, last, buffer, taken + 1

    h_shape, _ = eqx.filter_eval_shape(engine_at, state)
    empty = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), h_shape)
    buffer = {
        names: jnp.zeros((size, *row.shape), row.dtype)
        for names, row in packed(record(empty)).items()
    }
    last = (state.lam, empty) if judged else None
    moved, before, last, buffer, taken = jax.lax.while_loop(
        is_open, body, (state, state, last, buffer, jnp.int32(0))
    )
    # A hypergradient that cannot be trusted moves nothing. It ends the loop, so one look after it will do.
    stayed = before._replace(step=moved.step, worst=moved.worst)
    if not engine.rewinds:
        stayed = stayed._replace(engine=moved.engine)
    state = jax.lax.cond(moved.worst <= Status.MAX_STEPS, lambda: moved, lambda: stayed)
    return state, buffer, taken, last


def _can_judge(problem, solver, engine, rule) -> bool:
    return can_estimate(problem, solver, engine) and not isinstance(rule, OuterMethod)


def with_verdict(
    engine, problem, solver, state: RunState, key: Array, buffer: Rows, taken: Array, last: Last
) -> tuple[RunState, Rows]:
    """State and history with the error estimate of the last step, at least one of which was taken."""
    assert last is not None
    (lam, h), step = last, state.step - 1
    step_key = jax.random.fold_in(key, step)
    h = estimated(problem, solver, engine, lam, h, state.engine, step_key, step)
    buffer = {
        names: jax.lax.dynamic_update_index_in_dim(buffer[names], row, taken - 1, 0)
        for names, row in packed(record(h)).items()
    }
    worst = jnp.where(h.info.status > Status.MAX_STEPS, h.info.status, jnp.int32(0))
    return state._replace(worst=jnp.maximum(state.worst, worst)), buffer


def judged_steps(
    engine, problem, solver, rule, scales, state: RunState, key, length, estimate: Array, size: int
) -> tuple[RunState, Rows, Array]:
    """`steps`, the last one with its error estimate where `estimate`, a boolean of shape (), is true."""
    state, buffer, taken, last = steps(
        engine, problem, solver, rule, scales, state, key, length, size
    )
    if last is not None:
        judge = lambda: with_verdict(engine, problem, solver, state, key, buffer, taken, last)
        state, buffer = jax.lax.cond(estimate, judge, lambda: (state, buffer))
    return state, buffer, taken


_begin = eqx.filter_jit(_first_state)
_begin_once = jit_with(_first_state, ONCE)
take_steps = eqx.filter_jit(steps)
_take_in_order = jit_with(steps, IN_ORDER)
_take_quick = jit_with(steps, QUICK)
_take_judged = eqx.filter_jit(judged_steps)
_judge = eqx.filter_jit(with_verdict)
_judge_seldom = jit_with(with_verdict, QUICK)
_judge_small = jit_with(with_verdict, ONCE)

SELDOM = 10
"""Steps in a chunk from which on an estimate's compilation takes longer than its runs."""


SMALL = 16_000_000
"""Bytes of data and state below which a run is taken to compile for longer than it works."""


def compiles_quick(engine: AbstractEngine, problem: Any, state: Any) -> bool:
    """Whether what is compiled quicker, though slower by some percent, is the better program.

    It depends on shapes alone, as the last bits of a result depend on the program. With batches it never is, since
    rows that are streamed leave open how many there are.
    """
    if not engine.needs_implicit or type(problem) is not Problem or not known(QUICK):
        return False
    if problem.batch_size != (None, None):
        return False
    leaves = [leaf for leaf in jax.tree.leaves((problem, state)) if hasattr(leaf, "dtype")]
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) <= SMALL


def program(
    engine: AbstractEngine, problem: Any, state: RunState
) -> Callable[..., tuple[RunState, Rows, Array, Last]]:
    """`steps`, compiled as suits it: short steps, those of engines that solve nothing, go in order."""
    if not engine.uses_solver and known(IN_ORDER):
        return _take_in_order
    return _take_quick if compiles_quick(engine, problem, state) else take_steps


def advance(
    engine, problem, solver, rule, scales, state: RunState, key, length: int, estimate: bool, size
) -> tuple[RunState, Rows, Array]:
    """`judged_steps`, compiled. The estimate is a program of its own, for the run that never asks for one."""
    args = (problem, solver, rule, scales, state, key, np.int32(length))  # no dispatch
    if getattr(engine, "memory_budget", None) is not None:
        # What is within the budget is one program with all there is to do.
        args = (*args, jnp.asarray(estimate), size)
        return _take_judged(fitted(_take_judged, engine, *args).engine, *args)
    state, buffer, taken, last = program(engine, problem, state)(engine, *args, size)
    if estimate and last is not None:
        judge = _judge
        if size >= SELDOM and known(QUICK):
            small = compiles_quick(engine, problem, state)
            judge = _judge_small if small else _judge_seldom
        state, buffer = judge(engine, problem, solver, state, key, buffer, taken, last)
    return state, buffer, taken


def _outer_step(
    problem, rule, scales, state: RunState, h: Hypergradient
) -> tuple[Tree, Any, Array, Array]:
    """One step of the outer rule on the unconstrained scale, then the projection on the natural one.

    Also the value to compare points by, and its margin: of an outer method, corrected and infinite where it did not
    accept, and the size of the correction.
    """
    project_natural = getattr(problem, "outer_projection", None) or (lambda lam: lam)
    u = transforms.inverse(scales, state.lam)
    _, pull_back = jax.vjp(lambda u: transforms.forward(scales, u), u)
    grad = pull_back(h.grad)[0]
    if isinstance(rule, OuterMethod):
        flat, unflatten = tree.flatten(u)
        info = h.info
        numbers = (info.error_estimate, info.outer_value, info.corrected_value)
        numbers = tuple(x.astype(flat.dtype) for x in (*numbers, info.inner.residual))
        at = Evaluation(flat, tree.flatten(grad)[0], *numbers)

        def project(flat: Array) -> Array:
            lam = project_natural(transforms.forward(scales, unflatten(flat)))
            return tree.flatten(transforms.inverse(scales, lam))[0]

        flat, outer_state = rule.update(at, state.outer, project)
        u = unflatten(flat)
        accepted = jnp.all(rule.point(outer_state) == at.u)
        value = jnp.where(accepted, at.corrected, jnp.inf)
        margin = jnp.abs(at.corrected - at.value)
    else:
        u, outer_state = optax_update(rule, grad, state.outer, u)
        value = h.info.outer_value
        margin = jnp.zeros_like(value)
    return project_natural(transforms.forward(scales, u)), outer_state, value, margin


def point(rule, scales, state: RunState) -> Tree:
    """The outer variable of the result: an outer method may just have been about to try another."""
    if not isinstance(rule, OuterMethod):
        return state.lam
    return _accepted(rule, scales, state.lam, state.outer)


@eqx.filter_jit
def _accepted(rule: OuterMethod, scales, lam: Tree, outer_state: Any) -> Tree:
    _, unflatten = tree.flatten(transforms.inverse(scales, lam))
    return transforms.forward(scales, unflatten(rule.point(outer_state)))
