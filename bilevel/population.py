"""Many runs of one problem at once: starting points, seeds and settings."""

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from bilevel import fingerprint, outer_steps, processes, validation
from bilevel.checkpoint import opened
from bilevel.checkpoint_file import Saved
from bilevel.chunks import Chunks
from bilevel.compiler_options import QUICK
from bilevel.compiler_options import jit as jit_with
from bilevel.log import Log
from bilevel.outer.base import OuterMethod
from bilevel.prepared import Prepared, prepared
from bilevel.problem import shuffled
from bilevel.progress import Progress
from bilevel.result import BilevelError, History, Result, RunState, finished, join, unpacked
from hypergrad import AbstractEngine, BilevelProblem
from hypergrad.base import Solver
from solvers import Status
from solvers.types import Tree


@dataclasses.dataclass(frozen=True)
class Population:
    """Outcome of `run_population`."""

    members: list[Result]
    """One result for each start. `stopped` is "status" or "hopeless" for one that ended early, else as in `run`."""
    best: int
    """The member with the smallest outer value."""

    @property
    def result(self) -> Result:
        """The best member's."""
        return self.members[self.best]

    def __repr__(self) -> str:
        lines = [f"Population of {len(self.members)}, best is member {self.best}"]
        return "\n".join([*lines, *(f"  {i}: {member}" for i, member in enumerate(self.members))])


class PopulationState(NamedTuple):
    """What the next chunk needs, and a callback gets."""

    step: Any
    """Steps of the members that last, int32."""
    members: RunState
    """Of each member, stacked."""
    active: Any
    """(members,), boolean: which of them go on."""


