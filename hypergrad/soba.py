"""SOBA and its variance-reduced forms: inner variable, adjoint and `lam` all move at once."""

from typing import Any

import equinox as eqx
import jax
from jax import Array

from hypergrad.base import BilevelProblem
from hypergrad.derivatives import outer_value_and_grads
from hypergrad.estimators import EMA, SAGA, SPIDER, AbstractEstimator, Oracles, Plain, Point
from hypergrad.single_loop import AbstractSingleLoop, Cost, Move, Stage, relative
from solvers import tree
from solvers.fields import Number, number, static
from solvers.types import Tree

__all__ = ["EMA", "SABA", "SOBA", "SRBA"]


class AbstractSOBA(AbstractSingleLoop):
    """`w -= s dg/dw;  v -= r (H v - dF/dw);  grad = dF/dlam - C v`, all at one point (Jacobi)."""

    adjoint_step: eqx.AbstractVar[Number | None]
    inner_steps: eqx.AbstractVar[int]

    second_order = True

    def start(self, problem: BilevelProblem, w: Tree, lam: Tree) -> Point:
        return {"v": tree.zeros_like(w)}

    def stages(self, problem: BilevelProblem, size: Array) -> tuple[Stage, ...]:
        step_v = size if self.adjoint_step is None else self.adjoint_step

        def inner(point: Point, batch: Any) -> tuple[Oracles, dict]:
            value, g_w, product, cross = adjoint_products(problem, point, batch)
            return {"g_w": g_w, "product": product, "cross_lam": cross}, {"inner_value": value}

        def move(oracles: Oracles, point: Point) -> Move:
            left = tree.sub(oracles["product"], oracles["f_w"])
            after = {
                "w": tree.axpy(-size, oracles["g_w"], point["w"]),
                "v": tree.axpy(-step_v, left, point["v"]),
            }
            report = {
                "residual": tree.norm(oracles["g_w"]),
                "adjoint_residual": relative(left, oracles["f_w"]),
            }
            return Move(after, report, tree.sub(oracles["f_lam"], oracles["cross_lam"]))

        return (Stage(inner, outer_oracles(problem), move, self.inner_steps),)

    def calls(self) -> Cost:
        times = self.inner_steps * self.estimator.evaluations
        return Cost(gradients=2 * times, hvps=times)


class SOBA(AbstractSOBA):
    """Three moves at once: inner variable, adjoint and outer variable, each on one batch.

    `w -= s dg/dw;  v -= r (H v - dF/dw);  grad = dF/dlam - C v`, everything at the point before the step.
    `adjoint_step=None` is r = s. `inner_steps` of it at one `lam` make one outer step. With the estimator
    `EMA(rate)` it is MA-SOBA, with `STORM(rate)` a momentum form of all three directions.

    Class: smooth inner problems, strongly convex. With noise the steps (and those of the outer rule) have to
    decay, in the paper as `k^-1/2`; without noise constant steps converge linearly.
    Cost per step: an inner and an outer gradient and one Hessian-vector product with its cross derivative.
    Memory: two copies of `w` beside the estimator's.
    Source: Dagreou, Ablin, Vaiter and Moreau 2022; Chen, Xiao and Balasubramanian 2024 (MA-SOBA).
    """

    step_size: Number | str = number("auto", low=0.0, strict=True)
    adjoint_step: Number | None = number(None, low=0.0, strict=True)
    inner_steps: int = static(1, low=1)
    estimator: AbstractEstimator = eqx.field(default_factory=Plain)
    estimate: bool | None = static(None)


class SABA(AbstractSOBA):
    """SOBA with SAGA's tables: finite sums are solved to rounding at constant steps.

    Class, cost and source as `SOBA`. Memory: a table of every oracle (three like `w`, two like `lam`) for
    each of the batches that `batch_size` cuts the data into; it is updated in place. `run`
    shuffles the rows first, `hypergradient` takes them in order. Departs from the paper: a short last batch
    is drawn and weighted by its rows.
    """

    step_size: Number | str = number("auto", low=0.0, strict=True)
    adjoint_step: Number | None = number(None, low=0.0, strict=True)
    inner_steps: int = static(1, low=1)
    estimator: AbstractEstimator = eqx.field(default_factory=SAGA)
    estimate: bool | None = static(None)


class SRBA(AbstractSOBA):
    """SOBA with SPIDER: all rows every `period` steps, differences on batches between.

    Class and source as `SOBA`; Dagreou, Moreau, Vaiter and Ablin 2024. Constant steps.
    Cost per step: twice that of `SOBA`; every `period` steps instead one pass over all rows (`cost()` has both).
    Memory: two copies of every oracle and variable.
    """

    step_size: Number | str = number("auto", low=0.0, strict=True)
    adjoint_step: Number | None = number(None, low=0.0, strict=True)
    inner_steps: int = static(1, low=1)
    estimator: AbstractEstimator = eqx.field(default_factory=SPIDER)
    estimate: bool | None = static(None)


def adjoint_products(
    problem: BilevelProblem, point: Point, batch: Any
) -> tuple[Array, Tree, Tree, Tree]:
    """`(g, dg/dw, H v, C v)` at `w, lam, v`: forward over reverse, one pass."""
    w, lam, v = point["w"], point["lam"], point["v"]
    gradients = jax.value_and_grad(problem.inner, argnums=(0, 1))
    (value, (g_w, _)), (_, (product, cross)) = jax.jvp(
        lambda w: gradients(w, lam, batch), (w,), (v,)
    )
    own = problem.inner_objective(lam).hvp
    if own is not None:
        product = own(w, lam, batch, v)
    return value, g_w, product, cross


def outer_oracles(problem: BilevelProblem, name: str = "w"):
    """Raw oracles `f_w, f_lam` of the outer loss at the variable `name`."""

    def outer(point: Point, batch: Any) -> tuple[Oracles, dict]:
        value, f_w, f_lam = outer_value_and_grads(problem, point[name], point["lam"], batch)
        return {"f_w": f_w, "f_lam": f_lam}, {"outer_value": value}

    return outer
