"""The benchmark of label cleaning: its draws, its judge, and its engines on rows that are easy to tell apart."""

import dataclasses
import importlib
import pathlib
import sys

import jax
import numpy as np
import pytest

BENCHMARKS = pathlib.Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def modules():
    """The script and its parts, under JAX's own defaults, with which they run."""
    sys.path.insert(0, str(BENCHMARKS))
    names = ("label_cleaning", "label_cleaning_data", "label_cleaning_fits")
    with (
        jax.enable_x64(False),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        yield [importlib.import_module(name) for name in names]
    sys.path.remove(str(BENCHMARKS))


def test_draws_do_not_overlap(modules):
    _, data, _ = modules
    pool = data.load("digits")
    numbered = pool._replace(X=np.arange(len(pool.y), dtype=np.float32)[:, None])
    rows = data.draw(numbered, 1000, 100, 0.5, 3, False)
    seen = np.concatenate([part["X"][:, 0] for part in rows[:3]])
    assert len(seen) == len(pool.y) == len(np.unique(seen))
    assert rows.wrong.sum() == 500
    np.testing.assert_array_equal(rows.train["y"] != rows.truth, rows.wrong)
    held = data.draw(numbered, 1000, 100, 0.5, 3, True)
    # Settings are judged by trusted rows: no test row takes part.
    judges, used = (set(part["X"][:, 0]) for part in (held.test, held.trusted))
    assert len(judges) == 20 and not judges & used
    assert judges | used == set(rows.trusted["X"][:, 0])


def test_soba_tells_digits_apart(modules):
    script, data, _ = modules
    pool, found = data.load("digits"), []
    for seed in range(5):
        rows = data.draw(pool, 1000, 100, 0.5, seed, False)
        setting = script.settings(rows.train["X"], 2000)["soba"]
        found.append(script.judge(result := script.run(setting, rows, seed), rows, seed))
    assert {one["status"] for one in found} == {"OK"}
    assert np.mean([one["accuracy"] for one in found]) > 0.915
    assert np.mean([one["f1"] for one in found]) > 0.88
    assert script.oracles(setting, result, rows, 0) == {"gradients": 4000, "products": 2000}
    # The judge goes by the weights alone, and turned round they keep the wrong labels.
    turned = script.judge(dataclasses.replace(result, lam=-result.lam), rows, seed)
    assert turned["accuracy"] < 0.5 and turned["f1"] < 0.2


def test_network_tells_digits_apart(modules, monkeypatch):
    script, data, _ = modules
    monkeypatch.setattr(script, "MODEL", "network")
    rows = data.draw(data.load("digits"), 1000, 100, 0.5, 0, False)
    setting = script.network_settings(1000, 2000)["masoba"]
    found = script.judge(script.run(setting, rows, 0), rows, 0)
    assert found["status"] == "OK"
    assert found["accuracy"] > 0.9 and found["f1"] > 0.8


def test_gauss_newton_of_the_network(modules):
    """Of scores that are linear in `w` it is the Hessian."""
    script, data, _ = modules
    rows = data.draw(data.load("digits"), 100, 100, 0.5, 0, False).train
    w, v, lam = (
        np.random.default_rng(k).normal(size=s) for k, s in enumerate([(65, 10)] * 2 + [100])
    )
    w, v, lam = (np.float32(x) for x in (w, v, lam))
    product = script.network_settings(100, 1)["implicit"].gauss_newton(w, lam, rows)(v)
    slope = lambda w: jax.grad(script.inner)(w, lam, rows)
    np.testing.assert_allclose(product, jax.jvp(slope, (w,), (v,))[1], rtol=1e-3, atol=1e-5)
