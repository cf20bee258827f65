"""The loops that run an inner solver's steps."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array

from solvers import status, tree
from solvers.base import AbstractInnerSolver
from solvers.fields import cast
from solvers.status import Status
from solvers.types import ObjectiveFn, Sampler, Scalar, SolveInfo, Tree


def tolerance(solver: AbstractInnerSolver, w: Tree) -> Scalar:
    """The absolute tolerance in force: the solver's own, or 1e-8 in float64 and 1e-4 otherwise."""
    like = jnp.zeros((), tree.accumulation_dtype(w))
    default = 1e-8 if tree.epsilon(w) < 1e-10 else 1e-4
    return jnp.asarray(default, like.dtype) if solver.tol is None else cast(solver.tol, like)


def budget_of(solver: AbstractInnerSolver) -> Array | int:
    """The steps a solve may take: `max_steps`, or `steps` where that is less."""
    if solver.steps is None:
        return solver.max_steps
    steps = jnp.asarray(solver.steps)  # a schedule may give any dtype, and more than an int32 holds
    return jnp.minimum(steps, jnp.asarray(solver.max_steps, steps.dtype)).astype(jnp.int32)


def fixed_budget(solver: AbstractInnerSolver) -> int:
    """`max_steps`, where all of them are taken.

    Raises ValueError for a solver with `steps`, which bounds a loop that stops.
    """
    if solver.steps is not None:
        raise ValueError(
            f"{type(solver).__name__}(steps=...) bounds a loop that stops, but these steps are gone through one by "
            "one: give their number as max_steps, or use the engine Implicit."
        )
    return solver.max_steps


def solve(
    solver: AbstractInnerSolver, objective: ObjectiveFn, w: Tree, state: Any, sampler: Sampler
) -> tuple[Tree, Any, SolveInfo]:
    """Run until the tolerance or the budget is reached: `(w, state, info)`.

    With minibatches that change from step to step there is no residual to stop at: the whole budget
    is run. Reverse mode does not go through this loop.
    """
    if solver.max_steps == 0:
        num_steps, tol = jnp.int32(0), tolerance(solver, w)
    elif sampler.varies and solver.minibatches:
        num_steps, tol = jnp.asarray(budget_of(solver), jnp.int32), jnp.zeros(())
        if solver.steps is None:
            w, state = run_steps(solver, objective, w, state, sampler, solver.max_steps)
        else:
            step = lambda i, carry: solver.step(objective, carry[0], carry[1], sampler(i))
            w, state = jax.lax.fori_loop(0, num_steps, step, (w, state))
    else:
        tol = tolerance(solver, w)
        w, state, num_steps = _run_while_useful(solver, objective, w, state, sampler(0), tol)
    return w, state, judge(solver.settled(state), objective, w, sampler(0), num_steps, tol)


ROUND = 100
"""Steps between two looks at whether a solve still gains on its rounding error."""


def _run_while_useful(
    solver: AbstractInnerSolver,
    objective: ObjectiveFn,
    w: Tree,
    state: Any,
    batch: Any,
    tol: Scalar,
) -> tuple[Tree, Any, Array]:
    """`run_until`, ended too where a round of steps below the rounding level gained less than a tenth.

    Else a tolerance that the precision does not allow would take the whole budget, at each solve.
    """
    level, most = stop_level(tol, w), budget_of(solver)
    if solver.max_steps <= ROUND:
        return run_until(solver, objective, w, state, batch, level)

    def is_going(carry: tuple[Tree, Any, Array, Array]) -> Array:
        _, state, steps, stuck = carry
        return is_open(state, steps, level, most) & ~stuck

    def body(carry: tuple[Tree, Any, Array, Array]) -> tuple[Tree, Any, Array, Array]:
        w, before, steps, _ = carry
        budget = jnp.minimum(most - steps, ROUND)
        w, state, taken = run_until(solver, objective, w, before, batch, level, budget)
        floor = rounding_level(objective(w, batch), w).astype(state.residual.dtype)
        gained = state.residual < 0.9 * before.residual
        stuck = ~gained & (state.residual <= floor) & (tol > 0)
        return w, state, steps + taken, stuck

    w, state, steps, _ = jax.lax.while_loop(
        is_going, body, (w, state, jnp.int32(0), jnp.asarray(False))
    )
    return w, state, steps


def stop_level(tol: Scalar, w: Tree) -> Scalar:
    """Where a loop ends: what `judge` takes for met, as steps below rounding cost much and gain nothing."""
    return jnp.where(tol > 0, jnp.maximum(tol, 10 * tree.epsilon(w)), tol)


