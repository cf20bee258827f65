"""A second opinion on a hypergradient: other engines, the dense oracle, and finite differences."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bilevel import validation
from bilevel.gradient import hypergradient
from bilevel.tuning.output import table
from hypergrad import ENGINES, AbstractEngine, BilevelProblem, Exact, Implicit
from hypergrad.base import Solver, has_prox
from solvers import LBFGS, ProximalGradient, Status, tree
from solvers.status import explain
from solvers.types import Tree

MAX_ORACLE = 1500
"""Largest size of `w` for which the dense oracle is asked."""


@dataclasses.dataclass(frozen=True)
class Row:
    """What one engine says."""

    name: str
    status: Status
    norm: float
    """2-norm of its hypergradient."""
    error_estimate: float
    """Its own estimate of its relative error; NaN where it has none."""
    bound: float
    """Certified relative error; NaN where the problem declares no constants."""
    distance: float
    """From the reference's hypergradient, relative to that one's norm; NaN where there is no reference."""
    slope: float
    """Along the direction of the differences."""
    inner_steps: int
    adjoint_steps: int
    reason: str = ""
    """Why an engine does not apply; its numbers are NaN then."""


@dataclasses.dataclass(frozen=True)
class Check:
    """The table; printed, it is one for people."""

    rows: list[Row]
    reference: str
    """Whose hypergradient the others are compared with."""
    difference: float
    """`(Phi(lam + h v) - Phi(lam - h v)) / (2 h)`, inner problems solved anew, each value corrected to
    second order; v is the direction of the reference's hypergradient, plus one in which every entry of `lam` moves, in
    proportion to itself: a part of the derivative that is missing shows."""
    difference_error: float
    """How far two step lengths, h and h/2, disagree, relative to the difference."""
    agreed: bool
    """Whether the reference's slope is the difference, within 1 % and ten times its own error."""

    def __repr__(self) -> str:
        header = ["engine", "status", "norm", "own estimate", "bound", f"from {self.reference}"]
        header += ["slope", "inner steps", "adjoint steps"]
        lines = []
        for row in self.rows:
            numbers = (row.norm, row.error_estimate, row.bound, row.distance, row.slope)
            steps = (str(row.inner_steps), str(row.adjoint_steps))
            status = "-" if row.reason else row.status.name
            lines.append([row.name, status, *map(_number, numbers), *steps])
        verdict = "agree" if self.agreed else "DISAGREE"
        text = [
            table(header, lines),
            f"slope by differences {_number(self.difference)} (to {_number(self.difference_error)}): "
            f"{self.reference} and differences {verdict}",
        ]
        text += [f"{row.name} does not apply: {row.reason}" for row in self.rows if row.reason]
        failed = {row.status for row in self.rows if row.status != Status.OK}
        text += [explain(status) for status in sorted(failed)]
        return "\n".join(text)


