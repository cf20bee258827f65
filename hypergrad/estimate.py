"""How wrong a hypergradient is: the defect estimate, from one Newton correction, and the certified bound."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from hypergrad.base import (
    AbstractEngine,
    BilevelProblem,
    Hypergradient,
    Solver,
    has_prox,
    make_solver,
)
from hypergrad.certificate import Constants, error_bound
from hypergrad.derivatives import cross_vjp, linearized_map, outer_value_and_grads
from hypergrad.nonsmooth import fixed_point, step_size
from solvers import CG, GMRES, AbstractInnerSolver, LinearInfo, Status, tree
from solvers.fields import Number
from solvers.kinks import bent
from solvers.linear.cg import preconditioned
from solvers.linear.spectrum import ritz_values
from solvers.loops import rounding_level
from solvers.status import combine, where
from solvers.types import MatVec, Tree


class Assessment(NamedTuple):
    """What the estimate found; every array but `refined` has shape ()."""

    refined: Tree
    """The hypergradient after the Newton correction, like `lam`."""
    corrected_value: Array
    """`F(w) - <q+, dg/dw>`: the outer value at the inner solution, to second order in the inner error."""
    error: Array
    """Estimated `||grad - true|| / ||grad||`; NaN where the systems behind it could not be solved."""
    curvature: Array
    """Smallest curvature met by the estimate's solves and a Lanczos probe from a random start."""
    num_steps: Array
    """Products with the Hessian, int32, without the probe's."""
    status: Array
    """INDEFINITE, BREAKDOWN or NONFINITE where the implicit hypergradient does not exist, else OK."""


def with_estimate(
    problem: BilevelProblem,
    solver: Solver,
    engine: AbstractEngine,
    lam: Tree,
    h: Hypergradient,
    state: Any,
    key: Array,
    *,
    refine: bool = False,
    rtol: Number = 1e-3,
    probe: bool | None = None,
) -> Hypergradient:
    """The hypergradient with its error estimate, its bound and its corrected value filled in.

    Args:
      state: the engine's after the step.
      refine: return the corrected hypergradient instead of `h.grad`. The estimate is still that of
        `h.grad`, so more than the error of what is returned. The products are counted in `adjoint_steps`.
      rtol: of the corrections, where the engine has an adjoint to correct.
      probe: look for negative curvature that no right-hand side excites; None does unless `refine`.

    Where the engine needs the inverse Hessian, undamped, what the estimate's solves found (negative
    curvature, a singular system) is a verdict on the hypergradient too.
    """
    solver = make_solver(solver, lam)
    batches = problem.inner_sampler(key)(0), problem.outer_batch(key)
    adjoint = engine.adjoint(state)
    probe = not refine if probe is None else probe
    probe_key = jax.random.fold_in(key, 3) if probe else None
    found = assess(problem, solver, lam, h, *batches, probe_key, adjoint, rtol)
    info = h.info
    like = info.error_estimate.dtype
    status, bound = info.status, info.bound
    if adjoint is not None and engine.needs_implicit:
        biased = (info.damping != 0) | info.gauss_newton  # of another matrix than was looked at
        status = jnp.where(biased, status, combine(status, found.status))
    constants = getattr(problem, "constants", None)
    if constants is not None and adjoint is not None and not has_prox(problem):
        if not isinstance(constants, Constants):
            constants = constants(h.w, lam, *batches)
        bound = error_bound(problem, solver, lam, h, adjoint, *batches, constants)
        bound = jnp.where(info.gauss_newton, jnp.nan, bound)  # the residual is of another matrix
    info = info._replace(
        error_estimate=found.error.astype(like),
        bound=bound.astype(like),
        corrected_value=found.corrected_value.astype(info.corrected_value.dtype),
        adjoint_steps=info.adjoint_steps + (found.num_steps if refine else 0),
        status=status,
        curvature=jnp.fmin(info.curvature, found.curvature.astype(info.curvature.dtype)),
    )
    known = ~jnp.isnan(info.error_estimate)
    grad = tree.where(known, found.refined, h.grad) if refine else h.grad
    return Hypergradient(grad, h.w, info)


