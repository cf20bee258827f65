"""Paired timings of calls that do the same work: interleaved, compile apart from warm, JSON out."""

import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

PACKAGES = ("bilevel", "jax", "jaxlib", "jaxopt", "optax", "equinox", "numpy", "scikit-learn")


def compare(
    calls: dict[str, Callable[[], Any]],
    repeats: int,
    inner_repeats: int = 1,
    check: Callable[[str, Any], None] = lambda name, result: None,
) -> dict:
    """Times every call `repeats` times, in turn, after one cold call each (compile included).

    `check(name, result)` sees the result of each cold call and may raise. A timing is the mean over
    `inner_repeats` calls in a row, for calls of microseconds. Seconds of wall clock, and of CPU over
    all threads, which other work on the machine disturbs less.
    """
    cold = {}
    for name, call in calls.items():
        start = time.perf_counter()
        result = jax.block_until_ready(call())
        cold[name] = time.perf_counter() - start
        check(name, result)
    wall: dict[str, list[float]] = {name: [] for name in calls}
    cpu: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for repeat in range(repeats):
        # Each call takes each place in the order equally often.
        shift = repeat % len(names)
        for name in names[shift:] + names[:shift]:
            seconds, cpu_seconds = _seconds(calls[name], inner_repeats)
            wall[name].append(seconds)
            cpu[name].append(cpu_seconds)
    return {
        name: {
            "cold_seconds": cold[name],
            "warm_seconds": _summary(wall[name]),
            "warm_cpu_seconds": _summary(cpu[name]),
        }
        for name in calls
    }


def ratios(timings: dict, reference: str, kind: str = "warm_seconds") -> dict[str, float]:
    """Median of each call over the median of `reference`."""
    base = timings[reference][kind]["median"]
    return {name: timing[kind]["median"] / base for name, timing in timings.items()}


def write(path: Path, record: dict) -> None:
    """The record with the machine and the versions that made it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine(), "versions": versions(), **record}, indent=2))


def table(timings: dict, reference: str, columns: dict[str, dict[str, Any]] | None = None) -> str:
    """One line for each call: warm median [min, max] in microseconds, ratios, cold seconds."""
    relative, cpu = ratios(timings, reference), ratios(timings, reference, "warm_cpu_seconds")
    lines = []
    for name, timing in timings.items():
        warm = timing["warm_seconds"]
        low, middle, high = (1e6 * warm[k] for k in ("min", "median", "max"))
        extra = "  ".join(
            f"{key} {column.get(name, '-')}" for key, column in (columns or {}).items()
        )
        lines.append(
            f"{name:28s} {middle:9.1f} us [{low:.1f}, {high:.1f}]  x{relative[name]:.2f}"
            f" (CPU x{cpu[name]:.2f})  cold {timing['cold_seconds']:.2f} s  {extra}"
        )
    return "\n".join(lines)


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """The processor and what this process may use of it; no name of the machine."""
    device = jax.devices()[0]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "processor": _processor(),
        "cores": cores,
        "backend": device.platform,
        "device": device.device_kind,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _seconds(call: Callable[[], Any], count: int) -> tuple[float, float]:
    start, cpu_start = time.perf_counter(), time.process_time()
    for _ in range(count):
        jax.block_until_ready(call())
    return (time.perf_counter() - start) / count, (time.process_time() - cpu_start) / count


def _summary(seconds: list[float]) -> dict[str, float]:
    return {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds)}
