"""Checkpoints: the bits of a run without a break, whatever breaks it; and nothing lost, whatever else fails."""

import contextlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel as bl
from bilevel import checkpoint, checkpoint_file, fingerprint, lane_choice, transforms

STEPS = 24
X = np.random.default_rng(0).standard_normal((2, 12, 3))
KEY = 5


def inner(w, lam, X):
    return 0.5 * jnp.mean((X @ w - X[:, 0]) ** 2) + 0.5 * jnp.sum(lam["p"] * w**2)


def outer(w, lam, X):
    return jnp.mean((X @ w - 0.5 * X[:, 0]) ** 2)


def run(directory=None, num_steps=STEPS, **kwargs) -> bl.Result:
    """Minibatches, Adam and L-BFGS: keys, counters and memories all matter."""
    data = kwargs.pop("data", X)
    problem = bl.Problem(inner, outer, *data, batch_size=(None, 5))
    lam, w = {"p": jnp.full(kwargs.pop("size", 3), 0.3)}, jnp.zeros(3)
    key = jax.random.key(kwargs.pop("seed", KEY))
    settings = {"chunk": 2, "estimate_every": 4, "key": key} | kwargs
    return bl.run(problem, lam, w, num_steps=num_steps, checkpoint=directory, **settings)


@pytest.fixture(scope="module")
def whole() -> bl.Result:
    return run()


def same(found: bl.Result, expected: bl.Result) -> None:
    for field in ("lam", "w", "history", "state", "best"):
        jax.tree.map(np.testing.assert_array_equal, getattr(found, field), getattr(expected, field))
    types = lambda result: [(leaf.dtype, leaf.weak_type) for leaf in jax.tree.leaves(result.state)]
    assert types(found) == types(expected)


def files(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.glob("step-*"))


CHILD = """
import sys, time
sys.path[:0] = sys.argv[2:4]
import jax
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_compilation_cache_dir", sys.argv[4] or None)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)
import test_checkpoint
test_checkpoint.run(sys.argv[1], resume=True, callback=lambda *_: time.sleep(0.1))
"""


def test_killed_processes_leave_no_trace_in_the_result(tmp_path, whole):
    here = Path(__file__).parent
    cache = jax.config.jax_compilation_cache_dir or ""  # type: ignore[attr-defined]
    arguments = [str(tmp_path), str(here), str(here.parents[1]), cache]
    rng = np.random.default_rng()
    for kill in range(2):
        before = files(tmp_path)
        child = subprocess.Popen([sys.executable, "-c", CHILD, *arguments])
        while files(tmp_path) == before and child.poll() is None:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.3))
        assert child.poll() is None
        child.kill()
        child.wait()
        assert f"step-{STEPS:012d}.npz" not in files(tmp_path), kill
    (tmp_path / ".bilevel-half").write_bytes(b"PK")  # of a save that was killed
    same(run(tmp_path, resume=True), whole)
    assert not list(tmp_path.glob(".bilevel-*")) and len(files(tmp_path)) == checkpoint.KEEP
    same(run(tmp_path, resume=True), whole)  # nothing is left to do


