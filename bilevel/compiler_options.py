"""What the CPU's compiler is asked for, where the default does not suit a program."""

import functools
from collections.abc import Callable, Hashable
from typing import Any, cast

import equinox as eqx
import jax

Options = tuple[tuple[str, Hashable], ...]

IN_ORDER: Options = (("xla_cpu_scheduler_type", "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"),)
"""Operations one after the other: small ones handed to other threads cost a program of short steps more than is won."""
QUICK: Options = (("xla_cpu_use_fusion_emitters", False), ("xla_backend_optimization_level", 1))
"""Compiled in little more than half of the time, for a program that runs up to a third longer and seldom."""
ONCE: Options = (("xla_cpu_use_fusion_emitters", False), ("xla_backend_optimization_level", 0))
"""Hardly optimised: compiled in half the time of `QUICK`, for a program that then runs twice as long, but once."""


def jit(function: Callable[..., Any], options: Options) -> Callable[..., Any]:
    """`eqx.filter_jit` with the options, for a backend where they are `known`."""
    return cast(Any, eqx.filter_jit)(function, compiler_options=dict(options))


@functools.cache
def known(options: Options) -> bool:
    """Whether this backend, in this version, has the options."""
    if jax.default_backend() != "cpu":
        return False
    try:
        jax.jit(lambda: 0, compiler_options=dict(options)).lower().compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True
