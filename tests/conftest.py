"""Strict numerics, fixed seeds and a compilation cache for the whole suite."""

import functools
import gc
import os

# Programs here are compiled once and run for milliseconds: compile quickly. Before JAX starts. Kernels of
# XLA's older emitter take half the time to compile. Nor do small products gain from threads, which wait for
# each other by spinning.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1 "
    "--xla_cpu_multi_thread_eigen=false",
)
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import jax
import pytest

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

SEED = int(os.environ.get("BILEVEL_TEST_SEED", "0"))


def pytest_report_header() -> str:
    return f"seed: {SEED} (another: BILEVEL_TEST_SEED=...)"


def pytest_configure(config: pytest.Config) -> None:
    # A cache file cut short by an interrupted run: the program is compiled instead.
    config.addinivalue_line("filterwarnings", "ignore:Error reading persistent compilation cache")
    cache = getattr(config, "cache", None)
    if cache is not None:
        # One directory for each worker, as JAX does not write its files atomically.
        worker = os.environ.get("PYTEST_XDIST_WORKER", "main")
        directory = cache.mkdir("jax") / worker
        jax.config.update("jax_compilation_cache_dir", str(directory))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)


# Tracing makes millions of objects that stay: at the defaults, one second in fifteen goes to looking at them.
gc.freeze()
gc.set_threshold(50_000, 20, 100)

_finished = 0


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown() -> None:
    """Let go of compiled programs now and then.

    Each holds memory maps, several hundred for the programs of one test, and XLA aborts the process where
    Linux gives no more (65530 by default). The cache on disk makes the next compilation of them short.
    """
    global _finished
    _finished += 1
    if _finished % 40 == 0:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def seed() -> int:
    """The seed of the run, printed with every failure."""
    print(f"seed {SEED}: repeat with BILEVEL_TEST_SEED={SEED}")
    return SEED


@pytest.fixture
def key(seed: int) -> jax.Array:
    """The random key of the run."""
    return jax.random.key(seed)


class TraceCounter:
    """A function that counts its Python calls: under `jit`, how often it is traced."""

    def __init__(self, fn):
        functools.update_wrapper(self, fn)
        self.fn = fn
        self.count = 0

    def __call__(self, *args):
        self.count += 1
        return self.fn(*args)


@pytest.fixture
def count_traces():
    """Wraps a loss: `loss = count_traces(loss)`, then read or set `loss.count`."""
    return TraceCounter
