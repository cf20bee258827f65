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


@pytest.mark.parametrize(
    ("engine", "rate", "steps", "size", "penalty", "tol"),
    [
        (bl.F3SA(0.45, 1e3, 1.0, 60, estimator=bl.Plain()), 0.2, 400, None, 1e3, 2e-12),  # F2BA
        (bl.F3SA(0.25, 50.0, 1.0, 10, estimator=bl.Plain()), 0.1, 600, None, 50.0, 7e-11),
        (bl.F3SA(0.25, 5.0, estimator=bl.SPIDER()), 0.02, 3000, 4, 5.0, 1e-12),
    ],
    ids=["f2ba", "f2sa", "spider"],
)
def test_first_order_loop_ends_at_the_penalised_optimum(
    engine, rate, steps, size, penalty, tol, seed
):
    case, problem = quadratic(seed, batch_size=size)
    target = case.penalised_optimum(penalty)
    assert distance(case, problem, engine, rate, steps, target) < tol


def test_growing_penalty_goes_to_the_optimum_itself(seed):
    case, problem = quadratic(seed)
    s = bl.schedules.penalty(0.25, noise="none")
    engine = bl.F3SA(s.step_size, s.penalty, inner_steps=10, estimator=bl.Plain())
    early = distance(case, problem, engine, s.outer, 100, case.optimum())
    assert distance(case, problem, engine, s.outer, 1000, case.optimum()) < min(0.3, early / 1.5)


def test_noise_coupled_batches_and_momentum(seed):
    """One batch for both copies cancels most of the noise; momentum does as well with single steps."""
    case, problem = quadratic(seed, batch_size=4)
    s = bl.schedules.penalty(0.25, noise="both")
    f2sa = bl.F3SA(s.step_size, s.penalty, inner_steps=5, estimator=bl.Plain())
    target = case.penalised_optimum(float(s.penalty(jnp.asarray(3000))))
    coupled = distance(case, problem, f2sa, s.outer, 3000, target)
    apart = dataclasses.replace(f2sa, coupled=False)
    assert coupled < 0.05 and 2 * coupled < distance(case, problem, apart, s.outer, 3000, target)
    s = bl.schedules.penalty(0.25, noise="both", momentum=True, xi=0.3, offset=100.0)
    f3sa = bl.F3SA(s.step_size, s.penalty, estimator=bl.STORM(power(1.0, 0.8, 100.0)))
    target = case.penalised_optimum(float(s.penalty(jnp.asarray(5000))))
    assert distance(case, problem, f3sa, s.outer, 5000, target) < 0.1


@pytest.mark.parametrize(("order", "tol"), [(1, 6e-2), (2, 1.3e-3), (3, 8e-5)])
def test_differences_of_any_order_with_eighty_gradient_steps(order, tol, seed):
    """The double loop `F2SA` with single gradient steps for a solver: F2SA-p of the table."""
    case, problem = quadratic(seed)
    engine = bl.F2SA(nu=0.02, order=order)
    solver = bl.GradientDescent(0.45, max_steps=80, tol=0.0)
    found = distance(case, problem, engine, 0.2, 300, case.optimum(), solver=solver)
    assert tol / 1000 < found < tol


ROOT = lambda step: 0.2 / jnp.sqrt(step.astype(float) + 10)


@pytest.mark.parametrize(
    ("engine", "rate", "steps", "target", "tol"),
    [
        (bl.BAMM(0.4, mu=0.3), 0.1, 1500, lambda case: case.aggregated_optimum(0.3), 1e-12),
        (bl.AmIGO(0.4), 0.2, 300, lambda case: case.optimum(), 1e-12),
        (bl.StocBiO(0.1, None, 40), 0.2, 300, lambda case: case.series_optimum(10, 0.1), 1e-12),
        (bl.VPBGD(0.4, 10.0), 0.04, 3000, lambda case: case.penalised_optimum(10.0), 1e-12),
        (bl.GPBGD(0.01, 20.0), 0.01, 10_000, lambda case: case.squared_optimum(20.0), 1e-12),
        (bl.BOME(0.5, 0.5, ROOT, 20), ROOT, 3000, lambda case: case.optimum(), 6e-3),
    ],
    ids=["bamm", "amigo", "stocbio", "vpbgd", "gpbgd", "bome"],
)
def test_other_loops_end_at_their_closed_forms(engine, rate, steps, target, tol, seed):
    case, problem = quadratic(seed)
    assert distance(case, problem, engine, rate, steps, target(case)) < tol


