"""`bilevel launch SCRIPT`: one script in several processes, which JAX's own runtime connects."""

import argparse
import contextlib
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from bilevel.tuning.errors import InputError

GRACE = 20.0
"""Seconds that the other processes have to save and end, once one has failed."""


def add_launch(commands: Any) -> None:
    """`bilevel launch [--processes N] SCRIPT ...`."""
    parser = commands.add_parser(
        "launch",
        allow_abbrev=False,
        help="run a script of yours in several processes",
        description="Run a Python script in several processes that JAX connects: jax.devices() are those of all, "
        "and run(mesh=...) spreads tasks over them. Under srun, mpirun or as an indexed job of Kubernetes, the "
        "cluster has started the processes: no option is needed. --processes alone starts them on this machine, "
        "each with one of its accelerators; on several machines, start one on each with --coordinator and "
        "--process as well (the pods of an indexed job of Kubernetes know their --process).",
    )
    parser.add_argument("--processes", type=int, metavar="N", help="how many there are in all")
    parser.add_argument("--process", type=int, metavar="I", help="which one this is, from 0 on")
    parser.add_argument(
        "--coordinator", metavar="HOST:PORT", help="of process 0, as the others reach it"
    )
    parser.add_argument("script", metavar="SCRIPT")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="of the script")
    parser.set_defaults(run=_launch)


def _launch(options: argparse.Namespace) -> int:
    count, index, coordinator = options.processes, options.process, options.coordinator
    if not Path(options.script).is_file():
        raise InputError(f"no script {options.script!r}; expected a Python file")
    if count is not None and count < 1:
        raise InputError(f"--processes is {count}; expected at least 1")
    if count is not None and coordinator is not None and index is None:
        index = _index_of_job()
    if count is None or index is None:
        if index is not None or coordinator is not None:
            raise InputError(
                "expected --processes, --process and --coordinator together (the pods of an indexed job of Kubernetes "
                "know their --process)"
            )
        if count is not None:
            return _start(count, [options.script, *options.arguments])
    elif coordinator is None or not 0 <= index < count:
        raise InputError(
            f"--process is {index}, --coordinator {coordinator}; expected 0 to {count - 1} and HOST:PORT"
        )
    _join(count, index, coordinator)
    sys.argv = [options.script, *options.arguments]
    sys.path.insert(0, str(Path(options.script).resolve().parent))
    try:
        runpy.run_path(options.script, run_name="__main__")
    except BaseException as error:
        code = error.code if isinstance(error, SystemExit) else 1
        if code:
            # Leaving as usual, JAX would wait minutes for the others, who wait for this process.
            _leave(error, code if isinstance(code, int) else 1)
    return 0


def _index_of_job() -> int | None:
    """That of this pod, in an indexed job of Kubernetes."""
    given = os.environ.get("JOB_COMPLETION_INDEX", "")
    return int(given) if given.isdecimal() else None


def _leave(error: BaseException, code: int) -> NoReturn:
    if not isinstance(error, SystemExit):
        traceback.print_exception(error)
    elif not isinstance(error.code, int):
        print(error.code, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _join(count: int | None, index: int | None, coordinator: str | None) -> None:
    import jax

    # Of processes on one machine, each takes the accelerator of its number: `_start` says which.
    try:
        jax.distributed.initialize(coordinator, count, index)
    except ValueError as error:
        if coordinator is not None:
            raise
        raise InputError(
            f"no cluster found ({error}); expected srun, mpirun or an indexed job of Kubernetes, or --processes N"
        ) from error


def _start(count: int, line: list[str]) -> int:
    """Processes of this machine: 0, or the exit code of the first that failed, after which the others end."""
    coordinator = f"127.0.0.1:{_free_port()}"
    children: list[subprocess.Popen[bytes]] = []
    try:
        with _passed_on(children):
            for index in range(count):
                options = ["--processes", str(count), "--process", str(index)]
                options += ["--coordinator", coordinator]
                environment = {"JAX_LOCAL_DEVICE_IDS": str(index), **os.environ}
                command = [sys.executable, "-m", "bilevel", "launch", *options, *line]
                # A session of its own: Ctrl-C comes here alone, and is passed on as SIGTERM.
                child = subprocess.Popen(command, env=environment, start_new_session=True)
                children.append(child)
            return _wait(children)
    finally:
        for child in children:
            child.kill()
            child.wait()


def _wait(children: list[subprocess.Popen[bytes]]) -> int:
    code, until = 0, float("inf")
    while True:
        codes = [child.poll() for child in children]
        failed = [code for code in codes if code]
        if failed and not code:
            code, until = failed[0], time.monotonic() + GRACE
            for child in children:
                child.terminate()
        if None not in codes or time.monotonic() > until:
            return 128 - code if code < 0 else code
        time.sleep(0.05)


@contextlib.contextmanager
def _passed_on(children: list[subprocess.Popen[bytes]]) -> Iterator[None]:
    """Ctrl-C and SIGTERM reach the children as SIGTERM: with a checkpoint they save and end together."""

    def end(number: int, frame: Any) -> None:
        for child in children:
            child.terminate()

    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