def check(
    problem: BilevelProblem,
    lam: Tree,
    w: Tree | None = None,
    *,
    solver: Solver | str | None = None,
    engines: Iterable[str] | Mapping[str, AbstractEngine] | None = None,
    step: float = 1e-4,
    key: Array | None = None,
) -> Check:
    """Compare the engines' hypergradients at `lam` with each other, an oracle and finite differences.

    Args:
      problem, lam, w, key: as in `hypergradient`.
      solver: inner solver for the engines that take any; the others, and None, use their defaults.
      engines: names, or engines by a name of yours; None is all that are registered
        and work with an inner solver, but for `Exact`, the oracle, and `ES`, whose error is noise.
      step: length of the differences relative to `1 + ||lam||`; shortened so that no entry of `lam` moves by
        more than a tenth of itself.

    The reference is the dense oracle where `w` has at most 1500 entries and the inner problem is smooth, else
    `Implicit`. It costs a few
    hypergradients and five more inner solves; nothing here raises for a status that is not OK.

    Raises TypeError or ValueError for bad input.
    """
    if not np.isfinite(step) or step <= 0:
        raise ValueError(f"step must be a positive number, got {step!r}.")
    chosen = _engines(engines)
    validation.problem(problem)
    lam = validation.variables("lam", lam)
    key = jax.random.key(0) if key is None else key
    w = validation.start(problem, w, lam, key)

    def solve(engine: AbstractEngine, lam: Tree):
        own = solver if engine.needs_implicit else None
        return hypergradient(problem, lam, w, solver=own, engine=engine, key=key, throw=False)

    implicit = solve(Implicit(), lam)
    nonsmooth = has_prox(problem)
    dense = tree.size(w) <= MAX_ORACLE and not nonsmooth
    reference = solve(Exact(), lam) if dense else implicit
    size = float(tree.norm(reference.grad))
    direction = _direction(lam, reference.grad, key)

    def value(lam: Tree) -> float:
        long = ProximalGradient(max_steps=10_000) if nonsmooth else LBFGS(max_steps=1000)
        h = hypergradient(problem, lam, w, solver=long, key=key, throw=False)
        return float(h.info.corrected_value)

    difference, error = _difference(value, lam, direction, step)
    rows = []
    for name, engine in chosen.items():
        try:
            h = implicit if engine == Implicit() else solve(engine, lam)
        except (TypeError, ValueError) as refusal:
            rows.append(_refused(name, str(refusal)))
            continue
        info = h.info
        distance = float(tree.norm(tree.sub(h.grad, reference.grad))) / max(size, 1e-300)
        rows.append(
            Row(
                name,
                Status(int(info.status)),
                float(tree.norm(h.grad)),
                float(info.error_estimate),
                float(info.bound),
                distance,
                float(tree.vdot(h.grad, direction)),
                int(info.inner.num_steps),
                int(info.adjoint_steps),
            )
        )
    allowed = 0.01 + 10 * error
    slope = float(tree.vdot(reference.grad, direction))
    agreed = abs(slope - difference) <= allowed * max(abs(difference), abs(slope))
    name = "exact" if dense else "implicit"
    return Check(rows, name, difference, error, bool(agreed))


def _engines(engines: Any) -> dict[str, AbstractEngine]:
    if engines is None:
        # One step of a single-loop method is no hypergradient to compare, nor one that starts from elsewhere; an
        # evolution strategy is noise.
        others = ("exact", "es", "bda", "iaptt")
        engines = [
            name for name, kind in ENGINES.items() if kind.uses_solver and name not in others
        ]
    if isinstance(engines, str):
        raise TypeError(f"engines must be several names or a mapping, got the string {engines!r}.")
    if isinstance(engines, Mapping):
        return {name: validation.engine(engine) for name, engine in engines.items()}
    return {name: validation.engine(name) for name in engines}


def _direction(lam: Tree, grad: Tree, key: Array) -> Tree:
    """Of length 1: along the hypergradient, and uphill along all entries of `lam`, with random signs."""
    flat, unflatten = tree.flatten(lam)
    along = tree.flatten(grad)[0].astype(flat.dtype)
    along = along / jnp.maximum(jnp.linalg.norm(along), jnp.finfo(flat.dtype).tiny)
    everywhere = jnp.where(flat == 0, 1.0, jnp.abs(flat)).astype(flat.dtype)
    everywhere = everywhere * jax.random.rademacher(key, flat.shape, flat.dtype)
    everywhere = everywhere / jnp.linalg.norm(everywhere)
    uphill = jnp.where(along @ everywhere < 0, -everywhere, everywhere)
    return unflatten((along + uphill) / jnp.linalg.norm(along + uphill))


def _difference(
    value: Callable[[Tree], float], lam: Tree, direction: Tree, step: float
) -> tuple[float, float]:
    """Central difference of the corrected outer value along `direction`, and its relative error."""
    h = step * (1 + float(tree.norm(lam)))
    flat, along = (np.asarray(tree.flatten(x)[0], float) for x in (lam, direction))
    moves = (along != 0) & (flat != 0)
    h = min(h, 0.1 * np.min(np.abs(flat[moves] / along[moves]), initial=np.inf))

    def at(t: float) -> float:
        return value(tree.axpy(jnp.asarray(t, float), direction, lam))

    coarse, fine = ((at(t) - at(-t)) / (2 * t) for t in (h, h / 2))
    return fine, abs(fine - coarse) / max(abs(fine), 1e-300)


def _refused(name: str, reason: str) -> Row:
    nan = float("nan")
    return Row(name, Status.OK, nan, nan, nan, nan, nan, 0, 0, reason)


def _number(value: float) -> str:
    return "-" if np.isnan(value) else f"{value:.3g}"
