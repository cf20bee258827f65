"""`run(profile="directory")`: what the device does in one chunk, for TensorBoard or Perfetto."""

import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax


def directory(path: str | os.PathLike[str] | None) -> Path | None:
    """The directory, made where it is not there. Raises ValueError for one that cannot be written."""
    if path is None:
        return None
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):  # the only sure test is to write
            pass
    except OSError as error:
        raise ValueError(
            f"cannot write profile={str(folder)!r} ({error.strerror}); expected a writable directory."
        ) from error
    return folder


def traced(folder: Path | None, advance: Callable[..., Any], end: int) -> Callable[..., Any]:
    """`advance(state, length, ...)`, of which the second call is traced by `jax.profiler`: the first one compiles.

    So is the first where it reaches the step `end`, with a warning that compilation is in it. A profiler that
    cannot begin or write is a warning: no run ends for it. None as folder is no trace.
    """
    if folder is None:
        return advance
    calls = 0

    def call(state: Any, length: int, *rest: Any) -> Any:
        nonlocal calls
        calls += 1
        only = calls == 1 and int(state.step) + length >= end
        if calls != 2 and not only:
            return advance(state, length, *rest)
        if only:
            _warn(
                "the run has a single chunk: compilation is in its profile; expected a smaller chunk"
            )
        try:
            jax.profiler.start_trace(folder)
        except Exception as error:  # of several kinds, by backend
            _warn(f"no profile: the profiler did not begin ({error}); is another one running?")
            return advance(state, length, *rest)
        try:
            return advance(state, length, *rest)
        finally:
            try:
                jax.profiler.stop_trace()
                first = int(state.step)
                print(
                    f"bilevel: profile of the outer steps {first} to {first + length - 1} in {folder}",
                    file=sys.stderr,
                )
            except Exception as error:
                _warn(f"no profile: it could not be written to {str(folder)!r} ({error})")

    return call


def _warn(text: str) -> None:
    warnings.warn(text + "; the run goes on.", RuntimeWarning, stacklevel=4)
