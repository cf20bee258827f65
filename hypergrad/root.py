"""Any solver's result as a differentiable function, by the implicit function theorem."""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from solvers import CG, GMRES, AbstractLinearSolver, Status, tree
from solvers.status import explain
from solvers.types import MatVec, Tree


def implicit(
    solve: Callable[..., Tree],
    optimality: Callable[..., Tree],
    *,
    like: Tree | None = None,
    symmetric: bool = False,
    linear_solver: AbstractLinearSolver | None = None,
    tol: float | None = None,
) -> Callable[..., Tree]:
    """`solve` with derivatives: `w(*args)` with `optimality(w, *args) = 0`, whatever happens inside `solve`.

    With J the Jacobian of the optimality map r in w, `dw = -J^-1 (dr/dargs) dargs`, in forward and in
    reverse mode (then with J'), as often as r is differentiable. Works under `jit` and `vmap`.

    Args:
      solve: `(*args) -> w`. Never differentiated: a loop of unknown length will do.
      optimality: `(w, *args) -> r` like w, zero at the solution and with an invertible Jacobian in `w`
        there. `bilevel.optimality` makes it from a loss, a prox, a projection or constraints.
      like: arrays, or `jax.ShapeDtypeStruct`s, like the result. Where given, `solve` is called from Python
        with NumPy arrays, so that it may be SciPy, scikit-learn or any compiled code (no side effects).
      symmetric: J is symmetric and positive definite, as for the gradient of a loss at a strict minimum.
      linear_solver: of the systems with J; default `CG` where symmetric, else `GMRES`.
      tol: largest 2-norm of r that passes for a solution; default 1e-6 in float64, else 1e-3.

    Where r is larger, or the linear solver fails (a singular J, negative curvature in a symmetric one), the
    derivative is NaN, and a warning says why: it is no number to go on with. The result itself is what
    `solve` returned. A bilevel problem in this form has no error estimate; `hypergradient` has.

    Cost of a derivative: one linear solve, each step a product with J or J'; memory as the linear solver.
    Raises TypeError or ValueError, at the first call, for an optimality that is not like w.
    Source: Blondel et al. 2022; the linear system as a node of its own, so that forward mode works too.
    """
    for name, value in (("solve", solve), ("optimality", optimality)):
        if not callable(value):
            raise TypeError(f"implicit({name}=...) must be a function, got {value!r}.")
    if linear_solver is None:
        linear_solver = CG() if symmetric else GMRES()
    if not isinstance(linear_solver, AbstractLinearSolver):
        raise TypeError(
            f"implicit(linear_solver=...) must be one such as bilevel.CG(), got {linear_solver!r}."
        )
    if tol is not None and not tol > 0:
        raise ValueError(f"implicit(tol=...) must be above zero, got {tol!r}.")
    run = solve if like is None else functools.partial(_call_from_python, solve, _shapes(like))
    linear = linear_solver

    @eqx.filter_custom_jvp
    def solution(*args: Any) -> Tree:
        w = jax.tree.map(jnp.asarray, run(*args))
        _check(optimality, w, args)
        return w

    @solution.def_jvp
    def _(primals: tuple, tangents: tuple) -> tuple[Tree, Tree]:
        w = solution(*primals)
        residual, product = jax.linearize(lambda w: optimality(w, *primals), w)
        _, change = eqx.filter_jvp(lambda *args: optimality(w, *args), primals, tangents)
        # Parts that no argument moves have no tangent.
        change = jax.tree.map(
            lambda leaf, moved: jnp.zeros_like(leaf) if moved is None else moved, w, change
        )
        distance = tree.norm(jax.lax.stop_gradient(residual))
        limit = tol if tol is not None else (1e-6 if tree.epsilon(w) < 1e-10 else 1e-3)

        # One vector, since JAX transposes the system of a tree only where every leaf of it moves.
        flat, unflatten = tree.flatten(change)

        def flat_product(v: Array) -> Array:
            return tree.flatten(product(unflatten(v)))[0]

        def solve_system(product: MatVec, b: Array) -> Array:
            key = jax.random.key(0)
            state = linear.init(product, b, key)
            x, info = linear.solve(product, b, jnp.zeros_like(b), state, key)
            failed = lambda status: f"of its linear system: {explain(int(status))}"
            # A right-hand side that is not finite has had its warning.
            audible = tree.all_finite(b)
            return _or_nan(x, info.status == Status.OK, failed, info.status, audible)

        moved = jax.lax.custom_linear_solve(
            flat_product, flat, solve_system, transpose_solve=solve_system, symmetric=symmetric
        )
        unsolved = lambda distance: (
            f"the optimality map has norm {float(distance):.3g} at what solve returned, above tol = "
            f"{limit:g}: solve more exactly, or give a larger tol."
        )
        # False for NaN.
        return w, _or_nan(unflatten(-moved), distance <= limit, unsolved, distance)

    return solution


def _or_nan(
    x: Tree,
    good: Array,
    explanation: Callable[[Any], str],
    detail: Array,
    audible: Array | bool = True,
) -> Tree:
    """x where `good`, else NaN and, where `audible`, a warning that explains the detail."""

    def warn(silent: Any, detail: Any) -> None:
        if not silent:  # under `vmap` it is called for each of the batch
            text = f"bilevel.implicit: the derivative is NaN, because {explanation(detail)}"
            warnings.warn(text, stacklevel=2)

    silent = good | ~jnp.asarray(audible)
    jax.lax.cond(silent, lambda: None, lambda: jax.debug.callback(warn, silent, detail))
    # A factor, and no `where`: the transpose has to become NaN too.
    factor = jnp.where(good, 1.0, jnp.nan)
    return jax.tree.map(lambda leaf: leaf * factor.astype(leaf.dtype), x)


def _shapes(like: Tree) -> Tree:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype), like)


def _call_from_python(solve: Callable[..., Tree], shapes: Tree, *args: Any) -> Tree:
    def call(*args: Any) -> Tree:
        found = solve(*jax.tree.map(np.asarray, args))
        return jax.tree.map(_fitted, shapes, found)

    return jax.pure_callback(call, shapes, *args, vmap_method="sequential")


def _fitted(shape: jax.ShapeDtypeStruct, found: Any) -> np.ndarray:
    array = np.asarray(found, shape.dtype)
    if array.shape != shape.shape:
        raise ValueError(
            f"implicit(like=...) says {shape.shape}, but solve returned {array.shape}."
        )
    return array


def _check(optimality: Callable[..., Tree], w: Tree, args: tuple) -> None:
    """Raises TypeError for a `w` that is not floating point, ValueError for a map that is not like it."""
    for leaf in jax.tree.leaves(w):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise TypeError(f"implicit: solve must return floating-point arrays, got {leaf!r}.")
    describe = lambda x: jax.tree.map(lambda leaf: (jnp.shape(leaf), str(leaf.dtype)), x)
    expected, found = describe(w), describe(eqx.filter_eval_shape(optimality, w, *args))
    if expected != found:
        raise ValueError(
            f"implicit: optimality(w, ...) must be like w, {expected}, but it is {found}."
        )
