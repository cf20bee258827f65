"""Checks of what people pass, before any compute: shapes, types, names. Values are not looked at."""

import dataclasses
import functools
import inspect
from typing import Any, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from bilevel.problem import Problem
from bilevel.tasks import Task, Tasks
from hypergrad import ENGINES, AbstractEngine, BilevelProblem
from hypergrad.base import Solver, check_proximal, constraints, has_prox
from solvers import (
    SOLVERS,
    AbstractInnerSolver,
    FixedPoint,
    Mapping,
    ProximalGradient,
    Solved,
    WorkingSet,
)
from solvers.fields import Settings, as_array
from solvers.tree import accumulation_dtype

FIRST_ORDER = "F2SA, Moreau(gamma=...), F3SA, MEHA, LVHBA, VPBGD, BOME or PZOBO"
"""Engines that need gradients alone."""


def count(name: str, value: Any, low: int) -> int:
    """An integer of at least `low`."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} must be an integer, got {value!r}.")
    if value < low:
        raise ValueError(f"{name} must be at least {low}, got {value}.")
    return int(value)


def seconds(name: str, value: Any) -> Any:
    """A positive number of seconds, or None."""
    number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    if value is None or (number and value > 0):
        return value
    raise ValueError(f"{name} must be a positive number of seconds, got {value!r}.")


def tolerance(name: str, value: Any) -> Any:
    """A finite number of at least 0."""
    number = isinstance(value, int | float | np.number) or (
        isinstance(value, np.ndarray | jax.Array) and value.shape == () and value.dtype != bool
    )
    if number and not isinstance(value, bool) and 0 <= value < np.inf:
        return value
    raise ValueError(f"{name} must be a finite number of at least 0, got {value!r}.")


def flag(name: str, value: Any) -> None:
    """Raises TypeError for what is neither True nor False: a word would be taken for True."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be True or False, got {value!r}.")


def progress(value: Any, *words: str) -> None:
    """Raises ValueError for what is neither True, False, None nor one of these words."""
    if value is None or isinstance(value, bool | np.bool_) or value in words:
        return
    *names, last = "True", "False", "None", *map(repr, words)
    raise ValueError(f"progress must be {', '.join(names)} or {last}, got {value!r}.")


def function(name: str, value: Any) -> None:
    """Raises TypeError for what is neither a function nor None."""
    if value is not None and not callable(value):
        raise TypeError(f"{name} must be a function or None, got {value!r}.")


def key(value: Any) -> jax.Array:
    """The key given, or `jax.random.key(0)`, uncompiled where its words are known (JAX adds that flag at run time)."""
    if value is not None:
        return value
    if jax.config.jax_default_prng_impl != "threefry2x32":  # type: ignore[attr-defined]
        return jax.random.key(0)
    return jax.random.wrap_key_data(as_array(np.zeros(2, np.uint32)), impl="threefry2x32")


def variables(name: str, tree: Any) -> Any:
    """A variable as strongly typed floating-point arrays, each leaf with its own dtype.

    Raises TypeError for leaves that are not floating point, ValueError for a tree without leaves.
    """

    def convert(path: Any, leaf: Any) -> jax.Array:
        where = f"{name}{jax.tree_util.keystr(path)}"
        if isinstance(leaf, float):
            return as_array(leaf, jnp.result_type(float))
        if not isinstance(leaf, jax.Array | np.ndarray | np.generic):
            raise TypeError(f"{where} must be a floating-point array, got {leaf!r}.")
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(f"{where} must be floating point, got dtype {leaf.dtype}.")
        if leaf.size == 0:
            raise ValueError(f"{where} is empty: shape {leaf.shape}.")
        array = as_array(leaf)
        return jax.lax.convert_element_type(array, array.dtype)  # drops a weak type

    if not jax.tree.leaves(tree):
        raise ValueError(f"{name} holds no arrays; expected a pytree of floating-point arrays.")
    return jax.tree_util.tree_map_with_path(convert, tree)


