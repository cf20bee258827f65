"""What a linear solver is: prepare once, solve many right-hand sides."""

import abc
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from solvers import status, tree
from solvers.fields import Number, Settings, cast
from solvers.status import Status
from solvers.types import MatVec, Scalar, Tree


class LinearInfo(NamedTuple):
    """What people read about one linear solve `A x = b`; every field has shape ()."""

    residual: Array
    """`||b - A x|| / ||b||`, recomputed from the returned `x` (0 for `b = 0`)."""
    num_steps: Array
    """Products with `A` that built the solution, int32."""
    status: Array
    """A `Status`, int32."""
    curvature: Array
    """The smallest Rayleigh or Ritz value `v'Av / v'v` seen; NaN where none was."""
    largest: Array
    """The largest `||A v|| / ||v||` seen: `curvature` is known to a few eps of it."""


class AbstractLinearSolver(Settings):
    """Solves `A x = b` for an `A` given by its products; symmetric, unless the solver says otherwise.

    `init` factors, sketches or measures the spectrum; `solve` uses it for any number of `b`.
    Both work under `jit` and `vmap`.
    """

    @abc.abstractmethod
    def init(self, matvec: MatVec, like: Tree, key: Array) -> Any:
        """Prepare for the operator. `like` is a tree of the shape of `x` and `b`."""

    def solve(
        self, matvec: MatVec, b: Tree, x0: Tree, state: Any, key: Array
    ) -> tuple[Tree, LinearInfo]:
        """Solve from the start `x0`. The state is what `init` returned for this operator."""
        b, x0, unit = to_unit(b, x0)
        x, info = self.solve_unit(matvec, b, x0, state, key, unit)
        return tree.scale(unit, x), info

    @abc.abstractmethod
    def solve_unit(
        self, matvec: MatVec, b: Tree, x0: Tree, state: Any, key: Array, unit: Scalar
    ) -> tuple[Tree, LinearInfo]:
        """`solve` after `b` and `x0` were divided by `unit`, which makes the largest entry of `b` 1.

        An absolute tolerance has to be divided by it too.
        """


def to_unit(b: Tree, x0: Tree) -> tuple[Tree, Tree, Scalar]:
    """`(b / unit, x0 / unit, unit)`: of unit size, so that no inner product underflows or overflows."""
    size = tree.max_abs(b)
    unit = jnp.where((size > 0) & jnp.isfinite(size), size, jnp.ones_like(size))
    # A start that is no number, or so large against b that its residual's square might overflow, is dropped.
    # By the norm, which sees a NaN as well.
    usable = tree.norm(x0) < unit * jnp.finfo(unit.dtype).max ** 0.25
    start = tree.where(usable, tree.divide(x0, unit), tree.zeros_like(x0))
    return tree.divide(b, unit), start, unit


def target_residual(b: Tree, rtol: Number | None, atol: Number, unit: Scalar) -> Scalar:
    """`max(rtol ||b||, atol)`, with `rtol` by default 1e-10 (1e-5 in float32) and never below 10 eps."""
    b_norm, eps = tree.norm(b), tree.epsilon(b)
    default = 1e-10 if eps < 1e-10 else 1e-5
    relative = jnp.asarray(default, b_norm.dtype) if rtol is None else cast(rtol, b_norm)
    return larger_target(b_norm, jnp.maximum(relative, 10 * eps), atol, unit)


def larger_target(b_norm: Scalar, rtol: Number, atol: Number, unit: Scalar) -> Scalar:
    """`max(rtol ||b||, atol)`; NaN, which no residual meets, where a schedule made one of them infinite."""
    rtol, atol = cast(rtol, b_norm), cast(atol, b_norm)
    target = jnp.maximum(rtol * b_norm, atol / unit)
    return jnp.where(jnp.isinf(rtol) | jnp.isinf(atol), jnp.nan, target)


def step_budget(max_steps: int | None, b: Tree) -> int:
    """The steps given, or ten times the dimension, within 100 and 5000."""
    return min(max(10 * tree.size(b), 100), 5000) if max_steps is None else max_steps


def finish(
    matvec: MatVec,
    b: Tree,
    x: Tree,
    remainder: Tree,
    *,
    num_steps: Array,
    code: Array,
    curvature: Array,
    target: Scalar,
    largest: Scalar,
    singular: Array | bool = False,
) -> LinearInfo:
    """Judge a finished solve by its recomputed `remainder = b - A x` and fill in the report.

    The target is floored by what rounding allows, `10 eps (L ||x|| + ||b||)`, though never above a
    tenth of `||b||`: no residual of that size is a solution's. A solve that missed
    the target although nothing else was wrong is MAX_STEPS, or BREAKDOWN where what is left of the
    right-hand side lies in the null space of `A`, so that no number of steps would remove it (or where
    the method found the matrix to be `singular` on its own grounds).
    """
    b_norm, eps = tree.norm(b), tree.epsilon(b)
    (length, residual), x_finite = tree.norms_and_finite(x, remainder)
    floor = jnp.minimum(10 * eps * (largest * length + b_norm), 0.1 * b_norm)
    missed = ~(residual <= jnp.maximum(target, floor))

    def name_the_miss(_: None) -> Array:
        in_null_space = tree.norm(matvec(remainder)) <= eps**0.5 * largest * residual
        return jnp.where(
            in_null_space | singular, jnp.int32(Status.BREAKDOWN), jnp.int32(Status.MAX_STEPS)
        )

    code = jax.lax.cond(
        missed & (code == Status.OK), name_the_miss, lambda _: jnp.asarray(code, jnp.int32), None
    )
    finite = jnp.isfinite(residual) & x_finite
    code = status.combine(code, status.where(~finite, Status.NONFINITE))
    relative = jnp.where(b_norm > 0, residual / jnp.where(b_norm > 0, b_norm, 1.0), residual)
    return LinearInfo(relative, jnp.asarray(num_steps, jnp.int32), code, curvature, largest)


def accept_fixed_budget(info: LinearInfo, rtol: Number | None, atol: Number | None) -> LinearInfo:
    """With both tolerances zero the step budget is what was asked for: MAX_STEPS becomes OK."""
    if rtol is None or atol is None:
        return info
    accepted = (
        (jnp.asarray(rtol) == 0) & (jnp.asarray(atol) == 0) & (info.status == Status.MAX_STEPS)
    )
    return info._replace(status=jnp.where(accepted, jnp.int32(Status.OK), info.status))
