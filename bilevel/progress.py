"""Progress of a run on standard error."""

import sys
import time
from types import TracebackType
from typing import Any, Self

import jax
import numpy as np

from bilevel.footprint import size
from bilevel.live import Panel, Seen, View, gauge
from bilevel.result import History

try:
    import resource
except ImportError:  # Windows
    resource = None


def work(rows: History) -> str:
    """Of a chunk: the last error estimate, inner and adjoint steps of an outer step, and how busy the lanes were."""
    known = rows.error_estimate[np.isfinite(rows.error_estimate)]
    error = f" (error {known[-1]:.1g})" if len(known) else ""
    useful, spent = rows.inner_steps.sum(dtype=float), rows.lane_steps.sum(dtype=float)
    lanes = f"  lanes {100 * useful / spent:.0f}% busy" if spent > useful else ""
    steps = f"  inner {rows.inner_steps.mean():.3g}  adjoint {rows.adjoint_steps.mean():.3g}"
    return f"{error}{steps}{lanes}"


def memory() -> str:
    """The most that was in use so far: on the fullest device, where its backend says so, else by the process."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    used = max(one.get("peak_bytes_in_use", 0) for one in stats)
    if used:
        of = max(one.get("bytes_limit", 0) for one in stats)
        return f"  device {size(used)}" + (f" of {size(of)}" if of else "")
    if resource is None:
        return ""
    unit = 1 if sys.platform == "darwin" else 1024
    return f"  memory {size(unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)}"


PANEL = "panel"


class Progress:
    """Step, outer value, gradient norm, memory, elapsed and remaining seconds; a context manager.

    On a terminal with rich: one line that is redrawn, and goes on ticking while a program compiles; with
    `show="panel"` a box (`bilevel.live`). Otherwise a plain line for each update. `show=None` shows only where
    standard error is a terminal; `num_steps=None` is a number that nobody knows beforehand.

    Raises ImportError for a panel on a terminal without rich.
    """

    def __init__(self, show: bool | str | None, num_steps: int | None) -> None:
        terminal = sys.stderr.isatty()
        self.show = terminal if show is None else bool(show)
        self.panel = Panel() if show == PANEL and terminal else None
        self.num_steps = num_steps
        self.began = time.perf_counter()
        self.first: tuple[int, float] | None = None
        self.text, self.memory = "compiling", ""
        self.step = 0
        self.live = self._live() if self.show and terminal and num_steps != 0 else None

    def _live(self) -> Any:
        try:
            from rich.console import Console
            from rich.live import Live
            from rich.text import Text
        except ImportError as error:
            if self.panel is not None:
                raise ImportError(
                    "progress='panel' needs the package rich: pip install 'bilevel[tune]', or progress=True."
                ) from error
            return None
        view = None if self.panel is None else View(self.panel, self._head, self._foot)
        line = lambda: Text(self._line(), no_wrap=True, overflow="ellipsis")
        # In place, not on a screen of its own: what warnings and callbacks print stays above it.
        return Live(
            console=Console(stderr=True),
            get_renderable=line if view is None else lambda: view,
            refresh_per_second=4,
        )

    def _head(self, width: int) -> list[tuple[str, str]]:
        """Of the panel: how far the run is."""
        if self.num_steps is None:
            return [("step", f"{self.step}")]
        bar = gauge(self.step, self.num_steps, min(width - 20, 40)) if width > 30 else ""
        return [("step", f"{self.step} of {self.num_steps}  {bar}")]

    def _foot(self) -> list[tuple[str, str]]:
        now = time.perf_counter()
        left = self._left(now)
        left = "" if left is None else f", about {left:.0f} s left"
        name, _, used = self.memory.strip().partition(" ")
        used = [(name, used)] if used else []
        told = self.panel is not None and self.panel.last is not None
        compiling = [] if told else [("", self.text)]
        return [*compiling, *used, ("time", f"{now - self.began:.1f} s{left}")]

    def __enter__(self) -> Self:
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.live is not None:
            self.live.stop()

    def update(
        self,
        step: int,
        outer_value: float,
        grad_norm: float,
        work: str = "",
        seen: Seen | None = None,
    ) -> None:
        """What the run has reached after `step` steps, and the `work` it took; `seen` is for a panel."""
        self.step = step
        if self.panel is not None and seen is not None:
            self.panel.add(seen)
        self.text = f"outer {outer_value:.6g}  |hypergradient| {grad_norm:.3g}{work}"
        if self.show:
            self.memory = memory()
        if self.first is None:  # the first chunk holds the compile time
            self.first = (step, time.perf_counter())
        if self.live is not None:
            self.live.refresh()
        elif self.show:
            print(self._line(), file=sys.stderr, flush=True)

    def _line(self) -> str:
        now = time.perf_counter()
        of, left = "", ""
        if self.num_steps is not None:
            of = f"/{self.num_steps}"
            seconds = self._left(now)
            left = "" if seconds is None else f"  {seconds:.0f} s left"
        return f"step {self.step}{of}  {self.text}{self.memory}  {now - self.began:.1f} s{left}"

    def _left(self, now: float) -> float | None:
        """Seconds that are left at the pace after the first chunk; None where nobody knows."""
        if self.num_steps is None or self.first is None or self.step <= self.first[0]:
            return None
        pace = (now - self.first[1]) / (self.step - self.first[0])
        return pace * (self.num_steps - self.step)
