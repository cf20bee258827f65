"""Sparse solutions of large problems: solve for a few coordinates, check all of them."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array

from solvers import loops, tree
from solvers.base import AbstractInnerSolver
from solvers.fields import Number, number, static, unchecked
from solvers.proximal import ProximalGradient, apply_prox
from solvers.separable import coupling
from solvers.types import Objective, ObjectiveFn, Scalar, Tree, constant_sampler


class WorkingSet(AbstractInnerSolver):
    """Rounds of `solver` on at most `size` coordinates of `w`, for solutions with few that are not zero.

    `w` is one array (d,). A round chooses `size` of its coordinates, those that are not zero first, then the largest
    entries of the prox residual `(w - prox(w - s grad g(w))) / s`; solves the problem restricted to them, all others
    zero, to a tenth of the residual (to the tolerance, where all that want to differ from zero are in); and computes
    the residual of all d anew. That residual ends the solve and judges it, so the answer is that of `solver` on all
    coordinates, to the tolerance, which is this solver's own.

    `objective.restrict(args, batch, indices) -> (args, batch)` gives the restricted problem: the loss and the prox of
    `w[indices]` with what it returns are those of `w` with zeros elsewhere. So the prox has to act on each
    coordinate by itself and keep zero where the smooth part is flat (`l1`, `elastic_net`, `box` around zero); one in
    whose operations coordinates meet is refused.

    A round takes all coordinates (`solver` on the whole problem, to the tolerance) where those that are not zero, after
    a round to the tolerance, fill `size` to seven eighths and more want to enter; for the rest of a solve, where a
    restricted solution does not solve the whole problem on its own coordinates (`restrict` is then not what it should
    be); and always where `size` is d or more. Under `vmap` both kinds of round are computed, at the cost of the larger.

    `max_steps` and `steps` count rounds. s is that of `solver`, measured where "auto" at the first start and kept
    from then on; each restricted solve measures its own. One batch serves the whole solve.

    Cost per round: one gradient of the whole problem, one choice of `size` out of d, and the steps of
    `solver`, each a gradient in `size` coordinates. Cannot be unrolled.
    Source: the working sets of Massias, Gramfort and Salmon 2018 (Celer) and Bertrand et al. 2022 (skglm), which grow
    from round to round; here the number is fixed, as shapes are static.
    """

    size: int = static(100, low=1)
    solver: ProximalGradient = eqx.field(default_factory=lambda: ProximalGradient(10_000))
    max_steps: int = static(100, low=1, kw_only=True)
    tol: Number | None = number(None, low=0.0, infinite=False, kw_only=True)

    unrollable = False
    minibatches = False
    measured = ("learning_rate",)
    proximal = True

    def __check_init__(self) -> None:
        if not isinstance(self.solver, ProximalGradient):
            raise TypeError(
                f"WorkingSet(solver=...) must be a ProximalGradient, got {self.solver!r}."
            )

    @property
    def learning_rate(self) -> Number | str:
        return self.solver.learning_rate

    def init(self, objective: ObjectiveFn, w: Array, batch: Any) -> "_State":
        self._check(objective, w, batch)
        return self._begin(objective, w, self.solver._step(objective, w, batch), batch)

    def restart(self, objective: ObjectiveFn, w: Array, state: "_State", batch: Any) -> "_State":
        return self._begin(objective, w, state.step, batch)

    def _begin(self, objective: ObjectiveFn, w: Array, step: Scalar, batch: Any) -> "_State":
        residuals = self._at(step).optimality(objective, w, batch)
        yes, no = jnp.asarray(True), jnp.asarray(False)
        return _State(residuals, step, _norm(residuals, step), no, yes, no)

    def step(
        self, objective: ObjectiveFn, w: Array, state: "_State", batch: Any
    ) -> tuple[Array, "_State"]:
        tol = loops.tolerance(self, w).astype(state.residual.dtype)
        filled = jnp.count_nonzero(w)
        wanted = filled + jnp.count_nonzero((w == 0) & (state.residuals != 0))
        room = (filled <= 7 * self.size // 8) | (wanted <= self.size)
        # To the tolerance where the round may well be the last, or loosely solved ones left too much that is not zero.
        tight = (tol > 0) & ((wanted <= self.size) | ~room)
        tenth = jnp.maximum(0.1 * state.residual, 0.5 * tol)
        target = jnp.where(tight, 0.5 * tol, tenth)

        def solve_all(w: Array) -> tuple[Array, Array, Array]:
            to = jnp.where(tol > 0, 0.9 * tol, tenth)
            return self._solve(objective, w, batch, to), w, jnp.zeros(w.shape, bool)

        def solve_some(w: Array) -> tuple[Array, Array, Array]:
            score = jnp.where(w != 0, jnp.inf, jnp.abs(state.residuals))
            chosen = jax.lax.top_k(score, self.size)[1]
            inside, part = restricted(objective, batch, chosen)
            own = self._solve(inside, w[chosen], part, target)
            residuals = self._at(state.step).optimality(inside, own, part)
            scatter = lambda x: jnp.zeros(w.shape, x.dtype).at[chosen].set(x)
            return scatter(own), scatter(residuals), scatter(jnp.ones(chosen.shape, bool))

        if self.size >= w.size:
            new, claimed, inside = solve_all(w)
        else:
            fits = room | (state.loose & (filled <= self.size))
            new, claimed, inside = jax.lax.cond(fits & ~state.whole, solve_some, solve_all, w)
        value, gradient = jax.value_and_grad(objective)(new, batch)
        residuals = _residuals(objective, new, gradient, state.step)
        residual = _norm(residuals, state.step)
        # Residuals of one point on the same coordinates: they differ where the restricted problem is another one.
        apart = _norm(jnp.where(inside, residuals - claimed, 0), state.step)
        rounding = 1e3 * tree.epsilon(w) * _norm(gradient, state.step)
        whole = state.whole | (apart > jnp.maximum(tenth, rounding))
        floor = loops.rounding_level(value, w).astype(residual.dtype)
        stalled = (residual >= 0.9 * state.residual) & (residual <= floor)
        return new, _State(residuals, state.step, residual, whole, room & ~tight, stalled)

    def _solve(self, objective: ObjectiveFn, w: Array, batch: Any, tol: Scalar) -> Array:
        solver = unchecked(self.solver, tol=tol)
        state = solver.init(objective, w, batch)
        return loops.solve(solver, objective, w, state, constant_sampler(batch))[0]

    def _at(self, step: Scalar) -> ProximalGradient:
        return unchecked(self.solver, learning_rate=step)

    def settled(self, state: "_State") -> "WorkingSet":
        return unchecked(self, solver=self._at(state.step))

    def optimality(self, objective: ObjectiveFn, w: Array, batch: Any) -> Array:
        return self.solver.optimality(objective, w, batch)

    def _check(self, objective: ObjectiveFn, w: Tree, batch: Any) -> None:
        """Raises ValueError where `w` is not one array (d,), or the objective has no restriction that fits."""
        if not isinstance(w, jax.Array) or w.ndim != 1:
            shapes = jax.tree.map(jnp.shape, w)
            raise ValueError(
                f"WorkingSet needs an inner variable that is one array (d,), got {shapes}."
            )
        for name in ("prox", "restrict"):
            if getattr(objective, name, None) is None:
                raise ValueError(
                    f"WorkingSet needs Problem(inner_{name}=...), and the objective has none here (lanes of Tasks hand "
                    "on no restriction). Use ProximalGradient."
                )
        step = jnp.ones((), tree.accumulation_dtype(w))
        found = coupling(lambda v: apply_prox(objective, v, step), w)
        if found is not None:
            raise ValueError(
                "WorkingSet needs an inner_prox that acts on each coordinate by itself (l1, elastic_net, box), and "
                f"this one brings coordinates together ({found}), as those of groups and of a simplex do. Use "
                "ProximalGradient."
            )
        if self.size >= w.size:
            return

        def first(w: Array, batch: Any) -> tuple[Array, Array]:
            chosen = jnp.arange(self.size)
            inside, part = restricted(objective, batch, chosen)
            return inside(w[chosen], part), apply_prox(inside, w[chosen], jnp.ones(()))

        try:
            value, mapped = eqx.filter_eval_shape(first, w, batch)
        except Exception as error:
            raise ValueError(
                "inner_restrict must take (lam, batch, indices) and return (lam, batch) of the problem in "
                f"w[indices]; with {self.size} indices it, or the inner loss or prox with what it returned, failed: "
                f"{type(error).__name__}: {error}"
            ) from error
        if value.shape != () or mapped.shape != (self.size,):
            raise ValueError(
                f"with what inner_restrict returns for {self.size} indices, the inner loss must be a scalar and the "
                f"prox of shape ({self.size},), got shapes {value.shape} and {mapped.shape}."
            )


def restricted(objective: Any, batch: Any, chosen: Array) -> tuple[Objective, Any]:
    """The problem in the coordinates `chosen`, and its batch."""
    args, part = objective.restrict(objective.args, batch, chosen)
    return Objective(objective.fn, args, objective.hvp, objective.prox), part


def _residuals(objective: ObjectiveFn, w: Array, gradient: Array, step: Scalar) -> Array:
    size = step.astype(w.dtype)
    return (w - apply_prox(objective, w - size * gradient, step)) / size


def _norm(x: Array, like: Scalar) -> Scalar:
    return tree.norm(x).astype(like.dtype)


class _State(NamedTuple):
    residuals: Array  # of the prox, in each coordinate
    step: Scalar  # s, their step
    residual: Scalar
    whole: Array  # whether the restriction was found to be another problem
    loose: Array  # whether the last round may have left more coordinates than its problem's solution has
    stalled: Array
