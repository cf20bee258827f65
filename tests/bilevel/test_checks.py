"""`bilevel.check`: the table that compares engines, oracle and differences."""

import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest

import bilevel as bl


@pytest.fixture(scope="module")
def found():
    case = problems.make("ridge", 3)
    problem = bl.Problem(case.inner, case.outer, case.inner_data, case.outer_data)
    return case, problem, bl.check(problem, case.lam, case.w)


def test_the_table_is_right(found):
    case, _, table = found
    rows = {row.name: row for row in table.rows}
    assert set(rows) == {"f2sa", "forward", "implicit", "moreau", "onestep", "unrolled"}
    truth = float(case.hypergradient(case.lam))
    assert table.reference == "exact" and table.agreed
    assert table.difference == pytest.approx(abs(truth), rel=1e-5)
    assert rows["implicit"].distance < 1e-6 < rows["onestep"].distance
    assert rows["implicit"].status == bl.Status.OK
    text = str(table)
    assert "exact and differences agree" in text and "onestep" in text


def test_engines_and_solver_are_chosen(found):
    case, problem, _ = found
    table = bl.check(
        problem,
        case.lam,
        case.w,
        solver=bl.LBFGS(max_steps=1),
        engines={"mine": bl.Implicit(bl.Dense())},
    )
    (row,) = table.rows
    assert row.name == "mine" and row.status == bl.Status.MAX_STEPS
    # The reference does not use the short solver, so differences still agree with it.
    assert table.agreed and row.distance > 1e-3
    assert "max_steps" in str(table)


def test_an_engine_that_does_not_apply_says_why():
    inner = lambda w, lam, batch: 0.5 * jnp.sum(w**2)
    outer = lambda w, lam, batch: jnp.sum((w - 1) ** 2)
    problem = bl.Problem(inner, outer, inner_init=lambda lam, batch: lam)
    with pytest.raises(ValueError, match="Unrolled"):
        bl.check(problem, jnp.ones(3), engines=["implicit"])


@pytest.mark.parametrize(
    ("kwargs", "error"),
    [
        ({"step": 0.0}, "step"),
        ({"engines": "implicit"}, "several names"),
        ({"engines": ["nonsense"]}, "nonsense"),
        ({"solver": "nonsense"}, "nonsense"),
    ],
)
def test_bad_input(found, kwargs, error):
    case, problem, _ = found
    with pytest.raises((TypeError, ValueError), match=error):
        bl.check(problem, case.lam, case.w, **kwargs)


@pytest.mark.parametrize("kept", [0, 1])
def test_a_derivative_that_the_losses_hide_disagrees(kept):
    """Wholly, or one entry of two: along the hypergradient alone nothing of it would be seen."""

    def inner(w, lam, batch):
        seen = lam * jnp.array([kept, 0.0])
        return 0.5 * jnp.sum((w - seen - jax.lax.stop_gradient(lam - seen)) ** 2)

    outer = lambda w, lam, batch: 0.5 * jnp.sum((w - 3) ** 2)
    args = (bl.Problem(inner, outer), jnp.array([1.0, 2.0]), jnp.zeros(2))
    table = bl.check(*args, engines=["implicit"])
    assert not table.agreed and "DISAGREE" in str(table)
    whole = lambda w, lam, batch: 0.5 * jnp.sum((w - lam) ** 2)
    assert bl.check(bl.Problem(whole, outer), *args[1:], engines=["implicit"]).agreed


def test_wrong_product_disagrees(found):
    """A wrong Hessian-vector product is seen: the oracle does not use it."""
    case, _, _ = found
    wrong = lambda w, lam, batch, v: 3.0 * v
    problem = bl.Problem(case.inner, case.outer, case.inner_data, case.outer_data, inner_hvp=wrong)
    table = bl.check(problem, case.lam, case.w, engines=["implicit"])
    assert table.rows[0].distance > 0.05
    assert np.isfinite(table.difference)
