"""The commands that work on the results of an earlier run: `bilevel report` and `bilevel predict`."""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from bilevel.tuning.data import BUNDLED, load_table
from bilevel.tuning.errors import InputError, require_tune_extra
from bilevel.tuning.output import put
from bilevel.tuning.results import Saved, load_results


def add_report(commands: Any) -> None:
    """`bilevel report DIR`."""
    parser = commands.add_parser(
        "report",
        allow_abbrev=False,
        help="redraw report.html from the results of a run",
        description="Redraw report.html from result.json and model.npz. Images of examples need the "
        "data, and are drawn for bundled sets.",
    )
    parser.add_argument("directory", metavar="DIR", help="the --out of an earlier run")
    parser.set_defaults(run=_report)


def add_predict(commands: Any) -> None:
    """`bilevel predict DIR DATA`."""
    parser = commands.add_parser(
        "predict",
        allow_abbrev=False,
        help="predict the rows of a table with a tuned or cleaned model",
        description="Predictions of model.npz for a table that has its features by name: the "
        "columns may come in any order, others are ignored. Where the target is among them, the score "
        "is printed too.",
    )
    parser.add_argument("directory", metavar="DIR", help="the --out of an earlier run")
    parser.add_argument(
        "data", metavar="DATA", help="a CSV, Parquet or npz file, or the name of a bundled set"
    )
    parser.add_argument(
        "--out", metavar="FILE", help="CSV file for the predictions (standard output)"
    )
    parser.add_argument("--force", action="store_true", help="replace FILE where it exists")
    parser.set_defaults(run=_predict)


def _report(options: argparse.Namespace) -> int:
    saved = load_results(options.directory)
    require_tune_extra()
    try:
        text = page(saved)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        # Whatever a file that was changed by hand or by accident, can hold.
        raise InputError(
            f"result.json or model.npz in {options.directory!r} is damaged ({error!r}); expected what "
            "tune or clean wrote"
        ) from error
    path = Path(options.directory) / "report.html"
    try:
        put(path, lambda file: file.write(text.encode()), force=True)
    except OSError as error:
        raise InputError(
            f"cannot write {str(path)!r} ({error.strerror}); expected a writable directory"
        ) from error
    print(f"written: {path}")
    return 0


def page(saved: Saved) -> str:
    """The report, with the data where it is a bundled set."""
    from bilevel.tuning.report import render

    source = saved.result.get("data")
    return render(saved, features_of(source) if source in BUNDLED else None)


def features_of(source: str) -> np.ndarray:
    """Features of a bundled set, (n, d)."""
    return load_table(source, None).X


def _predict(options: argparse.Namespace) -> int:
    out = None if options.out is None else _check_out(options.out, options.force)
    saved = load_results(options.directory)
    from bilevel.tuning.predict import predict

    found = predict(saved, options.data)
    if out is None:
        print(found.csv, end="")
    else:
        try:
            put(out, lambda file: file.write(found.csv.encode()), options.force)
        except OSError as error:
            print(f"bilevel: cannot write {str(out)!r}: {error}", file=sys.stderr)
            return 1
        print(f"written: {out}")
    if found.score is not None:
        # Standard output may be the table.
        print(f"bilevel: {found.score}", file=sys.stderr)
    return 0


def _check_out(name: str, force: bool) -> Path:
    path = Path(name)
    if not name or path.is_dir():
        raise InputError(f"--out {name!r} is no file name; expected a name for a CSV file")
    if path.exists() and not force:
        raise InputError(f"{name!r} exists; expected a new file, or --force to replace it")
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".bilevel-"):
            pass
    except OSError as error:
        raise InputError(
            f"cannot write {name!r} ({error.strerror}); expected a writable directory"
        ) from error
    return path
