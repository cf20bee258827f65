"""Many inner problems under one outer variable: folds, tasks of meta-learning, blocks, restarts."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from bilevel import apart, on_lanes
from bilevel.difficulty import Drawn, TaskStates, after, begun, chances
from bilevel.draws import check_draws, draw
from bilevel.one_task import Task
from bilevel.problem import Problem, as_arrays
from bilevel.task_report import times, tiny_norm, together
from hypergrad import AbstractEngine, Hypergradient, HypergradInfo
from hypergrad.base import Solver, make_solver
from hypergrad.certificate import implied
from hypergrad.estimate import with_estimate
from solvers import AbstractInnerSolver, tree
from solvers.fields import unchecked
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
        inner problems, and then the adjoint systems of `Implicit` by CG, are solved on lanes that load the next one
        when they are done (engines `Implicit` and `OneStep`, all rows at once; no adjoints with a prox, an
        `inner_preconditioner`, `damping="auto"` or another `warm_start`), and the rest goes `lanes` at a time. "auto"
        takes what `bilevel.choose_lanes` measures: once per process for one problem, its shapes and settings.
      per_step: tasks that an outer step takes, drawn anew from the key of the step (`drawn`); None is all. The
        others keep what they have. Value and hypergradient are unbiased estimates of those of all tasks, and
        `info.tasks` has the tasks drawn, in their order.
      weights: (number of tasks,), positive: draw in proportion to them, with replacement, and divide what a
        task adds by its probability. None draws uniformly, without replacement. "difficulty" draws by running
        averages of the norms of the tasks' hypergradients, mixed with the uniform distribution (`bilevel.difficulty`).
      pool: "host" keeps data, solutions and states of the tasks in the host's memory, in NumPy; a chunk of `run`
        loads those that it draws. The numbers are the same.
      mesh: as in `run(mesh=...)`, which sets it: tasks are spread over its devices, each with `lanes` of its own.

    Cost: that of the engine, per task. Memory: `w` and the engine's state per task; what a step works with,
    `lanes` times; hypergradients of tasks are added up as they come, also `lanes` at a time.

    Raises TypeError or ValueError for data without a common first axis, for lanes below 1, for `per_step` that
    is not from 1 to the number of tasks, and for weights that are not positive.
    """

    problem: Problem
    task_data: Any
    lanes: int | str | None = eqx.field(static=True, default=None, kw_only=True)
    per_step: int | None = eqx.field(static=True, default=None, kw_only=True)
    weights: Any = eqx.field(default=None, kw_only=True)
    pool: str | None = eqx.field(static=True, default=None, kw_only=True)
    mesh: Mesh | None = eqx.field(static=True, default=None, kw_only=True)

    def __post_init__(self) -> None:
        if not isinstance(self.problem, Problem):
            raise TypeError(f"Tasks(problem=...) must be a bilevel.Problem, got {self.problem!r}.")
        if self.problem.data is not None:
            raise ValueError("what tasks share is on the device: expected Problem(data=None).")
        on_device = self.pool is None
        self.task_data = as_arrays("task_data", self.task_data, of="Tasks", on_device=on_device)
        shapes = [leaf.shape for leaf in jax.tree.leaves(self.task_data)]
        if not shapes or not all(shapes) or len({shape[0] for shape in shapes}) != 1:
            raise ValueError(
                "Tasks(task_data=...) must hold arrays with one common first axis, the tasks; got "
                f"shapes {shapes}."
            )
        lanes = self.lanes
        if lanes is not None and lanes != "auto":
            if isinstance(lanes, bool) or not isinstance(lanes, int | np.integer):
                raise TypeError(
                    f"Tasks(lanes=...) must be an integer, 'auto' or None, got {lanes!r}."
                )
            if lanes < 1:
                raise ValueError(f"Tasks(lanes=...) must be at least 1, got {lanes}.")
        check_draws(self)
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
            "inner_restrict",
            "inequality",
            "equality",
            "joint_projection",
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

    @property
    def total(self) -> int:
        """Of which these are a part."""
        return self.count

    def task(self, data: Any) -> "Task":
        """The problem of one task."""
        return Task(self.problem, data)

    def stacked(self, w: Tree) -> Tree:
        """`w` with the axis of tasks: every leaf has it already, or the start is for all."""
        leaves = jax.tree.leaves(w)
        if all(leaf.ndim > 0 and leaf.shape[0] == self.count for leaf in leaves):
            return w
        array = jnp if self.pool is None else np
        return jax.tree.map(lambda leaf: array.broadcast_to(leaf, (self.count, *leaf.shape)), w)

    def initial(self, lam: Tree, key: Array) -> Tree:
        """The problem's own start of each task."""

        def one(data: Any, key: Array) -> Tree:
            task = self.task(data)
            return task.start(None, lam, task.inner_sampler(key)(0))

        return jax.vmap(one)(self.task_data, self._keys(key))

    def init(
        self, engine: AbstractEngine, solver: Solver, w: Tree, lam: Tree, key: Array
    ) -> TaskStates:
        """The state before the first step."""
        one = lambda lam, data, w, key: engine.init(self.task(data), solver, w, lam, key)
        own = self._map(one, lam, self.task_data, w, self._keys(key))
        return begun(own, self.count, self.weights)

    def drawn(self, key: Array, state: TaskStates | None = None) -> Array:
        """The tasks of the step with this key, which in `run` is `jax.random.fold_in(key, step)`.

        With `weights="difficulty"` they also depend on the `state` before the step (`result.state.engine` of a run).
        """
        if self.per_step is None:
            return jnp.arange(self.count)
        return draw(self.total, self.per_step, self._weights(state), key)

    def step(
        self, engine: AbstractEngine, solver: Solver, w: Tree, lam: Tree, state: Any, key: Array
    ) -> tuple[Hypergradient, Any]:
        """The engine's step on each task; the hypergradient is the mean of theirs."""
        if self.per_step is None:
            h, own, norms = self._step(engine, solver, w, lam, state.own, key)
            drawn = None
        else:
            drawn = self._draw(key, state)
            part = self._part(drawn)
            h, own, norms = part._step(engine, solver, part.rows(w), lam, part.rows(state.own), key)
            h = h._replace(w=part.put(w, h.w), info=h.info._replace(drawn=drawn))
            own, drawn = part.put(state.own, own), part.places
        return h, after(state, own, norms, h.info.tasks, drawn)

    def _step(
        self, engine: AbstractEngine, solver: Solver, w: Tree, lam: Tree, state: Any, key: Array
    ) -> tuple[Hypergradient, Any, Array]:
        """`step` of all these tasks, from the engine's own states; also the norms of their hypergradients."""
        taken, spent = jnp.zeros(self.count, jnp.int32), None
        adjoints, adjoint_spent = None, None
        if self._refills(engine, solver):
            w, state, taken, spent = apart.solve(self, engine, solver, w, lam, state)
            if engine.adjoint_apart(self.problem, solver, lam):
                keys = self._keys(key)
                adjoints, adjoint_spent = apart.adjoints(self, engine, solver, w, lam, state, keys)
            solver = unchecked(solver, max_steps=0)  # the budget is spent

        def one(
            lam: Tree,
            data: Any,
            w: Tree,
            state: Any,
            key: Array,
            factor: Array | None,
            adjoint: Any,
        ):
            own = engine if adjoint is None else engine.with_adjoint(*adjoint)
            h, state = own.step(self.task(data), solver, w, lam, state, key)
            return times(factor, h.grad), (h.w, h.info, tree.norm(h.grad), state)

        rows = (self.task_data, w, state, self._keys(key), self._factors(), adjoints)
        lanes = self.lanes_here()
        total, (w, info, norms, state) = on_lanes.add_up(one, lam, rows, lanes, self.mesh)
        grad = jax.tree.map(lambda leaf: leaf / self.count, total)
        if spent is None:
            spent = on_lanes.lane_steps(info.inner.num_steps, lanes, self.mesh)
        info = info._replace(inner=info.inner._replace(num_steps=info.inner.num_steps + taken))
        report = together(info, norms, tree.norm(grad), self._factors(), spent)
        report = report._replace(adjoint_lane_steps=adjoint_spent)
        return Hypergradient(grad, w, report), state, norms

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
        if self.per_step is None:
            return self._estimate(engine, solver, lam, h, state.own, key)
        part = self._part(h.info.drawn)
        own = h._replace(w=part.rows(h.w))
        own = part._estimate(engine, solver, lam, own, part.rows(state.own), key)
        return own._replace(w=h.w)

    def _estimate(
        self,
        engine: AbstractEngine,
        solver: Solver,
        lam: Tree,
        h: Hypergradient,
        state: Any,
        key: Array,
    ) -> Hypergradient:
        """`estimate` of all these tasks, with the engine's own states."""
        smooth = self.inner_prox is None

        def one(shared: Any, data: Any, w: Tree, info: HypergradInfo, state: Any, key: Array):
            (lam, grad), task = shared, self.task(data)
            adjoint = engine.adjoint(state) if smooth else None
            # Of each task what its adjoint makes is judged: all but the step's own gradient is kept.
            if adjoint is not None:
                batches = task.inner_sampler(key)(0), task.outer_batch(key)
                grad = implied(task, make_solver(solver, lam), lam, w, adjoint, *batches)
            own = Hypergradient(grad, w, info)
            # Of the corrected hypergradients the mean is wanted, of the report all but their cost.
            own = with_estimate(task, solver, engine, lam, own, state, key, refine=True, probe=True)
            info = own.info._replace(adjoint_steps=info.adjoint_steps)
            return own.grad, grad, tree.norm(grad), info

        rows = (self.task_data, h.w, h.info.tasks, state, self._keys(key))
        better, made, norms, each = self._map(one, (lam, h.grad), *rows)
        size = tree.norm(h.grad)
        factors = self._factors()
        mean = lambda rows: jax.tree.map(
            lambda leaf: jnp.mean(leaf, axis=0),
            rows if factors is None else jax.vmap(times)(factors, rows),
        )
        relative = lambda other: (
            tree.norm(tree.sub(other, h.grad)) / jnp.maximum(size, tiny_norm(size))
        ).astype(each.error_estimate.dtype)
        error = jnp.maximum(relative(mean(better)), 10 * tree.epsilon(h.grad))
        unknown = jnp.any(jnp.isnan(each.error_estimate))
        has_adjoint = smooth and engine.adjoint(state) is not None
        if not (has_adjoint and engine.needs_implicit):  # not the step's own gradient was judged
            each = each._replace(error_estimate=h.info.tasks.error_estimate)
        info = together(each, norms, size, factors)
        return h._replace(
            info=info._replace(
                lane_steps=h.info.lane_steps,
                adjoint_lane_steps=h.info.adjoint_lane_steps,
                drawn=h.info.drawn,
                error_estimate=jnp.where(unknown, jnp.nan, error),
                # The means differ by rounding, or by what an engine does beside its adjoint.
                bound=info.bound + relative(mean(made)).astype(info.bound.dtype),
            )
        )

    def _weights(self, state: TaskStates | None) -> Any:
        if not isinstance(self.weights, str):
            return self.weights
        if state is None or state.difficulty is None:
            raise TypeError(
                "tasks drawn by difficulty depend on the steps before: expected drawn(key, state)."
            )
        return chances(state.difficulty)

    def _draw(self, key: Array, state: TaskStates) -> Drawn:
        numbers, weights = self.drawn(key, state), self._weights(state)
        if weights is None:
            return Drawn(numbers, None)
        return Drawn(numbers, 1 / (self.total * (weights / jnp.sum(weights))[numbers]))

    def _part(self, drawn: Drawn) -> "Part":
        places = self._places(drawn.numbers)
        fields = {name: getattr(self, name) for name in ("problem", "lanes")}
        fields |= {"task_data": _take(self.task_data, places), "places": places}
        return Part(**fields, numbers=drawn.numbers, factors=drawn.factors)

    def _places(self, numbers: Array) -> Array:
        """Where in the arrays these tasks are."""
        return numbers

    def _numbers(self) -> Array:
        return jnp.arange(self.count)

    def _factors(self) -> Array | None:
        """What each task counts in the mean; None is the same."""
        return None

    def _keys(self, key: Array) -> Array:
        return jax.vmap(lambda i: jax.random.fold_in(key, i))(self._numbers())

    def lanes_here(self) -> int:
        """Of each device."""
        if self.lanes == "auto":
            raise TypeError(
                "lanes='auto' measures, which cannot be done inside jit, vmap or grad: pass "
                "lanes=bilevel.choose_lanes(...)."
            )
        here = self.count // (1 if self.mesh is None else self.mesh.size)
        return here if self.lanes is None else min(int(self.lanes), here)

    def _map(self, fn: Callable[..., Any], shared: Any, *rows: Any) -> Any:
        return on_lanes.map_rows(fn, shared, rows, self.lanes_here(), self.mesh)

    def _refills(self, engine: AbstractEngine, solver: Solver) -> bool:
        """Whether the inner problems can be solved before, and apart from, the engine's step."""
        fixed = self.problem.batch_size[0] is None and isinstance(solver, AbstractInnerSolver)
        devices = 1 if self.mesh is None else self.mesh.size
        few = 1 < self.lanes_here() < self.count // devices
        return few and fixed and engine.solves_once


