"""Progress lines, and Ctrl-C: in a run, and in the commands that finish with what was reached."""

import io
import json
import sys

import jax.numpy as jnp
import numpy as np
import pytest

import bilevel as bl
from bilevel import cli, live, progress


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


def history(count: int, **columns) -> bl.History:
    rows = dict.fromkeys(bl.History._fields, np.zeros(count))
    rows |= {"error_estimate": np.full(count, np.nan), "status": np.zeros(count, int), **columns}
    return bl.History(**{name: np.asarray(column) for name, column in rows.items()})


@pytest.mark.parametrize("width", [60, 140])
def test_the_panel_tells_what_chunks_brought(width, monkeypatch):
    console = pytest.importorskip("rich.console")
    clock = iter([0.0, 10.0, 12.0, 13.0])
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(progress, "memory", lambda: "  device 3 GB of 8 GB")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", Terminal())
    bar = progress.Progress("panel", 100)
    steps = np.array([30, 10], np.int32)
    work = {"inner_steps": steps, "lane_steps": 2 * steps, "adjoint_steps": np.array([3, 5])}
    first = history(2, outer_value=[9.0, 5.0], error_estimate=[np.nan, 0.02], **work)
    second = history(3, outer_value=[4.0, np.nan, 1.0], grad_norm=[0, 0, 0.25], status=[0, 0, 1])
    tasks = np.array([0, 0, 1, -1])
    bar.update(2, 5.0, 1.0, seen=live.Seen(first, (5.0, 1), tasks))
    bar.update(5, 1.0, 0.25, seen=live.Seen(second._replace(**work), (1.0, 4), tasks))
    shown = console.Console(record=True, width=width, file=io.StringIO(), force_terminal=True)
    shown.print(bar.live.get_renderable())
    lines = shown.export_text().splitlines()
    assert {len(line) for line in lines} == {width}
    text = {line[2:17].strip(): line[17:-1].strip() for line in lines}
    bars = min(width - 40, 40)
    assert text["step"] == "5 of 100  " + "█" * (bars // 20) + "░" * (bars - bars // 20)
    assert text["outer value"] == "1" and text["best so far"] == "1 at step 4"
    assert text[""].endswith("█▅▄x▁")
    assert text["hypergradient"] == "norm 0.25  relative error about 0.02"
    assert text["inner steps"] == "20 per step, 80 in all"
    assert text["adjoint steps"] == "4 per step, 16 in all"
    assert text["lanes"] == "50% busy" and text["device"] == "3 GB of 8 GB"
    assert text["steps"] == "4 OK, 1 MAX_STEPS"
    assert text["tasks"] == "2 OK, 1 MAX_STEPS, 1 not yet"
    assert text["time"] == "12.0 s, about 63 s left"
    assert live.sparkline([1.0, 3.0, 5.0, 5.0, 0.0], 3) == "▄█▁"
    assert live.sparkline([], 5) == "" and live.sparkline([2.0, 2.0], 5) == "▁▁"


def test_a_run_with_a_panel_and_where_there_is_none(monkeypatch, capsys):
    pytest.importorskip("rich")
    with pytest.raises(ValueError, match="'panel', got 'pannel'"):
        run(progress="pannel")
    run(progress="panel")  # no terminal
    assert [line.split("  ")[0] for line in capsys.readouterr().err.splitlines()][-1] == "step 6/6"
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    tasks = bl.Tasks(bl.Problem(lambda w, lam, x: inner(w, lam, x) * x, outer), np.ones(3))
    result = bl.run(tasks, 2.0, 0.0, num_steps=4, chunk=2, progress="panel")
    text = terminal.getvalue()
    assert "4 of 4" in text and "3 OK" in text and "best so far" in text
    np.testing.assert_array_equal(result.state.engine.status, np.zeros(3))
    monkeypatch.setitem(sys.modules, "rich.console", None)
    with pytest.raises(ImportError, match=r"pip install 'bilevel\[tune\]'"):
        run(progress="panel")


def test_a_profile_of_the_second_chunk(tmp_path, capsys, monkeypatch):
    folder = tmp_path / "trace"
    result, whole = run(profile=folder), run()
    np.testing.assert_array_equal(result.history.outer_value, whole.history.outer_value)
    assert list(folder.rglob("*.xplane.pb")) and "steps 2 to 3 in" in capsys.readouterr().err
    with pytest.raises(ValueError, match="expected a writable directory"):
        run(profile=__file__)
    progress.jax.profiler.start_trace(tmp_path / "other")
    try:
        with pytest.warns(RuntimeWarning, match="is another one running"):
            assert len(run(profile=folder).history.status) == 6
    finally:
        progress.jax.profiler.stop_trace()
    with pytest.warns(RuntimeWarning, match="compilation is in its profile"):
        bl.run(bl.Problem(inner, outer), 2.0, 0.0, num_steps=2, chunk=2, profile=tmp_path / "one")
    assert list((tmp_path / "one").rglob("*.xplane.pb"))


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
