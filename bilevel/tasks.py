"""Many inner problems under one outer variable: folds, tasks of meta-learning, blocks, restarts."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, PartitionSpec

from bilevel.problem import Loss, Problem, as_arrays
from hypergrad import AbstractEngine, Hypergradient, HypergradInfo
from hypergrad.base import Solver, make_solver
from hypergrad.certificate import implied
from hypergrad.estimate import with_estimate
from solvers import AbstractInnerSolver, Mapping, Objective, Sampler, SolveInfo, tree
from solvers.fields import unchecked
from solvers.lanes import solve_many
from solvers.types import Tree


class Tasks(eqx.Module):
    """`min over lam of mean_i outer_i(w_i*(lam), lam)`, `w_i*(lam) = argmin over w of inner_i(w, lam)`.

    Stands in for a problem in `hypergradient`, `run` and `check`, with any engine. A task's slice of
    `task_data` is the batch of a level of `problem` that has no data, else the batch is `(data, slice)`.

    `w` is stacked, tasks first; one start without that axis is given to all of them. Each task keeps its own
    `w`, solver state and adjoint from one outer step to the next, and its own random key. The report holds the
    means of values, the sums of steps, the worst residual and status; those of each task are in
    `info.tasks`.

    Args:
      problem: what the tasks share: losses, data, start, prox, constants.
      task_data: pytree of arrays whose first axis is the task.
      lanes: tasks that are worked on at once; None is all of them, which waits for the slowest. With less,
        inner problems are solved on lanes that load the next one when they are done (engines `Implicit`,
        `OneStep` and `Exact`, all rows at once), and the rest goes `lanes` at a time. "auto" takes what
        `bilevel.choose_lanes` measures: once per process for one problem, its shapes and settings.
      mesh: as in `run(mesh=...)`, which sets it: tasks are spread over its devices, each with `lanes` of its own.

    Cost: that of the engine, per task. Memory: `w` and the engine's state per task; what a step works with,
    `lanes` times.

    Raises TypeError or ValueError for data without a common first axis and for lanes below 1.
    """

    problem: Problem
    task_data: Any
    lanes: int | str | None = eqx.field(static=True, default=None, kw_only=True)
    mesh: Mesh | None = eqx.field(static=True, default=None, kw_only=True)

    def __post_init__(self) -> None:
        if not isinstance(self.problem, Problem):
            raise TypeError(f"Tasks(problem=...) must be a bilevel.Problem, got {self.problem!r}.")
        self.task_data = as_arrays("task_data", self.task_data, of="Tasks")
        shapes = [leaf.shape for leaf in jax.tree.leaves(self.task_data)]
        if not shapes or not all(shapes) or len({shape[0] for shape in shapes}) != 1:
            raise ValueError(
                "Tasks(task_data=...) must hold arrays with one common first axis, the tasks; got "
                f"shapes {shapes}."
            )
        lanes = self.lanes
        if lanes is not None and lanes != "auto":
            if isinstance(lanes, bool | str) or lanes != int(lanes):
                raise TypeError(
                    f"Tasks(lanes=...) must be an integer, 'auto' or None, got {lanes!r}."
                )
            if lanes < 1:
                raise ValueError(f"Tasks(lanes=...) must be at least 1, got {lanes}.")
        if self.mesh is not None and self.count % self.mesh.size:
            raise ValueError(
                f"{self.count} tasks do not divide among the {self.mesh.size} devices of the mesh; "
                "expected a multiple of it, or a mesh of fewer devices."
            )

    def __getattr__(self, name: str) -> Any:
        shared = (
            "inner",
            "inner_init",
            "inner_prox",
            "second_order",
            "outer_projection",
            "constants",
            "batch_size",
        )
        if name in shared:
            return getattr(self.problem, name)
        raise AttributeError(name)

    @property
    def count(self) -> int:
        """Number of tasks."""
        return jax.tree.leaves(self.task_data)[0].shape[0]

    def task(self, data: Any) -> "Task":
        """The problem of one task."""
        return Task(self.problem, data)

    def stacked(self, w: Tree) -> Tree:
        """`w` with the axis of tasks: every leaf has it already, or the start is for all."""
        leaves = jax.tree.leaves(w)
        if all(leaf.ndim > 0 and leaf.shape[0] == self.count for leaf in leaves):
            return w
        return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (self.count, *leaf.shape)), w)

    def initial(self, lam: Tree, key: Array) -> Tree:
        """The problem's own start of each task."""

        def one(data: Any, key: Array) -> Tree:
            task = self.task(data)
            return task.start(None, lam, task.inner_sampler(key)(0))

        return jax.vmap(one)(self.task_data, self._keys(key))

    def init(self, engine: AbstractEngine, solver: Solver, w: Tree, lam: Tree, key: Array) -> Any:
        """The engine's states, stacked."""
        one = lambda data, w, key: engine.init(self.task(data), solver, w, lam, key)
        return self._map(one, self.task_data, w, self._keys(key))

    def step(
        self, engine: AbstractEngine, solver: Solver, w: Tree, lam: Tree, state: Any, key: Array
    ) -> tuple[Hypergradient, Any]:
        """The engine's step on each task; the hypergradient is the mean of theirs."""
        taken = jnp.zeros(self.count, jnp.int32)
        if self._refills(engine, solver):
            w, state, taken = self._solve(solver, w, lam, state)
            solver = unchecked(solver, max_steps=0)  # the budget is spent

        def one(data: Any, w: Tree, state: Any, key: Array):
            h, state = engine.step(self.task(data), solver, w, lam, state, key)
            return h, tree.norm(h.grad), state

        each, norms, state = self._map(one, self.task_data, w, state, self._keys(key))
        inner = each.info.inner
        info = each.info._replace(inner=inner._replace(num_steps=inner.num_steps + taken))
        grad = jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), each.grad)
        return Hypergradient(grad, each.w, _together(info, norms, tree.norm(grad))), state

    def estimate(
        self,
        engine: AbstractEngine,
        solver: Solver,
        lam: Tree,
        h: Hypergradient,
        state: Any,
        key: Array,
    ) -> Hypergradient:
        """`hypergrad.estimate.with_estimate` of the mean."""

        smooth = self.inner_prox is None

        def one(data: Any, w: Tree, info: HypergradInfo, state: Any, key: Array):
            task = self.task(data)
            adjoint = engine.adjoint(state) if smooth else None
            # Of each task what its adjoint makes is judged: all but the step's own gradient is kept.
            grad = h.grad
            if adjoint is not None:
                batches = task.inner_sampler(key)(0), task.outer_batch(key)
                grad = implied(task, make_solver(solver, lam), lam, w, adjoint, *batches)
            own = Hypergradient(grad, w, info)
            # Of the corrected hypergradients the mean is wanted, of the report all but their cost.
            own = with_estimate(task, solver, engine, lam, own, state, key, refine=True, probe=True)
            info = own.info._replace(adjoint_steps=info.adjoint_steps)
            return own.grad, grad, tree.norm(grad), info

        rows = (self.task_data, h.w, h.info.tasks, state, self._keys(key))
        better, made, norms, each = self._map(one, *rows)
        size = tree.norm(h.grad)
        mean = lambda rows: jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), rows)
        relative = lambda other: (
            tree.norm(tree.sub(other, h.grad)) / jnp.maximum(size, _tiny(size))
        ).astype(each.error_estimate.dtype)
        error = jnp.maximum(relative(mean(better)), 10 * tree.epsilon(h.grad))
        unknown = jnp.any(jnp.isnan(each.error_estimate))
        has_adjoint = smooth and engine.adjoint(state) is not None
        if not (has_adjoint and engine.needs_implicit):  # not the step's own gradient was judged
            each = each._replace(error_estimate=h.info.tasks.error_estimate)
        info = _together(each, norms, size)
        return h._replace(
            info=info._replace(
                error_estimate=jnp.where(unknown, jnp.nan, error),
                # The means differ by rounding, or by what an engine does beside its adjoint.
                bound=info.bound + relative(mean(made)).astype(info.bound.dtype),
            )
        )

    def _keys(self, key: Array) -> Array:
        return jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(self.count))

    def _lanes(self) -> int:
        """Of each device."""
        if self.lanes == "auto":
            raise TypeError(
                "lanes='auto' measures, which cannot be done inside jit, vmap or grad: pass "
                "lanes=bilevel.choose_lanes(...)."
            )
        here = self.count // (1 if self.mesh is None else self.mesh.size)
        return here if self.lanes is None else min(int(self.lanes), here)

    def _map(self, fn: Callable[..., Any], *rows: Any) -> Any:
        lanes = self._lanes()

        def here(*rows: Any) -> Any:
            count = jax.tree.leaves(rows)[0].shape[0]
            if lanes == count:
                return jax.vmap(fn)(*rows)
            size = lanes if lanes > 1 else None
            return jax.lax.map(lambda row: fn(*row), rows, batch_size=size)

        return self._on_devices(here)(*rows)

    def _on_devices(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """`fn(*rows) -> rows` on each device's own tasks: loops of one device wait for no other."""
        if self.mesh is None:
            return fn
        spec = PartitionSpec(self.mesh.axis_names)
        # Every output is a row of its own device: there is nothing to check, and `while` could not be.
        return jax.shard_map(fn, mesh=self.mesh, in_specs=spec, out_specs=spec, check_vma=False)

    def _refills(self, engine: AbstractEngine, solver: Solver) -> bool:
        """Whether the inner problems can be solved before, and apart from, the engine's step."""
        fixed = self.problem.batch_size[0] is None and isinstance(solver, AbstractInnerSolver)
        devices = 1 if self.mesh is None else self.mesh.size
        few = 1 < self._lanes() < self.count // devices
        return few and fixed and engine.needs_implicit

    def _solve(self, solver: Any, w: Tree, lam: Tree, state: Any) -> tuple[Tree, Any, Array]:
        """Inner solves on refilled lanes: the engine's own then find nothing left to do."""
        objective = _Shared(self.problem.inner_objective(lam), self.problem.inner_data)

        def here(w: Tree, data: Any, own: Any) -> tuple[Tree, Any, Array]:
            lanes = self._lanes()
            w, own, info = solve_many(solver, objective, w, data, lanes=lanes, state=own)
            return w, own, info.inner.num_steps

        own = getattr(state, "inner", None)
        w, own, taken = self._on_devices(here)(w, self.task_data, own)
        return w, state if own is None else state._replace(inner=own), taken


class Task(eqx.Module):
    """The problem of one task, for an engine."""

    problem: Problem
    data: Any
    inner: Loss = eqx.field(static=True)
    outer: Loss = eqx.field(static=True)

    def __init__(self, problem: Problem, data: Any) -> None:
        self.problem, self.data = problem, data
        self.inner, self.outer = problem.inner, problem.outer

    def __getattr__(self, name: str) -> Any:
        if name in ("inner_init", "inner_hvp", "inner_prox", "constants"):
            return getattr(self.problem, name)
        raise AttributeError(name)

    def inner_objective(self, lam: Tree) -> Objective:
        return self.problem.inner_objective(lam)

    def inner_sampler(self, key: Array) -> Sampler:
        shared = self.problem.inner_sampler(key)
        return Sampler(lambda step: _pair(shared(step), self.data), shared.varies)

    def outer_batch(self, key: Array) -> Any:
        return _pair(self.problem.outer_batch(key), self.data)

    def start(self, w: Tree, lam: Tree, batch: Any) -> Tree:
        return self.problem.start(w, lam, batch)


class _Shared(eqx.Module):
    """The inner objective of a task's slice; the shared data are not copied."""

    objective: Objective
    data: Any

    def __call__(self, w: Tree, task: Any) -> Array:
        return self.objective(w, _pair(self.data, task))

    @property
    def args(self) -> Any:
        return self.objective.args

    def _of_slice(self, own: Any) -> Any:
        """A function `(w, args, batch, ...)` of the objective as one of the slice; None stays None."""
        return own and (lambda w, args, task, *v: own(w, args, _pair(self.data, task), *v))

    @property
    def fn(self) -> Any:
        own = self.objective.fn
        slice_of = self._of_slice
        return Mapping(slice_of(own.mapping)) if isinstance(own, Mapping) else slice_of(own)

    @property
    def hvp(self) -> Any:
        return self._of_slice(self.objective.hvp)

    @property
    def preconditioner(self) -> Any:
        return self._of_slice(self.objective.preconditioner)

    @property
    def prox(self) -> Any:
        return self.objective.prox


def _pair(shared: Any, task: Any) -> Any:
    return task if shared is None else (shared, task)


def _tiny(norm: Array) -> float:
    return float(jnp.finfo(norm.dtype).tiny) ** 0.5


def _together(each: HypergradInfo, norms: Array, norm: Array) -> HypergradInfo:
    """One report from those of the tasks; `norms` are those of the hypergradients errors are relative to.

    NaN in one task is NaN here, but for the margin, where it says that there is no kink.
    """
    tiny = _tiny(norm)  # errors are relative to no less
    weights = jnp.maximum(norms, tiny) / jnp.maximum(norm, tiny)
    weights = weights.astype(each.error_estimate.dtype)
    total = lambda steps: jnp.sum(steps, dtype=jnp.int32)
    return HypergradInfo(
        outer_value=jnp.mean(each.outer_value),
        inner=SolveInfo(
            value=jnp.mean(each.inner.value),
            residual=jnp.max(each.inner.residual),
            num_steps=total(each.inner.num_steps),
            status=jnp.max(each.inner.status),
        ),
        adjoint_residual=jnp.max(each.adjoint_residual),
        adjoint_steps=total(each.adjoint_steps),
        curvature=jnp.min(each.curvature),
        # By the triangle inequality.
        error_estimate=jnp.mean(weights * each.error_estimate),
        bound=jnp.mean(weights.astype(each.bound.dtype) * each.bound),
        corrected_value=jnp.mean(each.corrected_value),
        damping=jnp.max(each.damping),
        margin=jnp.nanmin(each.margin),
        growth=jnp.max(each.growth),
        status=jnp.max(each.status),
        tasks=each,
    )
