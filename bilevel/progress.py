"""Progress of a run on standard error."""

import sys
import time
from types import TracebackType
from typing import Any, Self

import numpy as np

from bilevel.result import History


def work(rows: History) -> str:
    """The last error estimate of a chunk, and the inner and adjoint steps that an outer step took."""
    known = rows.error_estimate[np.isfinite(rows.error_estimate)]
    error = f" (error {known[-1]:.1g})" if len(known) else ""
    return f"{error}  inner {rows.inner_steps.mean():.3g}  adjoint {rows.adjoint_steps.mean():.3g}"


class Progress:
    """Step, outer value, gradient norm, elapsed and remaining seconds; a context manager.

    On a terminal with rich: one line that is redrawn, and goes on ticking while a program compiles.
    Otherwise a plain line for each update. `show=None` shows only where standard error is a terminal;
    `num_steps=None` is a number that nobody knows beforehand.
    """

    def __init__(self, show: bool | None, num_steps: int | None) -> None:
        terminal = sys.stderr.isatty()
        self.show = terminal if show is None else show
        self.num_steps = num_steps
        self.began = time.perf_counter()
        self.first: tuple[int, float] | None = None
        self.text = "compiling"
        self.step = 0
        self.live = self._live() if self.show and terminal and num_steps != 0 else None

    def _live(self) -> Any:
        try:
            from rich.console import Console
            from rich.live import Live
            from rich.text import Text
        except ImportError:
            return None
        return Live(
            console=Console(stderr=True),
            get_renderable=lambda: Text(self._line(), no_wrap=True, overflow="ellipsis"),
            refresh_per_second=4,
        )

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

    def update(self, step: int, outer_value: float, grad_norm: float, work: str = "") -> None:
        """What the run has reached after `step` steps, and the `work` it took."""
        self.step = step
        self.text = f"outer {outer_value:.6g}  |hypergradient| {grad_norm:.3g}{work}"
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
            if self.first is not None and self.step > self.first[0]:
                pace = (now - self.first[1]) / (self.step - self.first[0])
                left = f"  {pace * (self.num_steps - self.step):.0f} s left"
        return f"step {self.step}{of}  {self.text}  {now - self.began:.1f} s{left}"
