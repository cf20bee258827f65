"""Single-loop methods: each at its fixed point or optimum in closed form, and their common contract."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from hypergrad_cases import SINGLE_LOOP

import bilevel as bl
from bilevel.schedules import power


def quadratic(seed, **kwargs):
    """P1: finite sums of 64 quadratics, from lam = 0; with a batch size, noise."""
    case = problems.make("quadratic", seed, n=64)
    return case, bl.Problem(case.inner, case.outer, case.inner_data, case.outer_data, **kwargs)


def distance(case, problem, engine, rate, num_steps, target, **kwargs):
    """Relative distance of lam from the target after plain gradient steps with this rate."""
    result = bl.run(
        problem,
        jnp.zeros_like(case.lam),
        case.w,
        engine=engine,
        outer=optax.sgd(rate),
        num_steps=num_steps,
        chunk=num_steps,
        **kwargs,
    )
    return np.linalg.norm(result.lam - target) / np.linalg.norm(target)


@pytest.mark.parametrize(
    ("engine", "rate", "steps", "size", "tol"),
    [
        (bl.SOBA(0.4), 0.1, 1000, None, 1e-12),
        (bl.SABA(0.1), 0.03, 5000, 1, 1e-12),
        (bl.SABA(0.2), 0.06, 2500, 5, 1e-12),  # 64 rows: the last batch has four
        (bl.SRBA(0.2), 0.06, 800, 4, 1e-6),
        (bl.SOBA(power(0.5, 0.5)), power(0.2, 0.5), 20_000, 4, 0.05),
    ],
    ids=["soba", "saba", "saba-short-batch", "srba", "soba-noise"],
)
def test_soba_family_reaches_the_optimum(engine, rate, steps, size, tol, seed):
    case, problem = quadratic(seed, batch_size=size)
    assert distance(case, problem, engine, rate, steps, case.optimum()) < tol


def test_noise_without_variance_reduction_leaves_a_floor(seed):
    """What the tables are for: plain batches at the same constant steps stay far away."""
    case, problem = quadratic(seed, batch_size=1)
    assert distance(case, problem, bl.SOBA(0.1), 0.03, 5000, case.optimum()) > 1e-2


def flat(x):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(x)])


@pytest.mark.parametrize("name", sorted(SINGLE_LOOP))
def test_contract(name, seed):
    """Chunks and repetition change no bit; types stay; NaN and divergence are said and move nothing."""
    engine = SINGLE_LOOP[name]
    case = problems.make("quadratic", seed, n=7)
    problem = bl.Problem(case.inner, case.outer, case.inner_data, case.outer_data, batch_size=2)

    def run(problem=problem, engine=engine, num_steps=9, **kwargs):
        kwargs = {"chunk": 4, "outer": optax.sgd(0.05), "throw": False} | kwargs
        return bl.run(problem, case.lam, case.w, engine=engine, num_steps=num_steps, **kwargs)

    whole, pieces = run(), run(num_steps=5)
    rest = run(num_steps=4, chunk=4, state=pieces.state)
    np.testing.assert_array_equal(whole.lam, rest.lam)
    np.testing.assert_array_equal(whole.w, rest.w)
    np.testing.assert_array_equal(flat(whole.state.engine), flat(rest.state.engine))
    assert whole.status == bl.Status.OK and len(np.unique(whole.history.outer_value)) == 9
    assert not np.array_equal(whole.lam, run(key=jax.random.key(seed + 1)).lam)
    cost = engine.cost()
    assert set(whole.history.inner_steps) == {cost.gradients}
    assert set(whole.history.adjoint_steps) == {cost.hvps}

    for dtype in (jnp.float32, jnp.float64):
        like = problems.make("quadratic", seed, dtype, n=7)
        small = bl.Problem(like.inner, like.outer, like.inner_data, like.outer_data, batch_size=2)
        key = jax.random.key(seed)
        state = jax.eval_shape(lambda: engine.init(small, None, like.w, like.lam, key))  # noqa: B023
        h, after = jax.eval_shape(
            lambda s: engine.step(small, None, like.w, like.lam, s, key),  # noqa: B023
            state,
        )
        shape = lambda t: jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), t)
        assert shape(state) == shape(after)
        assert {leaf.dtype for leaf in jax.tree.leaves((h.grad, h.w))} == {jnp.dtype(dtype)}

    bad = jax.tree.map(lambda x: x.at[...].set(jnp.nan), case.inner_data)
    broken = run(dataclasses.replace(problem, inner_data=bad))
    assert broken.status == bl.Status.NONFINITE
    np.testing.assert_array_equal(broken.lam, case.lam)
    far = run(engine=dataclasses.replace(engine, step_size=jnp.asarray(50.0)), num_steps=40)
    assert far.status == bl.Status.DIVERGED and np.all(np.isfinite(far.w))


def test_table_is_updated_in_place():
    """Every copy of a table in the compiled run is outside its loop."""
    from bilevel import driver, transforms
    from solvers.static_function import StaticFunction

    case = problems.make("quadratic", n=26)
    problem = bl.Problem(case.inner, case.outer, case.inner_data, case.outer_data, batch_size=2)
    rule, scales, key = (
        StaticFunction(optax.sgd(0.1)),
        transforms.broadcast(None, case.lam),
        jax.random.key(0),
    )
    common = problem, None, bl.SABA(0.1), rule, scales
    state = driver._first_state(*common, case.w, case.lam, key)
    sizes = jnp.int32(5), jnp.asarray(False), 5
    program = driver._chunk.lower(*common, state, key, *sizes).compile().compiled.as_text()
    copies, computation = [], ""
    for line in program.splitlines():
        if line.endswith("{"):
            computation = line.split()[0]
        if " copy(" in line and "[13,6]" in line:
            copies.append(computation)
    assert "[13,6]" in program and set(copies) <= {"ENTRY"}


def test_refusals(seed):
    case, problem = quadratic(seed)
    call = lambda problem=problem, **kw: bl.hypergradient(problem, case.lam, case.w, **kw)
    with pytest.raises(ValueError, match="would ignore solver"):
        call(engine="soba", solver="lbfgs")
    with pytest.raises(ValueError, match="positive number or 'auto'"):
        bl.SOBA("best")
    with pytest.raises(TypeError, match="must be an estimator"):
        bl.SOBA(estimator="saga")
    shared = dataclasses.replace(problem, batch_size=4, same_rows=True)
    with pytest.raises(ValueError, match="rows of the data by number"):
        call(shared, engine="saba")
