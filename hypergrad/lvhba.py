"""LV-HBA: inner problems whose constraints hold `w` and `lam` together."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from hypergrad.base import BilevelProblem, constraints
from hypergrad.estimators import AbstractEstimator, Oracles, Plain, Point
from hypergrad.single_loop import AbstractSingleLoop, Cost, Move, Stage, nothing
from hypergrad.soba import outer_oracles
from solvers import tree
from solvers.fields import Number, cast, number, static
from solvers.types import Tree

SHOWN = 8
"""Active constraints that are printed by name."""


class Multipliers(NamedTuple):
    """Of the inner problem's constraints, by "inequality" and "equality" (of those that there are)."""

    values: dict[str, Tree]
    active: dict[str, Tree]
    """Which constraints hold with equality; of inequalities, those with a multiplier above 0."""

    def __repr__(self) -> str:
        """Active constraints by name with their multipliers, and how many are not active."""
        if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(self.values)):
            return f"Multipliers(values={self.values})"
        found, idle = [], 0
        held = jax.tree.leaves(self.active)
        for (path, leaf), active in zip(
            jax.tree_util.tree_flatten_with_path(self.values)[0], held, strict=True
        ):
            name = path[0].key + jax.tree_util.keystr(path[1:])
            for index in np.ndindex(leaf.shape):
                if not active[index]:
                    idle += 1
                    continue
                place = "".join(f"[{i}]" for i in index)
                found.append(f"{name}{place}={float(leaf[index]):.6g}")
        more = f", and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        return (
            f"Multipliers(active: {', '.join(found[:SHOWN]) or 'none'}{more}; not active: {idle})"
        )


