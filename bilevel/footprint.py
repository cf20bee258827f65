"""How much memory a compiled program needs, and the engine setting that fits a budget."""

import dataclasses
import logging
from collections.abc import Callable
from typing import Any, cast

import jax
from jax import Array

from hypergrad import AbstractEngine

logger = logging.getLogger("bilevel")


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one compiled call, by XLA's own account; no program was run."""

    engine: AbstractEngine
    """The engine that was compiled: with a `memory_budget`, what it was resolved to."""
    temporary: int
    """Buffers that live only while it runs: what checkpoints change."""
    arguments: int
    outputs: int

    @property
    def peak(self) -> int:
        """All three: what must be there at once."""
        return self.temporary + self.arguments + self.outputs

    def __repr__(self) -> str:
        parts = ("temporary", "arguments", "outputs", "peak")
        return f"Memory({', '.join(f'{name}={size(getattr(self, name))}' for name in parts)})"


def size(count: int) -> str:
    """A number of bytes for people."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count} B"


def measured(program: Any, engine: AbstractEngine, *args: Any) -> Memory:
    """The memory of `program(engine, *args)`, a `filter_jit` function, compiled and not run."""
    analysis = program.lower(engine, *args).compile().compiled.memory_analysis()
    if analysis is None:
        raise RuntimeError(
            f"the backend {jax.default_backend()} does not say how much memory a program needs."
        )
    return Memory(
        engine,
        analysis.temp_size_in_bytes,
        analysis.argument_size_in_bytes,
        analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
    )


def fitted(program: Callable[..., Any], engine: AbstractEngine, *args: Any) -> Memory:
    """The first of the engine's settings, from the fastest on, whose program is within its budget.

    Raises ValueError where none is. Compiles each setting that is tried; choices are remembered.
    """
    budget = getattr(engine, "memory_budget", None)
    if budget is None:
        return measured(program, engine, *args)
    name = signature(program, engine, args)
    if name not in _chosen:
        if len(_chosen) >= 256:
            _chosen.pop(next(iter(_chosen)))
        _chosen[name] = _first_that_fits(program, engine, budget, args)
    found = _chosen[name]
    # The numbers of this engine, in the setting that was chosen.
    levels = _levels(found)
    same = dataclasses.replace(cast(Any, engine), memory_budget=None, levels=levels)
    logger.info("levels=%d: %s of a budget of %s", levels, found, size(budget))
    return dataclasses.replace(found, engine=same)


def _first_that_fits(program: Any, engine: Any, budget: int, args: Any) -> Memory:
    tried: list[Memory] = []
    while True:
        setting = dataclasses.replace(engine, memory_budget=None, levels=len(tried) + 1)
        tried.append(measured(program, setting, *args))
        if tried[-1].peak <= budget:
            return tried[-1]
        # More levels cost more from here on.
        if len(tried) > 1 and tried[-1].peak >= tried[-2].peak:
            break
    least = min(tried, key=lambda memory: memory.peak)
    raise ValueError(
        f"no setting fits memory_budget={size(budget)}: the least is levels={_levels(least)} with "
        f"{size(least.peak)} ({size(least.arguments)} of it arguments: data, w, lam). Try "
        "Unrolled(truncate=K), smaller batches, fewer inner steps, Forward for a few outer variables "
        "(its memory does not grow with the steps), or Implicit."
    )


def _levels(memory: Memory) -> int:
    """Only engines with `levels` have a budget."""
    return cast(Any, memory.engine).levels


_chosen: dict[Any, Memory] = {}


def signature(program: Any, *args: Any) -> Any:
    """What names the compiled program of a call: its structure, shapes and settings, not its numbers."""
    leaves, treedef = jax.tree.flatten(args)
    shapes = [(x.shape, x.dtype) if isinstance(x, Array) else x for x in leaves]
    return id(program), treedef, tuple(shapes)
