"""What an engine is: (problem, inner solver) -> hypergradient with a trust report."""

import abc
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import Array

from solvers import (
    LBFGS,
    AbstractInnerSolver,
    GradientDescent,
    Objective,
    OptaxSolver,
    Sampler,
    SolveInfo,
    Status,
    tree,
)
from solvers.fields import Settings
from solvers.linear.base import LinearInfo
from solvers.linear.lanes import System
from solvers.status import combine, where
from solvers.types import Tree


@runtime_checkable
class BilevelProblem(Protocol):
    """`min over lam of outer(w*(lam), lam)`, `w*(lam) = argmin over w of inner(w, lam)`.

    Losses are `loss(w, lam, batch) -> scalar`.
    """

    inner: Callable[[Tree, Tree, Any], Array]
    outer: Callable[[Tree, Tree, Any], Array]

    def inner_objective(self, lam: Tree) -> Objective:
        """The inner loss at a fixed outer variable."""
        ...

    def inner_sampler(self, key: Array) -> Sampler:
        """Batches of the inner data, by inner step."""
        ...

    def outer_batch(self, key: Array) -> Any:
        """A batch of the outer data (all of it where no batch size is set)."""
        ...

    def start(self, w: Tree, lam: Tree, batch: Any) -> Tree:
        """Where an inner solve starts: `w`, or the problem's own initialisation from `lam`."""
        ...


Solver = AbstractInnerSolver | Callable[[Tree], AbstractInnerSolver]
"""An inner solver, or a function of the outer variable that makes one."""


class HypergradInfo(NamedTuple):
    """The trust report; every array has shape ()."""

    outer_value: Array
    """The outer loss at the returned `w`."""
    inner: SolveInfo
    """The inner solve."""
    adjoint_residual: Array
    """Residual of the adjoint system relative to its right-hand side; NaN where there is none."""
    adjoint_steps: Array
    """Products with the Hessian, or reverse steps, int32."""
    curvature: Array
    """The smallest Rayleigh or Ritz value of the inner Hessian seen; NaN = unknown."""
    error_estimate: Array
    """Estimated error of `grad` relative to its norm; NaN = unknown."""
    bound: Array
    """A certified upper bound of the same, where the problem declares its constants; NaN = none."""
    corrected_value: Array
    """The outer value at the inner solution, to second order in the inner error; NaN = unknown."""
    damping: Array
    """What was added to the diagonal of the inner Hessian: above zero, `grad` is biased by it."""
    gauss_newton: Array
    """Whether the adjoint system is that of the Gauss-Newton matrix, so that `grad` is biased by what it leaves
    out of the inner Hessian; boolean."""
    margin: Array
    """Distance of the inner solution from a kink of the inner prox, on the scale of the inner gradient; NaN
    where no kink was found, or there is no prox."""
    growth: Array
    """The norm of the outer loss's derivative in the inner variable before the differentiated steps, over
    that after them (`Forward`: estimated along one random direction); NaN where no steps are differentiated."""
    peak_growth: Array
    """The same for the largest norm on the way, `Unrolled` alone: far above 1, the training is chaotic."""
    status: Array
    """A `Status`, int32: the worst of the solves behind this hypergradient."""
    tasks: Any = None
    """Of a mean over tasks: the report of each, stacked."""
    lane_steps: Any = None
    """Of a mean over tasks: inner steps of all lanes, idle or not, int32; `inner.num_steps` are the useful ones."""
    adjoint_lane_steps: Any = None
    """The same of products of the adjoint systems, where these went on refilled lanes; else None."""
    drawn: Any = None
    """Of a mean over tasks that were drawn: their `numbers`, and the `factors` that each counts with."""
    multipliers: Any = None
    """`Multipliers` of constraints on `w` and `lam` together, after the step, with the active ones; None without."""


