"""Backpropagation through the inner solver's steps, all of them or the last few."""

from typing import Any, NamedTuple
from typing import cast as cast_type

import jax
import jax.numpy as jnp
from jax import Array

from hypergrad.base import (
    AbstractEngine,
    BilevelProblem,
    Hypergradient,
    Solver,
    check_proximal,
    check_settings,
    has_prox,
    make_info,
    make_solver,
)
from hypergrad.derivatives import hessian_product
from hypergrad.watch import Watched, no_peak
from solvers import AbstractInnerSolver, GradientDescent, Mapping, Status, tree
from solvers.fields import Number, cast, number, static
from solvers.loops import fixed_budget, judge, run_steps
from solvers.status import where
from solvers.types import Objective, Sampler, Tree


def _bytes(value: Any) -> Any:
    """A size such as "500MB", "2GB" or "1.5GiB" in bytes; numbers are bytes already."""
    if not isinstance(value, str):
        return value
    units = {"KB": 1e3, "MB": 1e6, "GB": 1e9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "B": 1}
    text = value.strip().upper()
    for unit, factor in units.items():
        if text.endswith(unit):
            try:
                return int(float(text[: -len(unit)]) * factor)
            except ValueError:
                break
    raise ValueError(f"memory_budget must be bytes or a size such as '500MB', got {value!r}.")


