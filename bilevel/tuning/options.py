"""Options of `bilevel tune` that need the table, checked before any compute."""

import csv
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from bilevel.tuning.data import Table
from bilevel.tuning.errors import InputError

PENALTIES = ("single", "per-group", "per-feature", "free")
"""Values of `--penalty`."""

EXACT_ENGINES = ("implicit", "exact")
"""Engines whose gradients suit a search over several numbers."""


class Groups(NamedTuple):
    """Groups of features."""

    names: tuple[str, ...]
    of_feature: np.ndarray
    """(d,): the number of each feature's group, in the table's order."""


def choose_model(table: Table, model: str | None) -> tuple[Table, str]:
    """The table as the model wants its target, and the model: by default the one the target asks for.

    Ridge takes a whole-number target of few values as numbers.
    """
    if model is None or model == table.task:
        return table, table.task
    target = f"target {table.target!r}"
    if table.classes is None:
        raise InputError(
            f"{target} has too many distinct numbers to be classes; expected --model ridge"
        )
    if model == "ridge":
        if table.classes.dtype.kind not in "if":
            raise InputError(
                f"{target} holds classes ({str(table.classes[0])[:40]!r}, ...); expected numbers with "
                "--model ridge"
            )
        return replace(table, y=table.classes[table.y].astype(np.float64), classes=None), model
    if model == "logistic":
        raise InputError(
            f"{target} has {len(table.classes)} classes; expected 2 with --model logistic"
        )
    return table, model


def read_groups(path: str, features: tuple[str, ...]) -> Groups:
    """A CSV file with the header `feature,group` that names every feature once."""
    wanted = "expected a CSV file with the header feature,group that names every feature once"
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = [[cell.strip() for cell in row] for row in csv.reader(file, strict=True) if row]
    except (OSError, UnicodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot read --groups {path!r} ({reason}); {wanted}") from error
    if not rows or rows[0] != ["feature", "group"]:
        raise InputError(
            f"--groups {path!r} starts with {','.join(rows[0])[:40] if rows else ''!r}; {wanted}"
        )
    found: dict[str, str] = {}
    for number, row in enumerate(rows[1:], 2):
        if len(row) != 2 or not all(row):
            raise InputError(
                f"row {number} of --groups {path!r} is {','.join(row)[:40]!r}; {wanted}"
            )
        feature, group = row
        if feature not in features:
            raise InputError(f"--groups {path!r} names {feature!r}, which is no feature; {wanted}")
        if feature in found:
            raise InputError(f"--groups {path!r} names {feature!r} more than once; {wanted}")
        found[feature] = group
    missing = [feature for feature in features if feature not in found]
    if missing:
        raise InputError(
            f"--groups {path!r} lacks {len(missing)} features (first {missing[0]!r}); {wanted}"
        )
    names = tuple(dict.fromkeys(found.values()))
    return Groups(names, np.array([names.index(found[feature]) for feature in features]))


def check_penalty(
    penalty: str, groups: str | None, engine: str, features: tuple[str, ...]
) -> Groups | None:
    """The groups of `--penalty per-group`, None for the others; refuses what does not go together."""
    if penalty != "single" and engine not in EXACT_ENGINES:
        raise InputError(
            f"--penalty {penalty} does not work with --engine {engine}; expected "
            + " or ".join(EXACT_ENGINES)
        )
    if penalty != "per-group":
        if groups is not None:
            raise InputError(
                f"--groups goes with --penalty per-group, got {penalty}; expected both"
            )
        return None
    if groups is None:
        raise InputError("--penalty per-group needs to know them; expected --groups FILE")
    return read_groups(groups, features)
