"""What tasks solve apart from the step of an engine: inner problems and adjoint systems, on refilled lanes."""

from typing import Any

import jax.numpy as jnp
from jax import Array

from bilevel import on_lanes
from bilevel.one_task import Shared
from hypergrad import AbstractEngine
from solvers.lanes import solve_many
from solvers.linear.base import LinearInfo
from solvers.linear.lanes import System, solve_systems
from solvers.types import Tree


def solve(
    tasks: Any, engine: AbstractEngine, solver: Any, w: Tree, lam: Tree, state: Any
) -> tuple[Tree, Any, Array, Array]:
    """`(w, state, steps of each, steps of all lanes)`: the engine's own inner solves then find nothing left to do."""

    def here(lam: Tree, w: Tree, data: Any, own: Any, tol: Any) -> tuple[Tree, Any, Array, Array]:
        objective = Shared(tasks.problem.inner_objective(lam), tasks.problem.inner_data)
        lanes = tasks.lanes_here()
        w, own, info = solve_many(solver, objective, w, data, lanes=lanes, state=own, tol=tol)
        return w, own, info.inner.num_steps, info.lane_steps[None]

    own = getattr(state, "inner", None)
    rows = (w, tasks.task_data, own, engine.inner_tol(state))
    w, own, taken, spent = on_lanes.on_devices(tasks.mesh, here, lam, rows)
    spent = jnp.sum(spent, dtype=jnp.int32)
    return w, state if own is None else state._replace(inner=own), taken, spent


def adjoints(
    tasks: Any, engine: AbstractEngine, solver: Any, w: Tree, lam: Tree, state: Any, keys: Array
) -> tuple[tuple[Tree, LinearInfo], Array]:
    """The solutions of the adjoint systems with their reports, and the products of all lanes.

    After the inner solves, not in one lane with them: lanes do the same work at each step, so that one in its inner
    solve and one in its adjoint would each pay for both.
    """

    def here(lam: Tree, *rows: Any) -> tuple[tuple[Tree, LinearInfo], Array]:
        def system(data: Any, w: Tree, state: Any, key: Array) -> System:
            return engine.adjoint_system(tasks.task(data), solver, w, lam, state, key)

        x, info = solve_systems(system, rows, lanes=tasks.lanes_here())
        return (x, info.linear), info.lane_steps[None]

    rows = (tasks.task_data, w, state, keys)
    found, spent = on_lanes.on_devices(tasks.mesh, here, lam, rows)
    return found, jnp.sum(spent, dtype=jnp.int32)
