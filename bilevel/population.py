"""Many runs of one problem at once: starting points, seeds and settings."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from bilevel import outer_steps, validation
from bilevel.outer.base import OuterMethod
from bilevel.prepared import Prepared, prepared
from bilevel.problem import shuffled
from bilevel.progress import Progress
from bilevel.result import BilevelError, History, Result, RunState, join
from hypergrad import AbstractEngine, BilevelProblem
from hypergrad.base import Solver
from solvers import Status
from solvers.types import Tree


@dataclasses.dataclass(frozen=True)
class Population:
    """Outcome of `run_population`."""

    members: list[Result]
    """One result for each start; `stopped` is "num_steps", "status", "hopeless" or "interrupted"."""
    best: int
    """The member with the smallest outer value."""

    @property
    def result(self) -> Result:
        """The best member's."""
        return self.members[self.best]

    def __repr__(self) -> str:
        lines = [f"Population of {len(self.members)}, best is member {self.best}"]
        return "\n".join([*lines, *(f"  {i}: {member}" for i, member in enumerate(self.members))])


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
    progress: bool | None = None,
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
      progress: as in `run`; the values are those of the best member so far.
      throw: raise BilevelError where no member ended with OK or MAX_STEPS.

    A member whose step fails ends with that status; the others go on. Ctrl-C returns what is done.

    Raises TypeError or ValueError for bad input, before any compute.
    """
    count = _members(lam)
    num_steps = validation.count("num_steps", num_steps, 1)
    halvings = validation.count("halvings", halvings, 0)
    if 2**halvings > min(count, num_steps):
        raise ValueError(
            f"halvings={halvings} asks for {2**halvings} members and steps or more, got {count} members and "
            f"num_steps={num_steps}."
        )
    key = jax.random.key(0) if key is None else key
    starts = [jax.tree.map(lambda leaf, i=i: leaf[i], lam) for i in range(count)]
    engines, solvers = _each("engine", engine, count), _each("solver", solver, count)
    given = [
        prepared(problem, start, w, own_solver, own_engine, outer, transform, jax.random.fold_in(key, i))
        for i, (start, own_engine, own_solver) in enumerate(zip(starts, engines, solvers, strict=True))
    ]  # fmt: skip
    first = given[0]
    # Batches differ by the members' keys, the order that the rows lie in does not.
    problem = shuffled(first.problem, key)
    stacked = _stacked([one._replace(problem=None, rule=None, scales=None) for one in given])

    rungs = sorted({max(num_steps >> k, 1) for k in range(halvings + 1)})
    chunk = rungs[0]
    states = _first_states(stacked, problem, first.rule, first.scales)
    why = ["num_steps"] * count
    pieces: list[list[History]] = [[] for _ in range(count)]
    active, values = np.ones(count, bool), np.full(count, np.inf)
    done = 0
    try:
        with Progress(progress, num_steps) as bar:
            for rung in rungs:
                while done < rung and active.any():
                    length = min(chunk, rung - done)
                    sizes = jnp.int32(length), jnp.asarray(done + length == num_steps), chunk
                    new, rows, taken = _advance(
                        stacked,
                        problem,
                        first.rule,
                        first.scales,
                        states,
                        jnp.asarray(active),
                        *sizes,
                    )
                    # One assignment: Ctrl-C leaves all members at the same step.
                    states, done, rows, taken = new, done + length, *jax.device_get((rows, taken))
                    for i in np.flatnonzero(active):
                        pieces[i].append(_row(rows, (i, slice(taken[i]))))
                        if int(states.worst[i]) > Status.MAX_STEPS:
                            why[i], active[i] = "status", False
                    values = np.asarray(states.best.outer_value)
                    leader = int(np.argmin(values))
                    norm = float(pieces[leader][-1].grad_norm[-1])
                    bar.update(
                        done, float(values[leader]), norm, f"  {active.sum()} of {count} members"
                    )
                if rung < num_steps:
                    kept = np.argsort(np.where(active, values, np.inf), kind="stable")
                    for i in kept[-(-count // 2 ** (rungs.index(rung) + 1)) :]:
                        if active[i]:
                            why[i], active[i] = "hopeless", False
    except KeyboardInterrupt:
        why = ["interrupted" if one else reason for one, reason in zip(active, why, strict=True)]
    empty = eqx.filter_eval_shape(
        lambda: outer_steps.empty_record(
            problem, first.solver, first.engine, _row(states, 0), first.key
        )
    )
    members = [_result(_row(states, i), pieces[i], empty, given[i], why[i]) for i in range(count)]
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


@eqx.filter_jit
def _advance(
    stacked: Prepared,
    problem: Any,
    rule: Any,
    scales: Any,
    states: RunState,
    active: Array,
    length: Array,
    estimate: Array,
    size: int,
) -> tuple[RunState, History, Array]:
    """`length` steps of each active member: states, histories (members, size), and how many steps were taken."""
    arrays, rest = eqx.partition(stacked, eqx.is_array)

    def one(member: tuple[Prepared, RunState, Array]) -> tuple[RunState, History, Array]:
        own, state, on = member
        p = eqx.combine(own, rest)
        go = lambda: outer_steps.steps(
            p.engine, problem, p.solver, rule, scales, state, p.key, length, estimate, size
        )
        shapes = jax.eval_shape(go)[1]
        blank = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        return jax.lax.cond(on, go, lambda: (state, blank, jnp.int32(0)))

    return jax.lax.map(one, (arrays, states, active))


def _result(
    state: RunState, pieces: list[History], empty: History, given: Prepared, why: str
) -> Result:
    history, worst = join(pieces, empty), int(state.worst)
    if worst <= Status.MAX_STEPS and len(history.status):
        worst = int(history.status[-1])
    return Result(
        lam=outer_steps.point(given.rule, given.scales, state),
        w=state.w,
        history=history,
        status=Status(worst),
        state=state,
        best=state.best,
        stopped=why,
    )