def run_population(
    problem: BilevelProblem,
    lam: Tree,
    w: Tree | None = None,
    *,
    num_steps: int = 100,
    solver: Solver | str | Sequence[Solver] | None = None,
    engine: AbstractEngine | str | Sequence[AbstractEngine] = "implicit",
    outer: optax.GradientTransformation | OuterMethod | None = None,
    transform: Any = None,
    key: Array | None = None,
    halvings: int = 0,
    chunk: int | None = None,
    time_limit: float | None = None,
    progress: bool | None = None,
    callback: Callable[[PopulationState, History], Any] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = False,
    throw: bool = True,
) -> Population:
    """`run` from several starting points, each step of all members in one compiled program.

    An outer problem has local minima as a rule, and where a run ends depends on where it begins. The members take
    turns in the program (one after the other, not side by side: inner solves differ in length), so that a member
    that has ended costs nothing, and compilation does not grow with their number.

    Args:
      problem, w, outer, transform: as in `run`; all members start at the same `w`.
      lam: starting points, each leaf with a leading axis of members.
      num_steps: outer steps of a member that lasts.
      solver, engine: one for all, or a sequence of one for each member, which may differ in their numbers.
      key: member i has `jax.random.fold_in(key, i)`: seeds differ where the starts do not.
      halvings: so many times the worse half is given up, by their best outer values so far: after `2^-halvings`, ...,
        1/4, 1/2 of the steps (successive halving, Jamieson and Talwalkar 2016). 0 lets all of them last.
      chunk: steps in one compiled call; default those before the first halving, at most 100.
      time_limit, checkpoint, resume: as in `run`.
      progress: as in `run`; the values are those of the best member so far.
      callback: called as `callback(state, history_of_the_chunk)` after each chunk; a true result stops. The state has
        that of each member in `state.members`, stacked, and in `state.active` which of them go on; histories have shape
        (steps, members), zero after a member's end.
      throw: raise BilevelError where no member ended with OK or MAX_STEPS.

    A member whose step fails ends with that status; the others go on. Ctrl-C returns what is done.

    Raises TypeError or ValueError for bad input, before any compute.
    """
    count = _members(lam)
    num_steps = validation.count("num_steps", num_steps, 1)
    halvings = validation.count("halvings", halvings, 0)
    time_limit = validation.seconds("time_limit", time_limit)
    validation.function("callback", callback)
    validation.progress(progress)
    validation.flag("resume", resume)
    validation.flag("throw", throw)
    if 2**halvings > min(count, num_steps):
        raise ValueError(
            f"halvings={halvings} asks for {2**halvings} members and steps or more, got {count} members and "
            f"num_steps={num_steps}."
        )
    if getattr(problem, "pool", None) is not None or getattr(problem, "lanes", None) == "auto":
        raise ValueError(
            "a pool of tasks and lanes='auto' are for bilevel.run: expected Tasks(pool=None), and a number of lanes or "
            "None."
        )
    key = validation.key(key)
    starts = [jax.tree.map(lambda leaf, i=i: leaf[i], lam) for i in range(count)]
    engines, solvers = _each("engine", engine, count), _each("solver", solver, count)
    given = [
        prepared(problem, start, w, own_solver, own_engine, outer, transform, jax.random.fold_in(key, i))
        for i, (start, own_engine, own_solver) in enumerate(zip(starts, engines, solvers, strict=True))
    ]  # fmt: skip
    first = given[0]
    if any(one.rule != first.rule for one in given):
        raise ValueError(
            "the members move by one outer rule, and their engines want plain steps at different rates: expected "
            "engines with the same outer_step."
        )
    # Batches differ by the members' keys, the order that the rows lie in does not.
    problem = shuffled(first.problem, key)
    stacked = _stacked([one._replace(problem=None, rule=None, scales=None) for one in given])

    rungs = sorted({max(num_steps >> k, 1) for k in range(halvings + 1)})
    chunk = min(rungs[0], 100) if chunk is None else validation.count("chunk", chunk, 1)
    rule, scales = first.rule, first.scales

    def length(done: int) -> int:
        return min(chunk, next(rung for rung in rungs if rung > done) - done)

    def advance(
        state: PopulationState, steps: int, estimate: bool
    ) -> tuple[PopulationState, History]:
        sizes = jnp.int32(steps), jnp.asarray(estimate), chunk
        active = np.array(state.active)
        new, buffer, _ = (_advance_quick if quick else _advance)(
            stacked, problem, rule, scales, state.members, jnp.asarray(active), *sizes
        )
        rows = jax.tree.map(lambda leaf: leaf.T[:steps], unpacked(buffer))
        done = int(state.step) + steps
        active &= np.asarray(new.worst) <= Status.MAX_STEPS
        if done in rungs[:-1]:
            values = np.where(active, np.asarray(new.best.outer_value), np.inf)
            kept = -(-count // 2 ** (rungs.index(done) + 1))
            active[np.argsort(values, kind="stable")[kept:]] = False
        return PopulationState(jnp.int32(done), new, active), rows

    def shown(state: PopulationState, rows: History) -> tuple[float, float, str]:
        values = np.asarray(state.members.best.outer_value)
        leader = int(np.argmin(values))
        number = int(np.sum(state.active))
        norm = float(rows.grad_norm[-1, leader])
        return float(values[leader]), norm, f"  {number} of {count} members"

    with opened(checkpoint, resume, data=problem, key=key) as store, Log(None) as journal:
        shapes = eqx.filter_eval_shape(_first_states, stacked, problem, rule, scales)
        empty = eqx.filter_eval_shape(
            lambda states: outer_steps.empty_record(
                problem, first.solver, first.engine, _row(states, 0), first.key
            ),
            shapes,
        )
        quick = outer_steps.compiles_quick(
            first.engine, problem, eqx.filter_eval_shape(_row, shapes, 0)
        )
        everyone = np.ones(count, bool)
        like = PopulationState(jax.ShapeDtypeStruct((), jnp.int32), shapes, everyone)
        saved = None
        if store is not None:
            settings = first.w, first.lam, first.key, scales
            store.computed = fingerprint.digests(first.problem, *settings)
            saved = store.load(like, empty)
        if saved is None:
            states = _first_states(stacked, problem, rule, scales)
            saved = Saved(PopulationState(jnp.int32(0), states, everyone), (), 0, 0)
        chunks = Chunks(
            advance,
            length,
            why_ended=lambda state, _: "" if np.any(state.active) else "nobody",
            shown=shown,
            num_steps=num_steps,
            estimate_every=num_steps + 1,  # the last step only
            time_limit=time_limit,
            callback=callback,
        )
        saved, stopped = chunks.run(
            saved, store, journal, processes.Team(), Progress(progress, num_steps)
        )

    end, history = saved.state, join(saved.history, lambda: empty)
    members = []
    for i in range(count):
        state = _row(end.members, i)
        rows = jax.tree.map(lambda leaf, i=i, n=int(state.step): leaf[:n, i], history)
        why = "status" if int(state.worst) > Status.MAX_STEPS else "hopeless"
        lam = outer_steps.point(rule, scales, state)
        members.append(finished(first.engine, lam, state, rows, stopped if end.active[i] else why))
    best = int(np.argmin([float(member.best.outer_value) for member in members]))
    found = Population(members, best)
    if throw and all(member.status > Status.MAX_STEPS for member in members):
        raise BilevelError(int(found.result.status), "run_population: every member", found)
    return found


def _members(lam: Tree) -> int:
    sizes = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(lam)}
    if len(sizes) != 1 or sizes == {()} or sizes == {(0,)}:
        raise ValueError(
            "lam must hold the starting points, each leaf with a leading axis of members; got shapes "
            f"{[np.shape(leaf) for leaf in jax.tree.leaves(lam)]}."
        )
    return sizes.pop()[0]


