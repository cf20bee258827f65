"""Predictions of a saved model: the right rows, columns by name, scores, errors before compute."""

import io
import json

import numpy as np
import pandas as pd
import pytest
import saved_results
from sklearn.linear_model import LogisticRegression, Ridge

from bilevel import cli
from bilevel.tuning.data import load_table
from bilevel.tuning.results import Saved


def model(estimator, table, **result) -> Saved:
    """A fitted scikit-learn model in the form of a result."""
    estimator.fit(table.X, table.y)
    arrays = {
        "coef": np.atleast_2d(estimator.coef_).T,
        "intercept": np.atleast_1d(estimator.intercept_),
        "features": np.asarray(table.features),
    }
    if table.classes is not None:
        arrays["classes"] = table.classes
    return Saved({"target": "target", "data": table.name, **result}, arrays)


def run(line: list[str], capsys) -> tuple[pd.DataFrame, str]:
    assert cli.main(["predict", *line]) == 0
    captured = capsys.readouterr()
    return pd.read_csv(io.StringIO(captured.out)), captured.err


@pytest.mark.parametrize("name", ["breast_cancer", "wine"])
def test_classes_and_probabilities_are_those_of_scikit_learn(name, tmp_path, capsys):
    table = load_table(name, None)
    estimator = LogisticRegression(max_iter=20, C=1e-3)
    with pytest.warns(Warning):  # an unconverged fit is a model too
        folder = saved_results.write(model(estimator, table), tmp_path / "out")
    frame, score = run([str(folder), name], capsys)
    assert list(frame.columns) == ["prediction", *(f"p_{c}" for c in table.classes)]
    np.testing.assert_array_equal(frame["prediction"], estimator.predict(table.X))
    np.testing.assert_allclose(
        frame.to_numpy()[:, 1:].astype(float), estimator.predict_proba(table.X), atol=1e-9
    )
    assert f"accuracy {estimator.score(table.X, table.y):.4f}" in score


@pytest.mark.parametrize("suffix", ["csv", "parquet", "npz"])
def test_columns_in_any_order_and_format_with_others_beside_them(suffix, tmp_path, capsys):
    table = load_table("diabetes", None)
    estimator = Ridge(alpha=0.1)
    folder = saved_results.write(model(estimator, table), tmp_path / "out")
    frame = pd.DataFrame(table.X, columns=list(table.features)).iloc[:30, ::-1]
    frame.insert(3, "note", ["x"] * 30)
    path = tmp_path / f"rows.{suffix}"
    if suffix == "csv":
        frame.to_csv(path, index=False)
    elif suffix == "parquet":
        frame.to_parquet(path)
    else:
        columns = {name: frame[name].to_numpy() for name in frame if name != "note"}
        np.savez(path, **columns, note=np.asarray(["x"] * 30))
    found, score = run([str(folder), str(path)], capsys)
    assert score == ""
    np.testing.assert_allclose(found["prediction"], estimator.predict(table.X[:30]), rtol=1e-12)


def test_scores_leave_out_rows_without_a_known_target(tmp_path, capsys):
    table = load_table("diabetes", None)
    folder = saved_results.write(model(Ridge(), table), tmp_path / "ridge")
    frame = pd.DataFrame(table.X, columns=list(table.features))
    path = tmp_path / "rows.csv"
    for target, text in (
        (table.y, "on 442 rows"),
        (np.where(np.arange(442) < 42, np.nan, table.y), "on 400 rows"),
        (np.full(442, np.nan), "no score: no row has a target value"),
    ):
        frame.assign(target=target).to_csv(path, index=False)
        assert text in run([str(folder), str(path)], capsys)[1]

    table = load_table("iris", None)
    with pytest.warns(Warning):
        folder = saved_results.write(
            model(LogisticRegression(max_iter=5), table), tmp_path / "iris"
        )
    frame = pd.DataFrame(table.X, columns=list(table.features))
    for target, text in (
        (table.y, "on 150 rows"),
        (table.y + 1, "on 100 rows (50 rows without a label that the model knows are left out)"),
        (np.where(table.y == 0, np.nan, table.y), "on 100 rows"),
        (np.where(table.y == 0, np.inf, table.y), "on 100 rows"),
        (np.full(150, "other"), "no score"),
    ):
        frame.assign(target=target).to_csv(path, index=False)
        assert text in run([str(folder), str(path)], capsys)[1]


def test_text_labels_come_back(tmp_path, capsys):
    table = load_table("iris", None)
    names = np.asarray(["iris setosa", "b", "true"])
    saved = model(LogisticRegression(max_iter=200), table)
    folder = saved_results.write(
        Saved(saved.result, saved.arrays | {"classes": names}), tmp_path / "out"
    )
    frame = pd.DataFrame(table.X, columns=list(table.features)).assign(target=names[table.y])
    frame.to_csv(tmp_path / "rows.csv", index=False)
    found, score = run([str(folder), str(tmp_path / "rows.csv")], capsys)
    assert list(found.columns) == ["prediction", "p_iris setosa", "p_b", "p_true"]
    assert set(found["prediction"]) == set(names)
    assert "accuracy 0.9" in score


