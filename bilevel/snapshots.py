"""The derivative through a training that is run from the host: REPLAY, a lazy tree of snapshots."""

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array

from bilevel import sharding, validation
from bilevel.result import BilevelError
from bilevel.tasks import Tasks
from hypergrad import BilevelProblem, Hypergradient, Unrolled
from hypergrad.base import Solver, begin, check_proximal, has_prox, make_info, make_solver
from hypergrad.derivatives import outer_value_and_grads
from hypergrad.watch import Watched, no_peak
from solvers import Status, tree
from solvers.loops import fixed_budget, judge, run_steps
from solvers.status import where
from solvers.types import Tree

State = TypeVar("State")
Adjoint = TypeVar("Adjoint")


def replay(
    problem: BilevelProblem,
    lam: Tree,
    w: Tree | None = None,
    *,
    solver: Solver | str | None = None,
    block: int = 100,
    arity: int = 4,
    snapshots: int | None = None,
    max_growth: float = 1e6,
    key: Array | None = None,
    throw: bool = True,
) -> Hypergradient:
    """The number of `Unrolled()`, for a training too long for one call: blocks of steps, run from the host.

    States are kept in host memory at the children of the nodes that the backward pass is in, of a tree with
    `arity` children a node over the blocks; all others are made again from the nearest one. A snapshot is
    the inner variable and the solver's state: batches come from the step number, so a
    step that is run again is the same.

    Args:
      problem, lam, w, solver, key, throw: as in `hypergradient` with `Unrolled` (no `Tasks`).
      block: steps in one compiled call, differentiated with the state before each of them stored on the device.
      arity: k children of each node. For B = T / block blocks, `(k - 1) log_k B + 1` snapshots live at once and
        `(k - 1) / k B log_k B` blocks are run forward, the first pass included: a larger k takes more
        memory and less time.
      snapshots: instead of `arity`, the number s of snapshots that may live at once. Blocks are then run forward
        as seldom as that allows (binomial checkpointing): `r B - C(s + r, s + 1) + 1` times for the least r with
        `C(s + r, s) >= B`.
      max_growth: as in `Unrolled`.

    Cost: about `4 + (k - 1) / k log_k B` gradients per step. Device memory: `block` states and a few.
    Source: Engstrom et al. 2025 (REPLAY); here leaves are blocks, and the first pass is the tree's own. Griewank
    and Walther 2000 (binomial).

    Raises TypeError or ValueError for bad input, BilevelError for a status that is not OK.
    """
    numbers: list[tuple[str, Any, int]] = [("block", block, 1), ("arity", arity, 2)]
    if snapshots is not None:
        numbers.append(("snapshots", snapshots, 1))
    for name, value, low in numbers:
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an integer, got {value!r}.")
        if value < low:
            raise ValueError(f"{name} must be at least {low}, got {value}.")
    if not max_growth > 0:
        raise ValueError(f"max_growth must be positive, got {max_growth!r}.")
    validation.flag("throw", throw)
    if isinstance(problem, Tasks):
        raise TypeError("replay takes a bilevel.Problem, not Tasks.")
    solver = validation.solver(solver, Unrolled(), validation.problem(problem))
    key = jax.random.key(0) if key is None else key
    lam = validation.variables("lam", lam)
    w = validation.start(problem, w, lam, key)
    if validation.is_traced(problem, lam, w, solver, key):
        raise TypeError("replay works from Python: inside jit or vmap use the engine Unrolled.")
    validation.losses(problem, w, lam)
    w, (lam, key) = sharding.by_task(problem, w), sharding.on_all(problem, (lam, key))
    at_lam = make_solver(solver, lam)
    if has_prox(problem):
        check_proximal(at_lam)
    total = fixed_budget(at_lam)
    # The last block is the short one.
    ends = [*range(block, total, block), total]
    begins = [0, *ends[:-1]]
    args = problem, solver, lam, key

    def forward(carry: Any, index: int) -> Any:
        length = ends[index] - begins[index]
        return _forward(*args, carry, jnp.asarray(begins[index]), length)

    def back(carry: Any, index: int, adjoint: "_Adjoint") -> "_Adjoint":
        length = ends[index] - begins[index]
        return _back(*args, carry, jnp.asarray(begins[index]), length, adjoint)

    first, host = _first(*args, w), _Host()
    judged: list[Any] = []

    def last(carry: Any) -> "_Adjoint":
        adjoint, *report = _last(*args, carry, total)
        judged.extend([carry[0], *report])
        return adjoint

    schedule, size = (lazy_tree, arity) if snapshots is None else (binomial, snapshots)
    adjoint = schedule(len(ends), size, first, forward, last, back, host.put, host.get)
    end, value, inner, c_norm = judged
    grad, growth, peak = _finish(*args, w, adjoint, c_norm)
    exploded = where(peak > max_growth, Status.DIVERGED)
    info = make_info(
        value, inner, grad, exploded, adjoint_steps=total, growth=growth, peak_growth=peak
    )
    h = Hypergradient(grad, end, info)
    if throw and int(info.status) != Status.OK:
        raise BilevelError(int(info.status), "replay", h)
    return h