def rounding_level(value: Scalar, w: Tree, length: Scalar | None = None) -> Scalar:
    """`10 eps max(1, |value| / max(1, ||w||))`: a gradient norm below this is rounding error.

    By `||w||` (`length`, where it is known), or an iteration that diverges would end up below it: values grow as the
    square of gradients.
    """
    dtype = tree.accumulation_dtype(w)
    size = jnp.maximum(tree.norm(w) if length is None else length, 1.0)
    return 10 * tree.epsilon(w) * jnp.maximum(jnp.abs(value).astype(dtype) / size, 1.0)


def judge(
    solver: AbstractInnerSolver,
    objective: ObjectiveFn,
    w: Tree,
    batch: Any,
    num_steps: Array,
    tol: Scalar,
) -> SolveInfo:
    """Value and recomputed residual at `w`, and the status they deserve.

    A tolerance below the rounding level is met there. `tol = 0` asks for a
    fixed budget: what residual is left is OK. One that a schedule made NaN or infinite is NONFINITE.
    """
    value = objective(w, batch)
    (length, residual), w_finite = tree.norms_and_finite(w, solver.optimality(objective, w, batch))
    floor = rounding_level(value, w, length)
    unmet = (tol > 0) & (residual > jnp.maximum(tol.astype(residual.dtype), floor))
    finite = jnp.isfinite(residual) & jnp.isfinite(value) & jnp.isfinite(tol) & w_finite
    code = status.combine(
        status.where(unmet, Status.MAX_STEPS), status.where(~finite, Status.NONFINITE)
    )
    return SolveInfo(value, residual, jnp.asarray(num_steps, jnp.int32), code)


def run_until(
    solver: AbstractInnerSolver,
    objective: ObjectiveFn,
    w: Tree,
    state: Any,
    batch: Any,
    tol: Scalar,
    budget: Array | int | None = None,
) -> tuple[Tree, Any, Array]:
    """Steps until the residual is at most `tol`, at most `budget` of them: `(w, state, steps)`.

    `budget` is the solver's own where it is None.
    """
    budget = budget_of(solver) if budget is None else budget

    def is_going(carry: tuple[Tree, Any, Array]) -> Array:
        _, state, steps = carry
        return is_open(state, steps, tol, budget)

    def body(carry: tuple[Tree, Any, Array]) -> tuple[Tree, Any, Array]:
        return advance(solver, objective, *carry, batch, tol)

    return jax.lax.while_loop(is_going, body, (w, state, jnp.int32(0)))


def is_open(state: Any, steps: Array, tol: Scalar, budget: Array | int) -> Array:
    """Whether a solve goes on."""
    unmet = state.residual > tol.astype(state.residual.dtype)  # False for NaN: stop
    stalled = getattr(state, "stalled", jnp.asarray(False))
    return (steps < budget) & unmet & ~stalled


def advance(
    solver: AbstractInnerSolver,
    objective: ObjectiveFn,
    w: Tree,
    state: Any,
    steps: Array,
    batch: Any,
    tol: Scalar,
) -> tuple[Tree, Any, Array]:
    """One step of a solve to a tolerance: `(w, state, steps)`."""
    new_w, state = solver.step(objective, w, state, batch)
    if not solver.lagged:
        return new_w, state, steps + 1
    # The residual belongs to the point before the step: keep that point where it is good enough.
    met = state.residual <= tol.astype(state.residual.dtype)
    return tree.where(met, w, new_w), state, jnp.where(met, steps, steps + 1)


