"""Data in the host's memory, of which chunks of a run load batches: the numbers are those of data on the device."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel as bl
from bilevel import stream
from bilevel.problem import shuffled
from hypergrad.levels import Slots

ROWS, OUTER_ROWS, DIM = 400, 101, 3
TRACES = [0]


def inner(w, lam, batch):
    TRACES[0] += 1
    X, y = batch
    return 0.5 * jnp.mean((X @ w - y) ** 2) + 0.5 * jnp.exp(lam) * jnp.sum(w**2)


def outer(w, lam, batch):
    X, y = batch
    return jnp.mean(jnp.logaddexp(0.0, -y * (X @ w)))


@pytest.fixture
def data(seed):
    """401 rows: 25 batches of 16 and one of a single row."""
    rng = np.random.default_rng(seed)

    def rows(n):
        X = rng.standard_normal((n, DIM))
        return X, np.sign(X[:, 0] + 0.5 * rng.standard_normal(n))

    return rows(ROWS + 1), rows(OUTER_ROWS)


def run(data, where, key, engine, *, batch_size=(16, 8), **kw):
    problem = bl.Problem(inner, outer, *data, batch_size=batch_size, data=where)
    settings = {"num_steps": 12, "chunk": 5, "outer": optax.sgd(0.1), "key": key, "engine": engine}
    return bl.run(problem, jnp.asarray(-2.0), jnp.zeros(DIM), **(settings | kw))


def same(a, b):
    """To the last bit: what was found, each step of it, and what a further run goes on from."""
    for x, y in ((a.lam, b.lam), (a.w, b.w), (a.history, b.history), (a.state, b.state)):
        jax.tree.map(np.testing.assert_array_equal, x, y)


ENGINES = {
    "saba": (bl.SABA(0.1), {}),  # by the numbers of batches, the last of them short
    "f3sa": (bl.F3SA(0.1, coupled=False), {}),  # inner batches by the pair
    "mrbo": (bl.MRBO(0.1, terms=3), {}),  # several inner batches and an outer one at once
    "unrolled": (bl.Unrolled(), {"solver": bl.GradientDescent(0.1, max_steps=4)}),
    "outer rows": (bl.Implicit(), {"batch_size": (None, 8)}),  # inner data on the device
}


@pytest.mark.parametrize("name", ENGINES)
def test_every_engine_on_batches_has_the_numbers_of_data_on_the_device(name, data, key):
    engine, kw = ENGINES[name]
    if name == "saba":  # a quarter of the rows are in a short batch, and more
        data = tuple(x[:43] for x in data[0]), tuple(x[:13] for x in data[1])
    here = run(data, None, key, engine, **kw)
    assert here.status == bl.Status.OK and np.ptp(here.history.outer_value) > 1e-3
    loads, loaded = [], stream.Stream._loaded

    def counted(self, plan):
        loads.append(plan)
        return loaded(self, plan)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream.Stream, "_loaded", counted)
        same(run(data, "host", key, engine, **kw), here)
    assert len(loads) == 4  # a start, and each chunk once: what was fetched ahead was right


MOMENTUM = bl.SOBA(
    estimator=bl.STORM(0.3)
)  # measures its step size on a batch before the first step


def test_chunks_files_and_resumed_runs_have_the_same_bits(data, key, tmp_path):
    here = run(data, None, key, MOMENTUM)
    counts, loads, loaded = [], [], stream.Stream._loaded

    def counted(self, plan):
        loads.append(len(plan.starts[0]))
        return loaded(self, plan)

    mapped = np.memmap(tmp_path / "X", np.float64, "w+", shape=data[0][0].shape)
    mapped[:] = data[0][0]
    files = (np.memmap(tmp_path / "X", np.float64, "r", shape=mapped.shape), data[0][1]), data[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream.Stream, "_loaded", counted)
        count = lambda state, rows: counts.append(TRACES[0])
        same(run(files, "host", key, MOMENTUM, callback=count), here)
        assert loads == [1, 5, 5, 2]  # a start, and each chunk once
        assert len(set(counts)) == 1  # nor does the shorter one compile again
    same(run(data, "host", key, MOMENTUM, chunk=3), here)
    saves = {"checkpoint": tmp_path / "saves"}
    run(files, "host", key, MOMENTUM, num_steps=7, **saves)
    same(run(data, "host", key, MOMENTUM, resume=True, **saves), here)
    one = run(data, "host", key, MOMENTUM, num_steps=4)
    two = run(data, "host", key, MOMENTUM, num_steps=8, state=one.state)
    same(dataclasses.replace(two, history=here.history), here)


def test_settings_of_a_with_block_reach_the_thread_that_fetches(data, key):
    """Here the precision: arrays of NumPy in double are single on the device."""
    with jax.enable_x64(False):
        here, there = (run(data, where, key, bl.SOBA(0.1)) for where in (None, "host"))
        assert here.lam.dtype == np.float32
    same(there, here)


def test_a_run_goes_on_from_half_of_the_way_back_with_the_rows_of_its_step(data, key):
    """After a failed step the next chunk begins elsewhere than was fetched ahead."""
    X = data[0][0].copy()
    order = np.asarray(jax.random.permutation(jax.random.fold_in(key, 0), ROWS + 1))
    seeds = run(data, None, key, bl.SOBA(0.1), num_steps=0).state.engine.order
    X[order[int(Slots(None, 16, ROWS + 1, True).turn_start(seeds[0, 0], jnp.int32(3)))]] = np.nan
    bad = (X, data[0][1]), data[1]
    rule = {"retries": 40, "throw": False}
    with pytest.warns(RuntimeWarning, match="going on from half"):
        here, there = (run(bad, where, key, bl.SOBA(0.1), **rule) for where in (None, "host"))
    assert here.retries > 0
    same(there, here)


def test_the_device_holds_two_chunks_of_rows(data, key):
    rows = 6000
    many = tuple(np.tile(x, (rows // len(x) + 1, *[1] * (x.ndim - 1)))[:rows] for x in data[0])
    total, found = sum(x.nbytes for x in many), []
    before = sum(x.nbytes for x in jax.live_arrays())

    def callback(state, rows):
        found.append(sum(x.nbytes for x in jax.live_arrays()) - before)

    run((many, many), "host", key, MOMENTUM, callback=callback)
    # 5 steps and one more batch, of 16 and 8 rows, of this chunk and of the next, and what is not data.
    assert max(found) < 2 * 6 * (16 + 8) * (DIM + 1) * 8 + 20_000 < 0.2 * total


def test_a_batch_that_was_not_loaded_is_nan(data, key):
    """An engine that asks for other batches than are known ahead fails, and does not see others in their place."""
    problem = bl.Problem(inner, outer, *data, batch_size=(16, 8))
    whole = shuffled(problem, key).slots()[0]
    host = stream.Stream(dataclasses.replace(problem, data="host"), key, 5)
    part = host.start().slots()[0]
    start = int(part.starts[0])
    inside, other = part._cut(start, 16), part._cut(start + 1, 16)
    jax.tree.map(np.testing.assert_array_equal, inside, whole._cut(start, 16))
    assert all(np.isnan(leaf).all() for leaf in jax.tree.leaves((other, part._cut(start - 1, 16))))
    sample = host.sample()
    jax.tree.map(np.testing.assert_array_equal, sample.inner_data, problem.inner_sampler(key)(0))
    jax.tree.map(np.testing.assert_array_equal, sample.outer_data, problem.outer_batch(key))


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"where": "disk"}, ValueError, "must be 'host' or None, got 'disk'"),
        ({"batch_size": None}, ValueError, "expected a batch_size, and no same_rows"),
        ({"engine": bl.SRBA(0.1)}, ValueError, "all rows at once were asked for"),
        ({"engine": bl.VRBO(0.1)}, ValueError, "all rows at once were asked for"),
        ({"engine": bl.BOREP(0.1, estimator=bl.SAGA())}, ValueError, "leaves out turns"),
        ({"outer": bl.Adaptive(), "engine": "implicit"}, TypeError, "without batch_size"),
        ({"mesh": jax.make_mesh((1,), ("rows",))}, ValueError, "expected mesh=None"),
    ],
)
def test_what_needs_all_rows_is_refused(change, error, match, data, key):
    kw = {"engine": MOMENTUM, "where": "host"} | change
    with pytest.raises(error, match=match):
        run(data, kw.pop("where"), key, kw.pop("engine"), **kw)


def test_only_run_takes_them(data):
    problem = bl.Problem(inner, outer, *data, batch_size=8, data="host")
    assert isinstance(problem.inner_data[0], np.ndarray)
    with pytest.raises(ValueError, match="data='host' is for bilevel.run"):
        bl.hypergradient(problem, jnp.asarray(0.0), jnp.zeros(DIM))
    with pytest.raises(ValueError, match="what tasks share is on the device"):
        bl.Tasks(problem, np.ones(3))

    class Own(bl.Problem):
        pass

    own = Own(inner, outer, *data, batch_size=8, data="host")
    with pytest.raises(TypeError, match="got its subclass Own"):
        bl.run(own, jnp.asarray(0.0), jnp.zeros(DIM))