def start(problem: BilevelProblem, w: Any, lam: Any, key: jax.Array) -> Any:
    """`w` as `variables` gives it; None, where the problem has an `inner_init`, is that start.

    Raises TypeError for None where it has none.
    """
    if w is not None:
        w = variables("w", w)
        return problem.stacked(w) if isinstance(problem, Tasks) else w
    if getattr(problem, "inner_init", None) is None:
        raise TypeError("w is missing: expected a start for the inner variable, or an inner_init.")
    return variables("inner_init(lam, batch)", _initial(problem, lam, key))


@eqx.filter_jit
def _initial(problem: BilevelProblem, lam: Any, key: jax.Array) -> Any:
    if isinstance(problem, Tasks):
        return problem.initial(lam, key)
    return problem.start(None, lam, problem.inner_sampler(key)(0))


def single(settings: Any) -> None:
    """Raises ValueError for a setting that holds several numbers where one is meant."""
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if "low" in field.metadata and field.name != "mixture" and getattr(value, "ndim", 0):
            raise ValueError(
                f"{type(settings).__name__}({field.name}=...) must be one number, got shape {value.shape}: "
                "for several, use jax.vmap or bilevel.run_population."
            )
        if isinstance(value, Settings):
            single(value)


def engine(value: Any) -> AbstractEngine:
    """An engine from its instance or registry name."""
    if isinstance(value, str):
        if value.lower() not in ENGINES:
            raise ValueError(f"engine must be one of {', '.join(ENGINES)}, got {value!r}.")
        return ENGINES[value.lower()]()
    if isinstance(value, type) and issubclass(value, AbstractEngine):
        return value()
    if not isinstance(value, AbstractEngine):
        raise TypeError(f"engine must be an engine such as bilevel.Implicit(), got {value!r}.")
    single(value)
    return value


def stepping(value: Solver) -> Solver:
    """A solver for `run`."""
    if isinstance(value, Solved):
        raise ValueError(
            "solver=Solved() takes no step, but in run the solution has to follow lam."
        )
    return value


def solver(value: Any, engine: AbstractEngine, problem: BilevelProblem) -> Solver:
    """An inner solver from its instance, registry name, a function of lam, or the engine's default."""
    name = type(engine).__name__
    nonsmooth = has_prox(problem)
    if value is not None and not engine.uses_solver:
        raise ValueError(
            f"{name} moves the inner variable itself (step_size=..., inner_steps=...) and would ignore "
            f"solver={value!r}. Leave it out."
        )
    if nonsmooth and not engine.proximal:
        raise ValueError(
            f"the problem has an inner_prox, but {name} is for smooth inner problems. Use the engine "
            "Implicit or Unrolled."
        )
    held = ("inequality", "equality", "joint_projection")
    if any(getattr(problem, part, None) is not None for part in held):
        why = "the problem has constraints on w and lam together, which "
        if not engine.constrained:
            raise ValueError(f"{why}{name} would ignore. Use LVHBA.")
        if isinstance(problem, Tasks):
            raise ValueError(f"{why}Tasks cannot have: one lam belongs to the w of every task.")
    if engine.anticipates and isinstance(problem, Tasks):
        raise ValueError(
            f"{name} moves w by what lam is about to do on its account, but the lam of Tasks moves for all of "
            "them. Stack w and the data in one Problem, or use the engine Implicit."
        )
    if value is None:
        value = engine.default_solver()
        if isinstance(problem.inner, Mapping) and engine.fixed_points:
            value = FixedPoint()
        elif nonsmooth:  # cheap steps, and many of them, where none is stored
            value = ProximalGradient(max_steps=10_000 if engine.needs_implicit else 1000)
    if isinstance(value, str):
        if value.lower() not in SOLVERS:
            raise ValueError(f"solver must be one of {', '.join(SOLVERS)}, got {value!r}.")
        value = SOLVERS[value.lower()]()
    if isinstance(value, AbstractInnerSolver):
        single(value)
        if nonsmooth and engine.uses_solver:
            check_proximal(value)
        if isinstance(value, WorkingSet):
            _check_restriction(problem)
        if not value.symmetric and not isinstance(problem.inner, Mapping):
            raise ValueError(
                f"{type(value).__name__} solves w = T(w): expected the problem's inner to be "
                "bilevel.Mapping(T), not a loss."
            )
        if not value.symmetric and not engine.fixed_points:
            raise ValueError(
                f"{name} needs the derivatives of an inner loss, which {type(value).__name__} does not "
                "minimise. Use the engine Implicit or Unrolled, or a solver such as LBFGS."
            )
        if engine.through_steps and not value.unrollable:
            raise ValueError(
                f"{name} differentiates through the inner solver's steps, and "
                f"{type(value).__name__} has none, or a line search that it cannot pass. Use "
                "GradientDescent, ProximalGradient or OptaxSolver, or the engine Implicit."
            )
    elif not callable(value) or isinstance(value, type):
        raise TypeError(
            "solver must be an inner solver such as bilevel.LBFGS(), or a function lam -> solver, "
            f"got {value!r}."
        )
    elif engine.needs_implicit:
        raise ValueError(
            f"solver is a function of lam, but {name} has no derivative with respect to the inner "
            "solver's settings (it would be silently zero). Use the engine Unrolled."
        )
    if engine.needs_implicit and getattr(problem, "inner_init", None) is not None:
        raise ValueError(
            f"the problem has an inner_init, but {name} has no derivative with respect to where the "
            "inner solve starts (it would be silently zero). Use the engine Unrolled."
        )
    if not getattr(problem, "second_order", True):
        _without_curvature(engine, value)
    return cast(Solver, value)


