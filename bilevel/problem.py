"""What people write: an inner loss, an outer loss, and their data."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from bilevel.sampling import minibatch, num_rows, random_rows, take
from hypergrad.certificate import Constants
from hypergrad.levels import Slots
from solvers.fields import as_array
from solvers.types import MatVec, Objective, Sampler, Tree, constant_sampler

Loss = Callable[[Tree, Tree, Any], Array]


class Problem(eqx.Module):
    """`min over lam of outer(w*(lam), lam)`, with `w*(lam) = argmin over w of inner(w, lam)`.

    Args:
      inner, outer: losses `(w, lam, batch) -> scalar`. Pass the same function object each time: a
        fresh lambda compiles anew.
      inner_data, outer_data: pytrees of arrays, given to the losses as `batch`; None gives None. They
        are arguments of the compiled program, never constants in it.
      batch_size: rows per batch, or a pair (inner, outer); None uses all rows. `run` takes batches from a
        shuffled copy of the data (memory: once more), without repeats within a pass. A loss that needs to
        know which rows it sees (one weight per example) takes `jnp.arange(n)` as part of its data.
      data: "host" keeps the rows of a level with a batch size in the host's memory, in NumPy (`np.memmap` too): a chunk
        of `run` loads the batches that it takes, those of the next while it works, and gives the numbers of None, all
        on the device. For engines that work on batches alone, of one device.
      same_rows: both levels see the same batch, drawn once per outer step: rows that are tasks, each
        with its own training and test part and its own slice of `w` (batch_size, ...).
      inner_init: `(lam, batch) -> w`, where every inner solve starts, so that the outer variable can be
        an initialisation, or that each solve starts afresh instead of from the last solution.
      inner_hvp: `(w, lam, batch, v) -> H v`, the Hessian-vector product of `inner` in w, where it is
        known in closed form; used instead of automatic differentiation.
      inner_preconditioner: `(w, lam, batch) -> (r -> z)`, which prepares an approximation of the inverse of
        that Hessian, symmetric and positive definite: a CG without a preconditioner of its own uses it.
      inner_gauss_newton: `(w, lam, batch) -> (v -> G v)`, which prepares products with the Gauss-Newton matrix of
        `inner`, for `Implicit(gauss_newton=True)`; `bilevel.gauss_newton` makes it and the loss.
      constants: `bilevel.Constants`, or `(w, lam, inner_batch, outer_batch) -> Constants`, where they are
        known: a hypergradient of `Implicit` then comes with a certified error bound.
      inner_prox: `(v, step, lam) -> w`, the proximal operator of `step` times a nonsmooth term psi(w, lam)
        of the inner problem (see `bilevel.prox`), or a projection on its constraints. `inner` is then the
        smooth part alone: what is minimised is `inner + psi`.
      inner_restrict: `(lam, batch, indices) -> (lam, batch)`, for `WorkingSet` and a `w` of one array (d,): what makes
        of `inner` and `inner_prox` those of `w[indices]`, all other coordinates being zero; for a Lasso the columns
        `indices` of X, and of a penalty per coordinate its entries.
      inner_penalty: `(w, lam) -> scalar`, that term psi itself, for engines that need its slope in `lam`
        (`MEHA`; 0 for a projection).
      inequality, equality: `(w, lam) -> array` (or a pytree of them), constraints `<= 0` and `= 0` of the inner
        problem in which `lam` may take part, for `LVHBA`; other engines refuse them.
      joint_projection: `(w, lam) -> (w, lam)`, the nearest pair that satisfies all of them (and whatever
        else holds `w` or `lam`).
      second_order: False where the losses have no second derivatives (or must not be asked for them):
        engines, solvers and settings that need one are then refused.
      outer_projection: `lam -> lam`, applied before the first outer step of a run and after each, on the natural scale.

    Raises TypeError or ValueError for losses that are not callable, data that are not numeric or empty,
    and batch sizes that do not fit.
    """

    inner: Loss = eqx.field(static=True)
    outer: Loss = eqx.field(static=True)
    inner_data: Any = None
    outer_data: Any = None
    batch_size: Any = eqx.field(static=True, default=(None, None), kw_only=True)
    data: str | None = eqx.field(static=True, default=None, kw_only=True)
    same_rows: bool = eqx.field(static=True, default=False, kw_only=True)
    inner_init: Callable[[Tree, Any], Tree] | None = eqx.field(
        static=True, default=None, kw_only=True
    )
    inner_hvp: Callable[[Tree, Tree, Any, Tree], Tree] | None = eqx.field(
        static=True, default=None, kw_only=True
    )
    inner_preconditioner: Callable[[Tree, Tree, Any], MatVec] | None = eqx.field(
        static=True, default=None, kw_only=True
    )
    inner_gauss_newton: Callable[[Tree, Tree, Any], MatVec] | None = eqx.field(
        static=True, default=None, kw_only=True
    )
    constants: Any = eqx.field(default=None, kw_only=True)
    inner_prox: Callable[[Tree, Array, Tree], Tree] | None = eqx.field(
        static=True, default=None, kw_only=True
    )
    inner_restrict: Callable[[Tree, Any, Array], tuple[Tree, Any]] | None = eqx.field(
        static=True, default=None, kw_only=True
    )
    inner_penalty: Callable[[Tree, Tree], Array] | None = eqx.field(
        static=True, default=None, kw_only=True
    )
    outer_projection: Callable[[Tree], Tree] | None = eqx.field(
        static=True, default=None, kw_only=True
    )

    inequality: Callable[[Tree, Tree], Tree] | None = eqx.field(
        static=True, default=None, kw_only=True
    )
    equality: Callable[[Tree, Tree], Tree] | None = eqx.field(
        static=True, default=None, kw_only=True
    )
    joint_projection: Callable[[Tree, Tree], tuple[Tree, Tree]] | None = eqx.field(
        static=True, default=None, kw_only=True
    )
    second_order: bool = eqx.field(static=True, default=True, kw_only=True)

    def __post_init__(self) -> None:
        for name in ("inner", "outer"):
            if not callable(getattr(self, name)):
                raise TypeError(
                    f"Problem({name}=...) must be a function (w, lam, batch) -> scalar, "
                    f"got {getattr(self, name)!r}."
                )
        for name in ("same_rows", "second_order"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(
                    f"Problem({name}=...) must be True or False, got {getattr(self, name)!r}."
                )
        functions = (
            *("inner_init", "inner_hvp", "inner_preconditioner", "inner_gauss_newton"),
            *("inner_prox", "inner_restrict", "inner_penalty", "outer_projection"),
            *("inequality", "equality", "joint_projection"),
        )
        for name in functions:
            value = getattr(self, name)
            if value is not None and not callable(value):
                raise TypeError(f"Problem({name}=...) must be a function or None, got {value!r}.")
        if (self.inequality or self.equality) and self.joint_projection is None:
            raise ValueError(
                "Problem(inequality=..., equality=...) needs joint_projection=(w, lam) -> (w, lam), the nearest "
                "pair that satisfies the constraints."
            )
        self.constants = _constants(self.constants)
        self.batch_size = _pair(self.batch_size)
        if self.data not in (None, "host"):
            raise ValueError(f"Problem(data=...) must be 'host' or None, got {self.data!r}.")
        if self.data and (self.same_rows or self.batch_size == (None, None)):
            raise ValueError(
                "data='host' loads batches of shuffled rows: expected a batch_size, and no same_rows."
            )
        here = [self.data is None or size is None for size in self.batch_size]
        self.inner_data = as_arrays("inner_data", self.inner_data, on_device=here[0])
        self.outer_data = as_arrays("outer_data", self.outer_data, on_device=here[1])
        levels = zip(("inner_data", "outer_data"), self.batch_size, strict=True)
        for name, size in levels:
            if size is None:
                continue
            data = getattr(self, name)
            if data is None:
                raise ValueError(f"batch_size is set, but {name} is None: there are no rows.")
            rows = num_rows(data)
            if size > rows:
                raise ValueError(f"batch_size {size} is larger than the {rows} rows of {name}.")
        if self.same_rows:
            self._check_same_rows()

    def _check_same_rows(self) -> None:
        inner, outer = self.batch_size
        if inner is None or inner != outer:
            raise ValueError(
                "same_rows draws one batch for both levels: expected one batch_size, "
                f"got {self.batch_size}."
            )
        rows = num_rows(self.inner_data), num_rows(self.outer_data)
        if rows[0] != rows[1]:
            raise ValueError(
                "same_rows needs as many rows in inner_data as in outer_data, "
                f"got {rows[0]} and {rows[1]}."
            )

    def inner_objective(self, lam: Tree) -> Objective:
        own = self.inner_hvp, self.inner_prox, self.inner_preconditioner, self.inner_gauss_newton
        return Objective(self.inner, lam, *own, self.inner_restrict)

    def inner_sampler(self, key: Array) -> Sampler:
        size = self.batch_size[0]
        if size is None:
            return constant_sampler(self.inner_data)
        level = jax.random.fold_in(key, 0)
        if self.same_rows:
            return constant_sampler(minibatch(self.inner_data, size, level))
        rows = lambda step: random_rows(self.inner_data, size, jax.random.fold_in(level, step))
        return Sampler(lambda rows: take(self.inner_data, rows), varies=True, plan=rows)

    def outer_batch(self, key: Array) -> Any:
        size = self.batch_size[1]
        if size is None:
            return self.outer_data
        level = 0 if self.same_rows else 1
        return minibatch(self.outer_data, size, jax.random.fold_in(key, level))

    def slots(self) -> tuple[Slots | None, Slots | None]:
        """The numbered batches of the inner and the outer data; None where batches are shared rows."""
        if self.same_rows:
            return None, None
        (inner, outer), rows = self.batch_size, self.rows()
        return Slots(self.inner_data, inner, rows[0]), Slots(self.outer_data, outer, rows[1])

    def rows(self) -> tuple[int, int]:
        """The rows of each level that has batches, else 1."""
        levels = zip((self.inner_data, self.outer_data), self.batch_size, strict=True)
        inner, outer = (1 if size is None else num_rows(data) for data, size in levels)
        return inner, outer

    def start(self, w: Tree, lam: Tree, batch: Any) -> Tree:
        return w if self.inner_init is None else self.inner_init(lam, batch)


class Shuffled(Problem):
    """A problem with shuffled rows, the first `batch_size - 1` once more at the end: a batch is one slice.

    Rows that are spread over devices stay where they are: there are as many blocks of rows, each shuffled on its own,
    and a batch is a slice of each.
    """

    num_rows: tuple[int, int] = eqx.field(static=True, default=(1, 1), kw_only=True)
    parts: tuple[int, int] = eqx.field(static=True, default=(1, 1), kw_only=True)

    def rows(self) -> tuple[int, int]:
        return self.num_rows

    def slots(self) -> tuple[Slots, Slots]:
        (inner, outer), rows, parts = self.batch_size, self.num_rows, self.parts
        return (
            Slots(self.inner_data, inner, rows[0], True, parts[0]),
            Slots(self.outer_data, outer, rows[1], True, parts[1]),
        )

    def inner_sampler(self, key: Array) -> Sampler:
        slots = self.slots()[0]
        if slots.size is None:
            return constant_sampler(self.inner_data)
        seed = _seed(key, 0)
        return Sampler(lambda step: slots.turn(seed, jnp.asarray(step)), varies=True)

    def outer_batch(self, key: Array) -> Any:
        return self.slots()[1].turn(_seed(key, 1), jnp.int32(0))

    def starts(self, key: Array, number: int) -> tuple[Array, Array]:
        """The first rows of `number` batches of `inner_sampler(key)` and that of `outer_batch(key)`, int32."""
        levels = zip(self.slots(), (number, 1), (0, 1), strict=True)
        inner, outer = (
            jnp.zeros(0, jnp.int32)
            if slots.size is None
            else slots.turn_start(_seed(key, level), jnp.arange(count, dtype=jnp.int32))
            for slots, count, level in levels
        )
        return inner, outer


def _seed(key: Array, level: int) -> Array:
    return jax.random.bits(jax.random.fold_in(key, level), (), jnp.uint32)


def shuffled(problem: Any, key: Array, parts: tuple[int, int] | None = None) -> Any:
    """What a run works on: the problem with its rows in a random order, where it has batches of rows.

    `parts`: blocks of rows at each level; by default those that devices have. Raises ValueError for a batch size
    that is no multiple of it.
    """
    if type(problem) is not Problem or problem.same_rows or problem.batch_size == (None, None):
        return problem
    data = problem.inner_data, problem.outer_data
    parts = parts or (row_blocks(data[0]), row_blocks(data[1]))
    levels = zip(data, problem.batch_size, parts, (0, 1), strict=True)
    inner, outer = (
        part if size is None else _shuffle(part, size, blocks, key, level)
        for part, size, blocks, level in levels
    )
    names = (field.name for field in dataclasses.fields(problem))
    fields = {name: getattr(problem, name) for name in names}
    fields |= {"inner_data": inner, "outer_data": outer, "num_rows": problem.rows()}
    return Shuffled(**fields, parts=parts)


def row_blocks(data: Any) -> int:
    """How many parts the first axis of all arrays is cut into, each on devices of its own; 1 where they differ."""

    def blocks(leaf: Any) -> int:
        if isinstance(leaf, Tracer) or not isinstance(leaf, jax.Array) or not leaf.ndim:
            return 1
        return leaf.shape[0] // leaf.sharding.shard_shape(leaf.shape)[0]

    found = {blocks(leaf) for leaf in jax.tree.leaves(data)}
    return found.pop() if len(found) == 1 else 1


def _shuffle(data: Any, size: int, parts: int, key: Array, level: int) -> Any:
    rows = num_rows(data)
    if size % parts or rows % parts:
        raise ValueError(
            f"a batch takes as many rows from each of {parts} devices: expected a batch_size that is a multiple "
            f"of it, got {size}."
        )
    made = _shuffled_blocks(data, size // parts, parts, key, level)
    # Rows stay on their device; where that is does not depend on what XLA makes of it.
    return (
        made if parts == 1 else jax.tree.map(lambda x, y: jax.device_put(x, y.sharding), made, data)
    )


@functools.partial(jax.jit, static_argnums=(1, 2, 4))
def _shuffled_blocks(data: Any, size: int, parts: int, key: Array, level: int) -> Any:
    """Each block of rows in a random order, with its first `size - 1` rows once more at its end."""
    key = jax.random.fold_in(key, level)
    count = num_rows(data) // parts

    def order(key: Array) -> Array:
        rows = jax.random.permutation(key, count)
        return jnp.concatenate([rows, rows[: size - 1]])

    if parts == 1:
        rows = order(key)
        return jax.tree.map(lambda leaf: jnp.take(leaf, rows, axis=0), data)
    orders = jax.vmap(order)(jax.random.split(key, parts))

    def one(leaf: Array) -> Array:
        blocks = leaf.reshape(parts, count, *leaf.shape[1:])
        taken = jax.vmap(lambda block, rows: jnp.take(block, rows, axis=0))(blocks, orders)
        return taken.reshape(-1, *leaf.shape[1:])

    return jax.tree.map(one, data)


class _Function(eqx.Module):
    """A function as a pytree without leaves."""

    fn: Callable[..., Any] = eqx.field(static=True)

    def __call__(self, *args: Any) -> Any:
        return self.fn(*args)


def _constants(value: Any) -> Any:
    """Numbers as arrays, so that another number compiles nothing; a function as a pytree."""
    if value is None or isinstance(value, _Function):
        return value
    if isinstance(value, Constants):
        for name, number in value._asdict().items():
            if number is None or isinstance(number, Tracer):
                continue
            known = np.asarray(number, float)
            if known.shape != () or not known >= 0:
                raise ValueError(
                    f"Constants({name}=...) must be a number of at least 0, got {number!r}."
                )
        return jax.tree.map(lambda number: jnp.asarray(number, float), value)
    if callable(value):
        return _Function(value)
    raise TypeError(
        "Problem(constants=...) must be bilevel.Constants or a function that returns it, "
        f"got {value!r}."
    )


def _pair(batch_size: Any) -> tuple[int | None, int | None]:
    pair = tuple(batch_size) if isinstance(batch_size, tuple | list) else (batch_size, batch_size)
    for size in pair:
        if size is None:
            continue
        if isinstance(size, bool) or not isinstance(size, int | np.integer):
            raise TypeError(f"batch_size must be an integer or a pair of them, got {batch_size!r}.")
        if size < 1:
            raise ValueError(f"batch_size must be at least 1, got {size}.")
    if len(pair) != 2:
        raise ValueError(f"batch_size must be one integer or (inner, outer), got {batch_size!r}.")
    return tuple(None if size is None else int(size) for size in pair)  # type: ignore[return-value]


def as_arrays(name: str, data: Any, of: str = "Problem", on_device: bool = True) -> Any:
    """The data as JAX arrays, each with its own dtype; as NumPy's, unless `on_device`."""

    def convert(path: Any, leaf: Any) -> Any:
        where = f"{of}({name}=...){jax.tree_util.keystr(path)}"
        if isinstance(leaf, jax.Array) and on_device:  # covers traced arrays and keys
            array = leaf
        else:
            host = np.asarray(leaf)
            if host.dtype.kind not in "biuf" and not jnp.issubdtype(host.dtype, jnp.floating):
                raise TypeError(f"{where} must be a numeric array, got dtype {host.dtype}.")
            array = as_array(host) if on_device else host
        if array.size == 0:
            raise ValueError(f"{where} is empty: shape {array.shape}.")
        return array

    return jax.tree_util.tree_map_with_path(convert, data)
