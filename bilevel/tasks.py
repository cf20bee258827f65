"""Many inner problems under one outer variable: folds, tasks of meta-learning, blocks, restarts."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array

from bilevel.problem import Loss, Problem, as_arrays
from hypergrad import AbstractEngine, Hypergradient, HypergradInfo
from hypergrad.base import Solver
from hypergrad.estimate import with_estimate
from solvers import AbstractInnerSolver, Objective, Sampler, SolveInfo, tree
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
        `OneStep` and `Exact`, all rows at once), and the rest goes `lanes` at a time.

    Cost: that of the engine, per task. Memory: `w` and the engine's state per task; what a step works with,
    `lanes` times.

    Raises TypeError or ValueError for data without a common first axis and for lanes below 1.
    """

    problem: Problem
    task_data: Any
    lanes: int | None = eqx.field(static=True, default=None, kw_only=True)

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
        if self.lanes is not None and (
            isinstance(self.lanes, bool) or self.lanes != int(self.lanes)
        ):
            raise TypeError(f"Tasks(lanes=...) must be an integer or None, got {self.lanes!r}.")
        if self.lanes is not None and self.lanes < 1:
            raise ValueError(f"Tasks(lanes=...) must be at least 1, got {self.lanes}.")

    def __getattr__(self, name: str) -> Any:
        shared = ("inner_init", "inner_prox", "outer_projection", "constants", "batch_size")
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

        def one(data: Any, w: Tree, info: HypergradInfo, state: Any, key: Array):
            own = Hypergradient(h.grad, w, info)
            # Of the corrected hypergradients the mean is wanted, of the report all but their cost.
            own = with_estimate(
                self.task(data), solver, engine, lam, own, state, key, refine=True, probe=True
            )
            return own.grad, own.info._replace(adjoint_steps=info.adjoint_steps)

        better, each = self._map(one, self.task_data, h.w, h.info.tasks, state, self._keys(key))
        size = tree.norm(h.grad)
        info = _together(each, jnp.broadcast_to(size, (self.count,)), size)
        better = jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), better)
        tiny = jnp.finfo(size.dtype).tiny ** 0.5
        error = tree.norm(tree.sub(better, h.grad)) / jnp.maximum(size, tiny)
        error = jnp.maximum(error, 10 * tree.epsilon(h.grad)).astype(info.error_estimate.dtype)
        unknown = jnp.any(jnp.isnan(each.error_estimate))
        error = jnp.where(unknown, jnp.nan, error)
        return h._replace(info=info._replace(error_estimate=error))

    def _keys(self, key: Array) -> Array:
        return jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(self.count))

    def _map(self, fn: Callable[..., Any], *rows: Any) -> Any:
        if self.lanes is None or self.lanes >= self.count:
            return jax.vmap(fn)(*rows)
        size = self.lanes if self.lanes > 1 else None
        return jax.lax.map(lambda row: fn(*row), rows, batch_size=size)

    def _refills(self, engine: AbstractEngine, solver: Solver) -> bool:
        """Whether the inner problems can be solved before, and apart from, the engine's step."""
        fixed = self.problem.batch_size[0] is None and isinstance(solver, AbstractInnerSolver)
        few = self.lanes is not None and 1 < self.lanes < self.count
        return few and fixed and engine.needs_implicit

    def _solve(self, solver: Any, w: Tree, lam: Tree, state: Any) -> tuple[Tree, Any, Array]:
        """Inner solves on refilled lanes: the engine's own then find nothing left to do."""
        assert self.lanes is not None
        objective = _Shared(self.problem.inner_objective(lam), self.problem.inner_data)
        own = getattr(state, "inner", None)
        w, own, info = solve_many(solver, objective, w, self.task_data, lanes=self.lanes, state=own)
        return w, state if own is None else state._replace(inner=own), info.inner.num_steps


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

    @property
    def hvp(self) -> Any:
        own = self.objective.hvp
        return own and (lambda w, args, task, v: own(w, args, _pair(self.data, task), v))

    @property
    def prox(self) -> Any:
        return self.objective.prox


def _pair(shared: Any, task: Any) -> Any:
    return task if shared is None else (shared, task)


def _together(each: HypergradInfo, norms: Array, norm: Array) -> HypergradInfo:
    """One report from those of the tasks; `norms` are those of the hypergradients errors are relative to.

    NaN in one task is NaN here, but for the margin, where it says that there is no kink.
    """
    tiny = jnp.finfo(norm.dtype).tiny ** 0.5
    weights = (norms / jnp.maximum(norm, tiny)).astype(each.error_estimate.dtype)
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