def test_momentum_of_the_direction_alone(seed):
    case, problem = quadratic(seed, batch_size=4)
    engine = bl.FSLA(power(0.5, 0.5), estimator=bl.STORM(power(1.0, 0.5), everything=False))
    assert distance(case, problem, engine, power(0.2, 0.5), 5000, case.optimum()) < 0.1


@pytest.mark.parametrize(
    ("engine", "rate", "steps", "size", "tol"),
    [
        (bl.MEHA(0.2, c=20.0, gamma=4.0), 0.01, 20_000, None, 1e-12),
        (bl.MEHA(0.1, c=5.0, gamma=4.0, estimator=bl.SAGA()), 0.02, 5000, 4, 1e-12),
    ],
    ids=["meha", "meha-saga"],
)
def test_moreau_loop_ends_at_its_closed_form(engine, rate, steps, size, tol, seed):
    case, problem = quadratic(seed, batch_size=size)
    target = case.moreau_optimum(float(engine.c), 4.0)
    assert distance(case, problem, engine, rate, steps, target) < tol


def test_moreau_loop_with_a_growing_penalty(seed):
    case, problem = quadratic(seed)
    c = power(2.0, -0.49)
    engine, rate = bl.MEHA(0.2, c=c, gamma=4.0), lambda step: 0.2 / c(step)
    assert distance(case, problem, engine, rate, 20_000, case.optimum()) < 1.7e-2


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
        chunk=20_000,
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
        chunk=20_000,
    )
    x = 3 * np.pi / 4
    np.testing.assert_allclose([result.lam, result.w], [x, x + 2], atol=1e-2)
    assert abs(float(result.history.outer_value[-1]) - 2 * (x - 2) ** 2) < 1e-2


def by_hand(name, case, batches, lam, w, num_steps, s=0.2, rate=0.05, c=5.0, gamma=3.0):
    """The order of updates, in NumPy on the quadratic: `(lam, w)` after full outer steps."""
    y, v = w, np.zeros_like(w)
    before, last = np.zeros_like(lam), (lam, v)

    def means(inner, outer):
        mean = lambda x: np.asarray(x).mean(axis=0)
        return *(mean(inner[k]) for k in "ABb"), *(mean(outer[k]) for k in ("D", "t", "rho"))

    for step in range(num_steps):
        at = lambda turn, step=step: means(*batches(step, turn))
        if name == "soba":  # two cycles, all from one point
            for turn in (0, 1):
                A, B, b, D, t, rho = at(turn)
                f_w = D @ (w - t)
                grad = rho * lam + B.T @ v
                w, v = w - s * (A @ w - B @ lam - b), v - 0.1 * (A @ v - f_w)
        elif name == "f3sa":  # two moves of both copies, then lam at the new ones
            for turn in (0, 1):
                A, B, b, D, t, rho = at(turn)
                slope = lambda z, A=A, r=B @ lam + b: A @ z - r
                w, y = w - s * slope(w), y - 0.5 * s / c * (D @ (y - t) + c * slope(y))
            A, B, b, D, t, rho = at(2)
            grad = rho * lam - c * B.T @ (y - w)
        elif name == "bamm":  # SOBA's order with phi
            A, B, b, D, t, rho = at(0)
            P, f_w = 0.3 * D + 0.7 * A, D @ (w - t)
            grad = rho * lam + 0.7 * B.T @ v
            w, v = w - s * (0.3 * f_w + 0.7 * (A @ w - B @ lam - b)), v - 0.1 * (P @ v - f_w)
        elif (
            name == "fsla"
        ):  # w, v at the new w, then lam with momentum against the last step's points
            A, B, b, D, t, rho = at(0)
            w = w - s * (A @ w - B @ lam - b)
            A, B, b, D, t, rho = at(1)
            v = v - 0.1 * (A @ v - D @ (w - t))
            A, B, b, D, t, rho = at(2)
            grad = rho * lam + B.T @ v
            if step:
                grad = grad + 0.6 * (before - rho * last[0] - B.T @ last[1])
            before, last = grad, (lam, v)
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


