"""Implicit differentiation."""

import typing
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from hypergrad import accuracy
from hypergrad.accuracy import Accuracy
from hypergrad.base import (
    AbstractEngine,
    BilevelProblem,
    Hypergradient,
    Solver,
    check_proximal,
    has_prox,
    make_info,
    make_solver,
)
from hypergrad.derivatives import cross_vjp, linearized_map, outer_value_and_grads
from hypergrad.estimate import with_estimate
from hypergrad.nonsmooth import fixed_point, margin, narrowed, step_after
from hypergrad.warm_start import extrapolated_start, newton_start
from solvers import (
    CG,
    GMRES,
    AbstractInnerSolver,
    AbstractLinearSolver,
    LinearInfo,
    Status,
    status,
    tree,
)
from solvers.fields import Number, cast, number, static, unchecked
from solvers.gradient import linearized_hvp
from solvers.linear.cg import preconditioned
from solvers.linear.lanes import Given, System
from solvers.linear.spectrum import ritz_values
from solvers.loops import solve
from solvers.types import MatVec, Scalar, Tree


class Implicit(AbstractEngine):
    """The implicit function theorem at the inner solution: `dF/dlam - C q`, `(H + damping I) q = c`.

    Class: the inner solution is an isolated minimiser with an invertible Hessian; outer variables
    that act only through the inner solver (its start, its learning rate) have no implicit derivative
    and are refused.

    `damping > 0` gives the hypergradient of the proximal problem instead, a bias that
    `info.error_estimate` shows. `damping="auto"` is twice the most negative curvature that 12 Lanczos
    products from a random start find, and zero where they find none: at a point that is no minimiser
    (a network stopped early) the result is that of a damped problem, `info.damping` says so, and the
    error is unknown.

    `gauss_newton=True` takes the Gauss-Newton matrix of the inner loss (`Problem(inner_gauss_newton=...)`)
    in the place of H in the adjoint system, as `info.gauss_newton` says: never indefinite for a loss that is convex
    in the model's outputs, exact where the model is linear in `w` or fits the data; elsewhere a bias, which
    `info.error_estimate` shows where H is positive definite. C stays exact.

    Negative curvature of `H + damping I` is status INDEFINITE whatever the linear solver made of it: at a
    saddle point the formula has a value, but it is no hypergradient.

    `refine=True` returns the hypergradient after the Newton correction of the error estimate, whose error
    is quadratic in that of the plain one, at each step. `info.error_estimate` is still the plain one's.
    `refine_rtol` is how exactly the correction is solved for, relative to itself.

    `target` closes the loop: each step estimates its error, returns the corrected hypergradient (as `refine` does, but
    with a correction of one digit) and multiplies both tolerances of the next step by `target / error`, within 0.1
    and 4. So `info.error_estimate` stays near `target`, what is returned is better than that (about its square where
    the Hessian is smooth), and `tol` of the inner and `rtol` of the linear solver are not used. Under `Tasks`
    each task has its own loop, relative to its own hypergradient. For inner solves that stop at a tolerance. The first
    step, which a single `hypergradient` is, solves to 1e-2 and 1e-1 whatever the target.

    Where the inner problem is a fixed point (`Mapping`, solved by `FixedPoint`), H is the Jacobian of
    `w - T(w)`, the system is with its transpose, and `linear_solver` defaults to GMRES.

    Where the problem has an `inner_prox`, the equation differentiated is the prox's fixed point (see
    `hypergrad.nonsmooth`): the adjoint system is the Hessian restricted to the support, derivatives of the
    prox come from the function given. `info.margin` is the distance from a kink; one below the inner
    residual is MAX_STEPS, since the support is then not settled.

    The inner solver continues from the last `w` and state, the linear solver from the last adjoint.
    `warm_start="newton"` takes a Newton step for the new `lam` first, where that lowers the residual: the tangent
    of the solution path. It pays for inner solvers that take many steps (`ProximalGradient`,
    `GradientDescent`); its products are counted in `adjoint_steps`. `warm_start="extrapolated"` continues the
    secant of the last two solutions instead, where that lowers the residual: as near while `lam` moves steadily, and
    free of products.
    With a batch size, the adjoint system and the residual use one inner batch per outer step.

    `estimate`: True, False, or None for "in `hypergradient`, and at the end of a chunk in `run`".

    Cost per step: the inner solve, one Hessian-vector product per linear step (about a gradient each),
    two cross derivatives; `refine` solves two more systems. Memory: a few copies of `w`; no trajectory.
    Source: Pedregosa 2016; Lorraine, Vicol and Duvenaud 2020; Blondel et al. 2022.
    """

    linear_solver: AbstractLinearSolver | None = None
    damping: Number | str = number(0.0, low=0.0)
    gauss_newton: bool = static(False)
    estimate: bool | None = static(None)
    refine: bool = static(False)
    refine_rtol: float = static(1e-3)
    warm_start: str = static("last")
    target: Number | None = number(None, low=0.0, strict=True)

    needs_implicit = True
    solves_once = True
    proximal = True
    fixed_points = True

    def __check_init__(self) -> None:
        if isinstance(self.damping, str) and self.damping != "auto":
            raise ValueError(
                f"Implicit(damping=...) must be a number or 'auto', got {self.damping!r}."
            )
        rtol = self.refine_rtol
        if isinstance(rtol, bool) or not isinstance(rtol, int | float) or not 0 < rtol < 1:
            raise ValueError(
                f"Implicit(refine_rtol=...) must be a number between 0 and 1, got {rtol!r}."
            )
        if self.warm_start not in ("last", "newton", "extrapolated"):
            raise ValueError(
                "Implicit(warm_start=...) must be 'last', 'newton' or 'extrapolated', got "
                f"{self.warm_start!r}."
            )

    def init(
        self, problem: BilevelProblem, solver: Solver, w: Tree, lam: Tree, key: Array
    ) -> "_State":
        batch = problem.inner_sampler(key)(0)
        at_lam = make_solver(solver, lam)
        # Other starts ask what the last state knew.
        begin = at_lam.blank if self.warm_start == "last" else at_lam.init
        inner = begin(problem.inner_objective(lam), w, batch)
        own = None if self.target is None else accuracy.first(w)
        return _State(inner, tree.zeros_like(w), self._remembered(w), own)

    def step(
        self,
        problem: BilevelProblem,
        solver: Solver,
        w: Tree,
        lam: Tree,
        state: "_State",
        key: Array,
    ) -> tuple[Hypergradient, "_State"]:
        solver = make_solver(solver, lam)
        if has_prox(problem):
            check_proximal(solver)
        objective, sampler = problem.inner_objective(lam), problem.inner_sampler(key)
        batch = sampler(0)
        w = problem.start(w, lam, batch)
        linear = self._linear(solver)
        if state.accuracy is not None:
            solver, linear = _at(state.accuracy, solver, linear, sampler.varies)
        linear_key = jax.random.fold_in(key, 2)
        extra = jnp.int32(0)
        settled, last = solver.settled(state.inner), w
        if self.warm_start == "extrapolated":
            w = extrapolated_start(problem, settled, w, state.previous, lam, batch)
        if self.warm_start == "newton":
            w, extra = newton_start(problem, settled, linear, w, lam, batch, linear_key)
        inner_state = solver.restart(objective, w, state.inner, batch)
        w, inner_state, inner = solve(solver, objective, w, inner_state, sampler)

        value, c, grad_lam = outer_value_and_grads(problem, w, lam, problem.outer_batch(key))
        residual, hvp, damping = self._products(problem, solver, w, lam, batch, key)

        def solve_adjoint(product: MatVec, b: Tree) -> tuple[Tree, LinearInfo]:
            prepared = linear.init(product, w, linear_key)
            return linear.solve(product, b, state.adjoint, prepared, linear_key)

        if has_prox(problem):
            size = step_after(problem, solver, inner_state, w, lam, batch)
            at = fixed_point(problem, w, lam, batch, size, damping)
            system = narrowed(problem, solver, w, lam, batch, at, damping)
            q, adjoint = solve_adjoint(system.product, at.project(c))
            u = at.adjoint(c, q)
            grad = tree.add(grad_lam, at.pull_back(u))
            correction = tree.vdot(u, at.defect)
            distance = margin(problem, lam, at).astype(inner.residual.dtype)
            # Nearer to a kink than its own error: which side the solution is on is not known.
            undecided = status.where(distance <= inner.residual, Status.MAX_STEPS)
        else:
            linear = preconditioned(linear, objective, w, batch)
            q, adjoint = solve_adjoint(lambda v: tree.axpy(damping, v, hvp(v)), c)
            grad = tree.sub(grad_lam, cross_vjp(problem, solver, w, lam, batch, q))
            correction = -tree.vdot(q, residual)
            distance, undecided = None, jnp.int32(Status.OK)

        # MINRES and GMRES solve an indefinite system without complaint, but its `w` is no minimiser.
        # The symmetric part of another Jacobian says nothing.
        curvature = jnp.where(solver.symmetric, adjoint.curvature, jnp.nan)
        negative = curvature < -100 * tree.epsilon(w) * adjoint.largest
        info = make_info(
            value,
            inner,
            grad,
            adjoint.status,
            status.where(negative, Status.INDEFINITE),
            undecided,
            adjoint_residual=adjoint.residual,
            adjoint_steps=adjoint.num_steps + extra,
            # That of the Gauss-Newton matrix says nothing of the inner loss.
            curvature=jnp.full_like(curvature, jnp.nan)
            if self.gauss_newton
            else curvature - damping.astype(curvature.dtype),
            corrected_value=value + correction.astype(value.dtype),
            damping=damping,
            gauss_newton=self.gauss_newton,
            margin=distance,
        )
        h = Hypergradient(grad, w, info)
        state = _State(inner_state, q, self._remembered(last), state.accuracy)
        if self.refine or self.target is not None:
            rtol = self.refine_rtol if self.refine else 0.1
            h = with_estimate(problem, solver, self, lam, h, state, key, refine=True, rtol=rtol)
        if self.target is not None and state.accuracy is not None:
            error, reached = h.info.error_estimate, inner.residual
            new = accuracy.following(state.accuracy, error, reached, self.target)
            state = state._replace(accuracy=new)
        return h, state

    def _linear(self, solver: AbstractInnerSolver) -> AbstractLinearSolver:
        default = CG() if solver.symmetric else GMRES()
        return default if self.linear_solver is None else self.linear_solver

    def _products(
        self,
        problem: BilevelProblem,
        solver: AbstractInnerSolver,
        w: Tree,
        lam: Tree,
        batch: Any,
        key: Array,
    ) -> tuple[Tree, MatVec, Scalar]:
        """What is left of the inner equation at `w`, products with H or what stands for it, and the damping."""
        objective = problem.inner_objective(lam)
        if solver.symmetric:
            residual, hvp = linearized_hvp(objective, w, batch)
        else:
            residual, _, hvp = linearized_map(solver, objective, w, batch)
        if self.gauss_newton:
            hvp = _gauss_newton(problem, solver, objective)(w, lam, batch)
        if isinstance(self.damping, str) and not solver.symmetric:
            raise ValueError(
                "Implicit(damping='auto') is for losses: a fixed point has no curvature."
            )
        return residual, hvp, self._damping(hvp, w, jax.random.fold_in(key, 4))

    def adjoint_apart(self, problem: BilevelProblem, solver: Solver, lam: Tree) -> bool:
        """By CG, where nothing but its products has to be prepared, and `w` stays where the inner solver left it."""
        at_lam = make_solver(solver, lam)
        plain = not has_prox(problem) and problem.inner_objective(lam).preconditioner is None
        own = type(self._linear(at_lam)) is CG and not isinstance(self.damping, str)
        return at_lam.symmetric and plain and own and self.warm_start == "last"

    def adjoint_system(
        self,
        problem: BilevelProblem,
        solver: Solver,
        w: Tree,
        lam: Tree,
        state: "_State",
        key: Array,
    ) -> System:
        solver, sampler = make_solver(solver, lam), problem.inner_sampler(key)
        linear = self._linear(solver)
        if state.accuracy is not None:
            _, linear = _at(state.accuracy, solver, linear, sampler.varies)
        _, hvp, damping = self._products(problem, solver, w, lam, sampler(0), key)
        _, c, _ = outer_value_and_grads(problem, w, lam, problem.outer_batch(key))
        product = lambda v: tree.axpy(damping, v, hvp(v))
        own = typing.cast(CG, linear)
        return System(product, c, state.adjoint, own, jax.random.fold_in(key, 2))

    def with_adjoint(self, x: Tree, info: LinearInfo) -> "Implicit":
        return unchecked(self, linear_solver=Given(x, info))

    def _damping(self, hvp: MatVec, w: Tree, key: Array) -> Scalar:
        if not isinstance(self.damping, str):
            return cast(self.damping, jnp.zeros((), tree.accumulation_dtype(w)))
        ritz = ritz_values(hvp, w, key)
        negative = ritz[0] < -100 * tree.epsilon(w) * jnp.max(jnp.abs(ritz))
        return jnp.where(negative, -2 * ritz[0], jnp.zeros_like(ritz[0]))

    def _remembered(self, w: Tree) -> Tree | None:
        return w if self.warm_start == "extrapolated" else None

    def adjoint(self, state: "_State") -> Tree:
        return state.adjoint

    def inner_tol(self, state: "_State") -> Scalar | None:
        return None if state.accuracy is None else state.accuracy.tol


