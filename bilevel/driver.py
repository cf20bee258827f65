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

from bilevel import lane_choice, outer_steps, processes, sharding, validation
from bilevel import retries as retrying
from bilevel.checkpoint import Saved, opened
from bilevel.footprint import fitted
from bilevel.log import Log
from bilevel.outer.base import OuterMethod
from bilevel.pool import with_pool
from bilevel.prepared import prepared
from bilevel.problem import shuffled
from bilevel.progress import Progress, work
from bilevel.result import (
    BilevelError,
    History,
    Result,
    RunState,
    join,
    verdict,
)
from hypergrad import AbstractEngine, BilevelProblem
from hypergrad.base import Solver
from solvers import Status
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
    given = prepared(problem, lam, w, solver, engine, outer, transform, key, mesh, retries)
    engine, problem, solver, rule, scales, w, lam, key = given
    num_steps = validation.count("num_steps", num_steps, 0)
    chunk = (
        min(max(num_steps // 10, 1), 100) if chunk is None else validation.count("chunk", chunk, 1)
    )
    if estimate_every is not None:
        estimate_every = validation.count("estimate_every", estimate_every, 1)
    if patience is not None:
        patience = validation.count("patience", patience, 1)
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
        like = eqx.filter_eval_shape(outer_steps.first_state, *start) if state is None else state
        empty = outer_steps.empty_record(problem, solver, engine, like, key)
        saved = None if store is None else store.load(like, empty)
        if saved is None:
            state = outer_steps.first_state(*start) if state is None else state
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
                        engine = fitted(outer_steps.take_steps, engine, *args).engine
                    state, buffer, taken = outer_steps.program(engine)(engine, *args)
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
        lam=outer_steps.point(rule, scales, state),
        w=state.w,
        history=history,
        status=Status(worst),
        state=state,
        best=state.best,
        stopped=stopped,
        retries=retrying.used(state),
        multipliers=engine.multipliers(state.engine),
    )
    if throw and worst != Status.OK:
        raise BilevelError(worst, f"run: outer step {begin + len(history.status) - 1}", result)
    return result
