"""The `bilevel` command: `tune DATA`, `clean DATA`, on what they wrote `report DIR` and `predict DIR DATA`; `launch`.

Whatever can be wrong with the input is found before anything is computed and ends in one line on
standard error and exit code 2. Progress goes to standard error, the table to standard output, the
results to `--out DIR`.
"""

import argparse
import contextlib
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from bilevel import __version__
from bilevel.launch import add_launch
from bilevel.tuning.errors import InputError
from bilevel.tuning.options import PENALTIES
from bilevel.tuning.output import OutDir, plain, versions
from bilevel.tuning.saved_commands import add_predict, add_report

_EPILOG = (
    "With --out, report.html shows what was found, result.json holds all scores and the history of the "
    "outer steps, and model.npz the model (X @ coef + intercept) and the split. Ctrl-C during the outer "
    "steps ends them, and the results are those of the best so far; again, it ends without results. "
    "`seconds` in result.json: cold is the optimisation from the checked data to the refit, compilation "
    "(or loading compiled programs from the cache) included; warm is the same once more."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0, 1 (the computation failed) or 2 (bad input)."""
    try:
        options = _parser().parse_args(argv)
        options.argv = list(sys.argv[1:] if argv is None else argv)
        return options.run(options)
    except InputError as error:
        print(f"bilevel: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("bilevel: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `bilevel ... | head`
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


class _Parser(argparse.ArgumentParser):
    """argparse prints its usage before an error; here an error is one line that says what to do."""

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized"):
            message += "; expected options of `bilevel COMMAND --help`"
        elif "expected" not in message:
            message += f"; expected {self.format_usage().removeprefix('usage: ')}"
        raise InputError(message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="bilevel",
        description="Hyperparameters by hypergradients: tune a penalty, clean labels.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"bilevel {__version__}")
    commands = parser.add_subparsers(
        dest="command",
        metavar="{tune,clean,report,predict,launch}",
        required=True,
        parser_class=_Parser,
    )
    _add_tune(commands)
    _add_clean(commands)
    add_report(commands)
    add_predict(commands)
    add_launch(commands)
    return parser


def _add_tune(commands: Any) -> None:
    tune = commands.add_parser(
        "tune",
        allow_abbrev=False,
        epilog=_EPILOG,
        help="tune the penalties of a linear model by cross-validation",
        description="Tune one or many penalties of ridge, logistic or softmax regression on "
        "cross-validation folds, refit on all training rows, and test once. Penalties are those of "
        "features of unit variance.",
    )
    _add_common(tune)
    tune.add_argument(
        "--model",
        choices=("ridge", "logistic", "softmax"),
        help="default: what the target asks for",
    )
    tune.add_argument(
        "--penalty",
        choices=PENALTIES,
        default="single",
        help="one; one per group; one per feature, from two statistics of each; or one free penalty "
        "per feature, which overfits (single)",
    )
    tune.add_argument(
        "--groups",
        metavar="FILE",
        help="for per-group: a CSV file with the header feature,group and a row for each feature",
    )
    tune.add_argument(
        "--cv", type=_integer(2), default=5, metavar="K", help="cross-validation folds (5)"
    )
    tune.add_argument(
        "--test-size",
        type=_share(low_open=True),
        default=0.25,
        metavar="SHARE",
        help="share of the rows kept for the test (0.25)",
    )
    tune.set_defaults(run=_run_tune)


def _add_clean(commands: Any) -> None:
    clean = commands.add_parser(
        "clean",
        allow_abbrev=False,
        epilog=_EPILOG,
        help="find wrong labels with a few trusted examples",
        description="Learn one weight for each training example so that a softmax regression "
        "fitted with these weights does well on the trusted examples; refit, list the suspects, and "
        "test once (against the labels of the test rows as they are given).",
    )
    _add_common(clean)
    clean.add_argument(
        "--trusted",
        type=_count_or_column,
        required=True,
        metavar="N|COLUMN",
        help="rows whose labels are trusted: how many to draw at random, or a column that marks them "
        "with true and false (or yes and no, 1 and 0)",
    )
    clean.add_argument(
        "--flip",
        type=_share(low_open=False),
        default=0.0,
        metavar="P",
        help="first make this share of the training labels wrong on purpose (0)",
    )
    clean.add_argument(
        "--train",
        type=_integer(1),
        default=None,
        metavar="N",
        help="training rows; the rest is the test set (about 60 %% of the rows not trusted)",
    )
    clean.set_defaults(run=_run_clean)


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "data",
        metavar="DATA",
        help="a CSV, Parquet or npz file, a directory of IDX files, or the name of a bundled set",
    )
    parser.add_argument(
        "--target",
        metavar="COLUMN",
        help="the column to predict (bundled sets and IDX files: target)",
    )
    parser.add_argument(
        "--seed", type=_integer(0, 2**32 - 1), default=0, metavar="N", help="seed of all splits (0)"
    )
    parser.add_argument(
        "--engine", default="implicit", metavar="NAME", help="hypergradient engine (implicit)"
    )
    parser.add_argument("--out", metavar="DIR", help="directory for the results")
    parser.add_argument(
        "--force", action="store_true", help="replace results that are already in DIR"
    )


def _integer(low: int, high: int | None = None) -> Callable[[str], int]:
    bounds = f"of at least {low}" if high is None else f"from {low} to {high}"

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or value < low or (high is not None and value > high):
            raise argparse.ArgumentTypeError(f"expected an integer {bounds}, got {text!r}")
        return value

    return parse


def _count_or_column(text: str) -> int | str:
    """A number of rows, or the name of a column."""
    return _integer(1)(text) if text.lstrip("+-").isdecimal() else text


def _share(*, low_open: bool) -> Callable[[str], float]:
    bounds = "above 0 and below 1" if low_open else "of at least 0 and below 1"

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (0 < value < 1 or (value == 0 and not low_open)):
            raise argparse.ArgumentTypeError(f"expected a number {bounds}, got {text!r}")
        return value

    return parse


@contextlib.contextmanager
def _output(options: argparse.Namespace) -> Iterator[OutDir | None]:
    """The checked output directory; made by us and left empty, it is removed again."""
    out = None if options.out is None else OutDir(options.out, options.force)
    try:
        yield out
    finally:
        if out is not None:
            out.undo()


def _run_tune(options: argparse.Namespace) -> int:
    with _output(options) as out:
        from bilevel.tuning.data import load_table
        from bilevel.tuning.options import check_penalty, choose_model
        from bilevel.tuning.splits import tune_split

        table, model = choose_model(load_table(options.data, options.target), options.model)
        split = tune_split(table, options.cv, options.test_size, options.seed)
        outputs = len(table.classes) if table.classes is not None and model == "softmax" else 1
        _check_engine(options.engine, split.num_folds * outputs * (len(table.features) + 1))
        groups = check_penalty(options.penalty, options.groups, options.engine, table.features)
        from bilevel.tuning.tune import tune

        return _compute(
            options,
            out,
            lambda: tune(
                table,
                split,
                model=model,
                penalty=options.penalty,
                groups=groups,
                engine=options.engine,
                say=_say,
            ),
            table,
            # Penalties over ten decades: single precision would blur the flat parts of the curve.
            x64=True,
        )


def _run_clean(options: argparse.Namespace) -> int:
    with _output(options) as out:
        from bilevel.tuning.data import load_table
        from bilevel.tuning.splits import clean_split

        named = isinstance(options.trusted, str)
        column, count = (options.trusted, None) if named else (None, options.trusted)
        table = load_table(options.data, options.target, column)
        if table.classes is None:
            raise InputError(
                f"target {table.target!r} has more than 20 distinct numbers; expected classes"
            )
        split = clean_split(table, count, options.train, options.seed)
        _check_engine(options.engine, len(table.classes) * (len(table.features) + 1))
        _check_forward(options.engine, len(split.train))
        from bilevel.tuning.clean import clean

        return _compute(
            options,
            out,
            lambda: clean(
                table,
                split,
                flip=options.flip,
                seed=options.seed,
                engine=options.engine,
                say=_say,
            ),
            table,
            # Only penalties that are large against rounding, and three times faster.
            x64=False,
        )


MAX_EXACT = 500
"""Coefficients that `exact` takes: with 210 (wine) a hypergradient takes seconds, with 3250 (digits) ten GB."""


def _check_engine(name: str, coefficients: int) -> None:
    from bilevel.tuning.engines import engine_names

    known = engine_names()
    if name not in known:
        raise InputError(f"unknown engine {name!r}; expected one of {', '.join(known)}")
    if name == "exact" and coefficients > MAX_EXACT:
        raise InputError(
            f"--engine exact has dense matrices, here for {coefficients} coefficients of all fits at once; "
            f"expected at most {MAX_EXACT}, or --engine implicit"
        )


def _check_forward(name: str, weights: int) -> None:
    from bilevel.tuning.engines import make_engine

    if name == "forward" and weights > (limit := make_engine(name).limit):
        raise InputError(
            f"--engine forward takes at most {limit} of the {weights} weights of training rows; expected another engine"
        )


def _compute(
    options: argparse.Namespace,
    out: OutDir | None,
    work: Callable[[], Any],
    table: Any,
    *,
    x64: bool,
) -> int:
    """Compute, print the table, write the files."""
    import jax

    import bilevel
    from bilevel.tuning.report import render
    from bilevel.tuning.results import Saved

    _enable_compilation_cache()
    try:
        with jax.enable_x64(x64):
            outcome = work()
    except bilevel.BilevelError as error:
        text = " ".join(str(error).split())
        print(f"bilevel: the computation failed: {text}", file=sys.stderr)
        return 1
    print(outcome.text)
    if out is not None:
        head = {
            "command": options.command,
            "argv": options.argv,
            "data": options.data,
            "target": outcome.target,
            "seed": options.seed,
            "engine": options.engine,
            "versions": versions(),
        }
        result = plain(head | outcome.result)
        try:
            out.write(result, outcome.arrays)
            texts = {
                **outcome.texts,
                "report.html": render(Saved(result, outcome.arrays), table.X),
            }
            for name, text in texts.items():
                out.add(name, text)
        except OSError as error:
            print(f"bilevel: cannot write results to {out.path}: {error}", file=sys.stderr)
            return 1
        names = ["result.json", "model.npz", *texts]
        print("\nwritten: " + ", ".join(str(out.path / name) for name in names))
    return 0


def _say(text: str) -> None:
    print(f"bilevel: {text}", file=sys.stderr, flush=True)


def _enable_compilation_cache() -> None:
    """Keep compiled programs in the user's cache directory, so that the next run starts fast.

    A cache set by the user (`JAX_COMPILATION_CACHE_DIR`) is left alone; a directory that cannot be
    written to only costs speed.
    """
    import jax

    if getattr(jax.config, "jax_compilation_cache_dir", None) is not None:
        return
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        directory = Path(base) / "bilevel" / "jax"
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except (OSError, RuntimeError):
        return
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


if __name__ == "__main__":
    sys.exit(main())
