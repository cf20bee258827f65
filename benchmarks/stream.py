"""A run on batches of data in a file, larger than the device may hold: what the device holds, and what that costs.

Softmax regression by SOBA: 200,000 rows of 500 features and 20 classes, float32, in an `np.memmap` (400 MB), and as
many again for the outer level; one penalty per class; batches of 256 rows, chunks of 50 steps. `live_bytes` is the most
that JAX arrays hold, looked at once the batches of two chunks are there and at the end of chunks; `seconds_per_step`
is the median over the chunks after the first of a run, of which there are six of each kind, in turn, one left out.
`not_ahead` fetches a chunk's batches when it begins, and not while the device works on the one before.
`seconds_before` is from the call to the end of the first chunk, nothing compiled, in memory with the copies of data.
Fails where the results of the three differ in a bit.

    python benchmarks/stream.py [--out benchmarks/results/stream_cpu.json]
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from unittest import mock

import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel as bl
from bilevel.stream import Stream

ROWS, FEATURES, CLASSES, BATCH, CHUNK, STEPS, RUNS = 200_000, 500, 20, 256, 50, 500, 6


def loss(w, batch):
    X, y = batch
    logits = X @ w
    return jnp.mean(jax.nn.logsumexp(logits, 1) - jnp.take_along_axis(logits, y[:, None], 1)[:, 0])


def inner(w, lam, batch):
    return loss(w, batch) + 0.5 * jnp.sum(jnp.exp(lam) * w**2)


def outer(w, lam, batch):
    return loss(w, batch)


def nbytes(tree) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def written(folder: Path, name: str, rng: np.random.Generator, truth: np.ndarray):
    """Rows in a file, block by block, and their classes."""
    X = np.memmap(folder / name, np.float32, "w+", shape=(ROWS, FEATURES))
    y = np.empty(ROWS, np.int32)
    for begin in range(0, ROWS, 10_000):
        block = rng.standard_normal((10_000, FEATURES), dtype=np.float32)
        noise = rng.gumbel(size=(10_000, CLASSES))
        X[begin : begin + 10_000] = block
        y[begin : begin + 10_000] = np.argmax(block @ truth + noise, axis=1)
    X.flush()
    return np.memmap(folder / name, np.float32, "r", shape=(ROWS, FEATURES)), y


def run(where: str | None, data, ahead: bool = True) -> tuple[bl.Result, dict]:
    times, live, load = [], [], Stream.load

    def watched(stream, engine, solver, state, length):
        if not ahead:
            stream.end = 0
        found = load(stream, engine, solver, state, length)
        if stream._ahead is not None and len(times) == 2:
            stream._ahead[1].result()  # both chunks are there
        live.append(nbytes(jax.live_arrays()))
        return found

    def callback(state, rows):
        times.append(time.perf_counter())
        live.append(nbytes(jax.live_arrays()))

    begin = time.perf_counter()
    with mock.patch.object(Stream, "load", watched):
        result = solved(where, data, callback)
    return result, {
        "seconds_per_step": float(np.median(np.diff(times)) / CHUNK),
        "seconds_before": times[0] - begin,
        "live_bytes": max(live),
    }


def solved(where: str | None, data, callback) -> bl.Result:
    return bl.run(
        bl.Problem(inner, outer, *data, batch_size=BATCH, data=where),
        jnp.full(CLASSES, -6.0, jnp.float32),
        jnp.zeros((FEATURES, CLASSES), jnp.float32),
        num_steps=STEPS,
        chunk=CHUNK,
        engine=bl.SOBA(0.5),
        outer=optax.adam(0.01),
        callback=callback,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Path(__file__).parent / "results" / f"stream_{jax.default_backend()}.json"
    parser.add_argument("--out", type=Path, default=default)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    truth = rng.standard_normal((FEATURES, CLASSES)).astype(np.float32) / FEATURES**0.5
    modes = {"streamed": ("host", True), "not_ahead": ("host", False), "in_memory": (None, True)}
    record, results = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        data = tuple(written(Path(folder), name, rng, truth) for name in ("inner", "outer"))
        for _ in range(RUNS):
            for name, (where, ahead) in modes.items():
                results[name], found = run(where, data, ahead)
                record.setdefault(name, []).append(found)
    for name, runs in record.items():
        of = lambda key, runs=runs: [found[key] for found in runs[1:]]
        times = of("seconds_per_step")
        record[name] = {
            "seconds_per_step": {"median": statistics.median(times), "min": min(times), "max": max(times)},
            "seconds_before": statistics.median(of("seconds_before")),
            "live_bytes": max(of("live_bytes")),
        }  # fmt: skip
        print(name, record[name])
    for found in results.values():
        same = lambda *xs: np.testing.assert_array_equal(*xs)
        same(found.lam, results["in_memory"].lam)
        same(found.w, results["in_memory"].w)
        same(found.history.outer_value, results["in_memory"].history.outer_value)
    batch = BATCH * (FEATURES + 1) * 4
    record |= {"steps": STEPS, "data_bytes": nbytes(data), "two_chunks_bytes": 4 * CHUNK * batch}
    record["outer_value"] = [float(results["streamed"].history.outer_value[i]) for i in (0, -1)]
    assert record["streamed"]["live_bytes"] < 1.1 * record["two_chunks_bytes"]
    print({name: value for name, value in record.items() if name not in modes})
    harness.write(args.out, record)


if __name__ == "__main__":
    main()
