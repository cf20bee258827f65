"""Programs whose operations run one after the other.

On CPU, XLA hands small operations to other threads, which costs programs of short steps more than it wins.
"""

import functools
from collections.abc import Callable
from typing import Any, cast

import equinox as eqx
import jax

OPTIONS = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}


def jit(function: Callable[..., Any]) -> Callable[..., Any]:
    """`eqx.filter_jit` with the option, where it is `known`."""
    return cast(Any, eqx.filter_jit)(function, compiler_options=OPTIONS)


@functools.cache
def known() -> bool:
    """Whether this backend, in this version, has the option."""
    if jax.default_backend() != "cpu":
        return False
    try:
        jax.jit(lambda: 0, compiler_options=OPTIONS).lower().compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True
