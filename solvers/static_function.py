"""Functions compared by what they compute, not by where they live in memory.

`optax.adam(0.1)` builds new closures on each call, so two equal rules are different jit keys and
compile twice. Here two functions are equal when their code, defaults and everything they close over
are equal; whatever cannot be compared safely falls back to identity.
"""

import functools
import types
from typing import Any

import numpy as np


class StaticFunction:
    """A callable (or a NamedTuple of callables) that hashes and compares by structure."""

    def __init__(self, value: Any):
        self.value = value.value if isinstance(value, StaticFunction) else value
        self._key = _key(self.value, ())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.value(*args, **kwargs)

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StaticFunction) and self._key == other._key

    def __repr__(self) -> str:
        return f"StaticFunction({self.value!r})"


class _Identity:
    """Equal only to itself's object; keeps the object alive so that its id is not reused."""

    def __init__(self, value: Any):
        self.value = value

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and self.value is other.value


def _key(value: Any, path: tuple[int, ...]) -> Any:
    if id(value) in path:  # a function that closes over itself
        return ("cycle", path.index(id(value)))
    path = (*path, id(value))
    if isinstance(value, types.FunctionType):
        cells = []
        for cell in value.__closure__ or ():
            try:
                cells.append(_key(cell.cell_contents, path))
            except ValueError:  # an empty cell
                cells.append(None)
        keywords = tuple(sorted((value.__kwdefaults__ or {}).items()))
        return (
            "function",
            value.__code__,
            _Identity(value.__globals__),
            _key(value.__defaults__ or (), path),
            _key(keywords, path),
            tuple(cells),
        )
    if isinstance(value, functools.partial):
        keywords = tuple(sorted(value.keywords.items()))
        return ("partial", _key(value.func, path), _key(value.args, path), _key(keywords, path))
    if isinstance(value, tuple):
        return (type(value), tuple(_key(item, path) for item in value))
    if value is None or isinstance(value, bool | int | float | complex | str | bytes | np.dtype):
        return (type(value), value)
    return _Identity(value)
