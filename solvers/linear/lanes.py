"""Many linear systems at once by conjugate gradients: a lane that is done loads the next system."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array

from solvers import tree
from solvers.linear.base import LinearInfo, to_unit
from solvers.linear.cg import CG, is_done
from solvers.refill import Work, put, refilled, run_alone, take
from solvers.types import MatVec, Scalar, Tree


class System(NamedTuple):
    """One system `A x = b`, with a solver of its own."""

    product: MatVec
    b: Tree
    x0: Tree
    solver: CG
    key: Array


class SystemsInfo(NamedTuple):
    """What was spent on a set of systems."""

    linear: LinearInfo
    """Of each system: fields of shape (N,)."""
    useful: Array
    """Products of all systems, with those that recompute a residual, int32."""
    lane_steps: Array
    """Products of all lanes, idle or not, int32."""


def solve_systems(
    system: Callable[..., System], rows: tuple, *, lanes: int, tail: int | None = None
) -> tuple[Tree, SystemsInfo]:
    """Solve `system(*row)` for each of the N rows, on `lanes` lanes: `(x, info)`, N first.

    As `solvers.lanes.solve_many` with N, `lanes` and `tail`: one lane is one by one, N are `vmap`, and in between
    a lane that is done loads the next system. The numbers are those of `CG.solve` of each, to the rounding of a
    batched product, which CG makes larger where a system is badly conditioned: there the steps may differ too.

    `system` is called anew whenever a lane was loaded, so that it may prepare its products (as `jax.linearize`
    does): that costs about a gradient of all lanes per system beside the products.
    """
    count = jax.tree.leaves(rows)[0].shape[0]
    lanes = min(lanes, count)

    def start(i: Array) -> tuple[_Stays, _Moving]:
        row = take(rows, i)
        own = system(*row)
        b, x0, unit = to_unit(own.b, own.x0)
        stays = _Stays(row, b, unit, own.solver.init(own.product, b, own.key))
        begun = own.solver.iteration(own.product, b, stays.prepared, unit).begin(x0)
        return stays, _Moving(begun, jnp.int32(0))

    def stepper(stays: _Stays) -> Callable[[_Moving], _Moving]:
        own = system(*stays.row)
        step = own.solver.iteration(own.product, stays.b, stays.prepared, stays.unit).step
        return lambda moving: _Moving(step(moving.carry), moving.steps + 1)

    def end(stays: _Stays, moving: _Moving) -> tuple[Tree, LinearInfo, Array]:
        # Few systems need the product that tells why they failed: it is prepared where that is asked for.
        late = lambda v: system(*stays.row).product(v)
        own = system(*stays.row).solver.iteration(late, stays.b, stays.prepared, stays.unit)
        x, info = own.end(moving.carry)
        return tree.scale(stays.unit, x), info, moving.steps

    work = Work(
        start,
        stepper,
        lambda stays, moving: is_done(moving.carry),
        lambda out, i, stays, moving: put(out, i, end(stays, moving)),
    )

    def whole(i: Array) -> tuple[Tree, LinearInfo, Array]:
        stays, moving = start(i)
        return end(stays, run_alone(work, stays, moving)[0])

    everything = jnp.arange(count, dtype=jnp.int32)
    if lanes == 1:
        x, info, steps = jax.lax.map(whole, everything)
        spent = jnp.sum(steps, dtype=jnp.int32)
    elif lanes == count:
        x, info, steps = jax.vmap(whole)(everything)
        spent = count * jnp.max(steps)
    else:
        shapes = jax.eval_shape(whole, everything[0])
        out = jax.tree.map(lambda s: jnp.zeros((count, *s.shape), s.dtype), shapes)
        (x, info, steps), spent = refilled(work, out, count, lanes, tail)
    return x, SystemsInfo(info, jnp.sum(steps, dtype=jnp.int32), spent)


class Given(eqx.Module):
    """A solution that was found apart, with its report, in the place of a linear solver."""

    x: Tree
    info: LinearInfo
    rtol: Any = None
    """Of those who set one; there is nothing left to do."""

    def init(self, matvec: MatVec, like: Tree, key: Array) -> Any:
        return None

    def solve(
        self, matvec: MatVec, b: Tree, x0: Tree, state: Any, key: Array
    ) -> tuple[Tree, LinearInfo]:
        return self.x, self.info


class _Stays(NamedTuple):
    row: tuple
    b: Tree
    unit: Scalar
    prepared: Any


class _Moving(NamedTuple):
    carry: Any
    steps: Array
