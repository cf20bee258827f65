"""What is written to disk: strict JSON, whole files, nothing overwritten unasked."""

import json

import numpy as np
import pytest

from bilevel.tuning import output
from bilevel.tuning.errors import InputError
from bilevel.tuning.output import OutDir

ARRAYS = {"coef": np.arange(3.0), "names": np.asarray(["a", "b"])}


def test_round_trip(tmp_path):
    out = OutDir(str(tmp_path / "deep" / "out"), force=False)
    result = {"a": np.float32(0.5), "b": float("nan"), "c": [np.int64(3)], "d": {"e": np.ones(2)}}
    out.write(result | {"f": True, "g": None, "h": -np.inf}, ARRAYS)
    out.add("suspects.csv", "row\n")
    out.undo()  # removes only what is empty
    names = sorted(path.name for path in out.path.iterdir())
    assert names == ["model.npz", "result.json", "suspects.csv"]
    assert (out.path / "suspects.csv").read_text() == "row\n"
    text = (out.path / "result.json").read_text()
    assert "NaN" not in text
    assert json.loads(text) == {
        "a": 0.5,
        "b": None,
        "c": [3],
        "d": {"e": [1.0, 1.0]},
        "f": True,
        "g": None,
        "h": None,
    }
    with np.load(out.path / "model.npz") as model:
        np.testing.assert_array_equal(model["coef"], ARRAYS["coef"])
        assert model["names"].tolist() == ["a", "b"]


def test_an_existing_result_needs_force(tmp_path):
    (tmp_path / "result.json").write_text("precious")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        OutDir(str(tmp_path), force=False)
    out = OutDir(str(tmp_path), force=True)
    assert (tmp_path / "result.json").read_text() == "precious"  # checking changes nothing
    out.write({"a": 1}, ARRAYS)
    assert json.loads((tmp_path / "result.json").read_text()) == {"a": 1}
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_file_that_appears_during_the_run_is_kept(tmp_path):
    out = OutDir(str(tmp_path), force=False)
    (tmp_path / "model.npz").write_text("precious")
    with pytest.raises(FileExistsError):
        out.write({"a": 1}, ARRAYS)
    assert [path.name for path in tmp_path.iterdir()] == ["model.npz"]
    assert (tmp_path / "model.npz").read_text() == "precious"


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    out = OutDir(str(tmp_path / "new"), force=False)
    monkeypatch.setattr(output.np, "savez_compressed", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        out.write({"a": 1}, ARRAYS)
    out.undo()
    assert list(tmp_path.iterdir()) == []


def test_table_lines_up():
    text = output.table(["name", "x"], [["long name", "1.0"], ["b", "10.0"]])
    lines = text.split("\n")
    assert lines[0] == "name          x"
    assert lines[1] == "-" * 15
    assert lines[2] == "long name   1.0"
    assert output.fixed(0.12345) == "0.1235" and output.fixed(1234.56) == "1234.6"
    assert output.fixed(0.0) == "0.0000" and output.fixed(2.5e-10) == "2.5e-10"
    assert output.fixed(None) == output.fixed(float("nan")) == "-"
