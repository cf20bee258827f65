"""Fields of solvers and engines: numbers are array leaves, options are static.

A number that is an array leaf can be swept with `vmap`, scheduled over outer steps and changed
without recompiling. A number may also be given as a function of the outer step (any optax schedule).
"""

import copy
import dataclasses
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from solvers.static_function import StaticFunction

T = TypeVar("T")
Number = Array | float
"""A numeric setting: given as a number, stored as an array."""


class Schedule(eqx.Module):
    """A number that depends on the outer step: `schedule(step) -> value`."""

    fn: StaticFunction = eqx.field(static=True, converter=StaticFunction)

    def __call__(self, step: Array) -> Array:
        return jnp.asarray(self.fn(step))


def number(
    default: Any,
    *,
    low: float | None = None,
    strict: bool = False,
    high: float | None = None,
    infinite: bool = True,
    **kwargs: Any,
) -> Any:
    """A numeric setting, stored as an array leaf.

    Python numbers become strongly typed floats; `None` and strings such as "auto" are kept; a
    callable becomes a `Schedule`. Values below `low` (or equal to it, if `strict`) or above `high` are refused, and
    so are booleans, and infinity unless `infinite`.
    """
    metadata = {"low": low, "strict": strict, "high": high, "infinite": infinite}
    return eqx.field(default=default, converter=_to_number, metadata=metadata, **kwargs)


def static(default: Any, *, low: int | None = None, **kwargs: Any) -> Any:
    """An option that shapes the program: changing it compiles anew. `low` bounds an integer."""
    kwargs.setdefault("converter", _from_numpy)
    return eqx.field(default=default, static=True, metadata={"int_low": low}, **kwargs)


def _from_numpy(value: Any) -> Any:
    """A NumPy scalar as a Python one: arrays must not be static."""
    return value.item() if isinstance(value, np.generic) else value


def _to_number(value: Any) -> Any:
    if value is None or isinstance(value, str | complex | Schedule) or _is_bool(value):
        return value  # what `Settings` refuses, which knows the name
    if callable(value):
        return Schedule(value)
    dtype = jnp.result_type(value) if isinstance(value, jax.Array | np.ndarray) else None
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        dtype = jnp.result_type(float)
    return as_array(value, dtype)


def as_array(value: Any, dtype: Any = None) -> Array:
    """`jnp.asarray`, but numbers and NumPy arrays are copied, and no program is compiled for each shape."""
    if isinstance(value, jax.Array):
        return jnp.asarray(value, dtype)
    return jax.device_put(np.array(value, dtype))


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool) or jnp.issubdtype(getattr(value, "dtype", float), jnp.bool_)


class Settings(eqx.Module):
    """Base of everything configured by `number` and `static` fields; checks them once, when built."""

    def __check_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            where = f"{type(self).__name__}({field.name}=...)"
            numeric = "low" in field.metadata
            int_low = field.metadata.get("int_low")
            if numeric and _is_bool(value):
                raise TypeError(f"{where} must be a number, got the boolean {value!r}.")
            missing = value is None and not _takes(field.type, type(None))
            if (numeric and (missing or isinstance(value, complex))) or (int_low and missing):
                kind = "a number or a function of the outer step" if numeric else "an integer"
                raise TypeError(f"{where} must be {kind}, got {value!r}.")
            _check_part(where, value, field.type)
            if isinstance(value, jax.Array) and not isinstance(value, Tracer):
                _check_number(where, value, field.metadata)
            if numeric and isinstance(value, str) and not _takes(field.type, str):
                raise TypeError(
                    f"{where} must be a number or a function of the outer step, got {value!r}."
                )
            flag = field.type is bool or (_takes(field.type, bool) and value is not None)
            if flag and not isinstance(value, bool):
                raise TypeError(f"{where} must be True or False, got {value!r}.")
            if int_low is not None and value is not None:
                if isinstance(value, bool) or not isinstance(value, int):
                    raise TypeError(f"{where} must be an integer, got {value!r}.")
                if value < int_low:
                    raise ValueError(f"{where} must be at least {int_low}, got {value}.")
                if value > LARGEST:
                    raise ValueError(f"{where} must be at most {LARGEST}, got {value}.")


LARGEST = 2**31 - 1
"""Of integers: counters are int32."""


def _check_part(where: str, value: Any, annotation: Any) -> None:
    """Raises TypeError where a solver or another such part is expected and something else is given."""
    kinds = typing.get_args(annotation) or (annotation,)
    parts = tuple(k for k in kinds if isinstance(k, type) and issubclass(k, eqx.Module))
    if parts and len(parts) == len(set(kinds) - {type(None)}):
        optional = value is None and type(None) in kinds
        if not (isinstance(value, parts) or optional):
            raise TypeError(f"{where} must be an instance of {parts[0].__name__}, got {value!r}.")


def _takes(annotation: Any, kind: type) -> bool:
    return kind in typing.get_args(annotation)


def _check_number(where: str, value: Array, bounds: Mapping[Any, Any]) -> None:
    numbers, low, high = np.asarray(value), bounds.get("low"), bounds.get("high")
    if np.isnan(numbers).any():
        raise ValueError(f"{where} is NaN; expected a number.")
    if not bounds.get("infinite", True) and np.isinf(numbers).any():
        raise ValueError(f"{where} must be finite, got {value}.")
    if low is not None:
        strict = bounds.get("strict", False)
        if ((numbers <= low) if strict else (numbers < low)).any():
            relation = "greater than" if strict else "at least"
            raise ValueError(f"{where} must be {relation} {low}, got {value}.")
    if high is not None and (numbers > high).any():
        raise ValueError(f"{where} must be at most {high}, got {value}.")


def at_step(tree: Any, step: Array | int) -> Any:
    """The tree with every `Schedule` in it replaced by its value at the outer step."""

    def resolve(leaf: Any) -> Any:
        return leaf(jnp.asarray(step)) if isinstance(leaf, Schedule) else leaf

    return jax.tree.map(resolve, tree, is_leaf=lambda leaf: isinstance(leaf, Schedule))


def cast(value: Any, like: Array) -> Array:
    """A setting in the dtype of the quantity it is compared or multiplied with."""
    return jnp.asarray(value).astype(jnp.result_type(like))


def unchecked(settings: T, **changes: Any) -> T:
    """A copy with other values, for values that a user may not give."""
    made = copy.copy(settings)
    for name, value in changes.items():
        object.__setattr__(made, name, value)
    return made
