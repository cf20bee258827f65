"""The commands refuse bad input in one line, before any compute, and leave the disk as it was."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bilevel import cli
from bilevel.tuning import data

HEADER = "a,b,y\n"
ROWS = "".join(f"{i % 7},{(i * 5) % 11},{i % 2}\n" for i in range(40))
REGRESSION = HEADER + "".join(f"{i % 7},{(i * 5) % 11},{i * 0.37}\n" for i in range(40))


def marked(mark) -> str:
    lines = [f"{i % 7},{(i * 5) % 11},{i % 2},{mark(i)}" for i in range(40)]
    return "\n".join(["a,b,y,sure", *lines])


FILES = {
    "good.csv": HEADER + ROWS,
    "regression.csv": REGRESSION,
    "empty.csv": "",
    "blank.csv": " \n\n",
    "header_only.csv": HEADER,
    "one_row.csv": HEADER + "1,2,3\n",
    "one_column.csv": "y\n1\n2\n3\n",
    "semicolons.csv": "a;b;y\n1;2;0\n2;3;1\n",
    "no_header.csv": "1,2,0\n2,3,1\n",
    "repeated.csv": "a,a,y\n1,2,0\n2,3,1\n",
    "nan.csv": HEADER + ROWS + "nan,1,0\n",
    "missing.csv": HEADER + ROWS + ",1,0\n",
    "inf.csv": HEADER + ROWS + "inf,1,0\n",
    "huge.csv": HEADER + ROWS + "1e200,1,0\n",
    "short_row.csv": HEADER + ROWS + "1\n",
    "long_row.csv": HEADER + ROWS + "1,2,1,4,5\n",
    "trailing.csv": HEADER + "1,2,0,9\n2,3,1,9\n",
    "text.csv": HEADER + ROWS + "apple,1,0\n",
    "dates.csv": "d,y\n" + "".join(f"2020-01-{i + 1:02d},{i % 2}\n" for i in range(20)),
    "target_nan.csv": HEADER + ROWS + "1,1,\n",
    "target_inf.csv": REGRESSION + "1,1,inf\n",
    "constant_target.csv": HEADER + "1,2,3\n2,3,3\n4,5,3\n" * 9,
    "constant_float_target.csv": HEADER + "1,2,.5\n2,3,.5\n4,5,.5\n" * 9,
    "one_class.csv": HEADER + "1,2,x\n2,3,x\n4,5,x\n" * 9,
    "rare_class.csv": HEADER + ROWS + "1,2,2\n",
    "two_rare.csv": HEADER + ROWS + "1,2,2\n3,4,2\n",
    "constant_features.csv": HEADER + "1,1,0\n1,1,1\n" * 20,
    "latin1.csv": b"a,b,y\n\xe9,1,0\n\xff,2,1\n",
    "binary.csv": bytes(range(256)) * 20,
    "quote.csv": HEADER + '"1,2,3\n',
    "good_marks.csv": marked(lambda i: i < 12),
    "no_marks.csv": marked(lambda i: "no"),
    "all_marks.csv": marked(lambda i: 1),
    "bad_marks.csv": marked(lambda i: "maybe" if i == 6 else "yes"),
    "missing_marks.csv": marked(lambda i: "" if i == 6 else 1),
    "number_marks.csv": marked(lambda i: i / 2),
}

GROUP_FILES = {
    "groups.csv": "feature,group\na,1\nb,2\n",
    "groups_no_header.csv": "a,1\nb,2\n",
    "groups_unknown.csv": "feature,group\na,1\nb,2\nc,2\n",
    "groups_target.csv": "feature,group\na,1\nb,2\ny,2\n",
    "groups_missing.csv": "feature,group\na,1\n",
    "groups_repeated.csv": "feature,group\na,1\nb,2\na,2\n",
    "groups_wide.csv": "feature,group\na,1,2\nb,2\n",
    "groups_blank.csv": "feature,group\na,1\nb,\n",
    "words.csv": HEADER + "1,2,no\n2,3,yes\n4,5,no\n" * 9,
}

GROUPS = "good.csv --target y --penalty per-group --groups"

TUNE = {
    "no such data": ("nosuch", "no file and no bundled data set 'nosuch'"),
    "directory as data": (". --target y", "a directory of IDX files"),
    "no target for a file": ("good.csv", "no target"),
    "unknown column": ("good.csv --target z", "no column 'z'"),
    "unknown column of a bundled set": ("iris --target z", "no column 'z'"),
    "unknown engine": ("good.csv --target y --engine magic", "unknown engine 'magic'"),
    "engine for long runs": ("good.csv --target y --engine cgd", "unknown engine 'cgd'"),
    "too many coefficients for exact": ("digits --engine exact", "3250 coefficients"),
    "unknown option": ("good.csv --target y --frobnicate", "--frobnicate"),
    "seed": ("good.csv --target y --seed 1.5", "--seed"),
    "negative seed": ("good.csv --target y --seed=-1", "--seed"),
    "cv": ("good.csv --target y --cv 1", "--cv"),
    "cv text": ("good.csv --target y --cv many", "--cv"),
    "more folds than rows": ("good.csv --target y --cv 31", "for training"),
    "more folds than rows, regression": ("regression.csv --target y --cv 31", "rows"),
    "removed name of --cv": ("good.csv --target y --folds 3", "--folds"),
    "unknown model": ("good.csv --target y --model tree", "--model"),
    "ridge on text": ("words.csv --target y --model ridge", "holds classes ('no', ...)"),
    "logistic on three classes": ("iris --model logistic", "has 3 classes"),
    "logistic on numbers": ("regression.csv --target y --model logistic", "distinct numbers"),
    "softmax on numbers": ("regression.csv --target y --model softmax", "distinct numbers"),
    "unknown penalty": ("good.csv --target y --penalty many", "--penalty"),
    "engine for many penalties": ("good.csv --target y --penalty free --engine f2sa", "f2sa"),
    "groups without per-group": ("good.csv --target y --groups groups.csv", "per-group"),
    "per-group without groups": ("good.csv --target y --penalty per-group", "--groups FILE"),
    "groups: no file": (f"{GROUPS} nosuch.csv", "cannot read --groups 'nosuch.csv'"),
    "groups: a directory": (f"{GROUPS} full", "cannot read"),
    "groups: empty": (f"{GROUPS} empty.csv", "starts with ''"),
    "groups: no header": (f"{GROUPS} groups_no_header.csv", "starts with 'a,1'"),
    "groups: binary": (f"{GROUPS} binary.csv", "cannot read"),
    "groups: unknown feature": (f"{GROUPS} groups_unknown.csv", "'c', which is no feature"),
    "groups: the target": (f"{GROUPS} groups_target.csv", "'y', which is no feature"),
    "groups: missing feature": (f"{GROUPS} groups_missing.csv", "lacks 1 features (first 'b')"),
    "groups: repeated feature": (f"{GROUPS} groups_repeated.csv", "'a' more than once"),
    "groups: three cells": (f"{GROUPS} groups_wide.csv", "row 2"),
    "groups: no group": (f"{GROUPS} groups_blank.csv", "row 3"),
    "test size 1": ("good.csv --target y --test-size 1", "--test-size"),
    "test size nan": ("good.csv --target y --test-size nan", "--test-size"),
    "test size too small": ("good.csv --target y --test-size .01", "--test-size"),
    "test size too large": ("good.csv --target y --test-size .99", "training"),
    "out is a file": ("good.csv --target y --out good.csv", "is a file"),
    "out below a file": ("good.csv --target y --out good.csv/out", "cannot write"),
    "out not empty": ("good.csv --target y --out full", "not empty"),
    "out empty string": ("good.csv --target y --out=", "--out is empty"),
    "out not writable": ("good.csv --target y --out /proc/bilevel", "cannot write"),
    "new out directory is removed again": ("nan.csv --target y --out new/deep", "missing values"),
    "result.json is a directory": ("good.csv --target y --out odd --force", "is a directory"),
    "one class in few rows": ("rare_class.csv --target y", "class '2'"),
    "class with fewer rows than folds": ("two_rare.csv --target y", "class '2'"),
} | {
    f"file {name}": (f"{name} --target y", "expected")
    for name in FILES
    if name not in ("good.csv", "regression.csv") and "marks" not in name
}

CLEAN = {
    "no trusted": ("good.csv --target y", "--trusted"),
    "trusted 0": ("good.csv --target y --trusted 0", "--trusted"),
    "trusted text": ("good.csv --target y --trusted ten", "--trusted"),
    "more trusted than rows": ("good.csv --target y --trusted 41", "40 rows"),
    "trusted and train are all": ("good.csv --target y --trusted 10 --train 30", "40 rows"),
    "fewer trusted than classes": ("good.csv --target y --trusted 1", "--trusted"),
    "one trusted of a class": ("good.csv --target y --trusted 3", "trusted rows"),
    "train 0": ("good.csv --target y --trusted 10 --train 0", "--train"),
    "flip 1": ("good.csv --target y --trusted 10 --flip 1", "--flip"),
    "flip negative": ("good.csv --target y --trusted 10 --flip=-.1", "--flip"),
    "flip nan": ("good.csv --target y --trusted 10 --flip nan", "--flip"),
    "regression target": ("regression.csv --target y --trusted 10", "expected classes"),
    "unknown engine": ("good.csv --target y --trusted 10 --engine magic", "unknown engine"),
    "engine for long runs": ("good.csv --target y --trusted 10 --engine soba", "'soba'"),
    "too many weights for forward": ("wine --trusted 24 --engine forward", "of the 92 weights"),
    "too many coefficients for exact": ("digits --trusted 100 --engine exact", "650 coeff"),
    "nan": ("nan.csv --target y --trusted 10", "missing values"),
    "out not empty": ("good.csv --target y --trusted 10 --out full", "not empty"),
    "trusted is no column": ("good_marks.csv --target y --trusted sur", "no column 'sur'"),
    "trusted is the target": ("good_marks.csv --target y --trusted y", "both 'y'"),
    "trusted negative": ("good.csv --target y --trusted=-3", "--trusted"),
    "trusted of a bundled set": ("wine --trusted sure", "no column 'sure'"),
    "no row marked": ("no_marks.csv --target y --trusted sure", "0 trusted rows"),
    "every row marked": ("all_marks.csv --target y --trusted sure", "40 trusted"),
    "mark is no mark": ("bad_marks.csv --target y --trusted sure", "'maybe' in row 7"),
    "mark is missing": ("missing_marks.csv --target y --trusted sure", "'nan' in row 7"),
    "mark is a number": ("number_marks.csv --target y --trusted sure", "'0.5' in row 2"),
    "suspects.csv is a directory": (
        "good.csv --target y --trusted 10 --out odd2 --force",
        "is a dir",
    ),
}

OTHER = {
    "no command": ("", "expected"),
    "unknown command": ("frobnicate", "frobnicate"),
    "no data": ("tune", "DATA"),
}

CASES = (
    [pytest.param(f"tune {line}", text, id=f"tune: {name}") for name, (line, text) in TUNE.items()]
    + [pytest.param(f"clean {x}", text, id=f"clean: {name}") for name, (x, text) in CLEAN.items()]
    + [pytest.param(line, text, id=name) for name, (line, text) in OTHER.items()]
)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("files")
    for name, content in (FILES | GROUP_FILES).items():
        (root / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    (root / "full").mkdir()
    (root / "full" / "result.json").write_text("precious")
    (root / "full" / "model.npz").write_text("precious")
    (root / "odd" / "result.json").mkdir(parents=True)
    (root / "odd2" / "suspects.csv").mkdir(parents=True)
    return root


def snapshot(root: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(root)): path.read_bytes() if path.is_file() else None
        for path in sorted(root.rglob("*"))
    }


@pytest.mark.parametrize(("line", "text"), CASES)
def test_bad_input_is_one_line_and_exit_code_2(line, text, files, capsys, monkeypatch):
    monkeypatch.chdir(files)
    monkeypatch.setattr(cli, "_compute", lambda *_: pytest.fail("computed on bad input"))
    before = snapshot(files)
    assert cli.main(line.split()) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("bilevel: error: ")
    assert text in captured.err
    assert "expected" in captured.err
    assert snapshot(files) == before


def test_fuzzed_files_never_raise(tmp_path, capsys):
    rng = np.random.default_rng(0)
    good = (HEADER + ROWS).encode()
    path = tmp_path / "fuzz.csv"
    for trial in range(60):
        raw = bytearray(good[: rng.integers(1, len(good))])
        for _ in range(rng.integers(1, 30)):
            raw[rng.integers(len(raw))] = (
                rng.integers(256) if trial % 2 else ord(rng.choice(list(',"\n;x ')))
            )
        path.write_bytes(bytes(raw))
        try:
            data.load_table(str(path), "y")
        except data.InputError as error:
            assert "expected" in str(error)
            assert "\n" not in str(error)


def test_missing_extra_names_it(monkeypatch, capsys, files):
    monkeypatch.chdir(files)
    monkeypatch.setitem(sys.modules, "pandas", None)
    assert cli.main(["tune", "good.csv", "--target", "y"]) == 2
    captured = capsys.readouterr()
    assert "bilevel[tune]" in captured.err
    assert captured.err.count("\n") == 1


def test_version_and_help(capsys):
    for line in ("--version", "--help", "tune --help", "clean --help"):
        with pytest.raises(SystemExit) as stop:
            cli.main(line.split())
        assert stop.value.code == 0
    assert "--trusted" in capsys.readouterr().out


def test_module_runs_as_a_command(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "bilevel", "tune", "nosuch", "--out", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"HOME": str(tmp_path)},
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
