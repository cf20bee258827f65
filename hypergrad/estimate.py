"""How wrong a hypergradient is: the defect estimate, from one Newton correction."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from hypergrad.base import BilevelProblem, Hypergradient
from hypergrad.derivatives import cross_vjp, outer_value_and_grads
from solvers import CG, AbstractInnerSolver, Status, tree
from solvers.linear.spectrum import ritz_values
from solvers.loops import rounding_level
from solvers.status import combine, where
from solvers.types import Tree


class Assessment(NamedTuple):
    """What the estimate found; every array but `refined` has shape ()."""

    refined: Tree
    """The hypergradient after the Newton correction, like `lam`."""

    error: Array
    """Estimated `||grad - true|| / ||grad||`; NaN where the systems behind it could not be solved."""
    curvature: Array
    """Smallest curvature met by the estimate's solves and a Lanczos probe from a random start."""
    status: Array
    """INDEFINITE, BREAKDOWN or NONFINITE where the implicit hypergradient does not exist, else OK."""


def assess(
    problem: BilevelProblem,
    solver: AbstractInnerSolver,
    lam: Tree,
    hypergradient: Hypergradient,
    inner_batch: Any,
    outer_batch: Any,
    key: Array,
) -> Assessment:
    """Compare a hypergradient with the one after a Newton step on both equations.

    With the residuals of the inner and the adjoint equation at the returned `w`:
    `w+ = w - H^-1 dg/dw`, `H(w+) q+ = dF/dw(w+)`, `z+ = dF/dlam(w+) - C(w+) q+`, and the estimate is
    `||z+ - z|| / ||z||`. The error of z+ is quadratic in that of z where H is Lipschitz, so the
    estimate is sharp for small errors and says "large" for large ones. It holds for any engine: what
    it measures is the distance from the exact hypergradient, bias included.

    The systems are solved by CG on automatic Hessian-vector products, whatever the engine used, so a
    wrong `inner_hvp` or a diverging series shows here. A Lanczos probe from a random start looks for
    negative curvature that the right-hand sides do not excite.

    Source: dual-weighted residuals, Becker and Rannacher 2001; checked against dense references.
    """
    w, grad = hypergradient.w, hypergradient.grad
    objective = problem.inner_objective(lam)
    gradient = lambda u: jax.grad(objective)(u, inner_batch)

    residual, hvp = jax.linearize(gradient, w)
    ritz = ritz_values(hvp, w, key)
    # Below its rounding error the residual need not lie in the range of a singular Hessian.
    rounding = rounding_level(hypergradient.info.inner.value, w)
    dw, first = CG(atol=rounding).solve(
        hvp, tree.scale(-1.0, residual), tree.zeros_like(w), None, key
    )
    w_plus = tree.add(w, dw)
    _, c_plus, grad_lam = outer_value_and_grads(problem, w_plus, lam, outer_batch)
    _, hvp_plus = jax.linearize(gradient, w_plus)
    q_plus, second = CG().solve(hvp_plus, c_plus, tree.zeros_like(w), None, key)
    better = tree.sub(grad_lam, cross_vjp(problem, solver, w_plus, lam, inner_batch, q_plus))

    size = tree.norm(grad)
    tiny = jnp.finfo(size.dtype).tiny ** 0.5
    error = tree.norm(tree.sub(better, grad)) / jnp.maximum(size, tiny)
    # Nothing is known below the rounding level of the two gradients that are compared.
    error = jnp.maximum(error, 10 * tree.epsilon(grad))
    indefinite = ritz[0] < -100 * tree.epsilon(w) * jnp.max(jnp.abs(ritz))
    code = combine(first.status, second.status, where(indefinite, Status.INDEFINITE))
    # A budget that ran out makes the estimate unknown, not the hypergradient wrong.
    failed = code != Status.OK
    code = jnp.where(code == Status.MAX_STEPS, jnp.int32(Status.OK), code)
    curvature = jnp.minimum(ritz[0], jnp.fmin(first.curvature, second.curvature))
    return Assessment(better, jnp.where(failed, jnp.nan, error), curvature, code)
