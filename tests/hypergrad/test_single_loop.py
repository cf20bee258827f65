"""Single-loop methods: order of updates by hand, closed forms of fixed points, and their common contract."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from hypergrad_cases import SINGLE_LOOP

import bilevel as bl
from bilevel.problem import shuffled
from bilevel.schedules import power
from hypergrad.levels import mixed
from hypergrad.single_loop import DIRECTIONS

RATE, CHUNK = 0.02, 500
"""Of all runs of a method, with one size of batch, so that it compiles once."""


def quadratic(seed, noise=True):
    """P1 with 7 rows in batches of 3, so that the last batch is short; `noise=False`: equal rows."""
    case = problems.make("quadratic", seed, n=7)
    if not noise:
        even = lambda x: np.broadcast_to(np.mean(x, axis=0), x.shape)
        data = jax.tree.map(even, (case.inner_data, case.outer_data))
        case = dataclasses.replace(case, inner_data=data[0], outer_data=data[1])
    return case, bl.Problem(case.inner, case.outer, case.inner_data, case.outer_data, batch_size=3)


def run(problem, case, engine, num_steps, rate=RATE, **kwargs):
    kwargs = {"chunk": CHUNK, "outer": optax.sgd(rate), "throw": False} | kwargs
    return bl.run(problem, case.lam, case.w, engine=engine, num_steps=num_steps, **kwargs)


def distance(lam, target):
    return np.linalg.norm(lam - target) / np.linalg.norm(target)


def by_hand(
    name, case, batches, drawn, directions, lam, w, num_steps, s=0.2, rate=RATE, c=5.0, gamma=3.0
):
    """The order of updates, in NumPy on the quadratic: `(lam, w)` after full outer steps."""
    y, v = w, np.zeros_like(w)
    before, last = np.zeros_like(lam), (lam, v)

    def means(inner, outer):
        mean = lambda x: np.asarray(x).mean(axis=0)
        return *(mean(inner[k]) for k in "ABb"), *(mean(outer[k]) for k in ("D", "t", "rho"))

    for step in range(num_steps):
        at = lambda turn, copy=0, number=None, step=step: means(*batches(step, turn, copy, number))

        def series(lam, w, turn, last=None, at=at):  # 3 terms, or the one after `last` products
            _, B, _, D, t, rho = at(turn, number=0)
            now = total = D @ (w - t)
            for q in range(1, 3 if last is None else last + 1):
                now = now - 0.1 * at(turn, number=q)[0] @ now
                total = total + now
            return rho * lam + B.T @ (0.1 * total if last is None else 0.1 * 3 * now)

        if name == "soba":  # two cycles, all from one point
            for turn in (0, 1):
                A, B, b, D, t, rho = at(turn)
                f_w = D @ (w - t)
                grad = rho * lam + B.T @ v
                w, v = w - s * (A @ w - B @ lam - b), v - 0.1 * (A @ v - f_w)
        elif (
            name == "f2sa"
        ):  # two moves of both copies on batches of their own, then lam at the new ones
            for turn in (0, 1):
                A, B, b, D, t, rho = at(turn)
                w = w - s * (A @ w - B @ lam - b)
                A, B, b, *_ = at(turn, 1)
                y = y - 0.5 * s / c * (D @ (y - t) + c * (A @ y - B @ lam - b))
            A, B, b, D, t, rho = at(2)
            grad = rho * lam + c * (B.T @ w - at(2, 1)[1].T @ y)
        elif name == "bamm":  # SOBA's order with phi
            A, B, b, D, t, rho = at(0)
            P, f_w = 0.3 * D + 0.7 * A, D @ (w - t)
            grad = rho * lam + 0.7 * B.T @ v
            w, v = w - s * (0.3 * f_w + 0.7 * (A @ w - B @ lam - b)), v - 0.1 * (P @ v - f_w)
        elif name == "fsla":  # w, v at the new w, lam with momentum against the last step's points
            A, B, b, D, t, rho = at(0)
            w = w - s * (A @ w - B @ lam - b)
            A, B, b, D, t, rho = at(1)
            v = v - 0.1 * (A @ v - D @ (w - t))
            A, B, b, D, t, rho = at(2)
            grad = rho * lam + B.T @ v
            if step:
                grad = grad + 0.6 * (before - rho * last[0] - B.T @ last[1])
            before, last = grad, (lam, v)
        elif name == "mrbo":  # both at once, against the last point on the batches of now
            A, B, b, *_ = at(0, number=0)

            def both(lam, w, A=A, B=B, b=b, series=series):
                return np.concatenate([series(lam, w, 0), A @ w - B @ lam - b])

            now = both(lam, w)
            if step:
                now = now + 0.6 * (before - both(*last))
            before, last, grad = now, (lam, w), now[: len(lam)]
            w = w - s * now[len(lam) :]
        elif name == "ttsa":  # w, then one term of the series at the new w
            A, B, b, *_ = at(0)
            w = w - s * (A @ w - B @ lam - b)
            grad = series(lam, w, 1, drawn(step, 1) % 3)
        elif name == "borep":  # w at even steps, more of it at first, in a ball; v; momentum
            center = w
            for turn in range(0 if step % 2 else 2 if step else 3):
                A, B, b, *_ = at(turn)
                away = w - s * (A @ w - B @ lam - b) - center
                w = center + away * min(1.0, 0.3 / np.linalg.norm(away))
            A, _, _, D, t, _ = at(3)
            v = v - 0.1 * (A @ v - D @ (w - t))
            _, B, _, _, _, rho = at(4)
            grad = rho * lam + B.T @ v
            before = grad = grad if step == 0 else 0.4 * before + 0.6 * grad
        elif name == "pzobo":  # w twice, at lam and at three shifted ones on the same batches
            u = directions(step)
            shifted = np.tile(w, (3, 1))
            for turn in (0, 1):
                A, B, b, *_ = at(turn)
                w = w - s * (A @ w - B @ lam - b)
                for j in range(3):
                    shifted[j] -= s * (A @ shifted[j] - B @ (lam + 0.1 * u[j]) - b)
            *_, D, t, rho = at(2)
            grad = rho * lam + np.mean(((shifted - w) @ D @ (w - t) / 0.1)[:, None] * u, axis=0)
        elif name == "vpbgd":  # w twice, then y and lam at once
            for turn in (0, 1):
                A, B, b, D, t, rho = at(turn)
                w = w - s * (A @ w - B @ lam - b)
            A, B, b, D, t, rho = at(2)
            grad = rho * lam - c * B.T @ (y - w)
            y = y - 0.1 / c * (D @ (y - t) + c * (A @ y - B @ lam - b))
        elif name == "bome":  # z from y, then y and lam at once
            z = y
            for turn in (0, 1):
                A, B, b, D, t, rho = at(turn)
                z = z - s * (A @ z - B @ lam - b)
            A, B, b, D, t, rho = at(2)
            q = np.concatenate([A @ y - B @ lam - b, -B.T @ (y - z)])
            f = np.concatenate([D @ (y - t), rho * lam])
            d = f + max(0.5 * q @ q - f @ q, 0) / (q @ q + 1e-8) * q
            w = y = y - 0.1 * d[: len(y)]
            grad = d[len(y) :]
        else:  # y, then theta from the new y, then lam
            A, B, b, D, t, rho = at(0)
            y = y - s * (D @ (y - t) / c + A @ y - B @ lam - b - (y - w) / gamma)
            A, B, b, D, t, rho = at(1)
            w = w - 0.1 * (A @ w - B @ lam - b + (w - y) / gamma)
            A, B, b, D, t, rho = at(2)
            grad = rho * lam - c * B.T @ (y - w)
        lam = lam - rate * grad
    return lam, w


TARGETS = {
    "stocbio": lambda case: case.series_optimum(3, 0.2),
    "f3sa": lambda case: case.penalised_optimum(5.0),
    "f2sa": lambda case: case.penalised_optimum(5.0),
    "vpbgd": lambda case: case.penalised_optimum(5.0),
    "meha": lambda case: case.moreau_optimum(5.0, 3.0),
    "lvhba": lambda case: case.moreau_optimum(5.0, 3.0),
    "bamm": lambda case: case.aggregated_optimum(0.3),
    "gpbgd": lambda case: case.squared_optimum(5.0),
    "mrbo": lambda case: case.series_optimum(3, 0.1),
    "vrbo": lambda case: case.series_optimum(20, 0.2),
}
"""Where a method ends without noise, if not at the optimum."""
BY_HAND = (
    "soba",
    "f2sa",
    "meha",
    "bamm",
    "fsla",
    "vpbgd",
    "bome",
    "mrbo",
    "ttsa",
    "borep",
    "pzobo",
)


@pytest.mark.parametrize("name", SINGLE_LOOP)
def test_method(name, seed):
    """Everything about one method that one compiled program can show."""
    engine = SINGLE_LOOP[name]
    case, problem = quadratic(seed)
    if name in BY_HAND:
        check_order(name, case, problem, engine, seed)
    if name not in ("bome", "ttsa", "pzobo"):  # their steps have to decay
        target = TARGETS.get(name, lambda case: case.optimum())
        # Variance reduction on equal rows would prove nothing.
        at = quadratic(seed, noise=name in ("saba", "srba", "vrbo"))
        assert distance(run(at[1], at[0], engine, 4000).lam, target(at[0])) < 1e-12
    if name == "soba":  # what the tables are for: with noise and constant steps it stays away
        assert distance(run(problem, case, engine, 2000).lam, case.optimum()) > 1e-3
    check_contract(case, problem, engine, seed)


take = jax.jit(lambda slots, seed, count: slots.turn(seed, count))


def check_order(name, case, problem, engine, seed):
    """Three outer steps equal those written out by hand; every move sees batches of its own."""
    key = jax.random.key(seed)
    w = np.linspace(-1, 1, case.w.size)
    case = dataclasses.replace(case, w=jnp.asarray(w))
    result = run(problem, case, engine, 3, key=key)
    inner, outer = shuffled(problem, key).slots()
    order = np.asarray(result.state.engine.order)

    def batches(step, turn, copy, number):
        seed = order[turn, copy] if number is None else mixed(order[turn, copy], number + 1)
        return take(inner, seed, step), take(outer, order[turn, 2], step)

    drawn = lambda step, turn: int(mixed(order[turn, 3], step))

    def directions(step):
        own = jax.random.fold_in(jax.random.fold_in(key, step), DIRECTIONS)
        return np.asarray(jax.random.normal(own, (3, case.lam.size)))

    lam, w = by_hand(name, case, batches, drawn, directions, np.asarray(case.lam), w, 3)
    np.testing.assert_allclose(result.lam, lam, rtol=1e-10)
    np.testing.assert_allclose(result.w, w, rtol=1e-10)


def flat(x):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(x)])


def check_contract(case, problem, engine, seed):
    """Breaks and repetition change no bit; types stay; NaN and divergence are said and move nothing."""
    whole, pieces = run(problem, case, engine, 9), run(problem, case, engine, 5)
    rest = run(problem, case, engine, 4, state=pieces.state)
    np.testing.assert_array_equal(flat((whole.lam, whole.w)), flat((rest.lam, rest.w)))
    np.testing.assert_array_equal(flat(whole.state.engine), flat(rest.state.engine))
    assert whole.status == bl.Status.OK and len(np.unique(whole.history.outer_value)) == 9
    other = run(problem, case, engine, 9, key=jax.random.key(seed + 1))
    assert not np.array_equal(whole.lam, other.lam)
    cost = engine.cost()
    steps = set(whole.history.inner_steps)
    assert steps == ({7, 4, 6} if isinstance(engine, bl.BOREP) else {cost.gradients})
    hvps = set(whole.history.adjoint_steps)
    drawn = isinstance(engine, bl.TTSA)
    assert len(hvps) > 1 and hvps <= {1, 2, 3} if drawn else hvps == {cost.hvps}

    like = problems.make("quadratic", seed, jnp.float32, n=7)
    small = bl.Problem(like.inner, like.outer, like.inner_data, like.outer_data, batch_size=3)
    key = jax.random.key(seed)
    start = lambda: engine.init(small, None, like.w, like.lam, key)
    state = jax.eval_shape(start)
    h, after = jax.eval_shape(lambda s: engine.step(small, None, like.w, like.lam, s, key), state)
    shape = lambda t: jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), t)
    assert shape(state) == shape(after)
    assert {leaf.dtype for leaf in jax.tree.leaves((h.grad, h.w))} == {jnp.dtype("float32")}

    bad = jax.tree.map(lambda x: np.full_like(x, np.nan), case.inner_data)
    broken = run(dataclasses.replace(problem, inner_data=bad), case, engine, 9)
    assert broken.status == bl.Status.NONFINITE
    np.testing.assert_array_equal(broken.lam, case.lam)
    # BOREP's ball keeps w, but not the adjoint.
    too_long = "adjoint_step" if isinstance(engine, bl.BOREP) else "step_size"
    far = run(problem, case, dataclasses.replace(engine, **{too_long: jnp.asarray(50.0)}), 40)
    assert far.status == bl.Status.DIVERGED and np.all(np.isfinite(far.w))


@pytest.mark.parametrize(
    ("engine", "target"),
    [
        (bl.F3SA(0.25, 5.0, estimator=bl.SPIDER(8)), lambda case: case.penalised_optimum(5.0)),
        (bl.MEHA(0.2, c=5.0, gamma=4.0, estimator=bl.SAGA()), lambda c: c.moreau_optimum(5.0, 4.0)),
    ],
    ids=["spider", "saga"],
)
def test_variance_reduction_composes_with_first_order_methods(engine, target, seed):
    case, problem = quadratic(seed)
    assert distance(run(problem, case, engine, 4000).lam, target(case)) < 1e-12


def test_noise_and_decaying_steps(seed):
    case, problem = quadratic(seed)
    engine = bl.SOBA(power(0.5, 0.5))
    result = run(problem, case, engine, 10_000, rate=power(0.2, 0.5))
    assert distance(result.lam, case.optimum()) < 0.05


def test_growing_penalty_goes_to_the_optimum_itself(seed):
    case, problem = quadratic(seed, noise=False)
    s = bl.schedules.penalty(0.25, noise="none")
    engine = bl.F3SA(s.step_size, s.penalty, inner_steps=10, estimator=bl.Plain())
    early = run(problem, case, engine, 100, rate=s.outer)
    late = run(problem, case, engine, 900, rate=s.outer, state=early.state)
    first = distance(early.lam, case.optimum())
    assert distance(late.lam, case.optimum()) < min(0.3, first / 1.5)


def test_independent_batches_are_worse_than_coupled_ones(seed):
    """One batch for both copies cancels most of the noise that the penalty multiplies."""
    case, problem = quadratic(seed)
    apart = dataclasses.replace(SINGLE_LOOP["f2sa"], penalty=jnp.asarray(20.0))
    target = case.penalised_optimum(20.0)

    def mean_distance(engine):
        seen = []
        look = lambda state, history: seen.append(distance(state.lam, target))
        run(problem, case, engine, 10_000, callback=look)
        return np.mean(seen[10:])

    coupled = mean_distance(dataclasses.replace(apart, coupled=True))
    assert 3 * coupled < mean_distance(apart)


def test_moreau_loop_on_the_lasso(seed):
    """P3: min sum y over x in [0, 1]^n, y = argmin 1/2 |y - a|^2 + sum x_i |y_i|: value -1/2, from below."""
    n = 4
    a = jnp.repeat(jnp.array([1.0, -1.0]), n // 2) / n
    problem = bl.Problem(
        lambda w, lam, batch: 0.5 * jnp.sum((w - batch) ** 2),
        lambda w, lam, batch: jnp.sum(w),
        a,
        inner_prox=bl.prox.l1,
        inner_penalty=lambda w, lam: jnp.sum(lam * jnp.abs(w)),
        outer_projection=lambda lam: jnp.clip(lam, 0.0, 1.0),
    )
    c = power(20.0, -0.49)
    engine = bl.MEHA(0.1, c=c, gamma=10.0, theta_step=0.1)
    result = bl.run(
        problem,
        jnp.full(n, 0.1),
        jnp.full(n, 0.1),
        engine=engine,
        outer=optax.sgd(lambda step: 0.1 / c(step)),
        num_steps=20_000,
        chunk=5000,
    )
    y = np.asarray(result.w)
    np.testing.assert_allclose(y, np.repeat([0.0, -1.0], n // 2) / n, atol=5e-3)
    np.testing.assert_allclose(result.lam[n // 2 :], 0.0, atol=5e-3)
    assert np.all(result.lam[: n // 2] >= 1 / n - 5e-3) and -0.51 < y.sum() < -0.49
    bare = dataclasses.replace(problem, inner_penalty=None)
    with pytest.raises(ValueError, match="inner_penalty"):
        bl.hypergradient(bare, jnp.ones(n), jnp.ones(n), engine=engine)
    with pytest.raises(ValueError, match="SOBA is for smooth"):
        bl.hypergradient(problem, jnp.ones(n), jnp.ones(n), engine="soba")


def test_moreau_loop_on_a_weakly_convex_problem():
    """P4: f = (x - a)^2 + (y - a - c)^2, g = sin(x + y - c), a = c = 2: x* = 3 pi / 4, y* = x* + 2."""
    problem = bl.Problem(
        lambda w, lam, batch: jnp.sin(lam + w - 2.0),
        lambda w, lam, batch: (lam - 2.0) ** 2 + (w - 4.0) ** 2,
    )
    c = power(5.0, -0.48)
    engine = bl.MEHA(0.1, c=c, gamma=0.4, theta_step=0.1)
    result = bl.run(
        problem,
        1.5,
        3.5,
        engine=engine,
        outer=optax.sgd(lambda step: 0.05 / c(step)),
        num_steps=20_000,
        chunk=5000,
    )
    x = 3 * np.pi / 4
    np.testing.assert_allclose([result.lam, result.w], [x, x + 2], atol=1e-2)
    assert abs(float(result.history.outer_value[-1]) - 2 * (x - 2) ** 2) < 1e-2


def test_refusals(seed):
    case, problem = quadratic(seed)
    call = lambda problem=problem, **kw: bl.hypergradient(problem, case.lam, case.w, **kw)
    with pytest.raises(ValueError, match="would ignore solver"):
        call(engine="soba", solver="lbfgs")
    with pytest.raises(ValueError, match="positive number or 'auto'"):
        bl.SOBA("best")
    with pytest.raises(TypeError, match="must be an estimator"):
        bl.SOBA(estimator="saga")
    for ratio in (1.5, power(0.5, 0.1)):
        with pytest.raises(ValueError, match=r"\(0, 1\]"):
            bl.F3SA(ratio=ratio)
    for exponents in ((0.4, 0.6), (0.5, -0.1)):
        with pytest.raises(ValueError, match="0 <= c <= a <= 1"):
            bl.schedules.penalty(0.1, exponents=exponents)
    with pytest.raises(ValueError, match="ratio must be in"):
        bl.schedules.penalty(0.1, ratio=2.0)
    with pytest.raises(ValueError, match="two batches at once"):
        bl.F3SA(coupled=False, estimator=bl.SAGA())
    shared = dataclasses.replace(problem, batch_size=4, same_rows=True)
    with pytest.raises(ValueError, match="rows of the data by number"):
        call(shared, engine="saba")
    with pytest.raises(ValueError, match="has no table for"):
        bl.MRBO(estimator=bl.SAGA())