def test_a_file_is_written_once_and_replaced_only_by_force(tmp_path, capsys):
    folder = str(saved_results.write(saved_results.tune_result(), tmp_path / "out"))
    path = tmp_path / "found.csv"
    line = ["predict", folder, "digits", "--out", str(path)]
    assert cli.main(line) == 0
    captured = capsys.readouterr()
    assert captured.out == f"written: {path}\n" and "on 1797 rows" in captured.err
    assert len(pd.read_csv(path)) == 1797
    path.write_text("precious")
    assert cli.main(line) == 2
    assert path.read_text() == "precious"
    assert cli.main([*line, "--force"]) == 0
    assert path.read_text().startswith("prediction,p_0,")


BAD = {
    "missing directory": (["nosuch", "digits"], "no directory 'nosuch'"),
    "no results": (["empty", "digits"], "no result.json"),
    "missing data": (["out", "nosuch.csv"], "no file and no bundled data set"),
    "missing columns": (["out", "few.csv"], "lacks 62 of the 64 features"),
    "no rows": (["out", "none.csv"], "has no rows"),
    "NaN": (["out", "nan.csv"], "missing values"),
    "text": (["out", "text.csv"], "holds text"),
    "out is a directory": (["out", "digits", "--out", "out"], "no file name"),
    "out below a missing directory": (["out", "digits", "--out", "no/x.csv"], "cannot write"),
    "result is no JSON": (["cut", "digits"], "expected JSON"),
    "result is a list": (["list", "digits"], "holds no result"),
    "NaN in the result": (["nanjson", "digits"], "no JSON number"),
    "model is no npz": (["nomodel", "digits"], "expected an npz file"),
    "model without coefficients": (["nocoef", "digits"], "no array 'coef'"),
    "shapes that do not fit": (["shapes", "digits"], "do not fit together"),
    "infinite coefficients": (["inf", "digits"], "NaN or infinities"),
    "pickled objects": (["pickle", "digits"], "expected an npz file"),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("predict")
    good = saved_results.tune_result(penalties=False)
    saved_results.write(good, root / "out")
    (root / "empty").mkdir()
    names = list(good.arrays["features"])
    for name, rows in {
        "none": [],
        "nan": [[1.0] * 63 + [None]],
        "text": [[1.0] * 63 + ["x"]],
    }.items():
        pd.DataFrame(rows, columns=names).to_csv(root / f"{name}.csv", index=False)
    (root / "few.csv").write_text("pixel_0_0,pixel_1_1\n1,2\n3,4\n")
    for name, text in {"cut": '{"target": "y"', "list": "[1]", "nanjson": '{"a": NaN}'}.items():
        (saved_results.write(good, root / name) / "result.json").write_text(text)
    (saved_results.write(good, root / "nomodel") / "model.npz").write_bytes(b"PK not a zip")
    for name, change in {
        "nocoef": {},
        "shapes": {"coef": np.ones((64, 9))},
        "inf": {"coef": np.full((64, 10), np.inf)},
        "pickle": {"features": np.asarray(names, object)},
    }.items():
        arrays = good.arrays | change
        if name == "nocoef":
            del arrays["coef"]
        saved_results.write(Saved(good.result, arrays), root / name)
    return root


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_exit_code_2(name, place, capsys, monkeypatch):
    line, text = BAD[name]
    monkeypatch.chdir(place)
    before = sorted(path.name for path in place.rglob("*"))
    assert cli.main(["predict", *line]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("bilevel: error: ") and captured.err.count("\n") == 1
    assert text in captured.err and "expected" in captured.err
    assert sorted(path.name for path in place.rglob("*")) == before
    if text not in ("no file and no bundled data set",) and len(line) == 2 and line[0] != "out":
        assert cli.main(["report", line[0]]) == 2
        captured = capsys.readouterr()
        assert text in captured.err and captured.err.count("\n") == 1


def test_report_refuses_nonsense_inside_a_valid_file(place, tmp_path, capsys):
    good = saved_results.clean_result()
    for key, value in {"history": 5, "baselines": {"a": 1}, "suspects": [{}], "rows": "x"}.items():
        folder = saved_results.write(Saved(good.result | {key: value}, good.arrays), tmp_path / key)
        assert cli.main(["report", str(folder)]) == 2
        captured = capsys.readouterr()
        assert "is damaged" in captured.err and captured.err.count("\n") == 1
        assert not (folder / "report.html").exists()
        assert json.loads((folder / "result.json").read_text())[key] == value
