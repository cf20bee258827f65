"""One report from those of many tasks."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from hypergrad import HypergradInfo
from solvers import SolveInfo


def times(factor: Array | None, tree: Any) -> Any:
    if factor is None:
        return tree
    return jax.tree.map(lambda leaf: factor.astype(leaf.dtype) * leaf, tree)


def tiny_norm(norm: Array) -> float:
    return float(jnp.finfo(norm.dtype).tiny) ** 0.5


def together(
    each: HypergradInfo,
    norms: Array,
    norm: Array,
    factors: Array | None = None,
    lane_steps: Array | None = None,
) -> HypergradInfo:
    """One report from those of the tasks; `norms` are those of the hypergradients errors are relative to.

    NaN in one task is NaN here, but for the margin, where it says that there is no kink. `factors` are
    what each task counts in means of values and hypergradients.
    """
    tiny = tiny_norm(norm)  # errors are relative to no less
    weights = times(factors, jnp.maximum(norms, tiny)) / jnp.maximum(norm, tiny)
    mean = lambda values: jnp.mean(times(factors, values))
    weights = weights.astype(each.error_estimate.dtype)
    total = lambda steps: jnp.sum(steps, dtype=jnp.int32)
    return HypergradInfo(
        outer_value=mean(each.outer_value),
        inner=SolveInfo(
            value=mean(each.inner.value),
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
        corrected_value=mean(each.corrected_value),
        damping=jnp.max(each.damping),
        gauss_newton=jnp.any(each.gauss_newton),
        margin=jnp.nanmin(each.margin),
        growth=jnp.max(each.growth),
        peak_growth=jnp.max(each.peak_growth),
        status=jnp.max(each.status),
        tasks=each,
        lane_steps=lane_steps,
    )