@pytest.mark.parametrize("name", ["soba", "f3sa", "meha", "bamm", "fsla", "vpbgd", "bome"])
def test_order_of_updates_and_batches(name, seed):
    """Three outer steps on batches equal those written out by hand; every move sees a fresh batch."""
    case = problems.make("quadratic", seed, n=7)
    problem = bl.Problem(case.inner, case.outer, case.inner_data, case.outer_data, batch_size=3)
    engine = {
        "soba": bl.SOBA(0.2, 0.1, inner_steps=2),
        "f3sa": bl.F3SA(0.2, 5.0, inner_steps=2, estimator=bl.Plain()),
        "meha": bl.MEHA(0.2, c=5.0, gamma=3.0, theta_step=0.1),
        "bamm": bl.BAMM(0.2, 0.1, mu=0.3),
        "fsla": bl.FSLA(0.2, 0.1, estimator=bl.STORM(0.4, everything=False)),
        "vpbgd": bl.VPBGD(0.2, 5.0, outer_step=0.1, inner_steps=2),
        "bome": bl.BOME(0.2, 0.5, 0.1, inner_steps=2),
    }[name]
    key = jax.random.key(seed)

    def batches(step, turn):
        at = jax.random.fold_in(key, step)
        return problem.inner_sampler(at)(turn), problem.outer_batch(jax.random.fold_in(at, turn))

    w = np.linspace(-1, 1, case.w.size)
    result = bl.run(
        problem,
        case.lam,
        jnp.asarray(w),
        engine=engine,
        outer=optax.sgd(0.05),
        num_steps=3,
        key=key,
    )
    lam, w = by_hand(name, case, batches, np.asarray(case.lam), w, 3)
    np.testing.assert_allclose(result.lam, lam, rtol=1e-10)
    np.testing.assert_allclose(result.w, w, rtol=1e-10)


def test_table_estimate_is_unbiased(seed):
    """At any table, the mean of the estimate over slots, each by its rows, is the mean over all rows."""
    from hypergrad.levels import Level, Slots

    data = jnp.asarray(np.random.default_rng(seed).normal(size=(7, 2)))
    slots = Slots(data, 3)
    raw = lambda point, batch: ({"x": point["w"] * jnp.mean(batch, axis=0)}, {})
    level = lambda key: Level(lambda: data[:3], slots, jax.random.key(key))
    saga, memory = bl.SAGA(), None
    memory = saga.init(raw, {"w": jnp.asarray(1.0)}, level(0))
    for key in range(9):
        *_, memory = saga(raw, {"w": jnp.asarray(1.0 + key)}, level(key), memory)
    shares = np.array([3, 3, 1]) / 7
    np.testing.assert_allclose(memory.mean["x"], shares @ memory.rows["x"], rtol=1e-12)
    at = lambda i: memory._replace(index=jnp.int32(i), old={"x": memory.rows["x"][i]})
    found = [saga(raw, {"w": jnp.asarray(2.0)}, level(0), at(i))[0]["x"] for i in range(3)]
    np.testing.assert_allclose(shares @ np.stack(found), 2 * data.mean(axis=0), rtol=1e-12)
    drawn = jax.vmap(slots.draw)(jax.random.split(jax.random.key(seed), 3000))
    np.testing.assert_allclose(np.bincount(drawn, minlength=3) / 3000, shares, atol=0.05)


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
    from bilevel.problem import shuffled
    from solvers.static_function import StaticFunction

    case = problems.make("quadratic", n=26)
    problem = bl.Problem(case.inner, case.outer, case.inner_data, case.outer_data, batch_size=2)
    rule, scales, key = (
        StaticFunction(optax.sgd(0.1)),
        transforms.broadcast(None, case.lam),
        jax.random.key(0),
    )
    problem, engine = shuffled(problem, key), bl.SABA(0.1)
    state = driver._first_state(problem, None, engine, rule, scales, case.w, case.lam, key)
    sizes = jnp.int32(5), jnp.asarray(False), 5
    program = driver._chunk.lower(engine, problem, None, rule, scales, state, key, *sizes).compile().compiled.as_text()
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
