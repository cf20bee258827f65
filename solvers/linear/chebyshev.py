"""Chebyshev's semi-iteration: as fast as CG's bound, without inner products."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from solvers import status, tree
from solvers.fields import Number, cast, number, static
from solvers.linear.base import (
    AbstractLinearSolver,
    LinearInfo,
    accept_fixed_budget,
    finish,
    target_residual,
)
from solvers.linear.spectrum import ritz_values
from solvers.status import Status
from solvers.types import MatVec, Scalar, Tree


class Chebyshev(AbstractLinearSolver):
    """Residual polynomials that are smallest on `[mu, L]`, for a positive definite system.

    `||b - A x_k|| <= ||b|| / T_k((L + mu) / (L - mu))`, about `2 ((s - 1) / (s + 1))^k` with
    `s = sqrt(L / mu)`. The iterates are linear in `b`, as no coefficient is an inner product, and the residual
    is recomputed in each step: the choice where products are noisy (CG then loses its conjugacy), where
    a fixed number of steps has to be one fixed linear map, and instead of `Neumann`, at the same cost.

    "auto" is from 12 Lanczos products: `L` 1.05 times the largest Ritz value, `mu` half of the smallest
    that is not zero. With `mu` too large it still converges, at a lower rate. With an eigenvalue above
    `L + mu` it does not, and this alone makes the residual of a definite system exceed the first one: an
    automatic `L` is then doubled, a given one is DIVERGED and the best `x` is returned.
    INDEFINITE where a Ritz value is negative or the residual grows along negative curvature, BREAKDOWN
    and MAX_STEPS as in `CG`, whose tolerances are used too.

    Cost: one product per step (12 more for "auto"); memory six vectors.
    Source: Golub and Varga 1961; Saad, Iterative Methods, algorithm 12.1; the guard is ours.
    """

    mu: Number | str = number("auto", low=0.0, strict=True)
    L: Number | str = number("auto", low=0.0, strict=True)
    rtol: Number | None = number(None, low=0.0, infinite=False)
    atol: Number = number(0.0, low=0.0, infinite=False)
    max_steps: int = static(1000, low=1)

    def __check_init__(self) -> None:
        for name in ("mu", "L"):
            value = getattr(self, name)
            if isinstance(value, str) and value != "auto":
                raise ValueError(
                    f"Chebyshev({name}=...) must be a number or 'auto', got {value!r}."
                )

    def init(self, matvec: MatVec, like: Tree, key: Array) -> "_Interval":
        zero = jnp.zeros((), tree.accumulation_dtype(like))
        low, high, smallest = self.mu, self.L, zero + jnp.nan
        if isinstance(low, str) or isinstance(high, str):
            ritz = ritz_values(matvec, like, key)
            size = jnp.max(jnp.abs(ritz))
            eps = tree.epsilon(like)
            smallest = ritz[0]
            high = 1.05 * size if isinstance(high, str) else high
            # A value of rounding size is a null space, which no interval needs to reach down to.
            present = ritz > max(1e-6, 100 * eps) * size
            if isinstance(low, str):
                low = jnp.minimum(jnp.min(jnp.where(present, ritz, size)) / 2, cast(high, zero))
        return _Interval(cast(low, zero), cast(high, zero), smallest)

    def solve_unit(
        self, matvec: MatVec, b: Tree, x0: Tree, state: Any, key: Array, unit: Scalar
    ) -> tuple[Tree, LinearInfo]:
        b_norm = tree.norm(b)
        eps = tree.epsilon(b)
        target = target_residual(b, self.rtol, self.atol, unit)
        automatic = isinstance(self.L, str)
        zero = jnp.zeros((), b_norm.dtype)

        def is_open(c: _Carry) -> Array:
            return (c.residual > target) & (c.steps < self.max_steps) & (c.code == Status.OK)

        def step(c: _Carry) -> _Carry:
            # The first step has ratio 0, and is one of steepest descent with step 1 / centre.
            centre, half = (c.high + state.mu) / 2, (c.high - state.mu) / 2
            pivot = jnp.where(c.fresh, centre, 2 * centre - half * c.ratio)
            ratio = half / pivot
            momentum = jnp.where(c.fresh, zero, ratio * c.ratio)
            gain = jnp.where(c.fresh, 1 / pivot, 2 / pivot)
            d = tree.axpy(momentum, c.d, tree.scale(gain, c.r))
            x = tree.add(c.x, d)
            r = tree.axpy(-1.0, matvec(x), b)
            residual = tree.norm(r)
            # `r - r_new = A d`, so the Rayleigh quotient of the step is free.
            image = tree.sub(c.r, r)
            length2 = tree.vdot(d, d)
            length2 = jnp.where(length2 > 0, length2, jnp.ones_like(length2))
            rayleigh = tree.vdot(d, image) / length2
            size = tree.norm(image) / jnp.sqrt(length2)
            noise = 10 * eps * (b_norm + c.high * tree.norm(x))
            measured = jnp.sqrt(length2) * c.high > 1e3 * noise
            rayleigh = jnp.where(jnp.abs(rayleigh) * jnp.sqrt(length2) > noise, rayleigh, zero)
            largest = jnp.where(measured, jnp.maximum(c.largest, size), c.largest)
            grows = residual > c.first * (1 + 1e-6) + noise
            negative = grows & (rayleigh < 0)
            too_large = grows & ~negative
            code = jnp.where(negative, jnp.int32(Status.INDEFINITE), c.code)
            if not automatic:
                code = jnp.where(too_large, jnp.int32(Status.DIVERGED), code)
            better = residual < c.best_residual
            best, best_r = tree.where(better, x, c.best), tree.where(better, r, c.best_r)
            best_residual = jnp.where(better, residual, c.best_residual)
            return _Carry(
                x=tree.where(grows, best, x),
                r=tree.where(grows, best_r, r),
                d=d,
                best=best,
                best_r=best_r,
                residual=jnp.where(grows, best_residual, residual),
                best_residual=best_residual,
                first=jnp.where(grows, best_residual, c.first),
                high=jnp.where(too_large, 2 * c.high, c.high),
                ratio=ratio,
                fresh=grows,
                steps=c.steps + 1,
                code=code,
                curvature=jnp.where(measured, jnp.fmin(c.curvature, rayleigh), c.curvature),
                largest=largest,
            )

        x0 = tree.where(b_norm > 0, x0, tree.zeros_like(x0))
        r0 = tree.axpy(-1.0, matvec(x0), b)
        residual = tree.norm(r0)
        negative = state.smallest < -100 * eps * state.high
        code = jnp.where(negative, jnp.int32(Status.INDEFINITE), jnp.int32(Status.OK))
        last = jax.lax.while_loop(
            is_open,
            step,
            _Carry(
                x=x0,
                r=r0,
                d=tree.zeros_like(b),
                best=x0,
                best_r=r0,
                residual=residual,
                best_residual=residual,
                first=residual,
                high=state.high,
                ratio=zero,
                fresh=jnp.asarray(True),
                steps=jnp.int32(0),
                code=code,
                curvature=state.smallest,
                largest=zero,
            ),
        )
        code = jnp.where(b_norm > 0, last.code, jnp.int32(Status.OK))
        code = status.combine(code, status.where(~jnp.isfinite(last.residual), Status.NONFINITE))
        info = finish(
            matvec,
            b,
            last.best,
            last.best_r,  # recomputed from x at each step
            num_steps=last.steps,
            code=code,
            curvature=last.curvature,
            target=target,
            largest=jnp.maximum(last.largest, jnp.where(automatic, last.high / 1.05, 0.0)),
        )
        return last.best, accept_fixed_budget(info, self.rtol, self.atol)


class _Interval(NamedTuple):
    mu: Scalar
    high: Scalar
    smallest: Scalar  # the smallest Ritz value, NaN where none was asked for


class _Carry(NamedTuple):
    x: Tree
    r: Tree
    d: Tree  # the last step
    best: Tree  # the point of the smallest residual
    best_r: Tree
    residual: Scalar
    best_residual: Scalar
    first: Scalar  # the residual at the start
    high: Scalar
    ratio: Scalar  # T_{k-1} / T_k at (high + mu) / (high - mu)
    fresh: Array  # whether the next step is a first one
    steps: Array
    code: Array
    curvature: Scalar
    largest: Scalar
