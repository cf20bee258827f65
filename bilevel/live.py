"""The panel of `run(progress="panel")`: what a run has come to, in a box that is redrawn in place."""

import collections
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from bilevel.difficulty import TaskStates
from bilevel.result import History, RunState
from solvers import Status

BARS = "▁▂▃▄▅▆▇█"


class Seen(NamedTuple):
    """What a chunk brought back, beside the numbers of the line."""

    rows: History
    best: tuple[float, int]
    """The smallest outer value so far, and its step."""
    tasks: np.ndarray | None
    """The last status of each task; None without, or where other processes hold them."""


def task_statuses(state: RunState) -> np.ndarray | None:
    own = state.engine
    if not isinstance(own, TaskStates):
        return None
    elsewhere = isinstance(own.status, jax.Array) and not own.status.is_fully_addressable
    return None if elsewhere else np.asarray(own.status)


class Panel:
    """Collects what chunks bring back; `table(width)` is what is in the box. For `rich`, which it does not import."""

    def __init__(self) -> None:
        self.last: Seen | None = None
        self.values: list[float] = []
        self.inner, self.adjoint, self.useful, self.spent = 0, 0, 0, 0
        self.statuses: collections.Counter[str] = collections.Counter()
        self.error = math.nan

    def add(self, seen: Seen) -> None:
        self.last, rows = seen, seen.rows
        self.values += rows.outer_value.tolist()
        if len(self.values) > 4000:  # for a line of some hundred signs
            self.values = self.values[::2]
        self.inner += int(rows.inner_steps.sum(dtype=np.int64))
        self.adjoint += int(rows.adjoint_steps.sum(dtype=np.int64))
        self.useful = int(rows.inner_steps.sum(dtype=np.int64))
        self.spent = int(rows.lane_steps.sum(dtype=np.int64))
        self.statuses.update(_names(np.asarray(rows.status)))
        known = rows.error_estimate[np.isfinite(rows.error_estimate)]
        self.error = float(known[-1]) if len(known) else self.error

    def table(self, width: int) -> list[tuple[str, str]]:
        """Names and texts, to be shown on lines of `width` signs beside the names."""
        if self.last is None:
            return []
        rows, (best, at) = self.last.rows, self.last.best
        lines = [("outer value", f"{rows.outer_value[-1]:.6g}")]
        if at >= 0:
            lines.append(("best so far", f"{best:.6g} at step {at}"))
        lines.append(("", sparkline(self.values, width)))
        error = f"  relative error about {self.error:.1g}" if math.isfinite(self.error) else ""
        lines.append(("hypergradient", f"norm {rows.grad_norm[-1]:.3g}{error}"))
        each = lambda name: f"{getattr(rows, name).mean():.4g} per step"
        lines.append(("inner steps", f"{each('inner_steps')}, {self.inner} in all"))
        lines.append(("adjoint steps", f"{each('adjoint_steps')}, {self.adjoint} in all"))
        if self.spent > self.useful:
            lines.append(("lanes", f"{100 * self.useful / self.spent:.0f}% busy"))
        lines.append(("steps", _counts(self.statuses)))
        if self.last.tasks is not None:
            lines.append(("tasks", _counts(collections.Counter(_names(self.last.tasks)))))
        return lines


def sparkline(values: Sequence[float], width: int) -> str:
    """The values in at most `width` bars, from their smallest to their largest: means of as many values as it takes.

    What is not finite is a cross.
    """
    width = max(width, 1)
    size = -(-len(values) // width)
    groups = [values[i : i + size] for i in range(0, len(values), size or 1)]
    means = [sum(group) / len(group) for group in groups]
    finite = [value for value in means if math.isfinite(value)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    bar = lambda value: BARS[round((value - low) * scale)] if math.isfinite(value) else "x"
    return "".join(map(bar, means))


def gauge(done: int, of: int, width: int) -> str:
    """A bar of `width` signs."""
    full = round(width * min(done / of, 1.0))
    return "█" * full + "░" * (width - full)


class View:
    """The panel for rich, as wide as the console is now."""

    def __init__(self, panel: Panel, head: Any, foot: Any) -> None:
        self.panel, self.head, self.foot = panel, head, foot

    def __rich_console__(self, console: Any, options: Any) -> Any:
        from rich import box
        from rich.panel import Panel as Box
        from rich.table import Table
        from rich.text import Text

        names = 15
        width = max(options.max_width - names - 5, 10)
        table = Table.grid(padding=(0, 1))
        table.add_column(width=names, style="dim", no_wrap=True)
        table.add_column(no_wrap=True, overflow="ellipsis")
        for name, text in [*self.head(width), *self.panel.table(width), *self.foot()]:
            table.add_row(name, Text(text, style="bold" if name == "outer value" else ""))
        yield Box(table, title="bilevel", title_align="left", box=box.ROUNDED)


def _names(codes: np.ndarray) -> list[str]:
    return ["not yet" if code < 0 else Status(int(code)).name for code in codes.tolist()]


def _counts(counter: "collections.Counter[str]") -> str:
    return ", ".join(f"{count} {name}" for name, count in counter.most_common())