def _each(name: str, value: Any, count: int) -> list[Any]:
    if not isinstance(value, list | tuple):
        return [value] * count
    if len(value) != count:
        raise ValueError(f"{name} must be one for each of the {count} members, got {len(value)}.")
    return list(value)


def _stacked(given: list[Prepared]) -> Prepared:
    """Settings and starts with a leading axis. Raises ValueError where members differ in more than numbers."""
    arrays = [jax.tree.map(jnp.asarray, eqx.partition(one, _is_number)[0]) for one in given]
    rest = [eqx.partition(one, _is_number)[1] for one in given]
    if any(jax.tree.structure(arrays[0]) != jax.tree.structure(other) for other in arrays) or any(
        not eqx.tree_equal(rest[0], other) for other in rest
    ):
        raise ValueError(
            "the members' engines and solvers may differ in their numbers only: expected one type, with the "
            "same options."
        )
    return eqx.combine(jax.tree.map(lambda *leaves: jnp.stack(leaves), *arrays), rest[0])


def _is_number(leaf: Any) -> bool:
    return eqx.is_array(leaf) or isinstance(leaf, float)


def _row(states: Any, i: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf[i] if eqx.is_array_like(leaf) else leaf, states)


@eqx.filter_jit
def _first_states(stacked: Prepared, problem: Any, rule: Any, scales: Any) -> RunState:
    arrays, rest = eqx.partition(stacked, eqx.is_array)

    def one(own: Prepared) -> RunState:
        p = eqx.combine(own, rest)
        return outer_steps.first_state(problem, p.solver, p.engine, rule, scales, p.w, p.lam, p.key)

    return jax.lax.map(one, arrays)


def _steps_of_each(
    stacked: Prepared,
    problem: Any,
    rule: Any,
    scales: Any,
    states: RunState,
    active: Array,
    length: Array,
    estimate: Array,
    size: int,
) -> tuple[RunState, outer_steps.Rows, Array]:
    """`length` steps of each active member: states, `packed` histories (members, size, entries), and steps taken."""
    arrays, rest = eqx.partition(stacked, eqx.is_array)

    def one(member: tuple[Prepared, RunState, Array]) -> tuple[RunState, outer_steps.Rows, Array]:
        own, state, on = member
        p = eqx.combine(own, rest)
        go = lambda: outer_steps.judged_steps(
            p.engine, problem, p.solver, rule, scales, state, p.key, length, estimate, size
        )
        shapes = jax.eval_shape(go)[1]
        blank = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        return jax.lax.cond(on, go, lambda: (state, blank, jnp.int32(0)))

    return jax.lax.map(one, (arrays, states, active))


_advance = eqx.filter_jit(_steps_of_each)
_advance_quick = jit_with(_steps_of_each, QUICK)
