"""One script in several processes: the numbers and statuses of one process, and one set of files."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import bilevel as bl
from bilevel import cli

SCRIPT = """
import os, signal, sys, time
import jax, jax.numpy as jnp, numpy as np, optax
import bilevel as bl

def inner(w, lam, task):
    return 0.5 * w @ task["H"] @ w - task["b"] @ w + 0.5 * lam * w @ w

def outer(w, lam, task):
    return 0.5 * jnp.sum((w - task["c"]) ** 2) + 0.1 * lam**2

rng = np.random.default_rng(0)
A = rng.standard_normal((16, 3, 3)) / 2
H = np.linspace(1, 4, 16)[:, None, None] * (A @ A.swapaxes(1, 2) + np.eye(3))
data = {"H": H, "b": rng.standard_normal((16, 3)), "c": rng.standard_normal((16, 3))}
data = {name: jnp.asarray(x, jnp.float32) for name, x in data.items()}
tasks = bl.Tasks(bl.Problem(inner, outer), data)
start = jnp.float32(0.7), jnp.zeros((3,), jnp.float32)
# Enough steps for some of the tasks alone.
settings = {"solver": bl.GradientDescent(0.1, max_steps=14, tol=1e-3), "engine": bl.Implicit(estimate=False)}

def one(mesh):
    h = bl.hypergradient(tasks, *start, mesh=mesh, throw=False, **settings)
    return bl.gather({"grad": h.grad, "w": h.w, "status": h.info.tasks.status})

def run(mesh, num_steps, **kwargs):
    own = {"outer": optax.sgd(0.1), "chunk": 1, "throw": False, **settings, **kwargs}
    result = bl.run(tasks, *start, num_steps=num_steps, mesh=mesh, **own)
    found = {"lam": result.lam, "w": result.w, "outer_value": result.history.outer_value}
    return result.stopped, bl.gather(found)

def signal_once(state, rows):
    # To the launcher, by one of the processes.
    if jax.process_index() == 1 and state.step == 2:
        os.kill(os.getppid(), signal.SIGTERM)

if __name__ == "__main__":
    what, folder = sys.argv[1:]
    mesh = jax.make_mesh((jax.device_count(),), ("tasks",))
    if what == "one":
        found = one(mesh)
    else:
        kept = {"checkpoint": folder, "log": folder + "/run.jsonl"}
        stopped, found = run(mesh, 10**6, callback=signal_once, **kept)
        assert stopped == "terminated"
        _, found = run(mesh, len(found["outer_value"]) + 1, resume=True, **kept)
    if jax.process_index() == 0:
        np.savez(folder + "/found.npz", **found, count=jax.process_count())
        if what == "run":
            time.sleep(600)
    elif what == "run":
        while not os.path.exists(folder + "/found.npz"):
            time.sleep(0.05)
        raise SystemExit(7)
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    path = tmp_path_factory.mktemp("processes") / "script.py"
    path.write_text(SCRIPT)
    return path


def launch(count: int, script: Path, *arguments: str) -> subprocess.Popen:
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root}
    line = ["-m", "bilevel", "launch", "--processes", str(count), str(script), *arguments]
    return subprocess.Popen(
        [sys.executable, *line], env=environment, stderr=subprocess.PIPE, text=True
    )


def test_four_processes_give_what_one_gives(script, tmp_path):
    child = launch(4, script, "one", str(tmp_path))
    expected = runpy.run_path(str(script))["one"](None)
    errors = child.communicate(timeout=120)[1]
    assert child.returncode == 0, errors
    compare(tmp_path, 4, expected)
    assert set(expected["status"]) == {0, 1}


def test_two_processes_save_and_end_together(script, tmp_path):
    """SIGTERM ends the run after a chunk, which is gone on with; then the second fails, and the first ends."""
    child = launch(2, script, "run", str(tmp_path))
    errors = child.communicate(timeout=120)[1]
    assert child.returncode == 7, errors
    with np.load(tmp_path / "found.npz") as found:
        steps = len(found["outer_value"])
    assert steps >= 3
    compare(tmp_path, 2, runpy.run_path(str(script))["run"](None, steps)[1])
    lines = (tmp_path / "run.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [*range(steps)]


def compare(folder, count, expected):
    with np.load(folder / "found.npz") as found:
        assert found["count"] == count
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-6, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("--processes 2 nosuch.py", "no script 'nosuch.py'"),
        ("--processes 0 {}", "expected at least 1"),
        ("--processes 2 --coordinator h:1 {}", "expected --processes, --process and"),
        ("--process 1 {}", "expected --processes, --process and --coordinator together"),
        ("--processes 2 --process 2 --coordinator h:1 {}", "--process is 2, .* expected 0 to 1"),
    ],
)
def test_bad_lines_are_refused(line, match, script, capsys):
    assert cli.main(["launch", *line.format(script).split()]) == 2
    assert re.search(match, capsys.readouterr().err)


def test_a_cluster_has_started_the_processes(tmp_path, monkeypatch, capsys):
    script = tmp_path / "script.py"
    script.write_text("import sys; print(sys.argv[1:], sys.path[0]); sys.exit(0)")
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.setattr(sys, "argv", sys.argv.copy())
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *found: calls.append(found))
    assert cli.main(["launch", str(script), "--processes", "2"]) == 0  # those are the script's
    assert capsys.readouterr().out == f"['--processes', '2'] {tmp_path}\n"
    line = ["launch", "--processes", "3", "--process", "1", "--coordinator", "h:1", str(script)]
    assert cli.main(line) == 0
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "2")
    assert cli.main(["launch", "--processes", "3", "--coordinator", "h:1", str(script)]) == 0
    assert calls == [(None, None, None), ("h:1", 3, 1), ("h:1", 3, 2)]

    def none(*_):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", none)
    assert cli.main(["launch", str(script)]) == 2
    assert re.search("no cluster found .* or --processes N", capsys.readouterr().err)


def test_arrays_of_one_process_are_whole_already():
    tree = {"key": jax.random.key(3), "x": jax.numpy.ones(2), "n": 4}
    found = bl.gather(tree)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(found))
    np.testing.assert_array_equal(found["key"], jax.random.key_data(tree["key"]))
