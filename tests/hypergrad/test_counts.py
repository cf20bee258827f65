"""What `cost()` says of passes over all rows, against a count by the losses themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest

import bilevel as bl


def counting(loss, seen):
    """The loss, which notes the rows of each of its evaluations in a run."""

    def counted(w, lam, batch):
        rows = len(jax.tree.leaves(batch)[0])
        jax.debug.callback(lambda: seen.append(rows))
        return loss(w, lam, batch)

    return counted


def rows_seen(engine, steps, batch):
    case = problems.make("quadratic", n=24)
    outer_data = jax.tree.map(lambda x: x[:20], case.outer_data)
    inner_seen, outer_seen = [], []
    inner, outer = counting(case.inner, inner_seen), counting(case.outer, outer_seen)
    problem = bl.Problem(inner, outer, case.inner_data, outer_data, batch_size=batch)
    rule = optax.sgd(0.01)
    bl.run(problem, case.lam, case.w, engine=engine, outer=rule, num_steps=steps, chunk=steps)
    jax.effects_barrier()
    return sum(inner_seen), sum(outer_seen)


def mean(cost, on_batches, on_all, batch, rows):
    return (1 - cost.passes) * on_batches * batch + cost.passes * on_all * rows


@pytest.mark.parametrize("engine", [bl.SRBA(0.1, estimator=bl.SPIDER(4)), bl.SABA(0.1)], ids=repr)
def test_one_gradient_of_each_level(engine):
    """A product comes along with the inner gradient: half of the gradients are of each level."""
    cost, steps = engine.cost(), 8
    halves = cost.gradients / 2, cost.pass_gradients / 2
    found = rows_seen(engine, steps, (3, 4))
    expected = [steps * mean(cost, *halves, *of) for of in ((3, 24), (4, 20))]
    np.testing.assert_allclose(found, expected)
    assert cost.passes == (0.25 if isinstance(engine, bl.SRBA) else 0)
    assert cost.start_hvps == 0 and type(engine)().cost().start_hvps == 12


def test_a_series():
    """Each product evaluates the inner loss, the last one with its gradient; three of six turns are over all rows."""
    engine = bl.VRBO(0.1, terms=2, inner_steps=3, whole_terms=5, estimator=bl.SPIDER(2))
    cost, steps = engine.cost(), 2
    assert cost == (12, 12, 0.5, 6, 15, 0)
    inner, outer = rows_seen(engine, steps, (3, 4))
    assert inner == steps * mean(cost, cost.hvps, cost.pass_hvps, 3, 24)
    assert outer == steps * mean(cost, cost.gradients / 2, cost.pass_gradients / 2, 4, 20)


def test_measuring_the_step_size(monkeypatch):
    """The number of products is that of the measurement."""
    from hypergrad import single_loop

    taken = []
    monkeypatch.setattr(
        single_loop,
        "hessian_product",
        lambda *at: lambda v: (jax.debug.callback(lambda: taken.append(1)), v)[1],
    )
    case = problems.make("quadratic", n=24)
    problem = bl.Problem(case.inner, case.outer, case.inner_data, case.outer_data)
    jax.jit(lambda w: bl.SOBA().init(problem, None, w, case.lam, jax.random.key(0)).size)(
        jnp.ones(30)
    )
    jax.effects_barrier()
    assert len(taken) == bl.SOBA().cost().start_hvps