class Unrolled(AbstractEngine):
    """The exact derivative of `outer(w_T(lam), lam)` after T = `solver.max_steps` steps from `w`.

    Class: any solver without a line search; no convexity. The whole state of the solver is
    differentiated, so outer variables may be its learning rate (`solver` as a function of lam) or the
    start (`Problem(inner_init=...)`). `tol` is ignored. The derivative is that of the T-step problem;
    `info.error_estimate` says how far it is from the derivative of the converged one.

    `levels` is how much is recomputed instead of stored: 1 keeps the state before each of the T steps; 2 about
    2 sqrt(T) states, for one more forward pass; L about L T^(1/L) states, for L - 1 more. From 256 steps on, a
    few steps whose intermediates are small store them together, and count as one.
    `checkpoint=False` stores all intermediates. `memory_budget="2GB"` (or bytes)
    replaces `levels`: before it runs, `hypergradient` or `run` compiles with 1, 2, ... levels and takes the
    first whose memory fits, by XLA's own account; where none does they raise ValueError.

    `truncate=K` differentiates the last K steps only; at a fixed point of gradient descent this is the
    K-term Neumann series, with an error of order `(1 - learning_rate mu)^K` (`bilevel.truncation` chooses
    K). `mixture`, an array of K weights, gives `sum_k mixture[k-1] grad_k`, with grad_k that of `truncate=k`
    (`dF/dlam` included in each), in the one backward pass of K steps.

    `window="random"`: the training ends after n steps, n drawn from `key` uniformly from `truncate`, ..., T, and its
    last `truncate` steps are differentiated, the start too where they are all. The mean over n is the mean of the
    truncated derivatives of trainings of all these lengths: biased as each of them is, but no longer
    towards settings for the end of the training alone. `h.w` is w_n, `info.outer_value` its outer value, and
    `info.inner.num_steps` n: outer values of two calls are not comparable. It takes `(T + K) / 2` steps on average.

    A derivative of the outer loss in the inner variable that grows by more than `max_growth` anywhere on its way
    back through the steps is DIVERGED: the training is chaotic, and its derivative, though
    correct, says nothing about any step that is not tiny. `info.peak_growth` is that factor, and
    `info.growth` that of the whole way.

    Where the problem declares `constants`, `info.bound` bounds the distance from the derivative of the
    converged problem, truncation included: a shift of the inner gradient, common to all steps, has the
    derivative q, which solves `H q = dF/dw` up to what the truncation and the steps leave, and that is
    measured (`info.adjoint_residual`).

    Each solve starts with a fresh solver state, so the result depends on `w` and `lam` alone.

    Cost: about four gradients per differentiated step (levels = 1), one more for each further level.
    Source: Franceschi et al. 2017 (reverse); Shaban et al. 2019 (truncated); Griewank and Walther 2000
    (checkpoints); Bonnet et al. 2021 (mixtures); Feng, Vedantam and Kempe 2024 (random windows).
    """

    truncate: int | None = static(None, low=1)
    checkpoint: bool = static(True)
    levels: int = static(2, low=1)
    memory_budget: int | str | None = static(None, low=1, converter=_bytes)
    mixture: Number | None = number(None)
    max_growth: Number = number(1e6, low=0.0, strict=True)
    estimate: bool | None = static(None)
    window: str = static("last")

    proximal = True
    fixed_points = True
    through_steps = True

    def __check_init__(self) -> None:
        if self.mixture is not None and self.truncate is not None:
            raise ValueError("Unrolled: mixture has its own last K; leave out truncate.")
        if self.window not in ("last", "random"):
            raise ValueError(
                f"{type(self).__name__}(window=...) must be 'last' or 'random', got {self.window!r}."
            )
        if self.window == "random" and self.truncate is None:
            raise ValueError(
                "Unrolled: window='random' needs the length of the window, truncate=K."
            )
        if self.memory_budget is not None and not self.checkpoint:
            raise ValueError("Unrolled: memory_budget chooses checkpoints; leave out checkpoint.")

    def init(
        self, problem: BilevelProblem, solver: Solver, w: Tree, lam: Tree, key: Array
    ) -> "_State":
        return _State(tree.zeros_like(w) if _certified(problem) else None)

    def step(
        self, problem: BilevelProblem, solver: Solver, w: Tree, lam: Tree, state: Any, key: Array
    ) -> tuple[Hypergradient, "_State"]:
        sampler, outer_batch = problem.inner_sampler(key), problem.outer_batch(key)
        first_solver = make_solver(solver, lam)
        if has_prox(problem):
            check_proximal(first_solver)
        total = fixed_budget(first_solver)
        length = self.truncate if self.mixture is None else jnp.size(self.mixture)
        tail = total if length is None else min(length, total)
        head = total - tail  # steps that are not differentiated
        drawn = self.window == "random" and head > 0
        skipped: Any = _drawn(key, head) if drawn else head
        levels = self.levels if self.checkpoint else 0

        def begin(lam: Tree) -> Any:
            batch = sampler(0)
            first = problem.start(w, lam, batch)
            objective = problem.inner_objective(lam)
            return first, make_solver(solver, lam).init(objective, first, batch)

        def cut(lam: Tree) -> Any:
            """The first of the differentiated steps: what came before is a constant, settings are not."""
            first, inner_state = prefix
            fresh = make_solver(solver, lam).init(problem.inner_objective(lam), *at_start)
            carry = first, jax.tree.map(_where_unchanged, inner_state, fresh)
            if not drawn:
                return carry
            return jax.tree.map(lambda a, b: jnp.where(skipped == 0, a, b), begin(lam), carry)

        if head:  # outside the differentiated function
            first, inner_state = begin(lam)
            at_start = first, sampler(0)
            objective = problem.inner_objective(lam)
            if drawn:
                one = lambda t, x: first_solver.step(objective, x[0], x[1], sampler(t))
                prefix = jax.lax.fori_loop(0, skipped, one, (first, inner_state))
            else:
                prefix = run_steps(first_solver, objective, first, inner_state, sampler, head)

        weights = None if self.mixture is None else _weights(self.mixture, tail)

        def unrolled(at: "_Point") -> tuple[Array, Tree]:
            weigh = lambda index: at.lam if weights is None else _scaled(at.lam, weights[index])
            first, inner_state = (cut if head else begin)(weigh(0))
            if weights is not None:
                check_settings("Unrolled(mixture=...)", solver, first_solver, inner_state)
            steps = _Steps(problem, solver, at.lam, at.shift, weights, head)
            indexed = Sampler(
                lambda at: (at[0], sampler.draw(at[1])),
                varies=sampler.varies,
                plan=lambda index: (index, index if sampler.plan is None else sampler.plan(index)),
            )
            first = tree.add(first, at.first)
            w_final, _ = run_steps(
                cast_type(Any, Watched(steps)),
                cast_type(Any, None),
                first,
                (inner_state, at.peak),
                indexed,
                tail,
                start=skipped,
                levels=levels,
            )
            w_final = tree.add(w_final, at.last)
            return problem.outer(w_final, weigh(-1), outer_batch), w_final

        zero = tree.zeros_like(prefix[0] if head else jax.eval_shape(begin, lam)[0])
        at = _Point(lam, zero, zero, no_peak(zero), zero if _certified(problem) else None)
        (value, w), by = jax.value_and_grad(unrolled, has_aux=True)(at)
        inner = judge(
            make_solver(solver, lam),
            problem.inner_objective(lam),
            w,
            sampler(0),
            jnp.int32(skipped + tail),
            jnp.zeros(()),
        )
        c_norm = tree.norm(by.last)
        one = jnp.ones_like(c_norm)
        scale = jnp.where(c_norm > 0, c_norm, one)
        growth, peak_growth = tree.norm(by.first) / scale, by.peak / scale
        exploded = where(peak_growth > cast(self.max_growth, growth), Status.DIVERGED)
        left = None
        if by.shift is not None:
            image = hessian_product(problem, w, lam, sampler(0))(by.shift)
            left = tree.norm(tree.sub(image, by.last)) / scale
        info = make_info(
            value,
            inner,
            by.lam,
            exploded,
            adjoint_residual=left,
            adjoint_steps=tail,
            growth=growth,
            peak_growth=peak_growth,
        )
        return Hypergradient(by.lam, w, info), _State(by.shift)

    def adjoint(self, state: "_State") -> Tree | None:
        return state.adjoint

    @classmethod
    def default_solver(cls) -> AbstractInnerSolver:
        return GradientDescent(max_steps=100, learning_rate="auto")


