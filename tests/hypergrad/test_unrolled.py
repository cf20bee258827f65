"""Derivatives through training: every mode is the same number, what is left out is bounded."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest

import bilevel as bl

T = 21  # no power: every level leaves steps over


def flat(x):
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(x)])


def of(case, **kwargs):
    return bl.Problem(case.inner, case.outer, case.inner_data, case.outer_data, **kwargs)


# A network of 4 hidden units; lam: the learning rate of Adam and the decay of each layer.


def network_loss(w, batch):
    X, y = batch
    return jnp.mean((jnp.tanh(X @ w["in"]) @ w["out"] - y) ** 2)


def network_inner(w, lam, batch):
    penalty = lam["decay"][0] * jnp.sum(w["in"] ** 2) + lam["decay"][1] * jnp.sum(w["out"] ** 2)
    return network_loss(w, batch) + penalty


def network_outer(w, lam, batch):
    return network_loss(w, batch) + 0.01 * jnp.sum(lam["decay"])


def adam(lam):
    return bl.OptaxSolver(optax.adam(lam["rate"], eps_root=1e-10), max_steps=T)


def setting(name):
    """(problem, lam, w, solver, plain): `plain(lam)` is training and outer loss without the library."""
    if name == "network":
        rng = np.random.default_rng(0)
        data = [(jnp.asarray(rng.normal(size=(9, 3))), jnp.asarray(rng.normal(size=9)))] * 2
        w = {
            "in": jnp.asarray(rng.normal(size=(3, 4))),
            "out": jnp.asarray(rng.normal(size=4)),
        }
        lam = {"rate": jnp.asarray(0.05), "decay": jnp.asarray([0.01, 0.03])}

        @jax.numpy_dtype_promotion("standard")  # for optax
        def plain(lam):
            rule = optax.adam(lam["rate"], eps_root=1e-10)
            v, state = w, rule.init(w)

            def step(carry, _):
                v, state = carry
                updates, state = rule.update(jax.grad(network_inner)(v, lam, data[0]), state, v)
                return (optax.apply_updates(v, updates), state), None

            (v, _), _ = jax.lax.scan(step, (v, state), None, length=T)
            return network_outer(v, lam, data[1])

        return bl.Problem(network_inner, network_outer, *data), lam, w, adam, plain
    case = problems.make(name)

    def plain(lam):
        def step(carry, _):
            w, m = carry
            gradient = jax.grad(case.inner)(w, lam, case.inner_data)
            m = jax.tree.map(lambda a, g: 0.6 * a + g, m, gradient)
            return (jax.tree.map(lambda a, b: a - 0.1 * b, w, m), m), None

        zero = jax.tree.map(jnp.zeros_like, case.w)
        (w, _), _ = jax.lax.scan(step, (case.w, zero), None, length=T)
        return case.outer(w, lam, case.outer_data)

    solver = bl.GradientDescent(0.1, momentum=0.6, max_steps=T)
    return of(case), case.lam, case.w, solver, plain


@pytest.mark.parametrize("name", ["quadratic", "softmax", "network"])
def test_every_mode_is_plain_autodiff(name):
    """Reverse mode with every number of levels that 21 steps allow, forward mode, and blocks from the host."""
    problem, lam, w, solver, plain = setting(name)
    value, expected = jax.jit(jax.value_and_grad(plain))(lam)
    expected = flat(expected)
    assert np.all(np.abs(expected) > 1e-6)
    call = lambda engine: bl.hypergradient(problem, lam, w, solver=solver, engine=engine)
    modes = {L: lambda L=L: call(bl.Unrolled(levels=L, estimate=False)) for L in (1, 2, 3, 4)}
    modes["stored"] = lambda: call(bl.Unrolled(checkpoint=False, estimate=False))
    modes["forward"] = lambda: call(bl.Forward(estimate=False))
    modes["replay"] = lambda: bl.replay(problem, lam, w, solver=solver, block=7, arity=2)
    for mode, made in modes.items():
        h = made()
        scale = np.linalg.norm(expected)
        np.testing.assert_allclose(
            flat(h.grad), expected, rtol=1e-10, atol=1e-12 * scale, err_msg=str(mode)
        )
        assert float(h.info.outer_value) == pytest.approx(float(value), rel=1e-12), mode


# Truncation


def schedule_solver(lam):
    return bl.OptaxSolver(optax.sgd(lambda step: lam["rate"]), max_steps=7)


def injected_solver(lam):
    return bl.OptaxSolver(optax.inject_hyperparams(optax.sgd)(lam["rate"]), max_steps=7)


def plain_solver(lam):
    return bl.GradientDescent(lam["rate"], max_steps=7)


def rate_and_target(w, lam, batch):
    return 0.35 * jnp.sum((w - lam["target"]) ** 2)


def quartic(w, lam, batch):
    return jnp.sum(w**4) + 0.3 * lam["target"] ** 2


LAM = {"rate": 0.3, "target": 1.7}


@pytest.mark.parametrize("solver", [plain_solver, schedule_solver, injected_solver])
def test_truncation_keeps_the_derivative_in_a_setting_of_the_solver(solver):
    """Also where the solver keeps it in its state, which the first steps are a constant of."""
    problem, w, K = bl.Problem(rate_and_target, quartic), jnp.asarray([0.2, -0.4]), 3
    gradient = jax.grad(rate_and_target)
    head = w
    for _ in range(7 - K):
        head = head - LAM["rate"] * gradient(head, LAM, None)

    def last(lam):
        v = head
        for _ in range(K):
            v = v - lam["rate"] * gradient(v, lam, None)
        return quartic(v, lam, None)

    h = bl.hypergradient(problem, LAM, w, solver=solver, engine=bl.Unrolled(truncate=K))
    expected = jax.grad(last)(LAM)
    np.testing.assert_allclose(flat(h.grad), flat(expected), rtol=1e-10)


@pytest.mark.parametrize(
    ("solver", "weights"),
    [(schedule_solver, (0.5, 0.2, 0.4)), (plain_solver, (0.1,) * 6 + (0.7, 0.2))],
)
def test_a_mixture_is_the_weighted_sum_of_its_horizons(solver, weights):
    """Horizons beyond the 7 steps, and the start, belong to the full derivative."""
    start = lambda lam, batch: lam["target"] * jnp.asarray([0.2, -0.4])
    problem = bl.Problem(rate_and_target, quartic, inner_init=start)
    call = lambda engine: bl.hypergradient(problem, LAM, solver=solver, engine=engine)
    parts = [flat(call(bl.Unrolled(truncate=k + 1)).grad) for k in range(len(weights))]
    found = call(bl.Unrolled(mixture=weights))
    np.testing.assert_allclose(flat(found.grad), np.asarray(weights) @ parts, rtol=1e-10)
    assert int(found.info.adjoint_steps) == min(len(weights), 7)


def test_a_mixture_refuses_what_it_cannot_weigh():
    problem, w = bl.Problem(rate_and_target, quartic), jnp.ones(2)
    with pytest.raises(ValueError, match="inject_hyperparams"):
        bl.hypergradient(
            problem, LAM, w, solver=injected_solver, engine=bl.Unrolled(mixture=(0.5, 0.5))
        )
    with pytest.raises(ValueError, match="truncate"):
        bl.Unrolled(mixture=(1.0,), truncate=2)


@pytest.mark.parametrize("solver", [plain_solver, schedule_solver, injected_solver])
def test_random_windows_are_uniform_truncations(solver):
    """Windows of 3 in at most 7 steps: each is the truncation that ends there, and all five are as likely.

    Each step has its own batch; lam acts on the start, which the first window reaches.
    """
    target = lambda w, lam, batch: rate_and_target(w, lam, None) + 0.3 * jnp.mean(batch @ w)
    start = lambda lam, batch: lam["target"] * jnp.asarray([0.2, -0.4])
    rows = jnp.asarray(np.random.default_rng(0).normal(size=(40, 2)))
    problem = bl.Problem(target, quartic, rows, None, batch_size=(1, None), inner_init=start)
    engine, num = bl.Unrolled(truncate=3, window="random"), 2000
    lam = jax.tree.map(jnp.asarray, LAM)

    def draw(key):
        h = engine.step(problem, solver, jnp.zeros(2), lam, None, key)[0]
        return h.grad, h.w, h.info.inner.num_steps, h.info.outer_value

    @jax.jit
    def ending_at(length, key):
        """Derivatives through the last 3 of `length` steps, without the library."""
        sampler = problem.inner_sampler(key)
        slope = jax.grad(target)
        steps = lambda lam, w, first, last: jax.lax.fori_loop(
            first, last, lambda t, w: w - lam["rate"] * slope(w, lam, sampler(t)), w
        )
        w = steps(lam, start(lam, None), 0, length - 3)

        def last(lam):
            v = jnp.where(length == 3, start(lam, None), w)
            for k in range(3):
                v = v - lam["rate"] * slope(v, lam, sampler(length - 3 + k))
            return quartic(v, lam, None), v

        (value, v), grad = jax.value_and_grad(last, has_aux=True)(lam)
        return grad, v, length, value

    keys = jax.random.split(jax.random.key(5), num)
    found = jax.jit(jax.vmap(draw))(keys)
    lengths = np.asarray(found[2])
    counts = np.bincount(lengths, minlength=8)
    assert counts[:3].sum() == 0 and np.all(abs(counts[3:] - num / 5) < 4.5 * (num * 0.16) ** 0.5)
    expected = jax.vmap(ending_at)(found[2], keys)
    for mine, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(flat(mine), flat(theirs), rtol=1e-10)


def test_the_mean_over_random_windows_is_that_of_all_truncations():
    """On all rows: the mean of many draws against all five windows, each by its own solver."""
    problem, w, num = bl.Problem(rate_and_target, quartic), jnp.asarray([0.2, -0.4]), 4000
    engine, lam = bl.Unrolled(truncate=3, window="random"), jax.tree.map(jnp.asarray, LAM)
    until = lambda n: lambda lam: bl.GradientDescent(lam["rate"], max_steps=n)
    windows = [
        flat(
            bl.hypergradient(problem, LAM, w, solver=until(n), engine=bl.Unrolled(truncate=3)).grad
        )
        for n in range(3, 8)
    ]
    draw = lambda key: engine.step(problem, plain_solver, w, lam, None, key)[0].grad
    found = jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(6), num))
    found = np.stack([np.asarray(leaf) for leaf in jax.tree.leaves(found)], axis=-1)
    error = found.std(axis=0) / num**0.5
    assert np.all(np.abs(found.mean(axis=0) - np.mean(windows, axis=0)) < 4.5 * error)
    assert np.all(error < 0.02 * np.abs(np.mean(windows, axis=0)))
    short = bl.Unrolled(truncate=9, window="random")  # longer than the training: all of it
    h = bl.hypergradient(problem, LAM, w, solver=plain_solver, engine=short)
    whole = bl.hypergradient(problem, LAM, w, solver=plain_solver, engine=bl.Unrolled())
    np.testing.assert_allclose(flat(h.grad), flat(whole.grad), rtol=1e-12)
    for wrong in ({"window": "random"}, {"window": "first", "truncate": 2}):
        with pytest.raises(ValueError, match="window"):
            bl.Unrolled(**wrong)


@functools.cache
def ready(seed):
    rng = np.random.default_rng(seed)
    X, V = rng.normal(size=(2, 30, 4)) * np.array([1.0, 0.4, 2.0, 0.7])
    y, z = (X[:, 0] + rng.normal(size=30) > 0), (V[:, 0] + rng.normal(size=30) > 0)
    return bl.glm.logistic(X, y.astype(float), V, z.astype(float))


PENALTIES = jnp.asarray([0.1, 0.2, 0.05, 0.3])


@functools.cache
def truth(seed):
    return bl.hypergradient(ready(seed), PENALTIES, jnp.zeros(4), engine="exact")


@pytest.mark.parametrize(("K", "momentum"), [(1, 0.0), (25, 0.5)])
def test_the_bound_holds_for_truncated_steps(K, momentum):
    """Six random problems, each from the solution and from where 25 steps do not reach it."""
    solver, engine = bl.GradientDescent(momentum=momentum, max_steps=25), bl.Unrolled(truncate=K)
    errors, bounds = [], []
    for seed in range(6):
        true = truth(seed)
        for start in (jnp.zeros(4), true.w):
            h = bl.hypergradient(ready(seed), PENALTIES, start, engine=engine, solver=solver)
            error = np.linalg.norm(h.grad - true.grad) / np.linalg.norm(h.grad)
            assert error <= float(h.info.bound) < np.inf
            assert error < 2 * float(h.info.error_estimate)
            errors.append(error)
            bounds.append(float(h.info.bound))
    assert np.max(errors) > (1e-2 if K == 1 else 1e-3)
    assert np.median(np.divide(bounds, errors)) < 100


def test_the_adjoint_of_truncated_steps_is_the_partial_series():
    """q = sum_{k<K} rate (I - rate H)^k c at the solution, and the residual is (I - rate H)^K c."""
    case, K, rate = problems.make("quadratic"), 5, 0.3
    constants = bl.Constants(0.4, 0.0, 0.0, 2.0, 0.0)
    w = jnp.asarray(case.solution(case.lam))
    problem, engine = of(case, constants=constants), bl.Unrolled(truncate=K)
    solver = bl.GradientDescent(rate, max_steps=K + 4)
    key = jax.random.key(0)
    h, state = eqx.filter_jit(engine.step)(problem, solver, w, case.lam, None, key)
    A, _, _, D, t, _ = case.means
    c, M = D @ (np.asarray(w) - t), np.eye(len(A)) - rate * A
    q = sum(rate * np.linalg.matrix_power(M, k) @ c for k in range(K))
    np.testing.assert_allclose(engine.adjoint(state), q, rtol=1e-9)
    left = np.linalg.norm(np.linalg.matrix_power(M, K) @ c) / np.linalg.norm(c)
    np.testing.assert_allclose(h.info.adjoint_residual, left, rtol=1e-9)


def test_the_truncation_for_a_target():
    case, rate = problems.make("quadratic"), 0.3
    solver = bl.GradientDescent(rate, max_steps=500)
    curvatures = np.linalg.eigvalsh(case.means[0])
    contraction = np.max(np.abs(1 - rate * curvatures))
    call = functools.partial(bl.truncation, of(case), case.lam, case.w)
    K = call(solver=solver, target=1e-4)  # Lanczos is exact in 6 dimensions
    assert contraction**K <= 1e-4 < contraction ** (K - 1)
    declared = of(case, constants=bl.Constants(curvatures[0] / 2, 0.0, 0.0, 2.0, 0.0))
    K = bl.truncation(declared, case.lam, case.w, solver=solver, target=1e-4)
    slow = 1 - rate * curvatures[0] / 2
    assert slow**K <= 1e-4 < slow ** (K - 1)
    assert call(solver=bl.GradientDescent(rate, max_steps=9), target=1e-4) == 9
    with pytest.raises(ValueError, match="do not contract"):
        call(solver=bl.GradientDescent(3.0))
    with pytest.raises(ValueError, match="momentum"):
        call(solver=bl.GradientDescent(0.1, momentum=0.5))
    with pytest.raises(ValueError, match="target"):
        call(target=1.0)


# Never silently wrong


def halves(early, late):
    """A training of 12 steps, each of which multiplies w and the adjoint by 1 - rate (curvature 1)."""
    inner = lambda w, lam, batch: 0.5 * jnp.sum((w - lam) ** 2)
    outer = lambda w, lam, batch: jnp.sum(w)
    rule = optax.sgd(lambda step: jnp.where(step < 6, early, late))
    solver = bl.OptaxSolver(rule, max_steps=12)
    return {"problem": bl.Problem(inner, outer), "lam": 1.3, "w": jnp.ones(2), "solver": solver}


@pytest.mark.parametrize(
    ("early", "late", "status"),
    [(1.7, 1.7, "OK"), (11.0, 0.9, "OK"), (0.9, 12.0, "DIVERGED"), (4.4, 4.4, "DIVERGED")],
)
def test_an_exploding_adjoint_is_diverged(early, late, status):
    """Wherever on its way back it exploded: growth in the late steps may be gone after the early ones."""
    case = halves(early, late)
    of_step = abs(1 - np.repeat([early, late], 6))
    way = np.cumprod(of_step[::-1])
    assert (np.max(way) > 1e6) == (status == "DIVERGED")
    for call in (
        lambda: bl.hypergradient(**case, engine=bl.Unrolled(estimate=False), throw=False),
        lambda: bl.replay(**case, block=4, arity=2, throw=False),
    ):
        info = call().info
        np.testing.assert_allclose(info.growth, way[-1], rtol=1e-10)
        np.testing.assert_allclose(info.peak_growth, np.max(way), rtol=1e-10)
        assert bl.Status(int(info.status)).name == status


def test_an_exploding_adjoint_is_told_with_its_growth_and_what_to_try():
    case = halves(0.9, 12.0)
    with pytest.raises(bl.BilevelError) as raised:
        bl.hypergradient(**case, engine=bl.Unrolled(estimate=False))
    for part in (
        "smaller learning rate",
        "truncate=K",
        "metasmoothness",
        "ES",
        "factor of 1.77e+06",
    ):
        assert part in str(raised.value)
    free = bl.hypergradient(**case, engine=bl.Unrolled(estimate=False, max_growth=np.inf))
    last = bl.hypergradient(**case, engine=bl.Unrolled(estimate=False, truncate=3))
    np.testing.assert_allclose(last.info.peak_growth, 11.0**3, rtol=1e-10)
    assert int(free.info.status) == int(last.info.status) == bl.Status.OK


# Memory
