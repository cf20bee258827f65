"""The log of a run: every step once, whatever broke the run, and what cannot be a log refused."""

import json
import resource

import jax.numpy as jnp
import numpy as np
import pytest

import bilevel as bl


def inner(w, lam, batch):
    return 0.5 * jnp.sum((w - lam) ** 2)


def outer(w, lam, batch):
    return jnp.sum((w - 0.2) ** 2)


def run(num_steps=8, **kwargs) -> bl.Result:
    problem = bl.Problem(inner, outer)
    return bl.run(problem, 2.0, 0.0, num_steps=num_steps, **({"chunk": 2} | kwargs))


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def check(path, history, begin=0):
    rows = read(path)
    assert [row["step"] for row in rows] == [begin + i for i in range(len(history.status))]
    assert {*rows[0]} == {"step", "time", *history._fields}
    for name, column in history._asdict().items():
        if name != "status":
            column = [x if np.isfinite(x) else None for x in column.tolist()]
            assert [row[name] for row in rows] == column, name
    assert [row["status"] for row in rows] == [bl.Status(s).name for s in history.status]


def test_lines_are_the_history_and_a_further_run_adds_its_own(tmp_path):
    path = tmp_path / "run.jsonl"
    first = run(log=path)
    check(path, first.history)
    assert read(path)[0]["error_estimate"] is None is not read(path)[1]["error_estimate"]
    more = run(2, log=path, state=first.state)
    joined = [np.concatenate(pair) for pair in zip(first.history, more.history, strict=True)]
    check(path, type(first.history)(*joined))


def test_a_resumed_run_has_each_step_once(tmp_path):
    path, directory = tmp_path / "run.jsonl", tmp_path / "saved"

    def stop(state, rows):
        return int(state.step) == 4

    settings = {"log": path, "checkpoint": directory}
    run(callback=stop, **settings)
    times = [row["time"] for row in read(path)]
    lines = path.read_text().splitlines(keepends=True)
    # Killed: a step is missing, two are newer than the checkpoint, and one is cut short.
    newer = [lines[3].replace('"step": 3', f'"step": {step}') for step in (4, 5)]
    path.write_text("".join([*lines[:2], lines[3], *newer, lines[3][:30]]))
    check(path, run(resume=True, **settings).history)
    kept = [row["time"] for row in read(path)]
    assert [kept[i] for i in (0, 1, 3)] == [times[i] for i in (0, 1, 3)]


def test_what_can_be_no_log_is_refused(tmp_path):
    path = tmp_path / "run.jsonl"
    run(2, log=path)
    before = path.read_text()
    with pytest.raises(ValueError, match=r"log of an earlier run \(up to step 1\)"):
        run(2, log=path)
    assert path.read_text() == before
    for text in ("step,loss\n", "[1]\n", "{}\n"):
        (tmp_path / "other").write_text(text)
        with pytest.raises(ValueError, match="is no log of a run"):
            run(2, log=tmp_path / "other")
        assert (tmp_path / "other").read_text() == text
    with pytest.raises(ValueError, match="expected a file in a writable directory"):
        run(2, log=tmp_path / "none" / "run.jsonl")


def test_a_full_disk_costs_no_result(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        with pytest.warns(RuntimeWarning, match="could not write to .* goes on without a log"):
            result = run(log=tmp_path / "run.jsonl")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(result.history.status) == 8 and result.status == bl.Status.OK


def test_scalars_reach_a_writer_and_failures_the_callback():
    seen = []

    class Writer:
        def add_scalar(self, tag, value, step):
            seen.append((tag, step, value))

    bad = lambda w, lam, batch: jnp.sum(jnp.sqrt(w - 1.75))  # NaN from the fourth step on
    problem = bl.Problem(inner, bad)
    give = bl.scalars(Writer(), prefix="a")
    callback = lambda state, rows: give(state, rows) or int(state.worst) > 1
    result = bl.run(problem, 2.0, 0.0, num_steps=8, chunk=2, callback=callback, throw=False)
    assert (result.status, result.stopped) == (bl.Status.NONFINITE, "status")
    steps = lambda name: [step for tag, step, _ in seen if tag == f"a/{name}"]
    count = len(result.history.status)
    assert steps("status") == [*range(count)] and steps("outer_value") == [*range(count - 1)]
    values = [value for tag, _, value in seen if tag == "a/outer_value"]
    assert values == result.history.outer_value[:-1].tolist()