class Hypergradient(NamedTuple):
    """The gradient of the outer loss through the inner solution."""

    grad: Tree
    """Like the outer variable."""
    w: Tree
    """The inner solution; the start of the next inner solve."""
    info: HypergradInfo


class AbstractEngine(Settings):
    """Computes hypergradients. `state` is a pytree of fixed structure: what the next step needs.

    An engine works under `jit` and `vmap`. Within a step it moves `w` and its own sequences, never
    `lam`.
    """

    estimates: ClassVar[bool] = True
    """Whether the driver asks for the error estimate by default (it costs Hessian-vector products)."""
    proximal: ClassVar[bool] = False
    """Whether inner problems with a prox are differentiated right."""
    constrained: ClassVar[bool] = False
    """Whether constraints that hold `w` and `lam` together are taken into account."""
    fixed_points: ClassVar[bool] = False
    """Whether solutions of `FixedPoint` are differentiated right; else a `Mapping` is solved as a loss."""
    through_steps: ClassVar[bool] = False
    """Whether the inner solver's steps are differentiated."""
    needs_implicit: ClassVar[bool] = False
    """Whether the derivative ignores how the inner solver got there (its start and its settings)."""
    uses_solver: ClassVar[bool] = True
    """Whether an inner solver moves `w`; else the engine does so itself."""
    solves_once: ClassVar[bool] = False
    """Whether a step is one inner solve and then derivatives at its result, so that the solve may be done apart."""
    anticipates: ClassVar[bool] = False
    """Whether `w` moves by what `lam` is about to do on its account: not for `Tasks`, where all of them move `lam`."""
    second_order: ClassVar[bool] = True
    """Whether it needs second derivatives of the losses."""
    measured: ClassVar[tuple[str, ...]] = ()
    """Settings whose "auto" is measured by Hessian-vector products."""
    rewinds: ClassVar[bool] = True
    """Whether the driver keeps the state before a step that fails; costs a copy of the state per step."""

    @abc.abstractmethod
    def init(self, problem: BilevelProblem, solver: Solver, w: Tree, lam: Tree, key: Array) -> Any:
        """The state before the first step."""

    @abc.abstractmethod
    def step(
        self, problem: BilevelProblem, solver: Solver, w: Tree, lam: Tree, state: Any, key: Array
    ) -> tuple[Hypergradient, Any]:
        """Inner solve from `w` and hypergradient at `lam`."""

    def wants_estimate(self) -> bool:
        """Whether to compare with the implicit hypergradient: its own `estimate`, else the default."""
        wanted = getattr(self, "estimate", None)
        return self.estimates if wanted is None else wanted

    def adjoint(self, state: Any) -> Tree | None:
        """The solution of the adjoint system that the last step found; None where the engine has none."""
        return None

    def adjoint_apart(self, problem: BilevelProblem, solver: Solver, lam: Tree) -> bool:
        """Whether `adjoint_system` gives the one system that a step solves, so that it may be solved apart."""
        return False

    def adjoint_system(
        self, problem: BilevelProblem, solver: Solver, w: Tree, lam: Tree, state: Any, key: Array
    ) -> System:
        """The system of `step` where the inner problem is solved by `w`."""
        raise NotImplementedError

    def with_adjoint(self, x: Tree, info: LinearInfo) -> "AbstractEngine":
        """The engine for one step, with the solution of that system."""
        raise NotImplementedError

    def inner_tol(self, state: Any) -> Array | None:
        """The tolerance of the next inner solve, where the engine sets it; None leaves it to the solver."""

    def descent_rate(self) -> Any:
        """The rate of the plain gradient steps that the engine counts on `lam` to take; None where any rule will do."""

    def multipliers(self, state: Any) -> Any:
        """The multipliers of the problem's constraints in a state; None where the engine has none."""
        return None

    @classmethod
    def default_solver(cls) -> AbstractInnerSolver:
        """The inner solver where the user names none."""
        return LBFGS(max_steps=100)


