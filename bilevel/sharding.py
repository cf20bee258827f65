"""Tasks, or rows of data, over the devices of a mesh: which array lies where."""

import dataclasses
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from bilevel import processes
from bilevel.problem import Problem
from bilevel.result import RunState
from bilevel.tasks import Tasks
from bilevel.validation import is_traced

T = TypeVar("T")


def spread(problem: Any, mesh: Mesh | None) -> Any:
    """The tasks with their data spread over the devices of the mesh, and what they share on all of them.

    Of a `Problem`, the rows of its data. Raises TypeError for another problem or no mesh, ValueError where the
    tasks or the rows do not divide among the devices.
    """
    if mesh is None:
        return problem
    _check(mesh)
    if isinstance(problem, Problem):
        data = {name: getattr(problem, name) for name in ("inner_data", "outer_data")}
        if not jax.tree.leaves(data):
            raise ValueError("mesh=... spreads the rows of a Problem's data, and it has none.")
        rows = {name: shard_rows(value, mesh, name) for name, value in data.items()}
        return dataclasses.replace(problem, **rows)
    if not isinstance(problem, Tasks):
        raise TypeError(
            "mesh=... spreads the tasks of bilevel.Tasks or the rows of bilevel.Problem over devices, got "
            f"{type(problem).__name__}."
        )
    flat = _flat(mesh, "tasks")
    problem = dataclasses.replace(problem, mesh=flat)
    return dataclasses.replace(
        problem,
        problem=on_all(problem, problem.problem),
        task_data=by_task(problem, problem.task_data),
    )


def shard_rows(data: T, mesh: Mesh, name: str = "data") -> T:
    """Arrays with one common first axis, the rows, of which each device of the mesh gets its part.

    A `Problem` with such data computes in parallel: each device goes through its rows, and losses, gradients and
    products with Hessians are added up. Nothing else has to change: `w` and `lam` are on all devices, and a batch
    of `run` takes as many rows from each. `run(mesh=...)` and `hypergradient(mesh=...)` do this to both levels.
    Where `w` is large, it may be sharded too: give arrays with a `NamedSharding` of your own for `w` and for the
    data that meet it, and no mesh.

    Raises TypeError for another mesh, ValueError where the rows do not divide among the devices.
    """
    _check(mesh)
    leaves = jax.tree.leaves(data)
    lengths = {leaf.shape[0] if np.ndim(leaf) else 0 for leaf in leaves}
    if leaves and (len(lengths) != 1 or lengths == {0}):
        raise ValueError(
            f"{name} must hold arrays with one common first axis, the rows, to be spread over devices; got "
            f"shapes {[np.shape(leaf) for leaf in leaves]}. Place other arrays yourself, and give no mesh."
        )
    if any(length % mesh.size for length in lengths):
        raise ValueError(
            f"the {lengths.pop()} rows of {name} do not divide among the {mesh.size} devices of the mesh; "
            "expected a multiple of it, or a mesh of fewer devices."
        )
    where = NamedSharding(_flat(mesh, "rows"), PartitionSpec("rows"))
    return _put(jax.tree.map(jnp.asarray, data), where)


def mesh_of(problem: Any) -> Mesh | None:
    """The mesh of `Tasks`, or the one that the data of a `Problem` are spread over."""
    if not isinstance(problem, Problem):
        return getattr(problem, "mesh", None)
    for leaf in jax.tree.leaves((problem.inner_data, problem.outer_data)):
        where = leaf.sharding if isinstance(leaf, jax.Array) and not is_traced(leaf) else None
        if isinstance(where, NamedSharding) and where.mesh.size > 1:
            return where.mesh if isinstance(where.mesh, Mesh) else None
    return None


def by_task(problem: Any, tree: T) -> T:
    """Arrays whose first axis is the task; of a `Problem`, those that are not yet spread go on all devices."""
    mesh = mesh_of(problem)
    if mesh is None:
        return tree
    if not isinstance(problem, Tasks):
        return on_all(problem, tree)
    return _put(tree, NamedSharding(mesh, PartitionSpec("tasks")))


def on_all(problem: Any, tree: T) -> T:
    """Arrays that all tasks share. Those of a `Problem` that are spread stay so."""
    mesh = mesh_of(problem)
    if mesh is None:
        return tree
    everywhere = NamedSharding(mesh, PartitionSpec())
    if isinstance(problem, Tasks):
        return _put(tree, everywhere)
    spread = lambda leaf: is_traced(leaf) or len(leaf.sharding.device_set) > 1
    return jax.tree.map(
        lambda leaf: (
            _put(leaf, everywhere) if isinstance(leaf, jax.Array) and not spread(leaf) else leaf
        ),
        tree,
    )


def placed(problem: Any, state: RunState) -> RunState:
    """Every array of a run where the compiled steps take it, whatever made it: no second compilation."""
    if mesh_of(problem) is None:
        return state
    rows = lambda s: (s.w, s.engine, s.best.w)
    w, engine, best = by_task(problem, rows(state))
    state = on_all(problem, state._replace(w=None, engine=None, best=state.best._replace(w=None)))
    return state._replace(w=w, engine=engine, best=state.best._replace(w=best))


def _check(mesh: Any) -> None:
    if not isinstance(mesh, Mesh | AbstractMesh):
        raise TypeError(f"mesh must be a jax.sharding.Mesh, got {mesh!r}.")


def _flat(mesh: Mesh, name: str) -> Mesh:
    """One axis of all devices, of the kind that needs no sharding in the types of a user's losses."""
    return Mesh(mesh.devices.reshape(-1), (name,))


def _put(tree: Any, where: NamedSharding) -> Any:
    return jax.tree.map(
        lambda leaf: processes.put(leaf, where) if isinstance(leaf, jax.Array) else leaf, tree
    )