def run_steps(
    solver: AbstractInnerSolver,
    objective: ObjectiveFn,
    w: Tree,
    state: Any,
    sampler: Sampler,
    num_steps: int,
    *,
    start: Array | int = 0,
    levels: int = 0,
) -> tuple[Tree, Any]:
    """Exactly `num_steps` steps (static), differentiable in reverse mode: `(w, state)`.

    `levels` is how the reverse pass gets the intermediates. 0 stores all of them. 1 stores the state
    before each step and recomputes what is inside the step. L > 1 also stores states only at blocks of b^(L-1),
    b^(L-2), ..., 1 steps, `b = floor(T^(1/L))`: about `L T^(1/L)` states live at once, for `L - 1` more forward
    passes (Griewank and Walther 2000). T need not be a power: the steps left over are its digits in
    base b, each of them a scan, so no step is padded; of two levels, b is a divisor of T where one is near.
    With many steps a "step" here is a unit of a few (`unit_steps`), whose intermediates are stored together: fewer
    states, for no more passes.

    Where the sampler has a `plan`, those of a whole block (of all steps where levels < 2) are made at once.
    """

    def by_number(carry: tuple[Tree, Any], index: Array) -> tuple[tuple[Tree, Any], None]:
        w, state = carry
        return solver.step(objective, w, state, sampler(index)), None

    carry = (w, state)
    unit = unit_steps(by_number, carry, num_steps, levels) if levels else 1
    units = num_steps // unit
    base, levels = _base(units, levels) if levels else (units, 0)
    early = _plan_bytes(sampler) * (unit * base if levels > 1 else num_steps) <= PLANS
    draw = sampler.draw if early else sampler

    def plans(first: Array | int, count: int, unit: int = 1) -> Any:
        """What `step` needs to know of each of `count` units of steps from `first` on, stacked."""
        indices = first + jnp.arange(count * unit)
        known = jax.vmap(sampler.plan)(indices) if early and sampler.plan else indices
        if unit == 1:
            return known
        return jax.tree.map(lambda leaf: leaf.reshape(count, unit, *leaf.shape[1:]), known)

    def step(carry: tuple[Tree, Any], plan: Any) -> tuple[tuple[Tree, Any], None]:
        w, state = carry
        return solver.step(objective, w, state, draw(plan)), None

    if levels == 0:
        carry, _ = jax.lax.scan(step, carry, plans(start, num_steps))
        return carry

    single = jax.checkpoint(step, prevent_cse=False)
    together = single
    if unit > 1:

        def run_unit(carry: Any, plans: Any) -> Any:
            return jax.lax.scan(step, carry, plans)

        together = jax.checkpoint(run_unit, prevent_cse=False)

    # blocks[j] runs base**j units from an index, and stores nothing but where it begins.
    blocks: list[Any] = [together]
    for power in range(1, levels):
        offsets = unit * base ** (power - 1) * jnp.arange(base)

        def block(carry: Any, index: Array, power=power, offsets=offsets) -> Any:
            inside = plans(index, base, unit) if power == 1 else index + offsets
            return jax.lax.scan(blocks[power - 1], carry, inside)

        blocks.append(jax.checkpoint(block, prevent_cse=False))
    done = 0
    for power in reversed(range(levels)):
        count = (units - done) // base**power
        if count:
            first = start + unit * done
            if power == 0:
                inside = plans(first, count, unit)
            else:
                inside = first + unit * base**power * jnp.arange(count)
            carry, _ = jax.lax.scan(blocks[power], carry, inside)
        done += count * base**power
    if num_steps % unit:
        carry, _ = jax.lax.scan(single, carry, plans(start + unit * units, num_steps % unit))
    return carry


PLANS = 2**20
"""Bytes that the plans of steps may take which are made at once: above, each step makes its own."""


def _plan_bytes(sampler: Sampler) -> int:
    if sampler.plan is None:
        return 0
    return _num_bytes(jax.eval_shape(sampler.plan, jnp.asarray(0)))


def unit_steps(step: Any, carry: Any, num_steps: int, levels: int) -> int:
    """How many steps store their intermediates together: u with the least `L (T/u)^(1/L) s + u a`.

    s is the size of a state and a that of one step's intermediates, as autodiff stores them (XLA may need
    less). 1 below 256 steps, where little is to be gained for what another loop takes to compile.
    """
    if num_steps < 256:
        return 1
    floats, others = eqx.partition(carry, eqx.is_inexact_array)

    def one(floats: Any) -> Any:
        after, _ = step(eqx.combine(floats, others), jnp.asarray(0))
        return eqx.filter(after, eqx.is_inexact_array)

    stored = jax.eval_shape(lambda floats: jax.vjp(one, floats)[1], floats)
    state, each = _num_bytes(floats), _num_bytes(stored)
    cost = lambda u: levels * (num_steps / u) ** (1 / levels) * state + u * each
    return min(range(1, 9), key=cost)


def _num_bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _base(num_steps: int, levels: int) -> tuple[int, int]:
    """How many blocks make one of the next size, and the levels: fewer where a block would be one step.

    `floor(num_steps^(1/levels))`. Of two levels, a number near it that leaves no steps over is better: those are loops
    of their own, which are compiled a second time.
    """
    levels = max(min(levels, num_steps.bit_length() - 1), 1)
    base = max(round(num_steps ** (1 / levels)), 1)
    while base**levels > num_steps:
        base -= 1
    if levels == 2:
        stored = lambda b: b + num_steps // b
        whole = [b for b in range(base, 2 * base) if num_steps % b == 0]
        if whole and stored(whole[0]) <= 1.2 * stored(base):
            return whole[0], levels
    return base, levels
