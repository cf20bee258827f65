"""The compiled part of a run: outer steps in one program."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array

from bilevel import in_order, transforms
from bilevel.calls import can_estimate, engine_step, estimated, init_engine
from bilevel.outer.base import Evaluation, OuterMethod, at_accuracy
from bilevel.result import Best, History, RunState, packed, record, unpacked
from hypergrad import AbstractEngine, Hypergradient
from solvers import Status, tree
from solvers.optax_solver import optax_init, optax_update
from solvers.types import Tree


@eqx.filter_jit
def first_state(problem, solver, engine, rule, scales, w, lam, key) -> RunState:
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
    estimate: Array,
    size: int,
) -> tuple[RunState, History, Array]:
    """`length <= size` outer steps (fewer where one fails), their history, and how many were taken.

    `estimate`, boolean of shape (): whether the last step gets an error estimate.
    """

    def engine_at(state: RunState):
        step_key = jax.random.fold_in(key, state.step)
        own = (solver, engine)
        if isinstance(rule, OuterMethod):
            own = at_accuracy(rule, state.outer, solver, engine)
        return engine_step(problem, *own, state.w, state.lam, state.engine, step_key, state.step)

    def is_open(carry) -> Array:
        state, *_, taken = carry
        return (taken < length) & (state.worst <= Status.MAX_STEPS)

    judged = can_estimate(problem, solver, engine) and not isinstance(rule, OuterMethod)

    def body(carry):
        state, _, buffer, taken = carry
        h, engine_state = engine_at(state)
        buffer = {
            dtype: jax.lax.dynamic_update_index_in_dim(buffer[dtype], row, taken, 0)
            for dtype, row in packed(record(h)).items()
        }
        good = h.info.status <= Status.MAX_STEPS
        lam, outer_state, *judged_by = _outer_step(problem, rule, scales, state, h)
        last_best = state.best
        value, margin = (x.astype(last_best.outer_value.dtype) for x in judged_by)
        better = good & (value + margin < last_best.outer_value + last_best.margin)
        best = tree.where(better, Best(state.lam, h.w, value, state.step, margin), last_best)
        worst = jnp.where(good, state.worst, h.info.status)
        moved = RunState(state.step + 1, lam, h.w, engine_state, outer_state, best, worst)
        # A hypergradient that cannot be trusted moves nothing.
        stayed = state._replace(step=state.step + 1, worst=worst)
        if not engine.rewinds:
            stayed = stayed._replace(engine=engine_state)
        last = (state.lam, h) if judged else None
        return _select(good, moved, stayed), last, buffer, taken + 1

    h_shape, _ = eqx.filter_eval_shape(engine_at, state)
    empty = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), h_shape)
    entries = record(empty)
    buffer = {
        dtype: jnp.zeros((size, *row.shape), row.dtype) for dtype, row in packed(entries).items()
    }
    last = (state.lam, empty) if judged else None
    state, last, buffer, taken = jax.lax.while_loop(
        is_open, body, (state, last, buffer, jnp.int32(0))
    )
    history = unpacked(buffer, entries)

    def with_verdict() -> tuple[Array, History]:
        assert last is not None
        (lam, h), step = last, state.step - 1
        step_key = jax.random.fold_in(key, step)
        info = estimated(problem, solver, engine, lam, h, state.engine, step_key, step).info
        index = taken - 1
        rows = history._replace(
            error_estimate=history.error_estimate.at[index].set(info.error_estimate),
            curvature=history.curvature.at[index].set(info.curvature),
            status=history.status.at[index].set(info.status),
        )
        worst = jnp.where(info.status > Status.MAX_STEPS, info.status, jnp.int32(0))
        return jnp.maximum(state.worst, worst), rows

    if judged:
        worst, history = jax.lax.cond(estimate, with_verdict, lambda: (state.worst, history))
        state = state._replace(worst=worst)
    return state, history, taken


take_steps = eqx.filter_jit(steps)
_take_in_order = in_order.jit(steps)


def program(engine: AbstractEngine) -> Callable[..., tuple[RunState, History, Array]]:
    """Short steps, those of engines that solve nothing, run their operations in order."""
    return take_steps if engine.uses_solver or not in_order.known() else _take_in_order


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


def _select(condition: Array, x: Any, y: Any) -> Any:
    """`where` for trees that may hold random keys; an array that is in both is taken as it is."""
    return jax.tree.map(lambda a, b: a if a is b else jax.lax.select(condition, a, b), x, y)
