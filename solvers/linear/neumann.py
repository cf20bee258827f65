"""The Neumann series, run as a Richardson iteration that notices when it diverges."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from solvers import tree
from solvers.fields import Number, cast, number, static
from solvers.linear.base import (
    AbstractLinearSolver,
    LinearInfo,
    accept_fixed_budget,
    finish,
    larger_target,
)
from solvers.linear.spectrum import largest_eigenvalue
from solvers.status import Status
from solvers.types import MatVec, Scalar, Tree


class Neumann(AbstractLinearSolver):
    """`x <- x + step (b - A x)`: from `x0 = 0`, K steps are the first K terms of `A^-1 b`.

    Converges for `0 < step < 2/L` at the rate `1 - step mu`, far slower than CG; it is the choice
    where products are noisy. `step="auto"` is `1 / (1.05 L)` with L from 12 Lanczos products, halved
    whenever the residual grows. `rtol=0, atol=0` (the default) runs exactly `max_steps` terms: the
    report's `residual` then says what is left, and K terms act like a damping `1 / (step K)`.

    Status: DIVERGED where a given step is too long for the curvature met, INDEFINITE where the
    residual grows along negative curvature, BREAKDOWN and MAX_STEPS as in `CG`.

    Cost: one product per step (12 more for "auto"); memory two vectors.
    Source: Lorraine, Vicol and Duvenaud 2020, section 4; the guard is ours.
    """

    max_steps: int = static(100, low=1)
    rtol: Number = number(0.0, low=0.0, infinite=False)
    atol: Number = number(0.0, low=0.0, infinite=False)
    step: Number | str = number("auto", low=0.0, strict=True)

    def __check_init__(self) -> None:
        if isinstance(self.step, str) and self.step != "auto":
            raise ValueError(f"Neumann(step=...) must be a number or 'auto', got {self.step!r}.")

    def init(self, matvec: MatVec, like: Tree, key: Array) -> Array:
        """The step length, shape ()."""
        if isinstance(self.step, str):
            return 1 / (1.05 * largest_eigenvalue(matvec, like, key))
        return cast(self.step, jnp.zeros((), tree.accumulation_dtype(like)))

    def solve_unit(
        self, matvec: MatVec, b: Tree, x0: Tree, state: Any, key: Array, unit: Scalar
    ) -> tuple[Tree, LinearInfo]:
        b_norm = tree.norm(b)
        target = larger_target(b_norm, self.rtol, self.atol, unit)
        automatic = isinstance(self.step, str)

        def is_open(c: _Carry) -> Array:
            return (c.residual > target) & (c.steps < self.max_steps) & (c.code == Status.OK)

        def step(c: _Carry) -> _Carry:
            x = tree.axpy(c.step, c.r, c.x)
            r = tree.axpy(-1.0, matvec(x), b)
            residual = tree.norm(r)
            # `r - r_new = step A r`, so the Rayleigh quotient of the old residual is free.
            fell = tree.sub(c.r, r)
            length2 = jnp.where(c.residual > 0, c.residual**2, 1.0)
            rayleigh = tree.vdot(c.r, fell) / (c.step * length2)
            largest = jnp.maximum(c.largest, tree.norm(fell) / (c.step * jnp.sqrt(length2)))
            # Growth below the rounding level of the residual means nothing.
            noise = 10 * tree.epsilon(b) * (b_norm + largest * tree.norm(x))
            grows = residual > c.residual * (1 + 1e-6) + noise
            measured = c.residual > 1e3 * noise
            seen = jnp.abs(rayleigh) * c.step * c.residual > noise
            rayleigh = jnp.where(seen, rayleigh, jnp.zeros_like(rayleigh))
            negative = grows & (rayleigh < 0)
            too_long = grows & ~negative
            code = jnp.where(negative, jnp.int32(Status.INDEFINITE), jnp.int32(Status.OK))
            if not automatic:
                code = jnp.where(too_long, jnp.int32(Status.DIVERGED), code)
            return _Carry(
                x=tree.where(grows, c.x, x),
                r=tree.where(grows, c.r, r),
                residual=jnp.where(grows, c.residual, residual),
                step=jnp.where(too_long, c.step / 2, c.step),
                steps=c.steps + 1,
                code=code,
                curvature=jnp.where(measured, jnp.minimum(c.curvature, rayleigh), c.curvature),
                largest=largest,
            )

        x0 = tree.where(b_norm > 0, x0, tree.zeros_like(x0))
        r0 = tree.axpy(-1.0, matvec(x0), b)
        last = jax.lax.while_loop(
            is_open,
            step,
            _Carry(
                x=x0,
                r=r0,
                residual=tree.norm(r0),
                step=state.astype(b_norm.dtype),
                steps=jnp.int32(0),
                code=jnp.int32(Status.OK),
                curvature=jnp.full((), jnp.inf, b_norm.dtype),
                largest=jnp.zeros((), b_norm.dtype),
            ),
        )
        info = finish(
            matvec,
            b,
            last.x,
            last.r,  # recomputed from x at each step
            num_steps=last.steps,
            code=last.code,
            curvature=jnp.where(jnp.isinf(last.curvature), jnp.nan, last.curvature),
            target=target,
            largest=last.largest,
        )
        return last.x, accept_fixed_budget(info, self.rtol, self.atol)


class _Carry(NamedTuple):
    x: Tree
    r: Tree
    residual: Scalar
    step: Scalar
    steps: Array
    code: Array
    curvature: Scalar
    largest: Scalar
