"""The outer loop: chunks of outer steps, each one call of one compiled program."""

import os
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh

from bilevel import in_order, lane_choice, processes, sharding, transforms, validation
from bilevel import retries as retrying
from bilevel.calls import can_estimate, engine_step, estimated, init_engine
from bilevel.checkpoint import Saved, opened
from bilevel.choice import resolved
from bilevel.footprint import fitted
from bilevel.log import Log
from bilevel.outer.base import Evaluation, OuterMethod, at_accuracy, check
from bilevel.pool import with_pool
from bilevel.problem import shuffled
from bilevel.progress import Progress, work
from bilevel.result import (
    Best,
    BilevelError,
    History,
    Result,
    RunState,
    join,
    packed,
    record,
    unpacked,
    verdict,
)
from hypergrad import AbstractEngine, BilevelProblem, Hypergradient
from hypergrad.base import Solver
from solvers import Status, tree
from solvers.optax_solver import optax_init, optax_update
from solvers.static_function import StaticFunction
from solvers.types import Tree


@with_pool
def run(
    problem: BilevelProblem,
    lam: Tree,
    w: Tree | None = None,
    *,
    num_steps: int = 100,
    solver: Solver | str | None = None,
    engine: AbstractEngine | str = "implicit",
    outer: optax.GradientTransformation | OuterMethod | None = None,
    transform: Any = None,
    key: Array | None = None,
    chunk: int | None = None,
    estimate_every: int | None = None,
    outer_tol: float = 0.0,
    patience: int | None = None,
    retries: int = 0,
    progress: bool | None = None,
    callback: Callable[[RunState, History], Any] | None = None,
    log: str | os.PathLike[str] | None = None,
    state: RunState | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = False,
    mesh: Mesh | None = None,
    throw: bool = True,
) -> Result:
    """Minimise the outer loss by hypergradient steps; inner and adjoint solves are warm-started.

    Args:
      problem, lam, w, solver, engine, key: as in `hypergradient` (`w` may be left out as there).
      num_steps: outer steps to take (from `state`, where given: that many more).
      outer: optax rule for the outer variable, default `optax.adam(1e-1)`; or an outer method
        (`bilevel.Adaptive()`, `MAID`, `HOAG`), which searches along lines and sets the tolerances of
        `solver` and `engine` (that must be Implicit): an outer step is then one of its evaluations.
      transform: prefix tree of `bilevel.transforms`: the rule moves the unconstrained value.
      chunk: outer steps in one compiled call; default a tenth of the run, at most 100. The numbers do
        not depend on it, nor does a last, shorter chunk compile again.
      estimate_every: steps between error estimates, which cost a few tight adjoint solves; default and
        least is one for each chunk. The last step always gets one.
      outer_tol: stop where the hypergradient's 2-norm (natural scale) is at most this, after a chunk.
      patience: stop after this many steps without a new best outer value.
      retries: so many times in all, a step with one of the statuses below sends the run half of its last
        step back, with all further steps half as long, instead of ending it: with a warning, and
        counted in `result.retries`. For optax rules. An uneventful run has the same bits.
      progress: show the step, the outer value, the hypergradient's norm and error, inner and adjoint steps
        and the time left on standard error after each chunk: one live line on a terminal where rich is
        installed, else plain lines. None does so where standard error is a terminal.
      callback: called as `callback(state, history_of_the_chunk)` after each chunk; a true result stops.
      log: file that gets the history while the run goes on, a line of JSON for each step; with `resume`,
        the lines that are there are gone on with, and no step comes twice.
      state: `result.state` of an earlier run to go on from; `lam` and `w` then only give the shapes.
      checkpoint: directory that gets the whole state and history after chunks (the last few are kept, and a
        save is put off where it would take more than a twentieth of the time). SIGTERM then ends the
        run after the chunk, saved, with `stopped="terminated"`.
      resume: go on from the newest readable checkpoint, to `num_steps` in all, with the bits of a run
        without a break; begin where there is none. Settings may have new numbers; the data and the key
        may not.
      mesh: as in `hypergradient`: `Tasks`, their solutions and states are spread over its devices, `lam` is on
        all of them, and each step adds up one hypergradient and report.
      throw: raise BilevelError at the end of a chunk for NONFINITE, INDEFINITE, BREAKDOWN or DIVERGED,
        and after the last step where it ended with MAX_STEPS.

    A step with one of the first four statuses does not move `lam`, and stops the run. Ctrl-C returns
    (and saves) the chunks that are done.

    Raises TypeError or ValueError for bad input, before any compute.
    """
    problem = sharding.spread(validation.problem(problem), mesh)
    engine, solver = resolved(engine, solver, problem, lam, w, key)
    engine = validation.engine(engine)
    solver = validation.stepping(validation.solver(solver, engine, problem))
    key = jax.random.key(0) if key is None else key
    lam = validation.variables("lam", lam)
    w = validation.start(problem, w, lam, key)
    if validation.is_traced(problem, lam, w, solver, engine, key):
        raise TypeError(
            "run works from Python, between compiled chunks: do not call it inside jit."
        )
    num_steps = validation.count("num_steps", num_steps, 0)
    chunk = (
        min(max(num_steps // 10, 1), 100) if chunk is None else validation.count("chunk", chunk, 1)
    )
    if estimate_every is not None:
        estimate_every = validation.count("estimate_every", estimate_every, 1)
    if patience is not None:
        patience = validation.count("patience", patience, 1)
    outer = optax.adam(1e-1) if outer is None else outer
    if isinstance(outer, OuterMethod):
        check(problem, solver, engine)
        if retries:
            raise TypeError(
                "retries=... halves the steps of an optax rule; an outer method has none."
            )
    elif not isinstance(outer, optax.GradientTransformation):
        raise TypeError(
            "outer must be an optax rule such as optax.adam(1e-1) or an outer method such as "
            f"bilevel.Adaptive(), got {outer!r}."
        )
    elif validation.count("retries", retries, 0):
        outer = retrying.shortening(outer)
    scales = transforms.broadcast(transform, lam)
    transforms.check_domain(scales, lam)
    validation.losses(problem, w, lam)
    w, (lam, key) = sharding.by_task(problem, w), sharding.on_all(problem, (lam, key))

    rule = outer if isinstance(outer, OuterMethod) else StaticFunction(outer)
    stopped = "num_steps"
    team = processes.team(getattr(problem, "mesh", None))
    first = team.first
    with (
        opened(checkpoint, resume, team, data=problem, key=key) as store,
        Log(log if first else None) as journal,
    ):
        notes = None if store is None else store.notes
        problem = lane_choice.settled(engine, problem, solver, w, lam, key, notes)
        problem = shuffled(problem, key)
        start = (problem, solver, engine, rule, scales, w, lam, key)
        like = eqx.filter_eval_shape(_first_state, *start) if state is None else state
        empty = _empty_record(problem, solver, engine, like, key)
        saved = None if store is None else store.load(like, empty)
        if saved is None:
            state = _first_state(*start) if state is None else state
            saved = Saved(state, (), int(state.step), 0)
        begin = saved.begin
        journal.start(begin, saved.history, resume)
        try:
            with Progress(progress if first else False, num_steps) as bar:
                while True:
                    state, pieces = saved.state, saved.history
                    done = sum(len(rows.status) for rows in pieces)
                    if why := verdict(state, pieces, outer_tol, patience):
                        stopped = why
                        break
                    if done >= num_steps:
                        break
                    if store is not None and team.anywhere(store.terminated):
                        stopped = "terminated"
                        break
                    length = min(chunk, num_steps - done)
                    end = done + length
                    estimate = end == num_steps or end - saved.estimated >= (estimate_every or 1)
                    sizes = jnp.int32(length), jnp.asarray(estimate), chunk
                    state = sharding.placed(problem, state)
                    args = (problem, solver, rule, scales, state, key, *sizes)
                    if getattr(engine, "memory_budget", None) is not None:
                        engine = fitted(_chunk, engine, *args).engine
                    state, buffer, taken = _program(engine)(engine, *args)
                    rows = jax.tree.map(lambda leaf, n=int(taken): np.asarray(leaf)[:n], buffer)
                    done += int(taken)
                    state = retrying.again(problem, scales, state, retries)
                    at_estimate = done if estimate else saved.estimated
                    # One assignment: Ctrl-C never sees half a chunk.
                    saved = Saved(state, (*pieces, rows), begin, at_estimate)
                    if store is not None:
                        store.save(saved)
                    journal.write(begin + done, rows)
                    reached = float(rows.outer_value[-1]), float(rows.grad_norm[-1])
                    bar.update(done, *reached, work(rows))
                    stop = callback is not None and bool(callback(state, rows))
                    if team.anywhere(stop) and int(state.worst) <= Status.MAX_STEPS:
                        stopped = "callback"
                        break
        except KeyboardInterrupt:
            if team.several:  # the others may be in the middle of a chunk
                raise
            stopped = "interrupted"
            if store is not None:
                store.save(saved)

    state = saved.state
    history = join(saved.history, empty)
    worst = int(state.worst)
    if worst <= Status.MAX_STEPS and len(history.status):
        worst = int(history.status[-1])
    result = Result(
        lam=_point(rule, scales, state),
        w=state.w,
        history=history,
        status=Status(worst),
        state=state,
        best=state.best,
        stopped=stopped,
        retries=retrying.used(state),
    )
    if throw and worst != Status.OK:
        raise BilevelError(worst, f"run: outer step {begin + len(history.status) - 1}", result)
    return result


@eqx.filter_jit
def _first_state(problem, solver, engine, rule, scales, w, lam, key) -> RunState:
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
        best=Best(lam, w, infinity, jnp.int32(-1)),
        worst=jnp.int32(Status.OK),
    )


def _empty_record(problem, solver, engine, state, key) -> History:
    h, _ = eqx.filter_eval_shape(
        engine_step, problem, solver, engine, state.w, state.lam, state.engine, key, state.step
    )
    return eqx.filter_eval_shape(record, h)


def _steps(
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
        lam, outer_state, value = _outer_step(problem, rule, scales, state, h)
        value = value.astype(state.best.outer_value.dtype)
        better = good & (value < state.best.outer_value)
        best = tree.where(better, Best(state.lam, h.w, value, state.step), state.best)
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


_chunk = eqx.filter_jit(_steps)
_chunk_in_order = in_order.jit(_steps)


def _program(engine: AbstractEngine) -> Callable[..., tuple[RunState, History, Array]]:
    """Short steps, those of engines that solve nothing, run their operations in order."""
    return _chunk if engine.uses_solver or not in_order.known() else _chunk_in_order


def _outer_step(
    problem, rule, scales, state: RunState, h: Hypergradient
) -> tuple[Tree, Any, Array]:
    """One step of the outer rule on the unconstrained scale, then the projection on the natural one.

    Also the value to compare points by: of an outer method, corrected and infinite where it did not accept.
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
    else:
        u, outer_state = optax_update(rule, grad, state.outer, u)
        value = h.info.outer_value
    return project_natural(transforms.forward(scales, u)), outer_state, value


@eqx.filter_jit
def _point(rule, scales, state: RunState) -> Tree:
    """The outer variable of the result: an outer method may just have been about to try another."""
    if not isinstance(rule, OuterMethod):
        return state.lam
    _, unflatten = tree.flatten(transforms.inverse(scales, state.lam))
    return transforms.forward(scales, unflatten(rule.point(state.outer)))


def _select(condition: Array, x: Any, y: Any) -> Any:
    """`where` for trees that may hold random keys; an array that is in both is taken as it is."""
    return jax.tree.map(lambda a, b: a if a is b else jax.lax.select(condition, a, b), x, y)
