"""MEHA, the single loop of the Moreau-envelope penalty, with nonsmooth inner terms."""

from typing import Any

import equinox as eqx
import jax
from jax import Array

from hypergrad.base import BilevelProblem, has_prox
from hypergrad.estimators import AbstractEstimator, Oracles, Plain, Point
from hypergrad.f3sa import outer_slope, value_gap
from hypergrad.single_loop import AbstractSingleLoop, Cost, Move, Stage, nothing
from hypergrad.soba import outer_oracles
from solvers import tree
from solvers.fields import Number, cast, number, static
from solvers.types import Tree


class MEHA(AbstractSingleLoop):
    """Single gradient (or prox) steps on the Moreau-envelope penalty: no Hessian, inner kinks allowed.

    For `g + psi` inside, psi by its prox, with theta near the minimiser of
    `g + psi + ||theta - y||^2 / (2 gamma)`; theta is what the driver holds as `w`:
    `y = prox(y - s (dF/dw(y) / c + dg/dw(y) - (y - theta) / gamma))`,
    `theta = prox(theta - r (dg/dw(theta) + (theta - y) / gamma))`, and
    `grad = dF/dlam(y) + c d/dlam [g(y) - g(theta) + psi(y) - psi(theta)]`.

    The paper's direction is `grad / c`, so its step alpha is the outer rule's rate `alpha / c`. `c` may be a
    schedule, in the paper `c0 (k + 1)^p` with p < 1/2: a penalty that grows faster than `lam` can travel
    freezes it. The defaults are `gamma="auto"`, 20 step sizes (10 / L), and `theta_step=None`,
    `1 / (1 / (2 step_size) + 1 / gamma)`.

    With batches c multiplies their noise: cleaning labels with batches of 64, c = 2 gets there and the default 20 does
    not, with all rows both do (`benchmarks/w2_thresholds.py`). With a small c theta is drawn to the outer data on its
    way: judge `lam` by the inner problem solved anew, not by `w`.

    Class: inner loss weakly convex, with `gamma < 1 / (2 rho)` of your own where the curvature falls to -rho (a
    relaxation to inner stationarity then); constant c ends at the fixed point of `Moreau`, with bias O(1/c).
    A prox needs the term's value too, `Problem(inner_penalty=...)`, for its slope in lam.
    Cost per step: six gradients, two prox. Memory: two copies of `w`.
    Source: Liu, Liu, Yao, Zeng and Zhang 2024. The paper's order is theta, lam, y: the same cycle, begun at y.
    """

    step_size: Number | str = number("auto", low=0.0, strict=True)
    c: Number = number(20.0, low=0.0, strict=True)
    gamma: Number | str = number("auto", low=0.0, strict=True)
    theta_step: Number | None = number(None, low=0.0, strict=True)
    estimator: AbstractEstimator = eqx.field(default_factory=Plain)
    estimate: bool | None = static(None)

    proximal = True

    def __check_init__(self) -> None:
        if isinstance(self.gamma, str) and self.gamma != "auto":
            raise ValueError(
                f"MEHA(gamma=...) must be a positive number or 'auto', got {self.gamma!r}."
            )

    def start(self, problem: BilevelProblem, w: Tree, lam: Tree) -> Point:
        return {"y": w}

    def stages(self, problem: BilevelProblem, size: Array) -> tuple[Stage, ...]:
        c = cast(self.c, size)
        gamma = 20 * size if isinstance(self.gamma, str) else cast(self.gamma, size)
        if self.theta_step is None:
            step_theta = 1 / (0.5 / size + 1 / gamma)
        else:
            step_theta = cast(self.theta_step, size)
        penalty = getattr(problem, "inner_penalty", None)
        if has_prox(problem) and penalty is None:
            raise ValueError(
                "MEHA needs the slope in lam of the term behind inner_prox: expected "
                "Problem(inner_penalty=(w, lam) -> scalar), the term itself (0 for a projection)."
            )

        def prox(v: Tree, step: Array, lam: Tree) -> Tree:
            term = problem.inner_objective(lam).prox
            return v if term is None else term(v, step, lam)

        def slope(name: str):
            def inner(point: Point, batch: Any) -> tuple[Oracles, dict]:
                value, g = jax.value_and_grad(problem.inner)(point[name], point["lam"], batch)
                return {"g": g}, {"inner_value": value}

            return inner

        def apart(point: Point) -> Tree:
            return tree.scale(1 / gamma, tree.sub(point["y"], point["w"]))

        def move_y(oracles: Oracles, point: Point) -> Move:
            down = tree.sub(tree.axpy(1 / c, oracles["f_w"], oracles["g"]), apart(point))
            return Move({"y": prox(tree.axpy(-size, down, point["y"]), size, point["lam"])})

        def move_theta(oracles: Oracles, point: Point) -> Move:
            w, lam = point["w"], point["lam"]
            down = tree.sub(oracles["g"], apart(point))
            after = prox(tree.axpy(-step_theta, down, w), step_theta, lam)
            mapped = prox(tree.axpy(-step_theta, oracles["g"], w), step_theta, lam)
            residual = tree.norm(tree.sub(w, mapped)) / step_theta
            return Move({"w": after}, {"residual": residual})

        def direct(oracles: Oracles, point: Point) -> Move:
            gap = oracles["gap_lam"]
            if penalty is not None:
                term = penalty
                kinks = lambda lam: term(point["y"], lam) - term(point["w"], lam)
                gap = tree.add(gap, jax.grad(kinks)(point["lam"]))
            return Move({}, grad=tree.axpy(c, gap, oracles["f_lam"]))

        return (
            Stage(slope("y"), outer_oracles(problem, "y"), move_y),
            Stage(slope("w"), nothing, move_theta),
            Stage(value_gap(problem), outer_slope(problem), direct),
        )

    def calls(self) -> Cost:
        return Cost(gradients=6 * self.estimator.evaluations)
