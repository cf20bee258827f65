"""Tasks, or rows, over the devices of a mesh: the numbers of one device, in one compiled program."""

import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import bilevel as bl
from bilevel.problem import shuffled

CHILD = """
import os, sys, tempfile
os.environ["XLA_FLAGS"] += " --xla_force_host_platform_device_count=8"
import jax, jax.numpy as jnp, numpy as np, optax
import bilevel as bl
from bilevel import outer_steps

cache, sys.path[:0] = sys.argv[1], sys.argv[2:]
if cache:
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)

def inner(w, lam, task):
    return 0.5 * w @ task["H"] @ w - task["b"] @ w + 0.5 * lam * w @ w

def outer(w, lam, task):
    return 0.5 * jnp.sum((w - task["c"]) ** 2) + 0.1 * lam**2

rng = np.random.default_rng(0)
A = rng.standard_normal((16, 3, 3)) / 2
H = np.linspace(1, 4, 16)[:, None, None] * (A @ A.swapaxes(1, 2) + np.eye(3))
data = {"H": H, "b": rng.standard_normal((16, 3)), "c": rng.standard_normal((16, 3))}
data = {name: jnp.asarray(x, jnp.float32) for name, x in data.items()}
problem, lam, w = bl.Problem(inner, outer), jnp.float32(0.7), jnp.zeros((3,), jnp.float32)
# Enough steps for some of the tasks alone.
solver = bl.GradientDescent(0.1, max_steps=14, tol=1e-3)
settings = {"solver": solver, "engine": bl.Implicit(estimate=False), "throw": False}
mesh = jax.make_mesh((4, 2), ("a", "b"))

tasks = bl.Tasks(problem, data, lanes=4)  # refilled, of 16; on the mesh each device has its two at once
h = bl.hypergradient(tasks, lam, w, **settings)
second = bl.hypergradient(tasks, lam - 0.1 * h.grad, h.w, **settings)
h8 = bl.hypergradient(tasks, lam, w, mesh=mesh, **settings)
r8 = bl.run(tasks, lam, w, num_steps=2, chunk=1, outer=optax.sgd(0.1), mesh=mesh, **settings)
assert outer_steps.take_steps._cached._cache_size() == 1  # the second chunk compiles nothing
statuses = np.asarray(h.info.tasks.status)
assert set(statuses) == {0, 1}, h.info.tasks.inner.num_steps
np.testing.assert_array_equal(h8.info.tasks.status, statuses)
np.testing.assert_array_equal(h8.info.tasks.inner.num_steps, h.info.tasks.inner.num_steps)
values = [h.info.outer_value, second.info.outer_value]
norms = [abs(h.grad), abs(second.grad)]
pairs = [(h8.grad, h.grad), (h8.w, h.w), (r8.lam, lam - 0.1 * h.grad - 0.1 * second.grad), (r8.w, second.w)]
pairs += [(r8.history.outer_value, values), (r8.history.grad_norm, norms)]
for found, expected in pairs:
    np.testing.assert_allclose(found, np.asarray(expected), rtol=1e-6, atol=1e-6)
spread = lambda leaf: {shard.data.shape[0] for shard in leaf.addressable_shards}
for leaf in jax.tree.leaves((r8.w, r8.state.engine, h8.w, h8.info.tasks)):
    assert len(leaf.addressable_shards) == 8 and spread(leaf) == {2}
assert r8.lam.sharding.is_fully_replicated
with tempfile.TemporaryDirectory() as folder:
    kept = {"chunk": 1, "outer": optax.sgd(0.1), "mesh": mesh, "checkpoint": folder, **settings}
    bl.run(tasks, lam, w, num_steps=1, **kept)
    resumed = bl.run(tasks, lam, w, num_steps=2, resume=True, **kept)
jax.tree.map(np.testing.assert_array_equal, (resumed.state, resumed.history), (r8.state, r8.history))
assert outer_steps.take_steps._cached._cache_size() == 1

def batched(w, lam, batch):
    return inner(w, lam, batch[1]) - jnp.mean(batch[0] @ w)

shift = jnp.asarray(rng.standard_normal((40, 3)), jnp.float32)
kinks = bl.Problem(
    batched, lambda w, lam, batch: outer(w, lam, batch[1]), shift, shift, batch_size=5,
    inner_prox=lambda v, step, lam: bl.prox.l1(v, step, 0.2 * lam),
)
tasks, settings["solver"] = bl.Tasks(kinks, data), bl.ProximalGradient(max_steps=50, tol=0.0)
h, h8 = (bl.hypergradient(tasks, lam, w, mesh=m, **settings) for m in (None, mesh))
np.testing.assert_allclose(h8.grad, h.grad, rtol=1e-6)
np.testing.assert_allclose(h8.w, h.w, rtol=1e-6, atol=1e-6)
assert np.any(h.w == 0) and np.any(h.w != 0)

# Reverse mode through steps, on batches of what the tasks share; also its error estimate.
smooth = bl.Tasks(bl.Problem(batched, kinks.outer, shift, shift, batch_size=5), data)
settings = {"engine": bl.Unrolled(), "solver": bl.GradientDescent(0.1, max_steps=4), "throw": False}
h, h8 = (bl.hypergradient(smooth, lam, w, mesh=m, **settings) for m in (None, mesh))
np.testing.assert_allclose(h8.grad, h.grad, rtol=1e-6)
np.testing.assert_allclose(h8.info.error_estimate, h.info.error_estimate, rtol=1e-5)
"""

