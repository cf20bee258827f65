"""The adjoint system of an inner problem with a proximal operator.

The inner solution is the fixed point of `T(w, lam) = prox(v, s, lam)`, `v = w - s dg/dw`, for any step s > 0.
With P the Jacobian of the prox at v (the prox of a convex function is the gradient of a convex
function, so `P = P'` and `0 <= P <= I`) and H that of the gradient, the adjoint equation is

    (I - dT/dw)' u = (I - P + s H P) u = c,        grad = dF/dlam + (dT/dlam)' u.

It is not symmetric. Multiplied by P/s and in the unknown y = s u it reads

    A y = P c,        A = P H P + P (I - P) / s,

symmetric, and positive definite on the range of P where H is. With `q = P y` (so that `P u = q / s`) the
equation itself then gives `u = c + q / s - H q`. A Krylov method that starts at a point of the range stays
there, so P need not be inverted, nor its range known. For the soft threshold, a box or any other
projection `P = P^2` is the support's mask and A the Hessian restricted to it; for P = I this is the smooth
`H q = c`. None of the derivatives depends on s.

Newton's step for `T(w) = w` has the same system: from `(I - dT/dw) d = r`, `r = T(w) - w`, follows
`d = r + P y / s` with `A y = P (r - s H r)`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from hypergrad.base import BilevelProblem
from solvers import AbstractInnerSolver, WorkingSet, tree
from solvers.gradient import linearized_hvp
from solvers.kinks import kink_distance
from solvers.proximal import apply_prox
from solvers.types import MatVec, Scalar, Tree
from solvers.working_set import restricted


class FixedPoint(NamedTuple):
    """The prox equation linearised at a point."""

    v: Tree
    """`w - s dg/dw`, where the prox is taken."""
    mapped: Tree
    """`prox(v)`."""
    defect: Tree
    """`prox(v) - w`."""
    gradient: Tree
    """`dg/dw`."""
    hvp: MatVec
    project: MatVec
    """`x -> P' x`."""
    size: Scalar
    """The step s."""
    pull_back: Callable[[Tree], Tree]
    """`u -> (dT/dlam)' u`."""

    def product(self, y: Tree) -> Tree:
        """`A y`."""
        x = self.project(y)
        left = tree.divide(tree.sub(y, x), self.size)
        # P (I - P) y = (I - P) P y: one application of P does for both terms.
        return self.project(tree.add(self.hvp(x), left))

    def probe(self, y: Tree) -> Tree:
        """`(P H P + (I - P^2) / s) y`: the system filled up off the range of P, for its spectrum."""
        x = self.project(y)
        inside = self.project(tree.sub(self.hvp(x), tree.divide(x, self.size)))
        return tree.add(inside, tree.divide(y, self.size))

    def adjoint(self, c: Tree, y: Tree) -> Tree:
        """u, from the solution of `A y = P c`."""
        q = self.project(y)
        return tree.add(c, tree.sub(tree.divide(q, self.size), self.hvp(q)))

    def newton_rhs(self) -> Tree:
        """b, so that `A y = P b` belongs to Newton's step."""
        return tree.axpy(-self.size, self.hvp(self.defect), self.defect)

    def newton_step(self, y: Tree) -> Tree:
        """Newton's step, from that system's solution."""
        return tree.add(self.defect, tree.divide(self.project(y), self.size))


def fixed_point(
    problem: BilevelProblem,
    w: Tree,
    lam: Tree,
    batch: Any,
    size: Scalar,
    damping: Array | float = 0.0,
) -> FixedPoint:
    """The prox equation at `(w, lam)`, with `damping I` added to H."""
    objective = problem.inner_objective(lam)
    gradient, hvp = linearized_hvp(objective, w, batch)
    v = tree.axpy(-size, gradient, w)
    mapped, transposed = jax.vjp(lambda x: apply_prox(objective, x, size), v)

    def pull_back(u: Tree) -> Tree:
        def image(lam: Tree) -> Tree:
            objective = problem.inner_objective(lam)
            v = tree.axpy(-size, jax.grad(objective)(w, batch), w)
            return apply_prox(objective, v, size)

        return jax.vjp(image, lam)[1](u)[0]

    return FixedPoint(
        v=v,
        mapped=mapped,
        defect=tree.sub(mapped, w),
        gradient=gradient,
        hvp=lambda x: tree.axpy(damping, x, hvp(x)),
        project=lambda x: transposed(x)[0],
        size=size,
        pull_back=pull_back,
    )


