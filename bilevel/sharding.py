"""Tasks over the devices of a mesh: which array lies where."""

import dataclasses
from typing import Any, TypeVar

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bilevel import processes
from bilevel.result import RunState
from bilevel.tasks import Tasks

T = TypeVar("T")


def spread(problem: Any, mesh: Mesh | None) -> Any:
    """The tasks with their data spread over the devices of the mesh, and what they share on all of them.

    Raises TypeError for another problem or no mesh, ValueError where the tasks do not divide among the devices.
    """
    if mesh is None:
        return problem
    if not isinstance(problem, Tasks):
        raise TypeError(
            f"mesh=... spreads the tasks of bilevel.Tasks over devices, got {type(problem).__name__}."
        )
    if not isinstance(mesh, Mesh):
        raise TypeError(f"mesh must be a jax.sharding.Mesh, got {mesh!r}.")
    # One axis of all devices, of the kind that needs no sharding in the types of a user's losses.
    flat = Mesh(mesh.devices.reshape(-1), ("tasks",))
    problem = dataclasses.replace(problem, mesh=flat)
    return dataclasses.replace(
        problem,
        problem=on_all(problem, problem.problem),
        task_data=by_task(problem, problem.task_data),
    )


def by_task(problem: Any, tree: T) -> T:
    """Arrays whose first axis is the task."""
    mesh = getattr(problem, "mesh", None)
    return tree if mesh is None else _put(tree, NamedSharding(mesh, PartitionSpec("tasks")))


def on_all(problem: Any, tree: T) -> T:
    """Arrays that all tasks share."""
    mesh = getattr(problem, "mesh", None)
    return tree if mesh is None else _put(tree, NamedSharding(mesh, PartitionSpec()))


def placed(problem: Any, state: RunState) -> RunState:
    """Every array of a run where the compiled steps take it, whatever made it: no second compilation."""
    if getattr(problem, "mesh", None) is None:
        return state
    rows = lambda s: (s.w, s.engine, s.best.w)
    w, engine, best = by_task(problem, rows(state))
    state = on_all(problem, state._replace(w=None, engine=None, best=state.best._replace(w=None)))
    return state._replace(w=w, engine=engine, best=state.best._replace(w=best))


def _put(tree: Any, where: NamedSharding) -> Any:
    return jax.tree.map(
        lambda leaf: processes.put(leaf, where) if isinstance(leaf, jax.Array) else leaf, tree
    )
