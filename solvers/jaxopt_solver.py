"""Any iterative jaxopt solver as an inner solver."""

import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from solvers import tree
from solvers.base import AbstractInnerSolver
from solvers.fields import Number, number, static
from solvers.types import ObjectiveFn, Scalar, Tree


def _as_items(options: Any) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted(dict(options or {}).items()))


class JaxoptSolver(AbstractInnerSolver):
    """Steps of a jaxopt solver for smooth objectives, by name: "LBFGS", "GradientDescent", "BFGS", ...

    `options` is a dict of jaxopt's own settings (static). The residual is the true gradient norm,
    which jaxopt's own `state.error` is not, at the cost of one more gradient per step. jaxopt is no
    longer maintained; `LBFGS` and `Newton` here do the same work.
    """

    name: str = static("LBFGS")
    max_steps: int = static(100, low=1)
    tol: Number | None = number(None, low=0.0, infinite=False)
    options: tuple[tuple[str, Any], ...] = static((), converter=_as_items)

    unrollable = False
    minibatches = False

    def __check_init__(self) -> None:
        if not hasattr(getattr(_jaxopt(), str(self.name), None), "update"):
            raise ValueError(
                f"JaxoptSolver(name=...) must name an iterative jaxopt solver, got {self.name!r}."
            )

    def init(self, objective: ObjectiveFn, w: Tree, batch: Any) -> "_State":
        with _relaxed():
            inner = self._solver(objective).init_state(w, batch)
        inner = jax.tree.map(lambda x: jax.lax.convert_element_type(x, jnp.result_type(x)), inner)
        return _State(inner, tree.norm(jax.grad(objective)(w, batch)))

    def step(
        self, objective: ObjectiveFn, w: Tree, state: "_State", batch: Any
    ) -> tuple[Tree, "_State"]:
        with _relaxed():
            new_w, inner = self._solver(objective).update(w, state.inner, batch)
        keep = lambda value, like: jnp.asarray(value, jnp.result_type(like))
        new_w = jax.tree.map(keep, new_w, w)
        inner = jax.tree.map(keep, inner, state.inner)
        return new_w, _State(inner, tree.norm(jax.grad(objective)(new_w, batch)))

    def _solver(self, objective: ObjectiveFn) -> Any:
        options = {"maxiter": self.max_steps, "tol": 0.0, **dict(self.options)}
        return getattr(_jaxopt(), self.name)(fun=lambda w, batch: objective(w, batch), **options)


class _State(NamedTuple):
    inner: Any
    residual: Scalar


def _jaxopt() -> Any:
    with warnings.catch_warnings():  # jaxopt warns at import that it is unmaintained
        warnings.simplefilter("ignore")
        import jaxopt
    return jaxopt


class _relaxed:
    """jaxopt mixes dtypes and ranks; allow it whatever the caller's setting."""

    def __enter__(self) -> None:
        self._contexts = (jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"))
        for context in self._contexts:
            context.__enter__()

    def __exit__(self, *exc: Any) -> None:
        for context in reversed(self._contexts):
            context.__exit__(*exc)