class LVHBA(AbstractSingleLoop):
    """Single steps on the proximal-Lagrangian penalty; constraints `h(w, lam) <= 0` or `= 0` inside.

    With theta and multipliers m, near the saddle point of
    `g(theta) + <m, h(theta)> + ||theta - w||^2 / (2 gamma) - ||m - zeta||^2 / (2 dual_gamma)`:

    - `theta -= r (dg/dw(theta) + <m, dh/dw(theta)> + (theta - w) / gamma)`,
      `m = clip(m + r (h(theta) - (m - zeta) / dual_gamma))` to [0, limit], of equalities to [-limit, limit];
    - `(w, lam)+ = P(w - s d_w, lam - s d_lam)`, P = `Problem(joint_projection=...)`, with
      `d_w = dF/dw / c + dg/dw - (w - theta) / gamma`,
      `d_lam = dF/dlam / c + dg/dlam(w) - dg/dlam(theta) - <m, dh/dlam(theta)>`;
    - `zeta += zeta_step (m - zeta) / dual_gamma`.

    `grad` is `c (lam - lam+) / s`, so the outer rule `optax.sgd(s / c)` is the paper's step and ends on the
    constraints; other rules have the same fixed points. `c` may be a schedule, in the paper `c0 (k + 1)^p`, p < 1/2.
    `theta_step=None` and `zeta_step=None` are s. `info.multipliers` and `result.multipliers` are the multipliers and
    the active set, None without constraints. A multiplier that reaches `limit` is DIVERGED: too small a limit ends
    elsewhere.

    Class: inner loss and constraints smooth and convex, the projection at hand. Bias O(1/c), none where
    active inequalities alone fix `w`. Without constraints it is a `MEHA` with one step for `w` and `lam`.
    Cost per step: four gradients, three of the constraints, a projection. Memory: two copies of `w`.
    Source: Yao, Yu, Zeng and Zhang 2024; theta is held by no projection of its own.
    """

    step_size: Number | str = number("auto", low=0.0, strict=True)
    c: Number = number(20.0, low=0.0, strict=True)
    gamma: Number = number(2.0, low=0.0, strict=True)
    dual_gamma: Number = number(2.0, low=0.0, strict=True)
    theta_step: Number | None = number(None, low=0.0, strict=True)
    zeta_step: Number | None = number(None, low=0.0, strict=True)
    limit: Number = number(100.0, low=0.0, strict=True)
    estimator: AbstractEstimator = eqx.field(default_factory=Plain)
    estimate: bool | None = static(None)

    constrained = True

    def start(self, problem: BilevelProblem, w: Tree, lam: Tree) -> Point:
        zeros = tree.zeros_like(constraints(problem, w, lam))
        return {"theta": w, "m": zeros, "zeta": zeros}

    def stages(self, problem: BilevelProblem, size: Array) -> tuple[Stage, ...]:
        numbers = self.c, self.gamma, self.dual_gamma, self.limit
        c, gamma, dual_gamma, limit = (cast(value, size) for value in numbers)
        step_theta = size if self.theta_step is None else cast(self.theta_step, size)
        step_zeta = size if self.zeta_step is None else cast(self.zeta_step, size)
        project = getattr(problem, "joint_projection", None) or (lambda w, lam: (w, lam))

        def clipped(m: dict[str, Tree]) -> dict[str, Tree]:
            def clip(leaf: Array, low: Array) -> Array:
                return jnp.clip(leaf, low.astype(leaf.dtype), limit.astype(leaf.dtype))

            low = {"inequality": jnp.zeros_like(limit), "equality": -limit}
            cut = lambda name: jax.tree.map(lambda leaf: clip(leaf, low[name]), m[name])
            return {name: cut(name) for name in m}

        def pull(point: Point) -> tuple[Tree, Tree, Tree]:
            """`h`, and `<m, dh/dw>` and `<m, dh/dlam>`, at theta."""
            at = lambda w, lam: constraints(problem, w, lam)
            h, vjp = jax.vjp(at, point["theta"], point["lam"])
            return h, *vjp(point["m"])

        def apart(point: Point) -> Tree:
            return tree.scale(1 / gamma, tree.sub(point["theta"], point["w"]))

        def slope(point: Point, batch: Any) -> tuple[Oracles, dict]:
            value, g = jax.value_and_grad(problem.inner)(point["theta"], point["lam"], batch)
            return {"g": g}, {"inner_value": value}

        def saddle(oracles: Oracles, point: Point) -> Move:
            h, by_w, _ = pull(point)
            down = tree.add(tree.add(oracles["g"], by_w), apart(point))
            left = tree.scale(1 / dual_gamma, tree.sub(point["m"], point["zeta"]))
            m = clipped(tree.axpy(step_theta, tree.sub(h, left), point["m"]))
            theta = tree.axpy(-step_theta, down, point["theta"])
            return Move({"theta": theta, "m": m}, {"residual": tree.norm(down)})

        def gap(point: Point, batch: Any) -> tuple[Oracles, dict]:
            def difference(w: Tree, lam: Tree) -> Array:
                return problem.inner(w, lam, batch) - problem.inner(point["theta"], lam, batch)

            g_w, gap_lam = jax.grad(difference, argnums=(0, 1))(point["w"], point["lam"])
            return {"g_w": g_w, "gap_lam": gap_lam}, {}

        def joint(oracles: Oracles, point: Point) -> Move:
            w, lam = point["w"], point["lam"]
            by_lam = pull(point)[2]
            d_w = tree.add(tree.axpy(1 / c, oracles["f_w"], oracles["g_w"]), apart(point))
            d_lam = tree.axpy(1 / c, oracles["f_lam"], tree.sub(oracles["gap_lam"], by_lam))
            after, target = project(tree.axpy(-size, d_w, w), tree.axpy(-size, d_lam, lam))
            far = tree.scale(step_zeta / dual_gamma, tree.sub(point["m"], point["zeta"]))
            zeta = clipped(tree.add(point["zeta"], far))
            over = tree.max_abs(point["m"]) >= limit if point["m"] else jnp.asarray(False)
            grad = tree.scale(c / size, tree.sub(lam, target))
            return Move({"w": after, "zeta": zeta}, {"diverged": over}, grad)

        return (
            Stage(slope, nothing, saddle),
            Stage(gap, outer_oracles(problem), joint),
        )

    def calls(self) -> Cost:
        return Cost(gradients=4 * self.estimator.evaluations)

    def multipliers(self, state: Any) -> Multipliers | None:
        """The multipliers in a state of this engine, and the active set; None without constraints."""
        values = state.own["m"]
        if not values:
            return None
        active = {
            name: jax.tree.map(lambda leaf, name=name: (leaf > 0) | (name == "equality"), m)
            for name, m in values.items()
        }
        return Multipliers(values, active)