ROWS = """
import re
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from bilevel.gradient import _checked, _hypergradient

def loss(w, lam, batch):
    X, y = batch
    return jnp.mean(jax.nn.softplus(X @ w) - y * (X @ w))

def penalised(w, lam, batch):
    return loss(w, lam, batch) + 0.5 * jnp.sum(jnp.exp(lam) * w**2)

X = jnp.asarray(rng.standard_normal((400, 16)), jnp.float32)
y = (X @ jnp.asarray(rng.standard_normal(16), jnp.float32) > 0).astype(jnp.float32)
train, test = (X[:240], y[:240]), (X[240:], y[240:])
lam, w = jnp.full(16, -3.0, jnp.float32), jnp.zeros(16, jnp.float32)
large = bl.Problem(penalised, loss, train, test)
solver = bl.GradientDescent(1.0, max_steps=300, tol=1e-5)
settings = {"solver": solver, "engine": bl.Implicit(estimate=False), "throw": False}
steps = {"num_steps": 2, "chunk": 1, "outer": optax.sgd(0.1), **settings}

expected = bl.run(large, lam, w, **steps)
taken = lambda: sum(
    program._cached._cache_size() for program in (outer_steps.take_steps, outer_steps._take_quick)
)
programs = taken()
spread = bl.run(large, lam, w, mesh=mesh, **steps)
assert taken() == programs + 1  # the second chunk compiles nothing
assert spread.w.sharding.is_fully_replicated and len(spread.w.sharding.device_set) == 8

def compiled(problem, w, mesh=None):
    args = _checked(problem, lam, w, solver, settings["engine"], None, mesh)
    assert mesh is not None or args[3].sharding.is_equivalent_to(w.sharding, 1)
    program = _hypergradient.lower(*args).compile().compiled
    moves = set(re.findall(r" (all-[a-z]+|collective-[a-z]+)(?:-start)?\\(", program.as_text()))
    return moves, program.memory_analysis().argument_size_in_bytes

data = 400 * 17 * 4
alone, by_rows = compiled(large, w), compiled(large, w, mesh)
assert alone[0] == set() and by_rows[0] == {"all-reduce"}, by_rows
assert data < alone[1] < data + 512 and by_rows[1] < data / 8 + 512, by_rows

# Unknowns over the devices, by shardings that the user gives: w, what the solver keeps and the adjoint stay there.
flat = Mesh(mesh.devices.reshape(-1), ("unknowns",))
put = lambda leaf, *spec: jax.device_put(leaf, NamedSharding(flat, PartitionSpec(*spec)))
columns = [(put(X, None, "unknowns"), put(y)) for X, y in (train, test)]
wide = bl.run(bl.Problem(penalised, loss, *columns), lam, put(w, "unknowns"), **steps)
moves, size = compiled(bl.Problem(penalised, loss, *columns), put(w, "unknowns"))
assert moves == {"all-reduce"} and size < data / 8 + 400 * 4 + 512, (moves, size)
for leaf in jax.tree.leaves((wide.w, wide.best.w, wide.state.engine)):
    assert leaf.shape != (16,) or leaf.addressable_shards[0].data.shape == (2,)
for found in (spread, wide):
    for name in ("lam", "w"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-6, atol=1e-6)
    for name in ("outer_value", "grad_norm"):
        pair = getattr(found.history, name), getattr(expected.history, name)
        np.testing.assert_allclose(*pair, rtol=1e-6)

rows = [bl.shard_rows(level, mesh) for level in (train, test)]
short = {"solver": bl.GradientDescent(0.5, max_steps=3), "block": 2, "throw": False}
pair = [bl.replay(bl.Problem(penalised, loss, *data), lam, w, **short) for data in (rows, (train, test))]
np.testing.assert_allclose(pair[0].grad, pair[1].grad, rtol=1e-5)

# Batches: as many rows from each device, which has its own in an order of its own; a pass repeats none.
from bilevel.problem import shuffled
from bilevel.sharding import spread as spread_over

def rows_of(batch):
    return {X.tobytes(): i for i, X in enumerate(np.asarray(batch[0]))}

key = jax.random.key(1)
few = bl.Problem(penalised, loss, train, test, batch_size=(16, 40))
here, there = shuffled(few, key, (8, 8)), shuffled(spread_over(few, mesh), key)
numbers = rows_of(train)
batches = jax.jit(lambda problem: jax.vmap(problem.inner_sampler(key))(jnp.arange(15)))
pair = batches(here), batches(there)
jax.tree.map(np.testing.assert_array_equal, *pair)
drawn = np.array([[numbers[X.tobytes()] for X in batch] for batch in np.asarray(pair[1][0])])
np.testing.assert_array_equal(drawn // 30, np.repeat(np.arange(8), 2)[None].repeat(15, 0))
assert sorted(drawn.ravel()) == list(range(240)) and np.any(np.diff(drawn[:, 0]) < 0)
jax.tree.map(np.testing.assert_array_equal, here.slots()[0].data[1], there.slots()[0].data[1])
assert sorted(map(bytes, np.asarray(there.slots()[1].data[0]))) == sorted(map(bytes, np.asarray(test[0])))
for leaf in jax.tree.leaves((there.inner_data, there.outer_data)):
    assert leaf.addressable_shards[0].data.shape[0] == leaf.shape[0] // 8 > 0

soba = {"engine": bl.SOBA(0.1, estimate=False), "num_steps": 4, "chunk": 4, "outer": optax.sgd(0.1)}
stochastic = bl.run(few, lam, w, mesh=mesh, key=key, **soba)
assert np.isfinite(stochastic.history.outer_value).all()
program = jax.jit(lambda problem, w: jax.grad(problem.inner)(w, lam, problem.inner_sampler(key)(0)))
text = program.lower(there, w).compile().as_text()
assert set(re.findall(r" (all-[a-z]+|collective-[a-z]+)(?:-start)?\\(", text)) == {"all-reduce"}
"""


