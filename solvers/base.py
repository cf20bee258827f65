"""What an inner solver is: an initial state and one step."""

import abc
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp

from solvers.fields import Number, Settings, number, unchecked
from solvers.types import ObjectiveFn, Tree


class AbstractInnerSolver(Settings):
    """Minimises an objective one step at a time; `solvers.loops` runs the steps.

    The state is a NamedTuple with at least `residual`, the 2-norm of `optimality`: at the point `step`
    returned, or, where `lagged` is true, at the point `step` was given (methods that compute one gradient
    per step know no more). A state may hold `stalled`: no further progress is possible in this precision.
    """

    max_steps: eqx.AbstractVar[int]
    """Static: the length of a fixed budget."""
    tol: eqx.AbstractVar[Number | None]
    """Absolute 2-norm of `optimality`; None is 1e-8 (float64) or 1e-4; 0 is a fixed budget."""
    steps: Number | None = number(None, low=0.0, kw_only=True)
    """At most so many of the `max_steps`, rounded down: a number, so that it may follow the outer step without another
    compilation. For loops that stop; engines that go through a fixed number of steps refuse it."""

    lagged: ClassVar[bool] = False
    unrollable: ClassVar[bool] = True
    """Whether reverse mode can go through `step`."""
    minibatches: ClassVar[bool] = True
    """Whether each step may see another batch; else one batch serves the whole solve."""

    second_order: ClassVar[bool] = False
    """Whether it needs Hessian-vector products."""
    measured: ClassVar[tuple[str, ...]] = ()
    """Settings whose "auto" is measured by Hessian-vector products."""
    symmetric: ClassVar[bool] = True
    """Whether the Jacobian of `optimality` is symmetric."""
    proximal: ClassVar[bool] = False
    """Whether the objective's `prox`, where it has one, is part of what is minimised."""

    @abc.abstractmethod
    def init(self, objective: ObjectiveFn, w: Tree, batch: Any) -> Any:
        """The state before the first step from `w`."""

    @abc.abstractmethod
    def step(self, objective: ObjectiveFn, w: Tree, state: Any, batch: Any) -> tuple[Tree, Any]:
        """One iteration."""

    def restart(self, objective: ObjectiveFn, w: Tree, state: Any, batch: Any) -> Any:
        """The state for a new objective close to the last one; by default nothing is carried over."""
        return self.init(objective, w, batch)

    def blank(self, objective: ObjectiveFn, w: Tree, batch: Any) -> Any:
        """What `restart` begins with: zeros where it carries nothing over, so that nothing is measured twice."""
        if type(self).restart is not AbstractInnerSolver.restart:
            return self.init(objective, w, batch)
        # Measurements take long to trace, and the shapes are those of any number.
        names = [name for name in self.measured if isinstance(getattr(self, name), str)]
        given = unchecked(self, **dict.fromkeys(names, 1.0))
        shapes = eqx.filter_eval_shape(type(self).init, given, objective, w, batch)
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    def settled(self, state: Any) -> "AbstractInnerSolver":
        """The solver with what `state` knows of its own settings (a step length), to judge its result."""
        return self

    def optimality(self, objective: ObjectiveFn, w: Tree, batch: Any) -> Tree:
        """A map whose root is the answer; here the gradient, whose Jacobian is symmetric."""
        return jax.grad(objective)(w, batch)