def assess(
    problem: BilevelProblem,
    solver: AbstractInnerSolver,
    lam: Tree,
    hypergradient: Hypergradient,
    inner_batch: Any,
    outer_batch: Any,
    key: Array | None,
    adjoint: Tree | None = None,
    rtol: Number = 1e-3,
) -> Assessment:
    """Compare a hypergradient with the one after a Newton step on both equations.

    With the residuals of the inner and the adjoint equation at the returned `w`:
    `w+ = w - H^-1 dg/dw`, `q+ = q + H(w+)^-1 (dF/dw(w+) - H(w+) q)`, `z+ = dF/dlam(w+) - C(w+) q+`, and the
    estimate is `||z+ - z|| / ||z||`. The error of z+ is quadratic in that of z where H is Lipschitz, so
    the estimate is sharp for small errors and says "large" for large ones. It holds for any engine: what
    it measures is the distance from the exact hypergradient, bias included.

    `adjoint` is the engine's own solution q of the adjoint system, where it has one. Then both systems
    are for corrections, of which a few digits (`rtol`) are enough; else q = 0 and both are solved tightly.

    A solver whose optimality map has no symmetric Jacobian (`FixedPoint`) gives the map, its Jacobian and the
    transpose in the places of dg/dw, H and H; the systems are then solved by GMRES, without a probe.

    The systems are solved by CG on automatic Hessian-vector products, whatever the engine used, so a
    wrong `inner_hvp` or a diverging series shows here. A Lanczos probe from a random start looks for
    negative curvature that the right-hand sides do not excite (none where `key` is None).

    With an `inner_prox` both equations are those of `hypergrad.nonsmooth`. Where the Newton step of the inner
    one meets a kink of the prox, the error is unknown (NaN) and the status MAX_STEPS.

    Source: dual-weighted residuals, Becker and Rannacher 2001; checked against dense references.
    """
    if has_prox(problem):
        return assess_nonsmooth(
            problem, lam, hypergradient, inner_batch, outer_batch, key, adjoint, rtol
        )
    w, grad = hypergradient.w, hypergradient.grad
    objective = problem.inner_objective(lam)
    symmetric = solver.symmetric

    def linearized(u: Tree) -> tuple[Tree, MatVec, MatVec]:
        if not symmetric:
            return linearized_map(solver, objective, u, inner_batch)
        # By autodiff, whatever the solver or the problem would use.
        residual, hvp = jax.linearize(lambda u: jax.grad(objective)(u, inner_batch), u)
        return residual, hvp, hvp

    residual, hvp, _ = linearized(w)

    dtype, eps = tree.norm(grad).dtype, tree.epsilon(w)
    q = tree.zeros_like(w) if adjoint is None else adjoint
    tight = 1e-10 if eps < 1e-10 else 1e-5
    rtol = jnp.asarray(tight if adjoint is None else rtol, dtype)
    rounding = rounding_level(hypergradient.info.inner.value, w).astype(dtype)

    def solve(w: Tree, second: Array) -> tuple[Tree, LinearInfo]:
        """The inner (first) or the adjoint (second) equation's correction at `w`."""
        residual, product, transposed = linearized(w)
        if not symmetric:  # one of them at a time
            hvp = lambda v: jax.lax.cond(second, transposed, product, v)
        else:
            hvp = product
        _, c, _ = outer_value_and_grads(problem, w, lam, outer_batch)
        defect = tree.axpy(-1.0, transposed(q), c)
        atol = jnp.where(second, 10 * eps * tree.norm(c).astype(dtype), jnp.zeros((), dtype))
        system = CG(rtol=rtol, atol=atol) if symmetric else GMRES(rtol=rtol, atol=atol)
        b = tree.where(second, defect, tree.scale(-1.0, residual))
        system = preconditioned(system, objective, w, inner_batch)
        solved = system.solve(hvp, b, tree.zeros_like(w), None, jax.random.key(0))
        return _or_rounding(*solved, ~second & (tree.norm(b) <= rounding))

    def correct(carry: tuple[Tree, Tree], second: Array) -> tuple[tuple[Tree, Tree], LinearInfo]:
        w, _ = carry
        x, info = solve(w, second)
        return (tree.where(second, w, tree.add(w, x)), x), info

    # A loop of two passes: written out twice it would take twice as long to compile.
    (w_plus, dq), both = jax.lax.scan(correct, (w, q), jnp.array([False, True]))
    q_plus = tree.add(q, dq)
    _, _, grad_lam = outer_value_and_grads(problem, w_plus, lam, outer_batch)
    better = tree.sub(grad_lam, cross_vjp(problem, solver, w_plus, lam, inner_batch, q_plus))
    value = hypergradient.info.outer_value
    corrected = value - tree.vdot(q_plus, residual).astype(value.dtype)

    if not symmetric:  # the symmetric part of the Jacobian says nothing
        both, key = both._replace(curvature=jnp.full_like(both.curvature, jnp.nan)), None
    ritz = None if key is None else ritz_values(hvp, w, key)
    return _verdict(better, grad, corrected, both, ritz, jnp.asarray(False), eps)


