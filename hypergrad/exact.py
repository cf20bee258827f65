"""The dense oracle: exact derivatives of a small problem, by another route than the engines'."""

import jax
import jax.numpy as jnp
from jax import Array

from hypergrad.base import AbstractEngine, BilevelProblem, Hypergradient, Solver, make_info
from solvers import SolveInfo, Status, tree
from solvers.fields import static
from solvers.status import combine, where
from solvers.types import Tree


class Exact(AbstractEngine):
    """Newton's method on the dense Hessian, then `dF/dlam - C H^-1 c` with dense matrices.

    Shares no solver with the engines: it is what they are tested against. The inner solver is ignored;
    Newton steps are halved until the gradient norm falls, so the start must lie where the inner problem
    is locally convex. Cost O(d^3) per step, memory d x (d + p): for d up to a few thousand.
    """

    max_steps: int = static(50, low=1)
    estimate: bool | None = static(None)

    estimates = False
    needs_implicit = True

    def init(self, problem: BilevelProblem, solver: Solver, w: Tree, lam: Tree, key: Array) -> None:
        return None

    def step(
        self, problem: BilevelProblem, solver: Solver, w: Tree, lam: Tree, state: None, key: Array
    ) -> tuple[Hypergradient, None]:
        batch, outer_batch = problem.inner_sampler(key)(0), problem.outer_batch(key)
        w = problem.start(w, lam, batch)
        w_flat, to_w = tree.flatten(w)
        lam_flat, to_lam = tree.flatten(lam)

        def inner(w: Array, lam: Array) -> Array:
            return problem.inner(to_w(w), to_lam(lam), batch)

        def outer(w: Array, lam: Array) -> Array:
            return problem.outer(to_w(w), to_lam(lam), outer_batch)

        gradient = jax.grad(inner)
        hessian = jax.hessian(inner)

        def newton(index: Array, w: Array) -> Array:
            g = gradient(w, lam_flat)
            direction = -jnp.linalg.solve(hessian(w, lam_flat), g)

            def too_long(t: Array) -> Array:
                trial = jnp.linalg.norm(gradient(w + t * direction, lam_flat))
                return (t > 1e-8) & ~(trial <= jnp.linalg.norm(g))

            t = jax.lax.while_loop(too_long, lambda t: t / 2, jnp.ones((), w.dtype))
            return w + jnp.where(t > 1e-8, t, 0.0).astype(w.dtype) * direction

        w_flat = jax.lax.fori_loop(0, self.max_steps, newton, w_flat)
        h = hessian(w_flat, lam_flat)
        cross = jax.jacobian(gradient, argnums=1)(w_flat, lam_flat)
        c, grad_lam = jax.grad(outer, argnums=(0, 1))(w_flat, lam_flat)
        q = jnp.linalg.solve(h, c)
        grad = to_lam(grad_lam - cross.T @ q)
        w = to_w(w_flat)

        smallest = jnp.linalg.eigvalsh((h + h.T) / 2)[0]
        residual = jnp.linalg.norm(gradient(w_flat, lam_flat))
        value = inner(w_flat, lam_flat)
        scale = jnp.maximum(jnp.abs(value).astype(residual.dtype), 1.0)
        unmet = residual > jnp.sqrt(jnp.finfo(residual.dtype).eps) * scale
        code = combine(
            where(unmet, Status.MAX_STEPS), where(~jnp.isfinite(residual), Status.NONFINITE)
        )
        info = make_info(
            outer(w_flat, lam_flat),
            SolveInfo(value, residual, jnp.int32(self.max_steps), code),
            grad,
            where(smallest <= 0, Status.INDEFINITE),
            adjoint_residual=jnp.linalg.norm(h @ q - c) / jnp.maximum(jnp.linalg.norm(c), 1e-300),
            curvature=smallest,
        )
        return Hypergradient(grad, w, info), None
