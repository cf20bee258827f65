"""Minimax problems, `min over lam of max over w of F(w, lam)`: inner problems whose loss is minus the outer one."""

from typing import Any

import equinox as eqx
import jax
from jax import Array

from hypergrad.base import BilevelProblem
from hypergrad.derivatives import outer_value_and_grads
from hypergrad.estimators import AbstractEstimator, Oracles, Plain, Point
from hypergrad.single_loop import AbstractSingleLoop, Cost, Move, Stage
from hypergrad.soba import outer_oracles
from solvers import CG, AbstractLinearSolver, Status, tree
from solvers.fields import Number, cast, number, static
from solvers.status import where
from solvers.types import Tree


class AbstractMinimax(AbstractSingleLoop):
    """What methods for `inner = -outer` (up to a function of `lam`) share.

    At `w*` the hypergradient is then dF/dlam itself (Danskin). Where no level has batches, BREAKDOWN says that
    `dg/dw = -dF/dw` does not hold at the point: the method would end elsewhere than at a bilevel solution.
    """

    outer_step: eqx.AbstractVar[Number | None]

    anticipates = True
    measured = ()

    def __check_init__(self) -> None:
        if isinstance(self.step_size, str):
            raise ValueError(
                f"{type(self).__name__}(step_size=...) must be a positive number, got {self.step_size!r}: the "
                "curvature of the inner loss says nothing of how lam and w pull at each other."
            )

    def descent_rate(self) -> Any:
        return self.step_size if self.outer_step is None else self.outer_step

    def _outer_step(self, size: Array) -> Array:
        return size if self.outer_step is None else cast(self.outer_step, size)

    def _opposed(self, problem: BilevelProblem, oracles: Oracles) -> dict[str, Array]:
        if getattr(problem, "batch_size", None) != (None, None):
            return {}
        apart = tree.norm(tree.add(oracles["f_w"], oracles["g_w"]))
        allowed = 1e-3 * tree.norm(oracles["f_w"]) + tree.epsilon(oracles["f_w"]) ** 0.5
        return {"status": where(apart > allowed, Status.BREAKDOWN)}


class Extragradient(AbstractMinimax):
    """`w` and `lam` move by the slopes at a point ahead: it turns inwards where plain descent and ascent circles out.

    `w' = w - s dg/dw`, `lam' = P(lam - r dF/dlam)` at `(w, lam)`, P the problem's `outer_projection`; then
    `w -= s dg/dw(w', lam')`, `grad = dF/dlam(w', lam')`. `outer_step` is r, None for s; `run` takes `optax.sgd` at
    that rate (its default here) and refuses other rules. Two time scales where r is much smaller than s. With a
    `transform`, lam' is still a step on the natural scale.

    Class: `inner = -outer`; convex in `lam` and concave in `w`, also bilinear, with `s, r < 1 / L`, L the largest
    mixed or own curvature; else a small r. With noise the steps decay.
    Cost per step: four gradients. Memory: two copies of `w` and `lam`.
    Source: Korpelevich 1976; two steps as in Mahdavinia, Deng, Li and Mahdavi 2022.
    """

    step_size: Number | str = number(0.1, low=0.0, strict=True)
    outer_step: Number | None = number(None, low=0.0, strict=True)
    estimator: AbstractEstimator = eqx.field(default_factory=Plain)
    estimate: bool | None = static(None)

    def start(self, problem: BilevelProblem, w: Tree, lam: Tree) -> Point:
        return {"ahead": w, "lam_ahead": lam}

    def stages(self, problem: BilevelProblem, size: Array) -> tuple[Stage, ...]:
        rate = self._outer_step(size)
        project = getattr(problem, "outer_projection", None) or (lambda lam: lam)

        def slope(w: str, lam: str):
            def inner(point: Point, batch: Any) -> tuple[Oracles, dict]:
                value, g = jax.value_and_grad(problem.inner)(point[w], point[lam], batch)
                return {"g_w": g}, {"inner_value": value} if w == "w" else {}

            return inner

        def look(oracles: Oracles, point: Point) -> Move:
            after = {
                "ahead": tree.axpy(-size, oracles["g_w"], point["w"]),
                "lam_ahead": project(tree.axpy(-rate, oracles["f_lam"], point["lam"])),
            }
            report = {"residual": tree.norm(oracles["g_w"])}
            return Move(after, report | self._opposed(problem, oracles))

        def outer_ahead(point: Point, batch: Any) -> tuple[Oracles, dict]:
            f_lam = jax.grad(problem.outer, argnums=1)(point["ahead"], point["lam_ahead"], batch)
            return {"f_lam": f_lam}, {}

        def move(oracles: Oracles, point: Point) -> Move:
            after = tree.axpy(-size, oracles["g_w"], point["w"])
            return Move({"w": after}, grad=oracles["f_lam"])

        return (
            Stage(slope("w", "lam"), outer_oracles(problem), look),
            Stage(slope("ahead", "lam_ahead"), outer_ahead, move),
        )

    def calls(self) -> Cost:
        return Cost(gradients=4 * self.estimator.evaluations)