def _gauss_newton(problem: BilevelProblem, solver: Solver, objective: Any) -> Callable[..., MatVec]:
    own = getattr(objective, "gauss_newton", None)
    if own is None:
        raise ValueError(
            "Implicit(gauss_newton=True) needs Problem(inner_gauss_newton=...): see bilevel.gauss_newton."
        )
    if has_prox(problem) or not solver.symmetric:
        raise ValueError("Implicit(gauss_newton=True) is for smooth inner losses without a prox.")
    return own


class _State(NamedTuple):
    inner: Any
    adjoint: Tree
    previous: Tree | None  # where the last inner solve started, for the secant
    accuracy: Accuracy | None  # tolerances of the next step, where the loop is closed


def _at(
    at: Accuracy, solver: AbstractInnerSolver, linear: AbstractLinearSolver, varies: bool
) -> tuple[AbstractInnerSolver, AbstractLinearSolver]:
    """The solvers with these tolerances. Raises ValueError where one has none to set."""
    if varies and solver.minibatches:
        raise ValueError(
            "Implicit(target=...) sets the tolerance of inner solves: expected all rows, or one batch per solve, "
            "not batches that change from inner step to inner step."
        )
    if not hasattr(linear, "rtol"):
        raise ValueError(
            f"Implicit(target=...) sets the rtol of the linear solver, and {type(linear).__name__} has none: "
            "expected one such as CG."
        )
    return unchecked(solver, tol=at.tol), unchecked(linear, rtol=at.rtol)