class Part(Tasks):
    """The tasks of one step. Each has the key, and so the batches, that it has among all of them."""

    numbers: Any = eqx.field(default=None, kw_only=True)
    places: Any = eqx.field(default=None, kw_only=True)
    factors: Any = eqx.field(default=None, kw_only=True)

    def _numbers(self) -> Array:
        return self.numbers

    def _factors(self) -> Array | None:
        return self.factors

    def rows(self, tree: Any) -> Any:
        """Those of these tasks."""
        return _take(tree, self.places)

    def put(self, tree: Any, rows: Any) -> Any:
        """The tree of all tasks with the new rows of these."""
        return jax.tree.map(lambda leaf, new: leaf.at[self.places].set(new), tree, rows)


class Loaded(Tasks):
    """Some tasks of a pool, among them all that the steps to come will draw."""

    numbers: Any = eqx.field(default=None, kw_only=True)
    """Rising."""
    of: int = eqx.field(static=True, default=0, kw_only=True)

    @property
    def total(self) -> int:
        return self.of

    def _numbers(self) -> Array:
        return self.numbers

    def _places(self, numbers: Array) -> Array:
        return jnp.searchsorted(self.numbers, numbers)


def _take(tree: Any, rows: Array) -> Any:
    return jax.tree.map(lambda leaf: leaf[rows], tree)
