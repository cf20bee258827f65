"""Hypergradients by a stochastic Neumann series: TTSA, BSA, MRBO, SUSTAIN, VRBO."""

from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array

from hypergrad.base import BilevelProblem
from hypergrad.derivatives import outer_value_and_grads
from hypergrad.estimators import SPIDER, STORM, AbstractEstimator, Oracles, Plain, Point
from hypergrad.levels import Both
from hypergrad.single_loop import AbstractSingleLoop, Cost, Move, Stage, nothing, relative
from hypergrad.soba import adjoint_products
from solvers import tree
from solvers.fields import Number, cast, number, static
from solvers.types import Tree


class AbstractSeries(AbstractSingleLoop):
    """`grad = dF/dlam - C v`, `v = r sum_(q < Q) (I - r H_q) ... (I - r H_1) dF/dw`, one oracle of both levels.

    Every H_i is on an inner batch of its own, dF on an outer one; C, and dg/dw where `together`, on one more. So
    an estimator takes the difference of two of them on the same batches.

    `drawn`: one term, the P-th with P drawn evenly from 0..Q-1, times Q, in the place of the sum: its mean is the
    sum, for half of the products.
    """

    adjoint_step: eqx.AbstractVar[Number | None]
    terms: eqx.AbstractVar[int]
    inner_steps: eqx.AbstractVar[int]

    second_order = True
    together: ClassVar[bool] = False
    """Whether `w` moves in the same stage, from the same point, by the same estimator (Jacobi)."""
    drawn: ClassVar[bool] = False

    def __check_init__(self) -> None:
        if self.estimator.has_table:
            raise ValueError(
                f"{type(self).__name__} has an oracle of both levels at once, which "
                f"{type(self.estimator).__name__}() has no table for: expected Plain, EMA, STORM or SPIDER."
            )

    def start(self, problem: BilevelProblem, w: Tree, lam: Tree) -> Point:
        return {}

    def stages(self, problem: BilevelProblem, size: Array) -> tuple[Stage, ...]:
        step = size if self.adjoint_step is None else cast(self.adjoint_step, size)

        def slope(point: Point, batch: Any) -> tuple[Oracles, dict]:
            value, g = jax.value_and_grad(problem.inner)(point["w"], point["lam"], batch)
            return {"g_w": g}, {"inner_value": value}

        def joint(point: Point, batch: Both) -> tuple[Oracles, dict]:
            value, f_w, f_lam = outer_value_and_grads(
                problem, point["w"], point["lam"], batch.outer
            )
            last, by_draw = self._terms(batch)

            def term(index: Array | int, carry: tuple[Tree, Tree]) -> tuple[Tree, Tree]:
                total, now = carry
                at = point | {"v": now}
                product = adjoint_products(problem, at, batch.inner(index))[2]
                now = tree.axpy(-step, product, now)
                return (now if by_draw else tree.add(total, now)), now

            v, _ = jax.lax.fori_loop(1, last + 1, term, (f_w, f_w))
            v = tree.scale(step * self.terms if by_draw else step, v)
            first = batch.inner(0)
            below, g_w, product, cross = adjoint_products(problem, point | {"v": v}, first)
            oracles = {"hyper_lam": tree.sub(f_lam, cross)}
            report = {
                "outer_value": value,
                "adjoint_residual": relative(tree.sub(product, f_w), f_w),
            }
            if by_draw:
                report["products"] = jnp.int32(self.estimator.evaluations) * (last + 1)
            if self.together:
                oracles["g_w"], report["inner_value"] = g_w, below
            return oracles, report

        def move_w(oracles: Oracles, point: Point) -> Move:
            grad = oracles.get("hyper_lam")
            after = tree.axpy(-size, oracles["g_w"], point["w"])
            return Move({"w": after}, {"residual": tree.norm(oracles["g_w"])}, grad)

        if self.together:
            return (Stage(joint, nothing, move_w, self.inner_steps, joint=self.terms),)
        direct = lambda oracles, point: Move({}, grad=oracles["hyper_lam"])
        return (
            Stage(slope, nothing, move_w, self.inner_steps),
            Stage(joint, nothing, direct, joint=self.terms),
        )

    def _terms(self, batch: Both) -> tuple[Array | int, bool]:
        """The number of products, and whether the term after them stands for all."""
        if not self.drawn:
            return self.terms - 1, False
        return (batch.bits % jnp.uint32(self.terms)).astype(jnp.int32), True

    def calls(self) -> Cost:
        """With `drawn`, the most that a step may take; the history has what it took."""
        times = self.estimator.evaluations
        if self.together:
            times *= self.inner_steps
            return Cost(gradients=2 * times, hvps=self.terms * times)
        return Cost(gradients=(self.inner_steps + 1) * times, hvps=self.terms * times)


