"""Batches by number: passes over shuffled rows, and SAGA's table over them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems

import bilevel as bl
from bilevel.problem import shuffled
from hypergrad.levels import Level, Slots

take = jax.jit(lambda slots, seed, count: slots.turn(seed, count))


def test_passes_over_shuffled_rows(seed):
    """Within a pass no row comes twice, passes differ, and in the long run every row counts the same."""
    rows = np.arange(7)
    problem = bl.Problem(lambda w, lam, b: w, lambda w, lam, b: w, rows, rows, batch_size=(3, 7))
    mixed = shuffled(problem, jax.random.key(seed))
    inner, outer = mixed.slots()
    many = jax.vmap(take, in_axes=(None, None, 0))
    passes = np.asarray(many(inner, jnp.uint32(seed), jnp.arange(4000))).reshape(2000, 6)
    assert all(len(set(one)) == 6 for one in passes.tolist())
    np.testing.assert_allclose(np.bincount(passes.ravel()) / 12_000, 1 / 7, atol=0.01)
    assert len({tuple(one) for one in passes[:50].tolist()}) == 7  # circles from each row
    assert set(np.asarray(take(outer, jnp.uint32(3), 5)).tolist()) == set(range(7))
    np.testing.assert_array_equal(np.sort(inner.data), rows)
    assert not np.array_equal(
        inner.data, shuffled(problem, jax.random.key(seed + 1)).slots()[0].data
    )


def test_table_estimate_is_unbiased(seed):
    """At any table, the mean of the estimate over slots, each by its rows, is the mean over all rows."""
    data = jnp.asarray(np.random.default_rng(seed).normal(size=(7, 2)))
    slots = Slots(data, 3, 7)
    raw = lambda point, batch: ({"x": point["w"] * jnp.mean(batch, axis=0)}, {})
    level = lambda bits: Level(lambda: data[:3], slots, bits)
    saga = bl.SAGA()
    step = jax.jit(lambda w, memory, bits: saga(raw, {"w": w}, level(bits), memory)[::2])
    memory = saga.init(raw, {"w": jnp.asarray(1.0)}, level(jnp.uint32(6)))
    for bits in (0, 6, 3, 0, 2):  # of rows: slots 0, 2, 1
        _, memory = step(jnp.asarray(1.0 + bits), memory, jnp.uint32(bits))
    shares = np.array([3, 3, 1]) / 7
    np.testing.assert_allclose(memory.mean, shares @ memory.rows, rtol=1e-12)
    at = lambda i: memory._replace(index=jnp.int32(i), old=memory.rows[i])
    found = [step(jnp.asarray(2.0), at(i), jnp.uint32(0))[0]["x"] for i in range(3)]
    np.testing.assert_allclose(shares @ np.stack(found), 2 * data.mean(axis=0), rtol=1e-12)
    bits = jax.random.bits(jax.random.key(seed), (3000,), jnp.uint32)
    drawn = np.bincount(jax.vmap(slots.draw)(bits), minlength=3) / 3000
    np.testing.assert_allclose(drawn, shares, atol=0.05)


def test_table_is_updated_in_place():
    """Every copy of a table in the compiled run is outside its loop."""
    from bilevel import outer_steps, transforms
    from solvers.static_function import StaticFunction

    case = problems.make("quadratic", n=26)
    problem = bl.Problem(case.inner, case.outer, case.inner_data, case.outer_data, batch_size=2)
    rule, scales, key = (
        StaticFunction(optax.sgd(0.1)),
        transforms.broadcast(None, case.lam),
        jax.random.key(0),
    )
    problem, engine = shuffled(problem, key), bl.SABA(0.1)
    state = outer_steps.first_state(problem, None, engine, rule, scales, case.w, case.lam, key)
    sizes = jnp.int32(5), 5
    program = (
        outer_steps.program(engine, problem, state)
        .lower(engine, problem, None, rule, scales, state, key, *sizes)
        .compile()
        .compiled.as_text()
    )
    # Its operations are in order: handed to other threads, such small ones cost twice as much.
    other = outer_steps.take_steps.lower(
        engine, problem, None, rule, scales, state, key, *sizes
    ).compile()
    assert program != other.compiled.as_text()
    copies, computation = [], ""
    for line in program.splitlines():
        if line.endswith("{"):
            computation = line.split()[0]
        if " copy(" in line and "[13,16]" in line:
            copies.append(computation)
    assert "[13,16]" in program and set(copies) <= {"ENTRY"}
