"""One line of progress per chunk on standard error."""

import sys
import time


class Progress:
    """Plain lines with the outer value, the gradient norm and the time left.

    `show=None` prints only where standard error is a terminal.
    """

    def __init__(self, show: bool | None, num_steps: int):
        self.show = sys.stderr.isatty() if show is None else show
        self.num_steps = num_steps
        self.began = time.perf_counter()
        self.first: tuple[int, float] | None = None

    def update(self, step: int, outer_value: float, grad_norm: float) -> None:
        if not self.show:
            return
        now = time.perf_counter()
        left = ""
        if (
            self.first is not None and step > self.first[0]
        ):  # the first chunk holds the compile time
            pace = (now - self.first[1]) / (step - self.first[0])
            left = f"  {pace * (self.num_steps - step):.0f} s left"
        elif self.first is None:
            self.first = (step, now)
        print(
            f"step {step}/{self.num_steps}  outer {outer_value:.6g}  |hypergradient| "
            f"{grad_norm:.3g}  {now - self.began:.1f} s{left}",
            file=sys.stderr,
            flush=True,
        )