def assess_nonsmooth(
    problem: BilevelProblem,
    lam: Tree,
    hypergradient: Hypergradient,
    inner_batch: Any,
    outer_batch: Any,
    key: Array | None,
    adjoint: Tree | None,
    rtol: Number,
) -> Assessment:
    """`assess` for an inner problem with a prox: a semismooth Newton step on its fixed-point equation.

    `adjoint` solves the symmetric system of `hypergrad.nonsmooth`.
    """
    w, grad = hypergradient.w, hypergradient.grad
    eps = tree.epsilon(w)
    size = step_size(problem, w, lam, inner_batch)
    first = fixed_point(problem, w, lam, inner_batch, size)
    ritz = None if key is None else ritz_values(first.probe, w, key)
    y = tree.zeros_like(w) if adjoint is None else adjoint
    tight = 1e-10 if eps < 1e-10 else 1e-5
    rtol = jnp.asarray(tight if adjoint is None else rtol, size.dtype)
    rounding = (rounding_level(hypergradient.info.inner.value, w) * size).astype(size.dtype)

    def correct(carry: _Newton, second: Array) -> tuple[_Newton, LinearInfo]:
        at = fixed_point(problem, carry.w, lam, inner_batch, size)
        _, c, _ = outer_value_and_grads(problem, carry.w, lam, outer_batch)
        b = at.project(tree.where(second, c, at.newton_rhs()))
        b = tree.axpy(-second.astype(size.dtype), at.product(y), b)
        atol = jnp.where(second, 10 * eps * tree.norm(c), 0).astype(size.dtype)
        solved = CG(rtol=rtol, atol=atol).solve(
            at.product, b, tree.zeros_like(w), None, jax.random.key(0)
        )
        x, info = _or_rounding(*solved, ~second & (tree.norm(b) <= rounding))
        # Whether the tangent of the prox here gives its value at the last point: no kink in between.
        back = tree.sub(carry.v, at.v)
        left = tree.sub(carry.mapped, tree.add(at.mapped, at.project(back)))
        crossed = second & bent(left, tree.max_abs(back), 0.01, 100 * eps * tree.max_abs(at.v))
        w_next = tree.where(second, carry.w, tree.add(carry.w, at.newton_step(x)))
        return _Newton(w_next, x, at.v, at.mapped, crossed), info

    begin = _Newton(w, y, w, w, jnp.asarray(False))
    last, both = jax.lax.scan(correct, begin, jnp.array([False, True]))
    at = fixed_point(problem, last.w, lam, inner_batch, size)
    _, c, grad_lam = outer_value_and_grads(problem, last.w, lam, outer_batch)
    u = at.adjoint(c, tree.add(y, last.x))
    better = tree.add(grad_lam, at.pull_back(u))
    value = hypergradient.info.outer_value
    corrected = value + tree.vdot(u, first.defect).astype(value.dtype)
    return _verdict(better, grad, corrected, both, ritz, last.crossed, eps)


def _or_rounding(x: Tree, info: LinearInfo, small: Array) -> tuple[Tree, LinearInfo]:
    """A right-hand side that may be rounding error need not lie in a singular Hessian's range: then no step."""
    unsolved = (info.status == Status.BREAKDOWN) | (info.status == Status.MAX_STEPS)
    dropped = small & unsolved
    kept = info._replace(status=jnp.where(dropped, jnp.int32(Status.OK), info.status))
    return tree.where(dropped, tree.zeros_like(x), x), kept


class _Newton(NamedTuple):
    w: Tree
    x: Tree  # the last system's solution
    v: Tree  # where the prox was taken last
    mapped: Tree  # and its value
    crossed: Array  # whether a kink lies between the two points


def _verdict(
    better: Tree,
    grad: Tree,
    corrected: Array,
    both: LinearInfo,
    ritz: Array | None,
    crossed: Array,
    eps: float,
) -> Assessment:
    size = tree.norm(grad)
    tiny = jnp.finfo(size.dtype).tiny ** 0.5
    error = tree.norm(tree.sub(better, grad)) / jnp.maximum(size, tiny)
    # Nothing is known below the rounding level of the two gradients that are compared.
    error = jnp.maximum(error, 10 * tree.epsilon(grad))
    curvature = jnp.fmin(both.curvature[0], both.curvature[1])
    code = combine(*both.status)
    if ritz is not None:
        indefinite = ritz[0] < -100 * eps * jnp.max(jnp.abs(ritz))
        code = combine(code, where(indefinite, Status.INDEFINITE))
        curvature = jnp.fmin(curvature, ritz[0])
    # A budget that ran out makes the estimate unknown, not the hypergradient wrong.
    failed = (code != Status.OK) | crossed
    code = jnp.where(code == Status.MAX_STEPS, jnp.int32(Status.OK), code)
    code = combine(code, where(crossed, Status.MAX_STEPS))
    nan = lambda x: jnp.where(failed, jnp.nan, x)
    num_steps = jnp.sum(both.num_steps, dtype=jnp.int32) + 2
    return Assessment(better, nan(corrected), nan(error), curvature, num_steps, code)
