"""A bound on the error of a hypergradient that is a theorem, from constants that are declared."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from hypergrad.base import BilevelProblem, Hypergradient
from hypergrad.derivatives import cross_vjp, outer_value_and_grads
from solvers import AbstractInnerSolver, tree
from solvers.types import Scalar, Tree

MAX_DENSE = 2000
"""Largest size of `lam` for which the norm of the cross derivative is computed."""


class Constants(NamedTuple):
    """Constants of a problem, each a number or an array of shape (): upper bounds, but for the first.

    They must hold on the ball of radius `||dg/dw|| / strong_convexity` around the returned `w`, so global
    ones always do. With H = d2g/dw2 and C = d2g/dlam dw (p x d), all norms 2-norms:
    """

    strong_convexity: Scalar | float
    """A lower bound on the smallest eigenvalue of H, above zero; for a fixed point, whose H is the Jacobian of
    `w - T(w)`, on its smallest singular value: one minus the factor of the contraction."""
    hessian_lipschitz: Scalar | float
    """`||H(w) - H(v)|| <= this ||w - v||`; zero for a quadratic."""
    cross_lipschitz: Scalar | float
    """The same of C."""
    outer_lipschitz: Scalar | float
    """The same of dF/dw."""
    outer_cross_lipschitz: Scalar | float
    """The same of dF/dlam; zero where F does not depend on lam."""
    cross_norm: Scalar | float | None = None
    """`||C||` at the returned `w`; None computes it, at two derivatives for each entry of lam (at most
    2000 of them; ValueError beyond)."""


def error_bound(
    problem: BilevelProblem,
    solver: AbstractInnerSolver,
    lam: Tree,
    hypergradient: Hypergradient,
    adjoint: Tree,
    inner_batch: Tree,
    outer_batch: Tree,
    constants: Constants,
) -> Array:
    """An upper bound of `||grad - true|| / ||grad||` for a hypergradient with an adjoint, shape ().

    With e = ||dg/dw|| / mu at the returned `w`, q the adjoint, r = ||H q - dF/dw||, and
    s = ||grad - (dF/dlam - C q)||, which is rounding where grad is made of q, and what the steps differ from
    the last point where it was unrolled:

        ||grad - true|| <= s + e (L_lamF + L_C ||q||) + (||C|| + L_C e) / mu (r + e (L_F + L_H ||q||))

    Proof: e bounds the distance to the solution w*, and with stars for what belongs to it
    `C q - C* q* = (C - C*) q + C* (q - q*)`, `q - q* = H*^-1 (H* q - dF/dw*)`. True up to rounding; often
    larger than the error by orders of magnitude, because mu is the worst curvature and not that of q: a
    certificate, where `error_estimate` is the number to act on.

    Source: as the bound of Salehi, Mukherjee, Roberts and Ehrhardt 2025 (MAID), with the actual ||q||.
    """
    info = hypergradient.info
    w = hypergradient.w
    _, c, _ = outer_value_and_grads(problem, w, lam, outer_batch)
    q_norm = tree.norm(adjoint)
    dtype = q_norm.dtype
    mu, L_H, L_C, L_F, L_lamF = (jnp.asarray(x, dtype) for x in constants[:5])
    norm = constants.cross_norm
    if norm is None:
        norm = _cross_norm(problem, solver, w, lam, inner_batch)
    own = implied(problem, solver, lam, w, adjoint, inner_batch, outer_batch)
    e = info.inner.residual.astype(dtype) / mu
    r = info.adjoint_residual.astype(dtype) * tree.norm(c) + info.damping.astype(dtype) * q_norm
    error = e * (L_lamF + L_C * q_norm)
    error += (jnp.asarray(norm, dtype) + L_C * e) / mu * (r + e * (L_F + L_H * q_norm))
    error += tree.norm(tree.sub(hypergradient.grad, own)).astype(dtype)
    size = tree.norm(hypergradient.grad)
    bound = error / jnp.maximum(size, jnp.finfo(size.dtype).tiny ** 0.5)
    smallest = jnp.min(jnp.stack([L_H, L_C, L_F, L_lamF, jnp.asarray(norm, dtype)]))
    # Below zero nothing is an upper bound.
    return jnp.where((mu > 0) & ~(smallest < 0), bound, jnp.inf)


def implied(
    problem: BilevelProblem,
    solver: AbstractInnerSolver,
    lam: Tree,
    w: Tree,
    adjoint: Tree,
    inner_batch: Tree,
    outer_batch: Tree,
) -> Tree:
    """`dF/dlam - C q`: the hypergradient that is made of an adjoint."""
    _, _, grad_lam = outer_value_and_grads(problem, w, lam, outer_batch)
    return tree.sub(grad_lam, cross_vjp(problem, solver, w, lam, inner_batch, adjoint))


def _cross_norm(
    problem: BilevelProblem, solver: AbstractInnerSolver, w: Tree, lam: Tree, batch: Tree
) -> Scalar:
    """`||C||`: the root of the largest eigenvalue of the dense C C', (p, p)."""
    flat_lam, _ = tree.flatten(lam)
    if flat_lam.size > MAX_DENSE:
        raise ValueError(
            f"the certified bound would need a dense matrix of {flat_lam.size} squared: declare "
            "Constants(cross_norm=...), an upper bound of the norm of d2g/dlam dw."
        )
    flat_w, to_w = tree.flatten(w)
    row = lambda q: tree.flatten(cross_vjp(problem, solver, w, lam, batch, to_w(q)))[0]
    transposed = jax.linear_transpose(row, flat_w)

    def gram(v: Array) -> Array:
        return row(transposed(v)[0])

    matrix = jax.lax.map(gram, jnp.eye(flat_lam.size, dtype=flat_lam.dtype), batch_size=32)
    return jnp.sqrt(jnp.maximum(jnp.linalg.eigvalsh((matrix + matrix.T) / 2)[-1], 0))