def _check_restriction(problem: Any) -> None:
    """Raises ValueError where the problem does not say how it is restricted to some coordinates."""
    for name in ("inner_prox", "inner_restrict"):
        if getattr(problem, name, None) is None:
            raise ValueError(
                f"WorkingSet needs Problem({name}=...), which is not set. Use ProximalGradient, or LBFGS where the "
                "inner problem is smooth."
            )
    if isinstance(problem, Tasks) and problem.lanes is not None:
        raise ValueError(
            f"WorkingSet does not work on lanes: expected Tasks(lanes=None), got lanes={problem.lanes!r}."
        )


def _without_curvature(engine: AbstractEngine, solver: Any) -> None:
    """Raises ValueError for a part that needs second derivatives."""
    parts = (engine, solver) if engine.uses_solver else (engine,)
    for part in parts:
        name = type(part).__name__
        measured = [setting for setting in part.measured if isinstance(getattr(part, setting), str)]
        if part.second_order:
            found, advice = name, f"Use {FIRST_ORDER} with numbers for their step sizes."
            if part is solver:
                advice = "Use LBFGS, or GradientDescent with a number for its learning_rate."
        elif measured:
            found = f"{name}({measured[0]}='auto')"
            advice = f"Give {measured[0]} a number."
        elif isinstance(part, AbstractEngine) and part.wants_estimate():
            found, advice = f"{name}(estimate=True)", "Leave out the estimate."
        else:
            continue
        raise ValueError(
            f"the problem is declared with second_order=False, and {found} needs Hessian-vector products. "
            f"{advice}"
        )


def problem(value: Any) -> Any:
    if not isinstance(value, Problem | Tasks) and not isinstance(value, BilevelProblem):
        raise TypeError(
            f"problem must be a bilevel.Problem or bilevel.Tasks, got {type(value).__name__}."
        )
    if isinstance(value, Problem) and value.data is not None:
        raise ValueError("data='host' is for bilevel.run: expected Problem(data=None).")
    return value


