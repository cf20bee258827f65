"""Progress lines, and Ctrl-C: in a run, and in the commands that finish with what was reached."""

import io
import json
import sys

import jax.numpy as jnp
import numpy as np
import pytest

import bilevel as bl
from bilevel import cli, progress


def inner(w, lam, batch):
    return 0.5 * jnp.sum((w - lam) ** 2)


def outer(w, lam, batch):
    return jnp.sum((w - 0.2) ** 2)


def run(**kwargs) -> bl.Result:
    return bl.run(bl.Problem(inner, outer), 2.0, 0.0, num_steps=6, chunk=2, **kwargs)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_plain_lines_where_asked_for_or_on_a_terminal_without_rich(monkeypatch, capsys):
    run()
    assert capsys.readouterr().err == ""
    run(progress=True)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["step 2/6", "step 4/6", "step 6/6"]
    assert all("outer " in line and "|hypergradient| " in line for line in lines)
    assert [" left" in line for line in lines] == [False, True, True]
    monkeypatch.setitem(sys.modules, "rich.console", None)
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    run()
    assert len(terminal.getvalue().splitlines()) == 3


def test_one_live_line_with_rich(monkeypatch):
    pytest.importorskip("rich")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    run(progress=False)
    assert terminal.getvalue() == ""
    run()
    text = terminal.getvalue()
    assert "\x1b[2K" in text  # the line is erased and drawn again
    assert text.count("\n") == 1 and "step 6/6" in text
    assert text.endswith("\x1b[?25h")  # the cursor is back


def test_time_left_is_the_pace_after_the_first_chunk(monkeypatch, capsys):
    clock = iter([0.0, 10.0, 10.0, 12.0])
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(clock))
    with progress.Progress(True, 10) as bar:
        bar.update(2, 1.0, 1.0)  # 10 s with compilation
        bar.update(4, 1.0, 1.0)  # 2 s for 2 steps
    assert capsys.readouterr().err.splitlines()[-1].endswith("12.0 s  6 s left")


def test_the_line_tells_work_idle_lanes_and_memory(monkeypatch, capsys):
    columns = dict.fromkeys(bl.History._fields, np.zeros(2))
    columns |= {
        "error_estimate": np.array([0.02, np.nan]),
        "inner_steps": np.array([30, 10], np.int32),
        "lane_steps": np.array([60, 20], np.int32),
        "adjoint_steps": np.array([3, 5], np.int32),
    }
    rows = bl.History(**columns)
    assert progress.work(rows) == " (error 0.02)  inner 20  adjoint 4  lanes 50% busy"
    assert "busy" not in progress.work(rows._replace(lane_steps=rows.inner_steps))
    run(progress=True)
    assert " memory " in capsys.readouterr().err  # of the process, where the backend says nothing

    class Device:
        def __init__(self, used):
            self.used = used

        def memory_stats(self):
            return {"peak_bytes_in_use": self.used, "bytes_limit": 8 * 10**9}

    monkeypatch.setattr(progress.jax, "local_devices", lambda: [Device(10**9), Device(3 * 10**9)])
    assert progress.memory() == "  device 3 GB of 8 GB"
    monkeypatch.setattr(progress.jax, "local_devices", lambda: [Device(0)])
    monkeypatch.setattr(progress, "resource", None)
    assert progress.memory() == ""


def test_ctrl_c_returns_the_chunks_that_are_done():
    def press(state, history):
        if int(state.step) == 4:
            raise KeyboardInterrupt

    result, whole = run(callback=press), run()
    assert result.stopped == "interrupted"
    np.testing.assert_array_equal(result.history.outer_value, whole.history.outer_value[:4])
    assert int(result.state.step) == 4 == len(result.history.status)
    again = bl.run(bl.Problem(inner, outer), 2.0, 0.0, num_steps=2, chunk=2, state=result.state)
    np.testing.assert_array_equal(again.lam, whole.lam)


def test_ctrl_c_before_the_first_chunk_returns_the_start(monkeypatch):
    def interrupt(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(progress.Progress, "__enter__", interrupt)
    result = run()
    assert result.stopped == "interrupted" and len(result.history.status) == 0
    assert float(result.lam) == 2.0 and result.status == bl.Status.OK


def test_estimates_come_as_often_as_asked_for(count_traces):
    counted = count_traces(outer)
    problem = bl.Problem(inner, counted)
    known = []
    for every in (None, 4, 5, 100):
        result = bl.run(problem, 2.0, 0.0, num_steps=7, chunk=2, estimate_every=every)
        known.append(np.flatnonzero(np.isfinite(result.history.error_estimate)).tolist())
        if every is None:
            traces = counted.count
    assert known == [[1, 3, 5, 6], [3, 6], [5, 6], [6]]
    assert counted.count == traces
    with pytest.raises(ValueError, match="estimate_every must be at least 1"):
        bl.run(problem, 2.0, 0.0, estimate_every=0)


class Presses:
    """Ctrl-C at given calls of the progress hook."""

    def __init__(self, monkeypatch, *at: int) -> None:
        self.at, self.calls = at, 0
        monkeypatch.setattr(progress.Progress, "update", self)

    def __call__(self, *_) -> None:
        self.calls += 1
        if self.calls in self.at:
            raise KeyboardInterrupt


def test_tune_finishes_with_the_best_so_far(tmp_path, capsys, monkeypatch):
    presses = Presses(monkeypatch, 3)
    assert cli.main(["tune", "wine", "--out", str(tmp_path)]) == 0
    captured = capsys.readouterr()
    result = json.loads((tmp_path / "result.json").read_text())
    assert presses.calls == 3
    assert result["stopped"] == "interrupted" and result["outer_steps"] == 3
    assert {name: len(column) for name, column in result["history"].items()} == {
        "objective": 3,
        "grad_norm": 3,
        "error_estimate": 3,
        "status": 3,
        "advice": 1,
    }
    # The best of three evaluations, solved anew.
    assert result["cv_loss"] == pytest.approx(min(result["history"]["objective"]), rel=1e-3)
    assert result["seconds"]["warm"] is None
    assert "interrupted after 3 evaluations" in captured.err
    assert "Interrupted" in (tmp_path / "report.html").read_text()
    with np.load(tmp_path / "model.npz") as model:
        assert np.isfinite(model["coef"]).all()


@pytest.mark.parametrize("at", [4, 13])
def test_clean_finishes_with_the_weights_so_far(at, tmp_path, capsys, monkeypatch):
    """The run on all trusted rows comes first (10 steps), then those without a fold."""
    presses = Presses(monkeypatch, at)
    line = ["clean", "wine", "--trusted", "24", "--seed", "2", "--out", str(tmp_path)]
    assert cli.main(line) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert presses.calls == at
    assert result["stopped"] == "interrupted"
    assert result["outer_steps"] == min(at, 10)
    with np.load(tmp_path / "model.npz") as model:
        assert np.ptp(model["weights"]) > 0
    assert capsys.readouterr().err.count("interrupted after") == 1


def test_a_second_ctrl_c_ends_without_results(tmp_path, capsys, monkeypatch):
    from bilevel.tuning import tune

    Presses(monkeypatch, 2)

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(tune, "sklearn_baselines", interrupt)
    out = tmp_path / "out"
    assert cli.main(["tune", "wine", "--out", str(out)]) == 130
    assert capsys.readouterr().err.endswith("bilevel: interrupted\n")
    assert not out.exists()