def narrowed(
    problem: BilevelProblem,
    solver: AbstractInnerSolver,
    w: Tree,
    lam: Tree,
    batch: Any,
    at: FixedPoint,
    damping: Array | float = 0.0,
) -> FixedPoint:
    """The same system, for a `WorkingSet` with products in its `size` coordinates instead of all d.

    The prox acts on each coordinate by itself there, so P is diagonal, and `P H P x` takes the rows and columns of H
    where P is not zero: those of the restricted problem that holds them and all of w's entries that are not zero.
    Vectors keep their length, as one loop then serves both: products are those of H where more coordinates than `size`
    take part, or where the restriction has another gradient at `w`, so that it is not what it should be.
    For `product` alone: `adjoint` and `newton_rhs` want rows of H in which P is zero.
    """
    if not isinstance(solver, WorkingSet) or solver.size >= w.size:
        return at
    part = (at.project(jnp.ones_like(w)) != 0) | (w != 0)
    chosen = jax.lax.top_k(part.astype(jnp.float32), solver.size)[1]
    inside, own = restricted(problem.inner_objective(lam), batch, chosen)
    gradient, hvp = linearized_hvp(inside, w[chosen], own)
    apart = tree.norm(gradient - at.gradient[chosen])
    same = apart <= 1e3 * tree.epsilon(w) * tree.norm(at.gradient)
    fits = (jnp.count_nonzero(part) <= solver.size) & same

    def narrow(x: Array) -> Array:
        own = x[chosen]
        image = tree.axpy(damping, own, hvp(own))
        return jnp.zeros_like(x).at[chosen].set(image)

    return at._replace(hvp=lambda x: jax.lax.cond(fits, narrow, at.hvp, x))


def step_after(
    problem: BilevelProblem,
    solver: AbstractInnerSolver,
    state: Any,
    w: Tree,
    lam: Tree,
    batch: Any,
) -> Scalar:
    """`step_size` after a solve: 1/L by the solver's own Lanczos products, where its "auto" took some."""
    if solver.measured and isinstance(getattr(solver, "learning_rate", None), str):
        return 1.05 * jnp.asarray(getattr(solver.settled(state), "learning_rate"))  # noqa: B009
    return step_size(problem, w, lam, batch)


def step_size(problem: BilevelProblem, w: Tree, lam: Tree, batch: Any) -> Scalar:
    """The step of the fixed-point equation: about 1/L, by ten power iterations.

    Nothing rests on its value but the scale of `margin`.
    """
    _, hvp = linearized_hvp(problem.inner_objective(lam), w, batch)
    flat, unflatten = tree.flatten(w)
    start = jnp.cos(jnp.arange(flat.size, dtype=flat.dtype))

    def iterate(_: Array, carry: tuple[Array, Scalar]) -> tuple[Array, Scalar]:
        image = tree.flatten(hvp(unflatten(carry[0])))[0]
        length = jnp.linalg.norm(image)
        return image / jnp.where(length > 0, length, jnp.ones_like(length)), length

    first = (start / jnp.linalg.norm(start), jnp.ones((), flat.dtype))
    _, curvature = jax.lax.fori_loop(0, 10, iterate, first)
    return jnp.where(curvature > 0, 1 / curvature, jnp.ones_like(curvature))


def margin(problem: BilevelProblem, lam: Tree, at: FixedPoint) -> Scalar:
    """Distance from v to a kink of the prox, over s: on the scale of the gradient; NaN where none was found.

    For an l1 penalty a, the smaller of `a - |dg/dw_j|` off the support and `|w_j| / s` on it.
    """
    objective = problem.inner_objective(lam)
    distance = kink_distance(lambda x: apply_prox(objective, x, at.size), at.v)
    return jnp.where(jnp.isinf(distance), jnp.nan, distance) / at.size.astype(distance.dtype)
