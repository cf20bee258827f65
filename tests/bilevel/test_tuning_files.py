"""Tables from CSV, Parquet and npz files; 500 broken files end in one line."""

import io
import json
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import saved_results

from bilevel import cli
from bilevel.tuning.data import load_table
from bilevel.tuning.errors import InputError


@pytest.fixture(scope="module")
def frame():
    rng = np.random.default_rng(0)
    found = pd.DataFrame(rng.normal(size=(40, 3)).round(4), columns=["a", "b", "c d"])
    found.insert(1, "kind", np.asarray(["no", "yes"])[rng.integers(0, 2, 40)])
    return found


def save(frame: pd.DataFrame, path: Path) -> Path:
    if path.suffix == ".parquet":
        frame.to_parquet(path, index=False)
    elif path.suffix == ".npz":
        np.savez(path, **{name: np.asarray(frame[name].tolist()) for name in frame})
    else:
        frame.to_csv(path, index=False)
    return path


@pytest.mark.parametrize("suffix", ["csv", "txt", "parquet", "PARQUET", "npz"])
def test_every_format_holds_the_same_table(suffix, frame, tmp_path):
    path = save(frame, tmp_path / f"table.{suffix.lower()}")
    path = path.rename(tmp_path / f"again.{suffix}")
    table = load_table(str(path), "kind")
    assert table.features == ("a", "b", "c d")
    assert table.task == "logistic"
    np.testing.assert_array_equal(table.X, frame[["a", "b", "c d"]].to_numpy())
    assert table.classes is not None
    np.testing.assert_array_equal(table.classes[table.y], frame["kind"])


def test_npz_with_a_matrix(tmp_path):
    X = np.arange(12.0).reshape(6, 2)
    np.savez(tmp_path / "m.npz", X=X, y=np.arange(6) % 3, extra=np.ones(6))
    table = load_table(str(tmp_path / "m.npz"), "y")
    assert table.features == ("X_0", "X_1", "extra")
    np.testing.assert_array_equal(table.X[:, :2], X)
    assert table.task == "softmax"


@pytest.mark.parametrize(
    ("arrays", "text"),
    [
        ({"X": np.ones((3, 2)), "y": np.ones(4)}, "different lengths"),
        ({"Z": np.ones((3, 2)), "y": np.ones(3)}, "only if its name is 'X'"),
        ({"X": np.ones((3, 2, 2)), "y": np.ones(3)}, "only if its name is 'X'"),
        ({"a": np.float64(1), "y": np.ones(3)}, "shape ()"),
        ({"a": np.ones(3, complex), "y": np.ones(3)}, "expected numbers or text"),
        ({"a": np.zeros(3, "datetime64[D]"), "y": np.ones(3)}, "expected numbers or text"),
        ({"y": np.ones(3)}, "one column"),
        ({"X": np.ones((3, 1)), "X_0": np.ones(3)}, "one column"),
    ],
)
def test_npz_files_that_are_no_table(arrays, text, tmp_path):
    np.savez(tmp_path / "m.npz", **arrays)
    with pytest.raises(InputError, match="expected") as error:
        load_table(str(tmp_path / "m.npz"), "y")
    assert text in str(error.value)


def test_parquet_columns_that_are_no_numbers(tmp_path):
    path = tmp_path / "t.parquet"
    y = [0, 1] * 3
    for column in ([[1], [2]] * 3, pd.date_range("2020", periods=6), [b"a"] * 6, [{"a": 1}] * 6):
        pd.DataFrame({"a": column, "y": y}).to_parquet(path)
        with pytest.raises(InputError, match="expected numbers"):
            load_table(str(path), "y")
    pd.DataFrame({"a": pd.array([1, None] * 3, dtype="Int64"), "y": y}).to_parquet(path)
    with pytest.raises(InputError, match="missing values"):
        load_table(str(path), "y")


# --- broken files -------------------------------------------------------------------------------------


def cut(raw: bytes, rng: np.random.Generator) -> bytes:
    return raw[: rng.integers(0, len(raw))]


def flip(raw: bytes, rng: np.random.Generator) -> bytes:
    changed = bytearray(raw)
    for _ in range(rng.integers(1, 60)):
        changed[rng.integers(len(raw))] ^= 1 << rng.integers(8)
    return bytes(changed)


def noise(raw: bytes, rng: np.random.Generator) -> bytes:
    return rng.bytes(rng.integers(1, 2000))


def magic(raw: bytes, rng: np.random.Generator) -> bytes:
    """The beginning of another format."""
    starts = (b"PK\x03\x04", b"PAR1", b"\x93NUMPY", b"\x89PNG", b"\x1f\x8b", b"%PDF", b"\x00" * 8)
    return starts[rng.integers(len(starts))] + raw[8:]


def doubled(raw: bytes, rng: np.random.Generator) -> bytes:
    """A piece that appears again in the middle of another."""
    at, start = rng.integers(0, len(raw), 2)
    return raw[:at] + raw[start:]


def text_of(raw: bytes, rng: np.random.Generator) -> list[str]:
    return raw.decode().split("\n")


def ragged(raw: bytes, rng: np.random.Generator) -> bytes:
    lines = text_of(raw, rng)
    for _ in range(rng.integers(1, 4)):
        row = rng.integers(1, len(lines) - 1)
        lines[row] = ",".join(lines[row].split(",")[: rng.integers(1, 4)] * rng.integers(1, 5))
    return "\n".join(lines).encode()


