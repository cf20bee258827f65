"""The loop around the compiled chunks of a run: when it ends, and what is written on the way."""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from bilevel.checkpoint import Store
from bilevel.checkpoint_file import Saved
from bilevel.log import Log
from bilevel.processes import Team
from bilevel.progress import Progress
from bilevel.result import History


class Chunks(NamedTuple):
    """What runs have in common between two chunks."""

    advance: Callable[[Any, int, bool], tuple[Any, History]]
    """`(state, steps, whether the last one gets an error estimate) -> (state, history in NumPy)`; at least one step."""
    length: Callable[[int], int]
    """Steps of the next chunk, from those that are done."""
    why_ended: Callable[[Any, Sequence[History]], str]
    """Why a run ends at this state; empty where it goes on."""
    shown: Callable[[Any, History], tuple[Any, ...]]
    """Outer value, norm of the hypergradient and further text for the line of progress, and what a panel shows."""
    num_steps: int
    estimate_every: int | None = None
    time_limit: float | None = None
    callback: Callable[[Any, History], Any] | None = None

    def run(
        self, saved: Saved, store: Store | None, journal: Log, team: Team, bar: Progress
    ) -> tuple[Saved, str]:
        """Chunks until the run ends, what they reached, and why it ended.

        Ctrl-C returns (and saves) the chunks that are done, but is raised where several processes run: the others
        may be in the middle of a chunk.
        """
        began = time.perf_counter()
        first = True
        done = sum(len(rows.status) for rows in saved.history)
        try:
            with bar:
                while True:
                    state, pieces = saved.state, saved.history
                    if why := self.why_ended(state, pieces):
                        return saved, why
                    if done >= self.num_steps:
                        return saved, "num_steps"
                    if store is not None and team.anywhere(store.terminated):
                        return saved, "terminated"
                    if self.time_limit is not None and not first:
                        late = time.perf_counter() - began >= self.time_limit
                        if team.anywhere(late):
                            return saved, "time_limit"
                    first = False
                    end = done + self.length(done)
                    since = end - saved.estimated
                    estimate = end == self.num_steps or since >= (self.estimate_every or 1)
                    state, rows = self.advance(state, end - done, estimate)
                    done += len(rows.status)
                    # One assignment: Ctrl-C never sees half a chunk.
                    saved = Saved(
                        state, (*pieces, rows), saved.begin, done if estimate else saved.estimated
                    )
                    if store is not None:
                        store.save(saved)
                    journal.write(saved.begin + done, rows)
                    bar.update(done, *self.shown(state, rows))
                    stop = self.callback is not None and bool(self.callback(state, rows))
                    if team.anywhere(stop):
                        failed = self.why_ended(state, saved.history) == "status"
                        return saved, "status" if failed else "callback"
        except KeyboardInterrupt:
            if team.several:
                raise
            if store is not None:
                store.save(saved)
            return saved, "interrupted"
