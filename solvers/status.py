"""Status codes of a computation, and what to do about each."""

import enum

import jax.numpy as jnp
from jax import Array


class Status(enum.IntEnum):
    """How a computation ended. Larger is worse, so statuses combine by `max`."""

    OK = 0
    MAX_STEPS = 1
    DIVERGED = 2
    BREAKDOWN = 3
    INDEFINITE = 4
    NONFINITE = 5


_ADVICE = {
    Status.OK: "converged.",
    Status.MAX_STEPS: (
        "the step budget ran out before the tolerance was met, so the hypergradient belongs to an "
        "unconverged solve. Try a larger `max_steps` (inner or linear solver) or `rank`, a looser `tol`/`rtol`, "
        "or `tol=0` if a fixed budget is what you want; `info.error_estimate` says how wrong it may be. "
        "With an `inner_prox` it is also said where the inner error reaches a kink of the prox "
        "(`info.margin`): solve tighter; where that changes nothing, the solution is on the kink and has "
        "no derivative there."
    ),
    Status.DIVERGED: (
        "the iteration moved away from the solution: its step is too long for the largest curvature. "
        "Try a smaller step or learning rate, or 'auto'. When unrolling, the adjoint grew on its way back "
        "through the steps by more than `max_growth` (`info.peak_growth`): the training is chaotic and its "
        "derivative no guide. Try a smaller learning rate, `truncate=K` with K steps too few to grow in, a "
        "smoother model (`bilevel.metasmoothness` names what helps), or the engine `ES`, whose smoothed outer "
        "loss has a derivative that is a guide. With Adam, a larger `eps_root` (1e-3, say): where a gradient "
        "entry is zero, a step multiplies it by up to rate * curvature / sqrt(eps_root). Such entries count "
        "even where lam cannot move them: "
        "`max_growth=inf` is right then."
    ),
    Status.BREAKDOWN: (
        "the linear system of the adjoint is singular and its right-hand side lies outside the range: "
        "the inner solution does not depend smoothly on the outer variable, as where two features are the same in the "
        "training rows and not in the held-out ones. Drop one of them, add an l2 term to the inner "
        "loss, or use `Implicit(damping=...)`, or an engine that needs no inverse (`Unrolled`). "
        "With `ES`: no perturbation of lam changed the outer loss; a larger `sigma`. With `CGD` or `Extragradient`: "
        "the inner loss is not minus the outer one."
    ),
    Status.INDEFINITE: (
        "the inner Hessian has negative curvature, so the inner point is not a minimiser. Solve the "
        "inner problem further or from another start, regularise it, use `Implicit(damping=...)` with "
        "a damping above the negative curvature, or use `Unrolled`."
    ),
    Status.NONFINITE: (
        "a NaN or infinity appeared. Look for NaN in the data, a learning rate that is too large, a "
        "logarithm or square root at zero, a penalty of an `inner_prox` below zero "
        "(`run(transform=...)` keeps it above). When unrolling Adam or another rule with a square root, set "
        "`eps_root` (`optax.adam(..., eps_root=1e-8)`; larger where that is DIVERGED): a root has "
        "no derivative at a gradient entry that is zero; nor has clipping by the norm at a zero gradient "
        "(clip by value, `optax.clip`, instead). With `ES` a perturbed lam may have left its domain: a smaller "
        "`sigma`, or logarithms in lam."
    ),
}


def explain(status: int) -> str:
    """The name of a status and what to try."""
    status = Status(int(status))
    return f"{status.name}: {_ADVICE[status]}"


def combine(*statuses: Array | int) -> Array:
    """The worst of several statuses, int32; works under `jit` and `vmap`."""
    worst = jnp.asarray(Status.OK, jnp.int32)
    for status in statuses:
        worst = jnp.maximum(worst, jnp.asarray(status, jnp.int32))
    return worst


def where(condition: Array, status: Status) -> Array:
    """`status` where the condition holds, OK elsewhere."""
    return jnp.where(condition, jnp.int32(status), jnp.int32(Status.OK))
