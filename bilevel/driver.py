"""The outer loop: chunks of outer steps, each one call of one compiled program."""

import functools
import os
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import optax
from jax import Array
from jax.sharding import Mesh

from bilevel import fingerprint, lane_choice, outer_steps, processes, sharding, validation
from bilevel import profile as profiling
from bilevel import retries as retrying
from bilevel.checkpoint import opened
from bilevel.checkpoint_file import Saved, check_state
from bilevel.chunks import Chunks
from bilevel.live import Seen, task_statuses
from bilevel.log import Log
from bilevel.outer.base import OuterMethod
from bilevel.pool import on_host, pooled
from bilevel.prepared import prepared
from bilevel.problem import shuffled
from bilevel.progress import PANEL, Progress, work
from bilevel.result import (
    BilevelError,
    History,
    Result,
    RunState,
    finished,
    join,
    unpacked,
    verdict,
)
from bilevel.stream import streamed
from hypergrad import AbstractEngine, BilevelProblem
from hypergrad.base import Solver
from solvers import Status
from solvers.types import Tree


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
    time_limit: float | None = None,
    progress: bool | str | None = None,
    callback: Callable[[RunState, History], Any] | None = None,
    log: str | os.PathLike[str] | None = None,
    profile: str | os.PathLike[str] | None = None,
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
      outer_tol: stop where the hypergradient's 2-norm (natural scale) is at most this, after a chunk; 0 does not.
      patience: stop after this many steps without a new best outer value.
      retries: so many times in all, a step with one of the statuses below sends the run half of its last
        step back, with all further steps half as long, instead of ending it: with a warning, and
        counted in `result.retries`. For optax rules. An uneventful run has the same bits.
      time_limit: end the run after the first chunk that ends so many seconds after its begin, compilation included,
        with `stopped="time_limit"`. At least one chunk is done, so runs that are resumed get on.
      progress: show the step, the outer value, the hypergradient's norm and error, inner and adjoint steps, how busy
        the lanes of `Tasks` were, memory and the time left on standard error after each chunk: one live line on
        a terminal where rich is installed, else plain lines. None does so where standard error is a terminal.
        "panel" is a box with all of that, totals, a curve of the outer values, the best of them and how many steps and
        tasks have which status; off a terminal, plain lines.
      profile: directory that gets a `jax.profiler` trace of the second chunk, which compiles nothing, and is named on
        standard error. It costs that chunk some time; no number changes.
      callback: called as `callback(state, history_of_the_chunk)` after each chunk; a true result stops.
      log: file that gets the history while the run goes on, a line of JSON for each step; with `resume`,
        the lines that are there are gone on with, and no step comes twice.
      state: `result.state` of an earlier run to go on from; `lam` and `w` then only give the shapes.
      checkpoint: directory that gets the whole state and history after chunks, written by a thread while the next
        ones run (the last few are kept, and a save is put off while one is under way, or where it would take more
        than a twentieth of the time). One that fails (a full disk) is a warning after a later chunk. SIGTERM then
        ends the run after the chunk, saved, with `stopped="terminated"`.
      resume: go on from the newest readable checkpoint, to `num_steps` in all, with the bits of a run
        without a break; begin where there is none. Settings may have new numbers; the data and the key
        may not. What computes something else than before (a loss, prox, projection, transform), and other batch
        sizes, is a warning.
      mesh: as in `hypergradient`: `Tasks`, their solutions and states are spread over its devices, `lam` is on
        all of them, and each step adds up one hypergradient and report. Of a `Problem`, the rows of both levels
        (`shard_rows`).
      throw: raise BilevelError at the end of a chunk for NONFINITE, INDEFINITE, BREAKDOWN or DIVERGED,
        and after the last step where it ended with MAX_STEPS.

    A step with one of the first four statuses does not move `lam`, and stops the run. Ctrl-C returns
    (and saves) the chunks that are done.

    Raises TypeError or ValueError for bad input, before any compute.
    """
    num_steps = validation.count("num_steps", num_steps, 0)
    chunk = (
        min(max(num_steps // 10, 1), 100) if chunk is None else validation.count("chunk", chunk, 1)
    )
    if estimate_every is not None:
        estimate_every = validation.count("estimate_every", estimate_every, 1)
    if patience is not None:
        patience = validation.count("patience", patience, 1)
    time_limit = validation.seconds("time_limit", time_limit)
    outer_tol = validation.tolerance("outer_tol", outer_tol)
    validation.function("callback", callback)
    validation.progress(progress, PANEL)
    validation.flag("resume", resume)
    validation.flag("throw", throw)
    key = validation.key(key)
    pool = pooled(problem, w, key, chunk)
    stream = streamed(problem, key, chunk, mesh)
    sample, w = (problem, w) if pool is None else pool.sample()
    sample = sample if stream is None else stream.sample()
    given = prepared(sample, lam, w, solver, engine, outer, transform, key, mesh, retries)
    engine, problem, solver, rule, scales, w, lam, key = given
    identity = problem if pool is None else pool.tasks
    identity = identity if stream is None else stream.problem
    team = processes.team(sharding.mesh_of(problem))
    bar = Progress(progress if team.first else False, num_steps)
    trace = profiling.directory(profile)

    def advance(state: RunState, length: int, estimate: bool) -> tuple[RunState, History]:
        tasks, part, numbers = (problem, state, None) if pool is None else pool.load(state, length)
        if stream is not None:
            tasks = stream.load(engine, solver, state, length)
        part = sharding.placed(tasks, part)
        args = (engine, tasks, solver, rule, scales, part, key, length, estimate, chunk)
        part, buffer, taken = outer_steps.advance(*args)
        rows = jax.tree.map(lambda leaf, n=int(taken): leaf[:n], unpacked(buffer))
        part = retrying.again(tasks, scales, part, retries)
        return part if pool is None else pool.store(state, numbers, part), rows

    with (
        opened(checkpoint, resume, team, data=identity, key=key) as store,
        Log(log if team.first else None) as journal,
    ):
        notes = None if store is None else store.notes
        problem = lane_choice.settled(engine, problem, solver, w, lam, key, notes)
        if store is not None:
            store.computed = fingerprint.digests(problem, w, lam, key, scales)
        problem = shuffled(problem, key) if stream is None else stream.start()
        begin = lambda problem, w: outer_steps.first_state(
            problem, solver, engine, rule, scales, w, lam, key
        )
        shapes = functools.cache(lambda: eqx.filter_eval_shape(begin, problem, w))
        record = functools.partial(outer_steps.empty_record, problem, solver, engine)
        if stream is not None:
            stream.check(engine, solver, shapes())
        if state is not None and pool is None:
            check_state(state, shapes())
        if pool is not None:
            state = pool.first_state(begin) if state is None else on_host(state)
        saved = None
        if store is not None:
            like = shapes() if state is None else state
            saved = store.load(like, record(shapes(), key))
        if saved is None:
            state = begin(problem, w) if state is None else state
            saved = Saved(state, (), int(state.step), 0)
        if stream is not None:
            stream.end = saved.begin + num_steps
        journal.start(saved.begin, saved.history, resume)
        chunks = Chunks(
            profiling.traced(trace, advance, saved.begin + num_steps),
            length=lambda done: min(chunk, num_steps - done),
            why_ended=lambda state, pieces: verdict(state, pieces, outer_tol, patience),
            shown=lambda state, rows: (
                float(rows.outer_value[-1]),
                float(rows.grad_norm[-1]),
                work(rows),
                Seen(
                    rows,
                    (float(state.best.outer_value), int(state.best.step)),
                    task_statuses(state),
                )
                if bar.panel is not None
                else None,
            ),
            num_steps=num_steps,
            estimate_every=estimate_every,
            time_limit=time_limit,
            callback=callback,
        )
        saved, stopped = chunks.run(saved, store, journal, team, bar)

    end: RunState = saved.state
    lam = outer_steps.point(rule, scales, end)
    result = finished(
        engine,
        lam,
        end,
        join(saved.history, lambda: record(shapes(), key)),
        stopped,
        retries=retrying.used(end),
    )
    if throw and result.status != Status.OK:
        last = saved.begin + len(result.history.status) - 1
        raise BilevelError(result.status, f"run: outer step {last}", result)
    return result