def losses(problem: Any, w: Any, lam: Any) -> None:
    """Both losses must take these shapes and give a floating-point scalar. Cached by loss and shapes."""
    hint = ""
    if isinstance(problem, Tasks):
        hint = (
            f" This is the w of one of {problem.count} tasks: a w whose arrays all have that many rows is taken as a "
            "start for each, any other as one start for all."
        )
        first = lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)
        w = jax.tree.map(first, w)
        problem = Task(problem.problem, jax.tree.map(first, problem.task_data))
    if isinstance(problem, Problem):  # no trace, which takes milliseconds in every call
        data = problem.inner_data, problem.outer_data
        inner_batch, outer_batch = map(_batch, data, problem.batch_size)
    else:
        key = jax.random.key(0)
        inner_batch = eqx.filter_eval_shape(lambda p, k: p.inner_sampler(k)(0), problem, key)
        outer_batch = eqx.filter_eval_shape(lambda p, k: p.outer_batch(k), problem, key)
    for name, batch in (("inner", inner_batch), ("outer", outer_batch)):
        leaves, treedef = jax.tree.flatten((w, lam, batch))
        shapes = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
        _check_loss(getattr(problem, name), name, treedef, shapes, hint)
    step = jax.ShapeDtypeStruct((), accumulation_dtype(w))
    for name, takes, given in (
        ("inner_prox", "(v, step, lam)", (w, w, step, lam)),
        ("inner_init", "(lam, batch)", (w, lam, inner_batch)),
        ("inner_hvp", "(w, lam, batch, v)", (w, w, lam, inner_batch, w)),
        ("outer_projection", "(lam)", (lam, lam)),
    ):
        function = getattr(problem, name, None)
        if function is not None:
            leaves, treedef = jax.tree.flatten(given)
            shapes = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
            _check_like(function, name, takes, treedef, shapes)
    joint = getattr(problem, "joint_projection", None)
    if joint is not None:
        same = lambda s: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), s)
        result = eqx.filter_eval_shape(joint, w, lam)
        if not isinstance(result, tuple) or len(result) != 2 or same(result) != same((w, lam)):
            raise ValueError(
                f"joint_projection must return (w, lam), like {_describe((w, lam))}, got {_describe(result)}."
            )
        for value in jax.tree.leaves(eqx.filter_eval_shape(constraints, problem, w, lam)):
            if not jnp.issubdtype(value.dtype, jnp.floating):
                raise ValueError(f"constraints must be floating point, got {_describe(value)}.")


def _batch(data: Any, size: int | None) -> Any:
    """What a loss sees of the data: `size` rows, or all of them."""
    if size is None:
        return data
    rows = lambda leaf: jax.ShapeDtypeStruct((size, *leaf.shape[1:]), leaf.dtype)
    return jax.tree.map(rows, data)


@functools.lru_cache(maxsize=256)
def _check_loss(loss: Any, name: str, treedef: Any, shapes: tuple[Any, ...], hint: str) -> None:
    structs = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]
    w, lam, batch = jax.tree.unflatten(treedef, structs)
    try:
        inspect.signature(loss).bind(w, lam, batch)
    except TypeError as error:
        raise TypeError(f"the {name} loss must take (w, lam, batch): {error}.") from error
    except ValueError:  # no signature to look at
        pass
    try:
        result = jax.eval_shape(loss, w, lam, batch)
    except Exception as error:
        raise ValueError(
            f"the {name} loss failed on w {_describe(w)}, lam {_describe(lam)}, batch "
            f"{_describe(batch)}: {type(error).__name__}: {error}.{hint}"
        ) from error
    scalar = getattr(result, "shape", None) == ()
    if not scalar or not jnp.issubdtype(result.dtype, jnp.floating):
        raise ValueError(
            f"the {name} loss must return a floating-point scalar, got {_describe(result)}.{hint}"
        )


@functools.lru_cache(maxsize=256)
def _check_like(
    function: Any, name: str, takes: str, treedef: Any, shapes: tuple[Any, ...]
) -> None:
    """Raises ValueError unless `function(*given)` is like `expected`, of the tree `(expected, *given)`."""
    structs = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]
    expected, *given = jax.tree.unflatten(treedef, structs)
    kind = "lam" if name == "outer_projection" else "w"
    must = f"{name} must take {takes} and return what is like {kind}, {_describe(expected)}"
    try:
        result = jax.eval_shape(function, *given)
    except Exception as error:
        shown = ", ".join(map(_describe, given))
        raise ValueError(f"{must}; on {shown}: {type(error).__name__}: {error}") from error
    same = lambda s: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), s)
    if same(result) != same(expected):
        raise ValueError(f"{must}, got {_describe(result)}.")


def _describe(tree: Any) -> str:
    shown = jax.tree.map(lambda s: f"{s.dtype}[{','.join(map(str, s.shape))}]", tree)
    return str(shown).replace("'", "")


def is_traced(*trees: Any) -> bool:
    """Whether any leaf is a tracer: the call is inside `jit`, `vmap` or `grad`."""
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(trees))
