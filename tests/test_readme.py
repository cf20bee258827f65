"""What the documentation says runs: its code, and the commands of the README."""

import csv
import pathlib
import re
import shlex
import tomllib

import pytest

from bilevel import cli
from bilevel.tuning import data
from bilevel.tuning.data import load_table
from bilevel.tuning.output import FILES

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def python_blocks(page):
    """The page's blocks as one program: they share their names, in the order of the page."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.S)
    assert blocks
    namespace = {}
    for block in blocks:
        exec(compile(block, page, "exec"), namespace)
    return namespace


def test_readme():
    found = python_blocks("README.md")
    assert found["result"].status == 0
    assert found["result"].history.outer_value[-1] < found["h"].info.outer_value


@pytest.mark.parametrize("page", ["docs/guide.md"])
def test_pages(page):
    python_blocks(page)


def shell_lines():
    """Lines of the README's shell blocks, in their order and split into words, without comments."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.S | re.M)
    lines = "".join(text for language, text in blocks if not language).splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def write_tables(folder):
    """The two files of their own that the README's commands name; returns the rows of new.csv."""
    digits, cancer = load_table("digits", None), load_table("breast_cancer", None)
    with (folder / "new.csv").open("w", newline="") as file:
        csv.writer(file).writerows([digits.features, *digits.X[:30].tolist()])
    with (folder / "groups.csv").open("w", newline="") as file:
        kinds = [
            (name, "error" if "error" in name else name.split()[0]) for name in cancer.features
        ]
        csv.writer(file).writerows([("feature", "group"), *kinds])
    return 30


def test_commands_of_the_readme(tmp_path, monkeypatch, capsys):
    """On a quarter of the rows: what the commands find on all of them, test_tuning_commands.py measures."""
    monkeypatch.chdir(tmp_path)
    whole = data._load_bundled
    monkeypatch.setattr(data, "_load_bundled", lambda name: whole(name).iloc[:450])
    rows = write_tables(tmp_path)
    commands = [words[1:] for words in shell_lines() if words[0] == "bilevel"]
    assert {words[0] for words in commands} == {"tune", "clean", "report", "predict"}
    for words in commands:
        if words[0] == "report":
            (tmp_path / words[1] / "report.html").unlink()
        assert cli.main(words) == 0, (words, capsys.readouterr().err)
    found = {path.name: {file.name for file in path.iterdir()} for path in tmp_path.glob("*/")}
    assert found == {"cleaned": set(FILES), "tuned": set(FILES) - {"suspects.csv"}}
    with (tmp_path / "found.csv").open() as file:
        predictions = list(csv.DictReader(file))
    assert len(predictions) == rows
    assert list(predictions[0]) == ["prediction", *(f"p_{digit}" for digit in range(10))]


def test_demo_is_two_commands_of_the_readme():
    """The demo itself needs its own environment; what it runs is run above."""
    recipe = re.search(r"^demo:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.M)
    assert recipe
    demo = recipe[1].replace("$(BIN)/", "").strip().split("\n\t")
    known = {" ".join(words).partition(" --out ")[0] for words in shell_lines()}
    assert len(demo) == 2
    for line in demo:
        command, _, rest = line.partition(" --out ")
        assert command in known
        assert re.fullmatch(r"demo/\w+ --force", rest)


def test_other_commands_of_the_readme_exist():
    """Targets of make, scripts in inline code, and extras of pip."""
    targets = {words[1] for words in shell_lines() if words[0] == "make"}
    assert {words[0] for words in shell_lines()} == {"bilevel", "make"}
    assert targets == {"demo", "test"}
    for target in targets:
        assert re.search(rf"^{target}: ", (ROOT / "Makefile").read_text(), re.M)
    scripts = re.findall(r"`python (\S+?)`", README)
    assert scripts and all((ROOT / script).is_file() for script in scripts)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = re.findall(r"`pip install (\w+)\[(\w+)\]`", README)
    assert extras
    for name, extra in extras:
        assert name == project["name"] and extra in project["optional-dependencies"]