def has_prox(problem: BilevelProblem) -> bool:
    return getattr(problem, "inner_prox", None) is not None


def constraints(problem: BilevelProblem, w: Tree, lam: Tree) -> dict[str, Tree]:
    """The values of the problem's constraints, by "inequality" and "equality", of those that it has."""
    functions = {name: getattr(problem, name, None) for name in ("inequality", "equality")}
    return {name: h(w, lam) for name, h in functions.items() if h is not None}


def check_proximal(solver: AbstractInnerSolver) -> None:
    """Raises ValueError for a solver that would ignore the problem's prox."""
    if not solver.proximal:
        raise ValueError(
            f"the problem has an inner_prox, which {type(solver).__name__} would ignore. Use "
            "ProximalGradient (or WorkingSet)."
        )


def check_settings(name: str, solver: Solver, at: AbstractInnerSolver, state: Any) -> None:
    """Raises ValueError where `lam` may act through a setting that was put into the state at the start."""
    held = lambda node: hasattr(node, "hyperparams")
    inject = any(map(held, jax.tree.leaves(state, is_leaf=held)))
    known = isinstance(at, GradientDescent) or (isinstance(at, OptaxSolver) and not inject)
    if not isinstance(solver, AbstractInnerSolver) and not known:
        raise ValueError(
            f"{name} with a solver made from lam needs settings that each step reads anew: "
            "GradientDescent, or OptaxSolver with a schedule instead of optax.inject_hyperparams."
        )


def begin(problem: BilevelProblem, solver: Solver, w: Tree, lam: Tree, key: Array) -> Any:
    """The first inner variable and the solver's state there."""
    batch = problem.inner_sampler(key)(0)
    first = problem.start(w, lam, batch)
    return first, make_solver(solver, lam).init(problem.inner_objective(lam), first, batch)


def make_solver(solver: Solver, lam: Tree) -> AbstractInnerSolver:
    """The inner solver at this outer variable. Raises TypeError where a function gives something else."""
    if isinstance(solver, AbstractInnerSolver):
        return solver
    made = solver(lam)
    if not isinstance(made, AbstractInnerSolver):
        raise TypeError(
            f"solver(lam) must be an inner solver such as bilevel.LBFGS(), got {made!r}."
        )
    return made


def is_finite(outer_value: Array, grad: Tree) -> Array:
    return jnp.isfinite(outer_value) & tree.all_finite(grad)


def make_info(
    outer_value: Array,
    inner: SolveInfo,
    grad: Tree,
    *statuses: Array,
    adjoint_residual: Array | None = None,
    adjoint_steps: Array | int = 0,
    curvature: Array | None = None,
    corrected_value: Array | None = None,
    damping: Array | float = 0.0,
    gauss_newton: bool = False,
    margin: Array | None = None,
    growth: Array | None = None,
    peak_growth: Array | None = None,
) -> HypergradInfo:
    """The report, with the worst status of all parts and of what is not finite."""
    nan = jnp.full((), jnp.nan, inner.residual.dtype)
    broken = where(~is_finite(outer_value, grad), Status.NONFINITE)
    return HypergradInfo(
        outer_value=outer_value,
        inner=inner,
        adjoint_residual=nan if adjoint_residual is None else adjoint_residual,
        adjoint_steps=jnp.asarray(adjoint_steps, jnp.int32),
        curvature=nan if curvature is None else curvature,
        error_estimate=nan,
        bound=nan,
        corrected_value=nan if corrected_value is None else corrected_value,
        damping=jnp.asarray(damping, nan.dtype),
        gauss_newton=jnp.asarray(gauss_newton),
        margin=nan if margin is None else margin,
        growth=nan if growth is None else growth.astype(nan.dtype),
        peak_growth=nan if peak_growth is None else peak_growth.astype(nan.dtype),
        status=combine(inner.status, broken, *statuses),
    )