def lazy_tree(
    count: int,
    arity: int,
    first: State,
    forward: Callable[[State, int], State],
    last: Callable[[State], Adjoint],
    back: Callable[[State, int, Adjoint], Adjoint],
    put: Callable[[State], Any] = lambda state: state,
    get: Callable[[Any], State] = lambda snapshot: snapshot,
) -> Adjoint:
    """`back` over `count` steps from the last to the first, each at the state before it.

    A node of n steps is cut into `arity` parts; the states where they begin are kept (`put`) while its parts
    are worked on, last to first, and let go of one by one.
    """

    def visit(state: State, low: int, high: int, adjoint: Any) -> Any:
        if high - low == 1:
            if high == count:
                adjoint = last(forward(state, low))
            return back(state, low, adjoint)
        parts = min(arity, high - low)
        cuts = [low + (high - low) * part // parts for part in range(parts + 1)]
        kept = [put(state)]
        for start, end in itertools.pairwise(cuts[:-1]):
            for index in range(start, end):
                state = forward(state, index)
            kept.append(put(state))
        del state
        for start, end in reversed(list(itertools.pairwise(cuts))):
            adjoint = visit(get(kept.pop()), start, end, adjoint)
        return adjoint

    return visit(first, 0, count, None)


def binomial(
    count: int,
    snapshots: int,
    first: State,
    forward: Callable[[State, int], State],
    last: Callable[[State], Adjoint],
    back: Callable[[State, int, Adjoint], Adjoint],
    put: Callable[[State], Any] = lambda state: state,
    get: Callable[[Any], State] = lambda snapshot: snapshot,
) -> Adjoint:
    """As `lazy_tree`, with at most `snapshots` of them and the fewest runs of `forward` that these allow.

    n steps are cut where what is left of the snapshots is best used; the late part is worked on with one less, then
    the early part with all of them again.
    """

    state, low, high, adjoint = first, 0, count, cast(Adjoint, None)
    early: list[tuple[Any, int]] = []  # snapshots, and the steps that they are at
    while True:
        while high - low > 1:
            early.append((put(state), low))
            cut = low + _early_part(high - low, snapshots - len(early) + 1)
            for index in range(low, cut):
                state = forward(state, index)
            low = cut
        if high == count:
            adjoint = last(forward(state, low))
        adjoint = back(state, low, adjoint)
        if not early:
            return adjoint
        high = low
        kept, low = early.pop()
        state = get(kept)


def _early_part(steps: int, snapshots: int) -> int:
    """How many of the steps to run before the next snapshot.

    With s snapshots and r runs of each step, `C(s + r, s)` steps can be reversed: the late part must not need more
    than r runs with one snapshot less, the early part not more than r - 1.
    """
    reach = lambda s, r: math.comb(s + r, s) if r >= 0 else 0
    runs = 0
    while reach(snapshots, runs) < steps:
        runs += 1
    return max(1, reach(snapshots, runs - 2), steps - reach(snapshots - 1, runs))


class _Host:
    """Snapshots in host memory, whatever the device."""

    def __init__(self) -> None:
        self.device = jax.local_devices(backend="cpu")[0]

    def put(self, carry: Any) -> Any:
        return jax.tree.map(lambda x: (jax.device_put(x, self.device), x.sharding), carry)

    def get(self, snapshot: Any) -> Any:
        is_pair = lambda node: isinstance(node, tuple) and len(node) == 2 and _is_place(node[1])
        return jax.tree.map(lambda pair: jax.device_put(*pair), snapshot, is_leaf=is_pair)


def _is_place(value: Any) -> bool:
    return isinstance(value, jax.sharding.Sharding)


class _Adjoint(NamedTuple):
    lam: Tree
    """What the steps so far add to the gradient."""
    state: Any
    """The outer loss's derivative in the floating-point leaves of the state."""
    peak: Array
    """Its largest norm so far, in the inner variable."""


def _moved(problem, solver, lam, key, floats, others, peak, start, length) -> tuple[Any, Any]:
    """The state after `length` steps: its floating-point leaves with `peak`, and the others."""
    w, inner_state = eqx.combine(floats, others)
    w, (inner_state, peak) = run_steps(
        cast(Any, Watched(make_solver(solver, lam))),
        problem.inner_objective(lam),
        w,
        (inner_state, peak),
        problem.inner_sampler(key),
        length,
        start=start,
        levels=1,
    )
    floats, others = eqx.partition((w, inner_state), eqx.is_inexact_array)
    return (floats, peak), others


@eqx.filter_jit
def _first(problem, solver, lam, key, w) -> Any:
    return begin(problem, solver, w, lam, key)


@eqx.filter_jit
def _forward(problem, solver, lam, key, carry, start, length: int) -> Any:
    parts = eqx.partition(carry, eqx.is_inexact_array)
    peak = no_peak(carry[0])
    (floats, _), others = _moved(problem, solver, lam, key, *parts, peak, start, length)
    return eqx.combine(floats, others)


@eqx.filter_jit
def _back(problem, solver, lam, key, carry, start, length: int, adjoint: _Adjoint) -> _Adjoint:
    floats, others = eqx.partition(carry, eqx.is_inexact_array)

    def block(lam: Tree, floats: Any, peak: Array) -> Any:
        return _moved(problem, solver, lam, key, floats, others, peak, start, length)[0]

    # Settings held in the state are differentiated too: optax raises them to integer powers.
    with jax.numpy_dtype_promotion("standard"):
        pull = jax.vjp(block, lam, floats, jnp.zeros_like(adjoint.peak))[1]
        in_lam, state, peak = pull((adjoint.state, adjoint.peak))
    return _Adjoint(tree.add(adjoint.lam, in_lam), state, peak)


@eqx.filter_jit
def _last(problem, solver, lam, key, carry, total: int) -> tuple[_Adjoint, Array, Any, Array]:
    """The adjoint after the last step, the outer value, the verdict on w, and `||dF/dw||`."""
    w, _ = carry
    value, c, in_lam = outer_value_and_grads(problem, w, lam, problem.outer_batch(key))
    floats, _ = eqx.partition(carry, eqx.is_inexact_array)
    batch, zero = problem.inner_sampler(key)(0), jnp.zeros(())
    objective = problem.inner_objective(lam)
    inner = judge(make_solver(solver, lam), objective, w, batch, jnp.int32(total), zero)
    adjoint = _Adjoint(in_lam, (c, tree.zeros_like(floats[1])), no_peak(w))
    return adjoint, value, inner, tree.norm(c)


@eqx.filter_jit
def _finish(problem, solver, lam, key, w, adjoint: _Adjoint, c_norm) -> tuple[Tree, Array, Array]:
    """The gradient with what lam does to the start, and the growth of the adjoint, at the start and at most."""

    def start(lam: Tree) -> Any:
        return eqx.partition(begin(problem, solver, w, lam, key), eqx.is_inexact_array)[0]

    (in_lam,) = jax.vjp(start, lam)[1](adjoint.state)
    scale = jnp.where(c_norm > 0, c_norm, jnp.ones_like(c_norm))
    growth = tree.norm(adjoint.state[0]) / scale
    return tree.add(adjoint.lam, in_lam), growth, adjoint.peak / scale