def test_signals_save_and_end_with_what_can_be_resumed(tmp_path, whole):
    def at(step, action):
        return lambda state, history: action() if int(state.step) == step else None

    def interrupt():
        raise KeyboardInterrupt

    handler = signal.getsignal(signal.SIGTERM)
    first = run(tmp_path, callback=at(4, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    assert first.stopped == "terminated" and len(first.history.status) == 4
    assert signal.getsignal(signal.SIGTERM) == handler
    second = run(tmp_path, resume=True, callback=at(10, interrupt))
    assert second.stopped == "interrupted" and len(second.history.status) == 10
    with pytest.raises(ZeroDivisionError):  # a user's own error loses no chunk either
        run(tmp_path, resume=True, callback=at(14, lambda: 1 / 0))
    assert files(tmp_path)[-1] == "step-000000000014.npz"
    same(run(tmp_path, resume=True), whole)
    stopped = run(tmp_path, resume=True, outer_tol=1e9)  # an ended run is not stepped on
    same(stopped, whole)
    assert stopped.stopped == "outer_tol"


def test_damaged_files_fall_back_to_the_last_good_one(tmp_path, whole):
    for num_steps in (STEPS - 4, STEPS - 2, STEPS):  # the last state of each is on disk
        run(tmp_path, num_steps=num_steps, resume=True)
    paths = sorted(tmp_path.glob("step-*"))
    assert len(paths) == checkpoint.KEEP and paths[-1].name == f"step-{STEPS:012d}.npz"
    paths[-1].write_bytes(paths[-1].read_bytes()[:-100])
    data = bytearray(paths[-2].read_bytes())
    data[len(data) // 2] ^= 1  # one bit
    paths[-2].write_bytes(data)
    with pytest.warns(RuntimeWarning, match=rf"{paths[-1].name}: .*{paths[-2].name}: "):
        same(run(tmp_path, resume=True), whole)
    for path in tmp_path.glob("step-*"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="no checkpoint in .* can be read"):
        run(tmp_path, resume=True)


def rewrite(path: Path, change) -> None:
    with np.load(path) as arrays:
        found = dict(arrays)
    meta = json.loads(str(found["meta"]))
    change(meta)
    found["meta"] = np.asarray(json.dumps(meta))
    np.savez(path, **found)


def test_another_problem_version_or_run_is_told(tmp_path, whole, monkeypatch):
    run(tmp_path, num_steps=4)
    for change, match in [
        ({"size": 1}, r"state.lam\['p'\] is float64\[3\] there and float64\[1\] here"),
        ({"data": 2 * X}, "the data has other values"),
        ({"seed": KEY + 1}, "the key has other values"),
        ({"outer": optax.sgd(0.1, momentum=0.9)}, "state.outer.* absent here"),
        ({"resume": False}, "earlier run .*resume=True"),
    ]:
        with pytest.raises(ValueError, match=match):
            run(tmp_path, **({"resume": True} | change))
    with pytest.raises(ValueError, match="resume=True needs checkpoint"):
        run(resume=True)
    with checkpoint.opened(tmp_path, True), pytest.raises(ValueError, match=f"{os.getpid()}"):
        run(tmp_path, resume=True)
    path = tmp_path / "step-000000000004.npz"
    rewrite(path, lambda meta: meta["versions"].update(jax="0.0.1"))
    with pytest.warns(RuntimeWarning, match="jax 0.0.1 -> "):
        run(tmp_path, num_steps=6, resume=True)
    for name in files(tmp_path):
        rewrite(tmp_path / name, lambda meta: meta.update(format=99))
    with pytest.raises(ValueError, match="format 99, of bilevel"):
        run(tmp_path, resume=True)


def test_another_loss_of_the_same_shapes_is_told(tmp_path, monkeypatch):
    """Another program, or another constant in it; the same losses, built anew, are not."""
    run(tmp_path, num_steps=2)
    run(tmp_path, num_steps=2, resume=True)
    first = outer
    monkeypatch.setitem(globals(), "outer", lambda w, lam, X: 2 * first(w, lam, X))
    with pytest.warns(
        RuntimeWarning, match=r"other than when step-\d+.npz was saved: outer loss\."
    ):
        run(tmp_path, num_steps=4, resume=True)
    scales = {"transform": {"p": bl.transforms.Exp()}}
    with pytest.warns(RuntimeWarning, match=r"was saved: transform\."):
        run(tmp_path, num_steps=4, resume=True, **scales)


def digests(problem, transform=None):
    w = np.zeros((2, 3) if isinstance(problem, bl.Tasks) else 3)
    lam = {"p": np.ones(3)}
    return fingerprint.digests(
        problem, w, lam, jax.random.key(0), transforms.broadcast(transform, lam)
    )


def changed(first, second):
    assert set(first) == set(second)
    return {name for name in first if first[name] != second[name]}


def test_the_digest_of_a_loss_sees_constants_and_tasks():
    def of(shift, factor=1.0, tasks=False):
        loss = lambda w, lam, X: inner(w, lam, X) + factor * jnp.asarray(shift) @ w
        problem = bl.Problem(loss, outer, None if tasks else X[0], None if tasks else X[1])
        return digests(bl.Tasks(problem, X) if tasks else problem)

    for tasks in (False, True):
        first = of(np.zeros(3), tasks=tasks)
        assert of(np.zeros(3), tasks=tasks) == first
        for other in (of(np.ones(3), tasks=tasks), of(np.zeros(3), 2.0, tasks)):
            assert changed(first, other) == {"inner loss"}


def test_every_function_of_a_problem_has_a_digest():
    half = {
        "inner_init": lambda lam, X: 0.5 * lam["p"],
        "inner_prox": lambda v, step, lam: bl.prox.l1(v, step, 0.5 * lam["p"]),
        "inner_penalty": lambda w, lam: 0.5 * jnp.sum(jnp.abs(lam["p"] * w)),
        "inequality": lambda w, lam: 0.5 * w - lam["p"],
        "equality": lambda w, lam: 0.5 * w - lam["p"],
        "joint_projection": lambda w, lam: (0.5 * w, lam),
        "outer_projection": lambda lam: jax.tree.map(lambda x: 0.5 * x, lam),
    }
    given = {"joint_projection": lambda w, lam: (w, lam)}
    for tasks in (False, True):

        def of(tasks=tasks, **functions):
            data = () if tasks else tuple(X)
            problem = bl.Problem(inner, outer, *data, **(given | functions))
            return digests(bl.Tasks(problem, X) if tasks else problem)

        for name, function in half.items():
            assert changed(of(), of(**{name: function})) == {name}
    plain = bl.Problem(inner, outer, *X)
    assert changed(digests(plain), digests(plain, bl.transforms.Exp())) == {"transform"}
    batches = bl.Problem(inner, outer, *X, batch_size=(None, 5))
    assert changed(digests(plain), digests(batches)) == {"outer loss", "sampling"}
    tasks = bl.Tasks(bl.Problem(inner, outer), X)
    assert changed(digests(tasks), digests(bl.Tasks(tasks.problem, X, per_step=1))) == {"sampling"}


def test_a_disk_that_fails_costs_no_result(tmp_path, whole):
    for bad in (tmp_path / "file" / "below", Path("/proc/none")):
        (tmp_path / "file").touch()
        with pytest.raises(ValueError, match="expected a writable directory"):
            run(bad)
    directory = tmp_path / "run"
    run(directory, num_steps=4)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:  # the system refuses to write more: as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        with pytest.warns(RuntimeWarning, match="could not save step .* step-000000000004.npz"):
            same(run(directory, resume=True), whole)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert files(directory)[-1] == "step-000000000004.npz"
    assert not list(directory.glob(".bilevel-*"))
    same(run(directory, resume=True), whole)


class Disk:
    """Writes wait until it is let go, and then `error`, where there is one, is raised. Of use for one run."""

    def __init__(self, monkeypatch, error=None) -> None:
        self.began, self.released = threading.Event(), threading.Event()
        self.writes: list[str] = []
        self.ended, self.error, self.put = 0, error, checkpoint_file.put
        monkeypatch.setattr(checkpoint_file, "put", self)

    def __call__(self, final, write, force) -> None:
        assert self.ended == len(self.writes)  # one at a time
        self.writes.append(final.stem)
        self.began.set()
        try:
            assert self.released.wait(20)
            if self.error is not None:
                raise self.error
            time.sleep(0.05)  # for one that is not waited for
            self.put(final, write, force)
        finally:
            self.ended += 1


def test_a_slow_disk_does_not_hold_up_the_next_chunk(tmp_path, whole, monkeypatch):
    """What comes while it writes is left to the last; nothing that a run returns is still to be written."""
    disk, steps = Disk(monkeypatch), []

    def callback(state, rows):
        steps.append(int(state.step))
        assert disk.began.wait(20)
        if steps[-1] == STEPS - 2:
            assert not files(tmp_path)
            disk.released.set()

    same(run(tmp_path, callback=callback), whole)
    assert steps == [*range(2, STEPS + 1, 2)]
    assert disk.writes == ["step-000000000002", f"step-{STEPS:012d}"]
    assert files(tmp_path) == [f"{name}.npz" for name in disk.writes]


@pytest.mark.parametrize("end", ["error", "interrupt", "sigterm"])
def test_however_a_run_ends_the_disk_is_waited_for(tmp_path, whole, monkeypatch, end):
    disk = Disk(monkeypatch)

    def callback(state, rows):
        assert disk.began.wait(20)
        if int(state.step) == 6:
            disk.released.set()
            if end == "sigterm":
                os.kill(os.getpid(), signal.SIGTERM)
            else:
                raise {"error": ZeroDivisionError, "interrupt": KeyboardInterrupt}[end]

    with pytest.raises(ZeroDivisionError) if end == "error" else contextlib.nullcontext():
        run(tmp_path, callback=callback)
    assert disk.writes == ["step-000000000002", "step-000000000006"] and disk.ended == 2
    assert files(tmp_path) == [f"{name}.npz" for name in disk.writes]
    assert not list(tmp_path.glob(".bilevel-*"))
    same(run(tmp_path, resume=True), whole)


def test_a_save_that_failed_is_told_after_the_next_chunk(tmp_path, whole, monkeypatch):
    """A full disk is a warning; what is no matter of the disk ends the run. Both are tried again at the end."""
    monkeypatch.setattr(checkpoint.Store, "slack", 0)
    run(tmp_path, num_steps=4)
    before, steps = files(tmp_path), []

    def wait(disk):
        def callback(state, rows):
            steps.append(int(state.step))
            assert disk.began.wait(20)
            disk.released.set()
            deadline = time.monotonic() + 20
            while disk.ended < len(disk.writes) and time.monotonic() < deadline:
                time.sleep(0.001)
            time.sleep(0.05)  # until the thread has handed its error over
            if steps[-1] == 10:
                raise KeyboardInterrupt

        return callback

    with monkeypatch.context() as patch:
        disk = Disk(patch, OSError(28, "No space left on device"))
        match = rf"could not save step .*No space left.* the last checkpoint is {before[-1]}"
        with pytest.warns(RuntimeWarning, match=match) as told:
            found = run(tmp_path, resume=True, callback=wait(disk))
    numbers = [int(re.findall(r"save step (\d+)", str(one.message))[0]) for one in told]
    assert numbers == [6, 8, 10, 10]
    assert found.stopped == "interrupted" and len(found.history.status) == 10
    assert disk.writes[-1] == "step-000000000010" and files(tmp_path) == before
    steps.clear()
    with monkeypatch.context() as patch, pytest.raises(LookupError, match="of the writer"):
        run(tmp_path, resume=True, callback=wait(Disk(patch, LookupError("of the writer"))))
    assert steps == [6] and files(tmp_path) == before  # step 8 was done, and not gone on from
    same(run(tmp_path, resume=True), whole)


def task_loss(w, lam, task):
    return jnp.sum((w - lam * task) ** 2)


def test_a_measured_number_of_lanes_is_kept(tmp_path, monkeypatch):
    """Another one would change the rounding."""
    measured = iter([3])
    monkeypatch.setattr(lane_choice, "measured", lambda *_: next(measured))
    tasks = bl.Tasks(bl.Problem(task_loss, task_loss), X[0, :3], lanes="auto")
    settings = {"engine": bl.OneStep(), "solver": bl.GradientDescent(0.3, max_steps=3, tol=0.0)}
    settings |= {"checkpoint": tmp_path, "resume": True, "chunk": 1}
    for num_steps in (1, 2):
        result = bl.run(tasks, 0.5, np.zeros(3), num_steps=num_steps, **settings)
        assert len(result.history.status) == num_steps


def test_every_kind_of_leaf_comes_back(tmp_path, whole):
    odd = {
        "key": jax.random.split(jax.random.key(3, impl="rbg"), 2),
        "none": None,
        "half": jnp.asarray([1.5, -0.1], jnp.bfloat16),
        "flag": jnp.asarray(True),
        "empty": jnp.zeros((0, 3)),
        "pair": (jnp.int8(-3), jnp.float32(jnp.nan)),
    }
    state = whole.state._replace(engine=odd)
    with checkpoint.opened(tmp_path, False) as store:
        assert store.load(state, whole.history) is None
        store.save(checkpoint_file.Saved(state, (whole.history, whole.history), 3, 4))
        store.finish()
        found = store.load(jax.eval_shape(lambda: state), whole.history)
    assert jax.tree.structure(found.state) == jax.tree.structure(state)
    assert (found.begin, found.estimated) == (3, 4)
    assert len(found.history[0].status) == 2 * STEPS
    bits = lambda leaf: (
        jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
    )
    for a, b in zip(jax.tree.leaves(found.state), jax.tree.leaves(state), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(bits(a), bits(b))