class TTSA(AbstractSeries):
    """One gradient step on `w`, then a direction by one drawn term of the Neumann series.

    `w -= s dg/dw`; `grad = dF/dlam - C v`, `v = Q r (I - r H_P) ... (I - r H_1) dF/dw` at the new `w`, P drawn
    from 0..Q-1, every batch a fresh one; `adjoint_step=None` is r = s, `terms` is Q.

    Class: smooth inner problems, strongly convex, `r < 1 / L`; bias `(1 - r mu)^Q`. The drawn term is noise that
    does not fade: the steps of `lam` have to decay faster than those of `w`, in the paper as `k^-3/5` and `k^-2/5`.
    Cost per step: two gradients, `(Q + 1) / 2` Hessian-vector products on average. Memory: one copy of `w`.
    Source: Hong, Wai, Wang and Yang 2023. Departs from the paper: a batch of its own for C.
    """

    step_size: Number | str = number("auto", low=0.0, strict=True)
    adjoint_step: Number | None = number(None, low=0.0, strict=True)
    terms: int = static(10, low=1)
    inner_steps: int = static(1, low=1)
    estimator: AbstractEstimator = eqx.field(default_factory=Plain)
    estimate: bool | None = static(None)

    drawn = True


class BSA(AbstractSeries):
    """`TTSA` with many gradient steps on `w`; class, cost of the direction and memory as there.

    Source: Ghadimi and Wang 2018. The paper's order is `lam`, then `w`: the same cycle, begun at `w`.
    """

    step_size: Number | str = number("auto", low=0.0, strict=True)
    adjoint_step: Number | None = number(None, low=0.0, strict=True)
    terms: int = static(10, low=1)
    inner_steps: int = static(10, low=1)
    estimator: AbstractEstimator = eqx.field(default_factory=Plain)
    estimate: bool | None = static(None)

    drawn = True


class MRBO(AbstractSeries):
    """`w` and `lam` move at once, both by directions with STORM's momentum, on batches they share.

    `w -= s D_w`; `grad = D_lam`, with `d = dg/dw` in `D_w` and `d = dF/dlam - C v` in D_lam,
    `v = r sum_(q < Q) (I - r H_q) ... (I - r H_1) dF/dw`, and `D <- d + (1 - rate) (D - d at the last point)`.

    Class: smooth inner problems, strongly convex; bias `(1 - r mu)^Q`. With noise the steps decay as `k^-1/3`, the
    rate of the estimator as `k^-2/3` (a schedule).
    Cost per step: four gradients, `2 Q` Hessian-vector products. Memory: three copies of `w` and `lam`.
    Source: Yang, Ji and Liang 2021; one rate for both directions. The first step has no momentum.
    """

    step_size: Number | str = number("auto", low=0.0, strict=True)
    adjoint_step: Number | None = number(None, low=0.0, strict=True)
    terms: int = static(10, low=1)
    inner_steps: int = static(1, low=1)
    estimator: AbstractEstimator = eqx.field(default_factory=STORM)
    estimate: bool | None = static(None)

    together = True


class SUSTAIN(AbstractSeries):
    """`MRBO` with one drawn term of the series (as in `TTSA`) in the place of the sum.

    Cost per step: four gradients, `Q + 1` Hessian-vector products on average. The rest as `MRBO`.
    Source: Khanduri, Zeng, Hong, Wai, Wang and Yang 2021.
    """

    step_size: Number | str = number("auto", low=0.0, strict=True)
    adjoint_step: Number | None = number(None, low=0.0, strict=True)
    terms: int = static(10, low=1)
    inner_steps: int = static(1, low=1)
    estimator: AbstractEstimator = eqx.field(default_factory=STORM)
    estimate: bool | None = static(None)

    together = True
    drawn = True


class VRBO(AbstractSeries):
    """Some steps on `w` with both directions followed by SPIDER, then `lam` moves by the last one.

    `inner_steps` times: `D <- D + d - d at the last point`, on one set of batches, for `d = dg/dw` and
    `d = dF/dlam - C v` (v as in `MRBO`), and `w -= s D_w`. Every `period` of these turns D is that of all rows;
    there the series has `whole_terms` terms, so that its bias, `(1 - r mu)^whole_terms`, costs nothing elsewhere:
    differences of a short series fade where the method stops moving. The first of the turns after a move of
    `lam` differences against the old one, as in the paper.

    Class: smooth inner problems, strongly convex, finite data; constant steps.
    Cost per step: `4 T` gradients and `2 T Q` Hessian-vector products; the passes are in `cost()`. Memory as `MRBO`.
    Source: Yang, Ji and Liang 2021.
    """

    step_size: Number | str = number("auto", low=0.0, strict=True)
    adjoint_step: Number | None = number(None, low=0.0, strict=True)
    terms: int = static(10, low=1)
    inner_steps: int = static(5, low=1)
    whole_terms: int = static(100, low=1)
    estimator: AbstractEstimator = eqx.field(default_factory=lambda: SPIDER(50))
    estimate: bool | None = static(None)

    together = True

    def _terms(self, batch: Both) -> tuple[Array | int, bool]:
        return (self.whole_terms if batch.whole else self.terms) - 1, False

    def calls(self) -> Cost:
        return super().calls()._replace(pass_hvps=self.whole_terms * self.inner_steps)
