"""The problem of one task, for engines, and the objective that all of them share, for lanes."""

from typing import Any

import equinox as eqx
from jax import Array

from bilevel.problem import Loss, Problem
from solvers import Mapping, Objective, Sampler
from solvers.types import Tree


class Task(eqx.Module):
    """The problem of one task, for an engine."""

    problem: Problem
    data: Any
    inner: Loss = eqx.field(static=True)
    outer: Loss = eqx.field(static=True)

    def __init__(self, problem: Problem, data: Any) -> None:
        self.problem, self.data = problem, data
        self.inner, self.outer = problem.inner, problem.outer

    def __getattr__(self, name: str) -> Any:
        shared = (
            *("inner_init", "inner_hvp", "inner_prox", "inner_penalty"),
            *("constants", "batch_size"),
        )
        if name in shared:
            return getattr(self.problem, name)
        raise AttributeError(name)

    def inner_objective(self, lam: Tree) -> Objective:
        return self.problem.inner_objective(lam)

    def inner_sampler(self, key: Array) -> Sampler:
        shared = self.problem.inner_sampler(key)
        pair = lambda at: _pair(shared.draw(at), self.data)
        return Sampler(pair, shared.varies, shared.plan)

    def outer_batch(self, key: Array) -> Any:
        return _pair(self.problem.outer_batch(key), self.data)

    def start(self, w: Tree, lam: Tree, batch: Any) -> Tree:
        return self.problem.start(w, lam, batch)


class Shared(eqx.Module):
    """The inner objective of a task's slice; the shared data are not copied."""

    objective: Objective
    data: Any

    def __call__(self, w: Tree, task: Any) -> Array:
        return self.objective(w, _pair(self.data, task))

    @property
    def args(self) -> Any:
        return self.objective.args

    def _of_slice(self, own: Any) -> Any:
        """A function `(w, args, batch, ...)` of the objective as one of the slice; None stays None."""
        return own and (lambda w, args, task, *v: own(w, args, _pair(self.data, task), *v))

    @property
    def fn(self) -> Any:
        own = self.objective.fn
        slice_of = self._of_slice
        return Mapping(slice_of(own.mapping)) if isinstance(own, Mapping) else slice_of(own)

    @property
    def hvp(self) -> Any:
        return self._of_slice(self.objective.hvp)

    @property
    def preconditioner(self) -> Any:
        return self._of_slice(self.objective.preconditioner)

    @property
    def gauss_newton(self) -> Any:
        return self._of_slice(self.objective.gauss_newton)

    @property
    def prox(self) -> Any:
        return self.objective.prox


def _pair(shared: Any, task: Any) -> Any:
    return task if shared is None else (shared, task)