def test_eight_devices_give_what_one_gives():
    here = Path(__file__).parents[2]
    cache = jax.config.jax_compilation_cache_dir or ""  # type: ignore[attr-defined]
    done = subprocess.run(
        [sys.executable, "-c", CHILD + ROWS, cache, str(here)],
        capture_output=True,
        text=True,
        check=False,
        cwd=here,
    )
    assert done.returncode == 0, done.stderr


def loss(w, lam, task):
    return (w - task) @ (w - lam)


def test_what_cannot_be_spread_is_refused():
    mesh = jax.make_mesh((1,), ("tasks",))
    problem = bl.Problem(loss, loss)
    with pytest.raises(ValueError, match=r"mesh=... spreads the rows .* and it has none"):
        bl.run(problem, 1.0, np.zeros(2), mesh=mesh)
    batches = bl.Problem(loss, loss, np.ones((4, 2)), batch_size=(3, None))
    with pytest.raises(ValueError, match=r"each of 2 devices: expected a batch_size .* got 3"):
        shuffled(batches, jax.random.key(0), (2, 1))
    mixed = bl.Problem(loss, loss, (np.ones((4, 2)), np.ones(())))
    with pytest.raises(ValueError, match=r"inner_data must hold arrays with one common first"):
        bl.run(mixed, 1.0, np.zeros(2), mesh=mesh)
    tasks = bl.Tasks(problem, np.zeros((3, 2)))
    with pytest.raises(TypeError, match=r"mesh must be a jax.sharding.Mesh, got 8"):
        bl.hypergradient(tasks, 1.0, np.zeros(2), mesh=8)
    with pytest.raises(TypeError, match=r"mesh must be a jax.sharding.Mesh, got 2"):
        bl.shard_rows(np.ones((4, 2)), 2)
    four = jax.sharding.AbstractMesh((4,), ("tasks",))
    with pytest.raises(ValueError, match=r"the 3 rows of data do not divide among the 4 devices"):
        bl.shard_rows(np.ones((3, 2)), four)
    with pytest.raises(ValueError, match=r"3 tasks do not divide among the 4 devices"):
        bl.Tasks(problem, np.zeros((3, 2)), mesh=four)