class CGD(AbstractMinimax):
    """Competitive gradient descent: each side answers the move that the other is about to make.

    The equilibrium of the local game `F + <slopes, moves> + <move of lam, D move of w>` with a cost of half the
    squared moves over r and s, D = d2F/dlam dw: `grad = (I + r s D D')^-1 (dF/dlam + s D dF/dw)`,
    `w += s (dF/dw - r D' grad)`. `outer_step` is r, None for s; `run` takes `optax.sgd` at that rate (its default
    here), and refuses other rules.

    `linear_solver`: CG by products with D and D', or `Dense()` for a small `lam`; its status is the step's.

    Class: `inner = -outer`; converges on bilinear F at any steps, and where own curvatures are at most about
    1 / s and 1 / r. With batches its mean is not the step on all rows. Refuses an `outer_projection`.
    Cost per step: two gradients, two products with D, and two for each step of the solve (the history has all).
    Memory: some copies of `w` and `lam`.
    Source: Schaefer and Anandkumar 2019; two steps instead of one.
    """

    step_size: Number | str = number(0.1, low=0.0, strict=True)
    outer_step: Number | None = number(None, low=0.0, strict=True)
    linear_solver: AbstractLinearSolver = eqx.field(default_factory=CG)
    estimator: AbstractEstimator = eqx.field(default_factory=Plain)
    estimate: bool | None = static(None)

    second_order = True

    def start(self, problem: BilevelProblem, w: Tree, lam: Tree) -> Point:
        return {}

    def stages(self, problem: BilevelProblem, size: Array) -> tuple[Stage, ...]:
        if getattr(problem, "outer_projection", None) is not None:
            # w would answer a move that the projection undoes: it ends where dF/dw is not zero.
            raise ValueError(
                "CGD has w answer the whole move of lam: expected a problem without outer_projection, or the engine "
                "Extragradient."
            )
        rate = self._outer_step(size)
        key = jax.random.key(0)  # for solvers that draw a sketch

        def inner(point: Point, batch: Any) -> tuple[Oracles, dict]:
            value, g = jax.value_and_grad(problem.inner)(point["w"], point["lam"], batch)
            return {"g_w": g}, {"inner_value": value}

        def outer(point: Point, batch: Any) -> tuple[Oracles, dict]:
            w, lam = point["w"], point["lam"]
            value, f_w, f_lam = outer_value_and_grads(problem, w, lam, batch)
            by_w = lambda lam: jax.grad(problem.outer)(w, lam, batch)
            _, to_w = jax.linearize(by_w, lam)
            transposed = jax.linear_transpose(to_w, lam)
            to_lam = lambda v: transposed(v)[0]
            matvec = lambda x: tree.axpy(rate * size, to_lam(to_w(x)), x)
            rhs = tree.axpy(size, to_lam(f_w), f_lam)
            prepared = self.linear_solver.init(matvec, rhs, key)
            grad, solve = self.linear_solver.solve(matvec, rhs, tree.zeros_like(rhs), prepared, key)
            answer = tree.axpy(-rate, to_w(grad), f_w)
            report = {
                "outer_value": value,
                "adjoint_residual": solve.residual,
                "products": 2 * solve.num_steps + 2,
                "solve": solve.status,
            }
            return {"f_w": f_w, "answer": answer, "hyper_lam": grad}, report

        def move(oracles: Oracles, point: Point) -> Move:
            after = tree.axpy(size, oracles["answer"], point["w"])
            report = {"residual": tree.norm(oracles["g_w"])}
            return Move(
                {"w": after}, report | self._opposed(problem, oracles), oracles["hyper_lam"]
            )

        return (Stage(inner, outer, move),)

    def calls(self) -> Cost:
        """Without the products of the solve."""
        times = self.estimator.evaluations
        return Cost(gradients=2 * times, hvps=2 * times)