def values(raw: bytes, rng: np.random.Generator) -> bytes:
    """A value that is no finite number."""
    junk = ("1e999", "-1e400", "1e308", "nan", "", "abc", "0x1f", "1,5", '"', "٣", "1e", "--1", "∞")
    lines = text_of(raw, rng)
    row = rng.integers(1, len(lines) - 1)
    fields = lines[row].split(",")
    fields[rng.choice([0, 2, 3])] = junk[rng.integers(len(junk))]
    lines[row] = ",".join(fields)
    return "\n".join(lines).encode()


def encoding(raw: bytes, rng: np.random.Generator) -> bytes:
    name = ("utf-16", "utf-32", "utf-16-be", "cp037")[rng.integers(4)]
    return raw.decode().encode(name)


def nul(raw: bytes, rng: np.random.Generator) -> bytes:
    at = rng.integers(len(raw))
    return raw[:at] + b"\0" * rng.integers(1, 9) + raw[at:]


def header(raw: bytes, rng: np.random.Generator) -> bytes:
    lines = text_of(raw, rng)
    choices = ("a,a,b,kind", "1,2,3,4", "a;b;c;kind", "", "a", '"a,kind,b,c', "a,b,c,d", "a,kind")
    return "\n".join([choices[rng.integers(len(choices))], *lines[1:]]).encode()


def deep(raw: bytes, rng: np.random.Generator) -> bytes:
    lines = text_of(raw, rng)
    junk = (
        '"' * 999,
        "(" * 5000,
        "," * 3000,
        "[" * 5000 + "]" * 5000,
        "\\" * 1000,
        "\r" * 99 + "x",
    )
    lines.insert(rng.integers(0, 3), junk[rng.integers(len(junk))])
    return "\n".join(lines).encode()


def objects(raw: bytes, rng: np.random.Generator) -> bytes:
    """An npz file with objects or a pickle in it, or a member that is no array."""
    out = io.BytesIO()
    kind = rng.integers(4)
    if kind == 0:
        np.savez(out, a=np.asarray([1, "x", None], object), kind=np.ones(3))
    elif kind == 1:
        out.write(pickle.dumps({"a": [1.0, 2.0], "kind": [0, 1]}))
    elif kind == 2:
        np.save(out, np.ones((4, 2)))
    else:
        with zipfile.ZipFile(out, "w") as archive:
            archive.writestr("a.npy", rng.bytes(40))
            archive.writestr("kind.txt", "no array")
    return out.getvalue()


COMMON = (cut, flip, noise, magic, doubled)
BREAKERS = {
    "csv": (*COMMON, ragged, values, encoding, nul, header, deep),
    "npz": (*COMMON, objects),
    "parquet": COMMON,
}


def check_refused(line: list[str], capfd, about: str) -> bool:
    """Whether the command refused, in one line; a changed file that is still good may pass."""
    capfd.readouterr()
    code = cli.main(line)
    captured = capfd.readouterr()
    assert "Traceback" not in captured.err, about
    if code == 0:
        return False
    assert code == 2, about
    assert captured.err.startswith("bilevel: error: "), about
    assert captured.err.count("\n") == 1 and "expected" in captured.err, about
    assert captured.out == "", about
    return True


def test_500_broken_files_end_in_one_line(frame, tmp_path, capfd, monkeypatch, seed):
    computed = []
    monkeypatch.setattr(cli, "_compute", lambda *_, **__: computed.append(0) or 0)
    rng = np.random.default_rng(seed)
    trials, refused = 0, 0
    whole = {name: save(frame, tmp_path / f"whole.{name}").read_bytes() for name in BREAKERS}
    while trials < 500:
        kind = ("csv", "csv", "npz", "parquet")[trials % 4]
        breaker = BREAKERS[kind][rng.integers(len(BREAKERS[kind]))]
        path = tmp_path / f"broken.{kind}"
        path.write_bytes(breaker(whole[kind], rng))
        extra = ["--trusted", "6"] if trials % 3 == 0 else []
        command = "clean" if extra else "tune"
        line = [command, str(path), "--target", "kind", *extra]
        refused += check_refused(line, capfd, f"trial {trials}: {breaker.__name__} {kind}")
        trials += 1
    assert len(computed) == 500 - refused
    print(f"{refused} of 500 refused")
    assert refused >= 400, f"{refused} of 500 were refused: the generator breaks too little"


def test_broken_results_end_in_one_line(tmp_path, capfd, seed):
    rng = np.random.default_rng(seed)
    folder = saved_results.write(saved_results.clean_result(), tmp_path / "out")
    whole = {name: (folder / name).read_bytes() for name in ("result.json", "model.npz")}
    (tmp_path / "data.csv").write_text("a,b\n1,2\n")
    refused = 0
    for trial in range(120):
        name = ("result.json", "model.npz")[trial % 2]
        breaker = COMMON[rng.integers(len(COMMON))]
        (folder / name).write_bytes(breaker(whole[name], rng))
        about = f"trial {trial}: {breaker.__name__} {name}"
        refused += check_refused(["report", str(folder)], capfd, about)
        # The data lack the features: a file that is still good ends in one line too.
        assert check_refused(["predict", str(folder), str(tmp_path / "data.csv")], capfd, about)
        (folder / name).write_bytes(whole[name])
    assert refused >= 90
    assert json.loads(whole["result.json"])["command"] == "clean"
