"""BDA: unrolled steps that descend on both losses, for inner problems with many solutions."""

from typing import Any, NamedTuple
from typing import cast as cast_type

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from hypergrad.base import BilevelProblem, Hypergradient, Solver, make_solver
from hypergrad.unrolled import Unrolled
from solvers.fields import Number, cast, number
from solvers.loops import judge
from solvers.types import Sampler, Tree


class BDA(Unrolled):
    """`Unrolled` through steps on `(1 - a_t) g + a_t F`, `a_t = weight / (t + 1)` at step t = 0, 1, ...

    Where the inner problem has many solutions, plain steps end at the one that their start happens to lie
    before, for ever; these are drawn towards the best for the outer loss F among them. As a_t falls to 0 they
    still solve the inner problem, slowly: the error in `w` is of order 1/T also where g alone would be fast.
    `weight` is in [0, 1], all other settings are those of `Unrolled`; weight 0 is that engine.

    Class: inner loss convex, outer loss strongly convex in `w`; a solver that can be unrolled. With
    `Problem(inner_init=...)` every solve starts afresh, as in the paper; else from the last `w`.
    Cost: that of `Unrolled`, with a gradient of F beside each of g. Memory as there.
    Source: Liu, Mu, Yuan, Zeng and Zhang 2020; one step size for both losses.
    """

    weight: Number = number(0.5, low=0.0)

    estimates = False
    fixed_points = False

    def __check_init__(self) -> None:
        fixed = isinstance(self.weight, jax.Array) and not isinstance(self.weight, Tracer)
        if fixed and np.any(np.asarray(self.weight) > 1):
            raise ValueError(f"BDA(weight=...) must be in [0, 1], got {self.weight}.")

    def step(
        self, problem: BilevelProblem, solver: Solver, w: Tree, lam: Tree, state: Any, key: Array
    ) -> tuple[Hypergradient, Any]:
        both = cast_type(BilevelProblem, _Both(problem, self.weight))
        h, state = super().step(both, solver, w, lam, state, key)
        last, objective = h.info.inner, problem.inner_objective(lam)
        batch, at_lam = problem.inner_sampler(key)(0), make_solver(solver, lam)
        inner = judge(at_lam, objective, h.w, batch, last.num_steps, jnp.zeros(()))
        return h._replace(info=h.info._replace(inner=inner)), state


class _Both(NamedTuple):
    """The problem, with the mixture to be minimised inside; a step's batch holds its weight."""

    problem: Any
    weight: Number

    inner = property(lambda self: self.problem.inner)
    inner_prox = property(lambda self: getattr(self.problem, "inner_prox", None))
    outer = property(lambda self: self.problem.outer)
    start = property(lambda self: lambda w, lam, batch: self.problem.start(w, lam, batch[0]))

    def inner_objective(self, lam: Tree) -> "_Mixture":
        return _Mixture(self.problem, lam)

    def inner_sampler(self, key: Array) -> Sampler:
        own, others = self.problem.inner_sampler(key), self.outer_batch(key)

        def draw(step: Array | int) -> Any:
            weight = jnp.asarray(self.weight)
            return own(step), others, weight / (jnp.asarray(step).astype(weight.dtype) + 1)

        return Sampler(draw, varies=True)

    def outer_batch(self, key: Array) -> Any:
        return self.problem.outer_batch(key)


class _Mixture(eqx.Module):
    """`(1 - a) g + a F` at a fixed outer variable."""

    problem: Any
    lam: Tree

    def __call__(self, w: Tree, batch: Any) -> Array:
        own, others, weight = batch
        g, f = self.problem.inner(w, self.lam, own), self.problem.outer(w, self.lam, others)
        return g + cast(weight, g) * (f.astype(g.dtype) - g)

    @property
    def prox(self) -> Any:
        return self.problem.inner_objective(self.lam).prox

    @property
    def args(self) -> Tree:
        return self.lam