class _State(NamedTuple):
    adjoint: Tree | None


class _Point(NamedTuple):
    """What the unrolled function is differentiated at; all but `lam` are zero."""

    lam: Tree
    first: Tree
    """Added to the first state: its derivative is the adjoint after all steps back."""
    last: Tree
    """Added to the last one: its derivative is dF/dw."""
    peak: Array
    """Its derivative is the largest norm of the adjoint on its way."""
    shift: Tree | None
    """Taken off the inner gradient of each step."""


class _Steps(NamedTuple):
    """The solver's steps in the form of an inner solver, with what each step knows of `lam`."""

    problem: BilevelProblem
    solver: Solver
    lam: Tree
    shift: Tree | None
    weights: Array | None
    start: int

    def step(self, _: None, w: Tree, state: Any, batch: Any) -> tuple[Tree, Any]:
        index, batch = batch
        lam, shift = self.lam, self.shift
        if self.weights is not None:
            lam, shift = _scaled((lam, shift), self.weights[index - self.start])
        objective = self.problem.inner_objective(lam)
        if shift is not None:
            objective = Objective(_shifted, (objective, shift))
        return make_solver(self.solver, lam).step(objective, w, state, batch)


def _certified(problem: BilevelProblem) -> bool:
    smooth_loss = not has_prox(problem) and not isinstance(problem.inner, Mapping)
    return smooth_loss and getattr(problem, "constants", None) is not None


def _shifted(w: Tree, args: tuple[Objective, Tree], batch: Any) -> Array:
    objective, shift = args
    value = objective(w, batch)
    return value - tree.vdot(shift, w).astype(value.dtype)


def _drawn(key: Array, high: int) -> Array:
    """Uniform from 0, ..., `high`."""
    return jax.random.randint(jax.random.fold_in(key, 8), (), 0, high + 1)


def _weights(mixture: Number, num_steps: int) -> Array:
    """What each of the last steps counts: step k from the end is in all horizons of k steps or more."""
    sums = jnp.cumsum(jnp.ravel(jnp.asarray(mixture))[::-1])
    return sums[-num_steps:]


def _where_unchanged(leaf: Array, fresh: Array) -> Array:
    """`leaf`, with the derivative of `fresh` where it still is that: a setting kept in the state."""
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return leaf
    return jnp.where(leaf == fresh, fresh, leaf)


def _scaled(x: Tree, weight: Array) -> Tree:
    """`x`, with its derivative times `weight`."""

    def scale(leaf: Array) -> Array:
        fixed = jax.lax.stop_gradient(leaf)
        return fixed + cast(weight, leaf) * (leaf - fixed)

    return jax.tree.map(scale, x)
