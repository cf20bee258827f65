"""BSVRB: many inner problems under one outer variable, a few of which are looked at in each step."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from hypergrad.base import AbstractEngine, BilevelProblem, Hypergradient, Solver, make_info
from hypergrad.derivatives import hessian_product, outer_value_and_grads
from hypergrad.single_loop import MEASURING, Cost, relative
from hypergrad.soba import adjoint_products
from solvers import SolveInfo, Status, tree
from solvers.fields import Number, cast, number, static
from solvers.linear.spectrum import largest_eigenvalue
from solvers.status import where
from solvers.types import Tree


class BSVRB(AbstractEngine):
    """`min over lam of mean_i F_i(w_i, lam)`, `w_i = argmin g_i(., lam)`, by some blocks i in each step.

    Blocks are the leading axis of every leaf of `w` and of both data, M long; the losses take any number of
    blocks, each with its slice of `w`, and are means over them (so every other engine takes the same problem).
    In each step `blocks` of them are drawn without repeats (None: all), and of each block `rows` of the second axis
    of its data, with repeats (None: all). For each drawn block, on one batch at this and the last point (MSVR),
    `d <- (1 - rate) d + rate now + correction (now - before)`, the first time `d = now`. `correction="auto"` is
    `(M - B) / (B (1 - rate)) + 1 - rate`, B = `blocks`: no part of the change is then lost on average.

    - `hessian="linear"` (v2): s_i of `dg_i/dw`, u_i of `H_i v_i - dF_i/dw`; `v_i -= r u_i` and
      `w_i -= s (steps since its last turn) s_i`, of the drawn ones; p_i = v_i. `adjoint_step=None` is r = s.
    - `hessian="dense"` (v1): s_i, and H_i of the Hessian, its eigenvalues raised to `floor`; `p_i = H_i^-1 dF_i/dw`;
      every `w_i -= s s_i`, also of those not drawn.

    `grad = m`, `m <- (1 - outer_rate) (m - G before) + G now`, G the mean over the drawn blocks of
    `dF_i/dlam - C_i p_i`, with the v_i or H_i before this step. With B < M the `outer_rate` has to decay, in
    the paper as `k^-2/3` (a schedule). `step_size="auto"` is `B / (2 L M)`, L the largest curvature of a block at
    the start, by 12 Lanczos products on all of the data.

    Class: smooth inner problems, strongly convex. Where a Hessian was raised to `floor`, `info.damping` says by how
    much; `grad` is biased by it. `info` is of the drawn blocks and batches, `inner.residual` the norm of the s_i / M.
    Cost per step, each over B blocks: four gradients and two Hessian-vector products, with "dense" 2 p more of them,
    p the size of a block. Memory: five copies of `w`, with "dense" two and twice M p^2.
    Source: Hu, Qiu, Guo, Zhang and Yang 2023. Departs from the paper: no ball around v_i; a block's first turn
    takes what it sees.
    """

    step_size: Number | str = number("auto", low=0.0, strict=True)
    adjoint_step: Number | None = number(None, low=0.0, strict=True)
    blocks: int | None = static(None, low=1)
    rows: int | None = static(None, low=1)
    hessian: str = static("linear")
    rate: Number = number(0.1, low=0.0, strict=True, high=1.0)
    outer_rate: Number = number(0.1, low=0.0, strict=True, high=1.0)
    correction: Number | str = number("auto", low=0.0)
    floor: Number = number(1e-3, low=0.0, strict=True)
    estimate: bool | None = static(None)

    estimates = False
    needs_implicit = True
    uses_solver = False
    rewinds = False
    measured = ("step_size",)

    def __check_init__(self) -> None:
        if self.hessian not in ("linear", "dense"):
            raise ValueError(
                f"BSVRB(hessian=...) must be 'linear' or 'dense', got {self.hessian!r}."
            )
        for name in ("step_size", "correction"):
            value = getattr(self, name)
            if isinstance(value, str) and value != "auto":
                raise ValueError(
                    f"BSVRB({name}=...) must be a positive number or 'auto', got {value!r}."
                )

    def cost(self, size: int | None = None) -> Cost:
        """Oracle calls per step, over the drawn blocks (`start_hvps`: all); `size`: entries of a block ("dense")."""
        start = MEASURING if isinstance(self.step_size, str) else 0
        if self.hessian == "linear":
            return Cost(gradients=4, hvps=2, start_hvps=start)
        if size is None:
            raise ValueError(
                "BSVRB(hessian='dense').cost() needs size=..., the entries of one block."
            )
        return Cost(gradients=4, hvps=2 * size + 2, start_hvps=start)

    def init(
        self, problem: BilevelProblem, solver: Solver, w: Tree, lam: Tree, key: Array
    ) -> "_State":
        inner, outer = self._all(problem, key)
        count = self._count(w, inner, outer)
        drawn = self.blocks or count
        like = jnp.zeros((), tree.accumulation_dtype(w))
        if isinstance(self.step_size, str):
            product = hessian_product(problem, w, lam, inner)
            curvature = count * largest_eigenvalue(product, w, jax.random.fold_in(key, 2))
            size = drawn / count * jnp.where(curvature > 0, 0.5 / curvature, 1.0)
        else:
            size = cast(self.step_size, like)
        zeros = tree.zeros_like(w)
        adjoint, u = zeros, zeros
        if self.hessian == "dense":
            p = tree.size(w) // count
            adjoint, u = jnp.broadcast_to(jnp.eye(p, dtype=like.dtype), (count, p, p)), None
        return _State(
            last=(lam, w, adjoint),
            adjoint=adjoint,
            s=zeros,
            u=u,
            m=tree.zeros_like(lam),
            seen=jnp.full(count, -1, jnp.int32),
            size=size.astype(like.dtype),
            limit=1e8 * (1 + tree.norm(w)),
            count=jnp.int32(0),
        )

    def step(
        self,
        problem: BilevelProblem,
        solver: Solver,
        w: Tree,
        lam: Tree,
        state: "_State",
        key: Array,
    ) -> tuple[Hypergradient, "_State"]:
        size = state.size if isinstance(self.step_size, str) else cast(self.step_size, state.size)
        step_v = size if self.adjoint_step is None else cast(self.adjoint_step, size)
        rate, outer_rate = cast(self.rate, size), cast(self.outer_rate, size)
        count, turn = len(state.seen), state.count
        drawn = self.blocks or count
        data = self._all(problem, key)
        keys = jax.random.split(key, 3)
        if drawn == count:
            pick, put = lambda whole: whole, lambda whole, part: part
        else:
            I = jax.random.choice(keys[0], count, (drawn,), replace=False)
            pick = lambda whole: jax.tree.map(lambda leaf: leaf[I], whole)
            put = lambda whole, part: jax.tree.map(lambda x, y: x.at[I].set(y), whole, part)
        inner, outer = (
            _rows(pick(level), self.rows, key) for level, key in zip(data, keys[1:], strict=True)
        )
        seen = pick(state.seen)
        new = seen < 0
        if isinstance(self.correction, str):
            missed = (count - drawn) / drawn
            back = jnp.where(rate < 1, missed / jnp.where(rate < 1, 1 - rate, 1.0), 0.0)
            correction = back + (1 - rate)
        else:
            correction = cast(self.correction, size)

        def tracked(old: Tree, now: Tree, before: Tree) -> Tree:
            def leaf(old: Array, now: Array, before: Array) -> Array:
                a, c = rate.astype(now.dtype), correction.astype(now.dtype)
                mixed = (1 - a) * old + a * now + c * (now - before)
                return jnp.where(new.reshape(-1, *(1,) * (now.ndim - 1)), now, mixed)

            return jax.tree.map(leaf, old, now, before)

        def oracles(lam: Tree, w: Tree, adjoint: Any) -> tuple[dict[str, Any], dict[str, Any]]:
            """Of each drawn block, and means over them; `adjoint`: the v_i, or matrices to solve with."""
            value, f_w, f_lam = outer_value_and_grads(problem, w, lam, outer)
            f_w = tree.scale(drawn, f_w)
            dense = self.hessian == "dense"
            v = _solved(adjoint, f_w) if dense else adjoint
            at = {"w": w, "lam": lam, "v": v}
            below, g, product, cross = adjoint_products(problem, at, inner)
            each: dict[str, Any] = {"s": tree.scale(drawn, g)}
            if not dense:
                each["u"] = tree.sub(tree.scale(drawn, product), f_w)
            means = {"grad": tree.sub(f_lam, cross), "f_w": f_w, "outer": value, "inner": below}
            return each, means

        w_now, last_lam = pick(w), state.last[0]
        w_last = pick(state.last[1])
        adjoint, last_adjoint = pick(state.adjoint), pick(state.last[2])
        if self.hessian == "dense":
            floor = cast(self.floor, adjoint)
            hessian = lambda lam, w: _hessians(problem, w, lam, inner, drawn)
            found, found_last = hessian(lam, w_now), hessian(last_lam, w_last)
            first = new[:, None, None]
            raised = _raised(found, floor)[0]
            adjoint = jnp.where(first, raised, adjoint)
            last_adjoint = jnp.where(first, raised, last_adjoint)
        each, means = oracles(lam, w_now, adjoint)
        each_last, means_last = oracles(last_lam, w_last, last_adjoint)

        keep = jnp.where(turn == 0, 0.0, 1 - outer_rate)
        m = tree.axpy(keep, tree.sub(state.m, means_last["grad"]), means["grad"])
        s_now = tracked(pick(state.s), each["s"], each_last["s"])
        s = put(state.s, s_now)
        report: dict[str, Any] = {}
        if self.hessian == "dense":
            now, lowest = _raised(tracked(adjoint, found, found_last), floor)
            report = {"curvature": lowest, "damping": jnp.maximum(floor - lowest, 0)}
            u, kept = None, put(state.adjoint, adjoint)
            after, moved = put(state.adjoint, now), tree.axpy(-size, s, w)
        else:
            u_now = tracked(pick(state.u), each["u"], each_last["u"])
            u, kept = put(state.u, u_now), state.adjoint
            after = put(state.adjoint, tree.axpy(-step_v, u_now, adjoint))
            since = jnp.where(new, 1, turn - seen).astype(size.dtype)

            def lead(x: Array, s: Array) -> Array:
                by = (size * since).astype(x.dtype)
                return x - by.reshape(-1, *(1,) * (x.ndim - 1)) * s

            moved = put(w, jax.tree.map(lead, w_now, s_now))
            report = {"adjoint_residual": relative(u_now, means["f_w"])}

        # Hessians are as large as the losses make them.
        grown = tree.norm((moved, m) if self.hessian == "dense" else (moved, after, m))
        residual = tree.norm(s) / count
        status = where(~jnp.isfinite(means["inner"]), Status.NONFINITE)
        cost = self.cost(tree.size(w) // count)
        info = make_info(
            means["outer"],
            SolveInfo(means["inner"], residual, jnp.int32(cost.gradients), status),
            m,
            where(grown > state.limit, Status.DIVERGED),
            where(~jnp.isfinite(grown) | ~tree.all_finite(after), Status.NONFINITE),
            adjoint_steps=cost.hvps,
            **report,
        )
        new_state = _State(
            last=(lam, w, kept),
            adjoint=after,
            s=s,
            u=u,
            m=m,
            seen=put(state.seen, jnp.full_like(seen, turn)),
            size=size,
            limit=state.limit,
            count=turn + 1,
        )
        return Hypergradient(m, moved, info), new_state

    def _all(self, problem: BilevelProblem, key: Array) -> tuple[Any, Any]:
        if getattr(problem, "batch_size", (None, None)) != (None, None):
            raise ValueError(
                "BSVRB draws its own batches: expected Problem(batch_size=None) and BSVRB(blocks=..., rows=...)."
            )
        return problem.inner_sampler(key)(0), problem.outer_batch(key)

    def _count(self, w: Tree, inner: Any, outer: Any) -> int:
        """The number of blocks. Raises ValueError where leaves differ in it."""
        lengths = set()
        for name, part in (("w", w), ("inner_data", inner), ("outer_data", outer)):
            for path, leaf in jax.tree_util.tree_flatten_with_path(part)[0]:
                where_ = f"{name}{jax.tree_util.keystr(path)}"
                need = 2 if self.rows is not None and name != "w" else 1
                if leaf.ndim < need:
                    expected = "(blocks, ...)" if need == 1 else "(blocks, rows, ...)"
                    raise ValueError(
                        f"BSVRB expects every leaf as {expected}; {where_} has shape {leaf.shape}."
                    )
                lengths.add(leaf.shape[0])
                if len(lengths) > 1:
                    raise ValueError(
                        "BSVRB expects one block for each entry of the leading axis of every leaf of w, inner_data and "
                        f"outer_data; {where_} has {leaf.shape[0]} of them, others {min(lengths - {leaf.shape[0]})}."
                    )
            if self.rows is not None and name != "w":
                second = {leaf.shape[1] for leaf in jax.tree.leaves(part)}
                if len(second) > 1:
                    raise ValueError(
                        f"BSVRB(rows=...) draws along the second axis of {name}, whose leaves differ there: "
                        f"{sorted(second)}."
                    )
        count = lengths.pop()
        if self.blocks is not None and self.blocks > count:
            raise ValueError(f"BSVRB(blocks={self.blocks}) of {count} blocks.")
        return count


class _State(NamedTuple):
    last: tuple[Tree, Tree, Any]  # lam, w and v (or H) of the last step
    adjoint: Any  # v (M, ...), or H (M, p, p)
    s: Tree
    u: Any  # None with "dense"
    m: Tree
    seen: Array  # (M,): the step of each block's last turn, -1 before
    size: Array  # the step size
    limit: Array
    count: Array


def _rows(data: Any, rows: int | None, key: Array) -> Any:
    """`rows` rows of every block, the same ones of every leaf."""
    leaves = jax.tree.leaves(data)
    if rows is None or not leaves:
        return data
    blocks, length = leaves[0].shape[:2]
    which = jax.random.randint(key, (blocks, rows), 0, length)
    return jax.tree.map(lambda leaf: jax.vmap(lambda x, i: x[i])(leaf, which), data)


def _matrix(blocks: Tree) -> Array:
    """(B, p) of a tree with leaves (B, ...)."""
    return jnp.concatenate([leaf.reshape(leaf.shape[0], -1) for leaf in jax.tree.leaves(blocks)], 1)


def _like(matrix: Array, blocks: Tree) -> Tree:
    leaves, treedef = jax.tree.flatten(blocks)
    ends = [0]
    for leaf in leaves:
        ends.append(ends[-1] + leaf[0].size)
    parts = (
        matrix[:, a:b].reshape(leaf.shape).astype(leaf.dtype)
        for a, b, leaf in zip(ends, ends[1:], leaves, strict=False)
    )
    return jax.tree.unflatten(treedef, parts)


def _hessians(problem: BilevelProblem, w: Tree, lam: Tree, batch: Any, drawn: int) -> Array:
    """(B, p, p), a column of all blocks by one product."""
    product = hessian_product(problem, w, lam, batch)
    p = tree.size(w) // drawn
    dtype = tree.accumulation_dtype(w)

    def column(basis: Array) -> Array:
        return _matrix(product(_like(jnp.broadcast_to(basis, (drawn, p)), w)))

    columns = jax.vmap(column)(jnp.eye(p, dtype=dtype))
    return drawn * jnp.moveaxis(columns, 0, 2).astype(dtype)


def _raised(matrices: Array, floor: Array) -> tuple[Array, Array]:
    """Symmetric, with no eigenvalue below `floor`; and the lowest that there was."""
    values, vectors = jnp.linalg.eigh(0.5 * (matrices + jnp.swapaxes(matrices, 1, 2)))
    raised = (vectors * jnp.maximum(values, floor)[:, None, :]) @ jnp.swapaxes(vectors, 1, 2)
    return raised, jnp.min(values)


def _solved(matrices: Array, rhs: Tree) -> Tree:
    flat = _matrix(rhs).astype(matrices.dtype)
    return _like(jnp.linalg.solve(matrices, flat[..., None])[..., 0], rhs)
