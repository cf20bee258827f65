"""Public names are loaded at first use: refusing bad input does not wait for JAX."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import bilevel


def test_every_public_name_is_there_and_is_what_type_checkers_see():
    tree = ast.parse(Path(bilevel.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom)
        seen |= {alias.name: node.module for alias in node.names}
    assert set(seen) == set(bilevel.__all__) <= set(dir(bilevel))
    for name, module in seen.items():
        if module == "bilevel":  # a submodule
            assert getattr(bilevel, name) is importlib.import_module(f"bilevel.{name}")
        else:
            assert getattr(bilevel, name) is getattr(importlib.import_module(module), name)
    with pytest.raises(AttributeError, match="no attribute 'Implict'"):
        bilevel.Implict  # noqa: B018


def run(code: str, cwd) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=cwd
    )


def test_a_submodule_imported_first_hides_no_function(tmp_path):
    names = "bilevel.hypergradient, bilevel.run, bilevel.transforms.Exp"
    done = run(f"import bilevel.gradient; assert all(map(callable, ({names})))", tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "line", ["tune nosuch.csv --target y", "tune text.csv --target y", "tune --folds 1"]
)
def test_refusing_bad_input_does_not_import_jax(line, tmp_path):
    (tmp_path / "text.csv").write_text("a,y\nx,1\ny,2\n")
    code = (
        "import sys; from bilevel.cli import main; assert main(sys.argv[1:]) == 2; "
        "assert 'jax' not in sys.modules"
    )
    done = run(f"import sys; sys.argv[1:] = {line.split()!r}; {code}", tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("\n") == 1
