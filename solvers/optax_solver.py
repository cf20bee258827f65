"""Any optax rule as an inner solver."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from solvers import tree
from solvers.base import AbstractInnerSolver
from solvers.fields import Number, number, static
from solvers.static_function import StaticFunction
from solvers.types import ObjectiveFn, Scalar, Tree


class OptaxSolver(AbstractInnerSolver):
    """Steps of an optax gradient transformation `tx`; its state is carried from solve to solve.

    Two rules built alike compile once. A Python number inside the rule (its learning rate) is part of
    the program; `optax.inject_hyperparams` turns it into an array. When unrolling Adam, set `eps_root`:
    its square root has no derivative at a zero gradient.
    """

    tx: StaticFunction = static(None, converter=StaticFunction)
    max_steps: int = static(100, low=1)
    tol: Number | None = number(None, low=0.0, infinite=False)

    lagged = True

    def __check_init__(self) -> None:
        if not isinstance(self.tx.value, optax.GradientTransformation):
            raise TypeError(
                "OptaxSolver(tx=...) must be an optax gradient transformation such as "
                f"optax.adam(1e-2), got {self.tx.value!r}."
            )

    def init(self, objective: ObjectiveFn, w: Tree, batch: Any) -> "_State":
        infinity = jnp.full((), jnp.inf, tree.accumulation_dtype(w))
        return _State(optax_init(self.tx, w), infinity)

    def restart(self, objective: ObjectiveFn, w: Tree, state: "_State", batch: Any) -> "_State":
        return state._replace(residual=jnp.full_like(state.residual, jnp.inf))

    def step(
        self, objective: ObjectiveFn, w: Tree, state: "_State", batch: Any
    ) -> tuple[Tree, "_State"]:
        value, gradient = jax.value_and_grad(objective)(w, batch)
        w, rule = optax_update(
            self.tx,
            gradient,
            state.rule,
            w,
            value=value,
            grad=gradient,
            value_fn=lambda u: objective(u, batch),
        )
        residual = tree.norm(jax.lax.stop_gradient(gradient))
        return w, _State(rule, residual)


class _State(NamedTuple):
    rule: Any
    residual: Scalar


def optax_init(tx: StaticFunction, w: Tree) -> Any:
    """The rule's state, strongly typed so that it keeps its type from step to step."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return jax.tree.map(_strong, tx.value.init(w))


def optax_update(
    tx: StaticFunction, gradient: Tree, state: Any, w: Tree, **extra: Any
) -> tuple[Tree, Any]:
    """One step of the rule: `(w, state)`, both with the types they came with.

    optax mixes dtypes inside, hence JAX's standard promotion whatever the caller's setting.
    """
    rule = optax.with_extra_args_support(tx.value)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        updates, new = rule.update(gradient, state, w, **extra)
        new_w = optax.apply_updates(w, updates)
    keep = lambda value, like: jnp.asarray(value, jnp.result_type(like))
    return jax.tree.map(keep, new_w, w), jax.tree.map(keep, new, state)


def _strong(leaf: Any) -> Array:
    leaf = jnp.asarray(leaf)
    return jax.lax.convert_element_type(leaf, leaf.dtype)
