"""The driver: right optimum, one compile, chunks that change nothing, errors that teach."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest

import bilevel as bl
from bilevel import validation


def problem_of(case, **kwargs):
    return bl.Problem(case.inner, case.outer, case.inner_data, case.outer_data, **kwargs)


@pytest.mark.parametrize(
    ("engine", "tol"), [("implicit", 1e-3), ("unrolled", 1e-3), ("f2sa", 1e-2), ("moreau", 1e-2)]
)
def test_defaults_reach_the_optimum(engine, tol, seed):
    case = problems.make("quadratic", seed)
    result = bl.run(
        problem_of(case), case.lam, case.w, engine=engine, num_steps=3000, outer=optax.adam(3e-2)
    )
    best = case.optimum()
    assert np.linalg.norm(result.lam - best) < tol * np.linalg.norm(best)
    assert result.status == bl.Status.OK


@pytest.mark.parametrize(
    ("engine", "fixed_point"),
    [
        (bl.F2SA(nu=0.05, order=1), lambda case: case.penalised_optimum(20.0)),
        (bl.F2SA(nu=0.05, order=2), lambda case: case.central_optimum(0.05)),
        (bl.Moreau(c=20.0, gamma=3.0), lambda case: case.moreau_optimum(20.0, 3.0)),
    ],
    ids=["f2sa-1", "f2sa-2", "moreau"],
)
def test_constant_penalty_ends_at_its_own_fixed_point(engine, fixed_point, seed):
    case = problems.make("quadratic", seed)
    result = bl.run(
        problem_of(case),
        case.lam,
        case.w,
        engine=engine,
        num_steps=1500,
        outer=optax.sgd(0.2),
        solver=bl.LBFGS(300, tol=1e-11),
    )
    expected = fixed_point(case)
    np.testing.assert_allclose(result.lam, expected, rtol=1e-6)
    assert np.linalg.norm(expected - case.optimum()) > 1e-4  # its own, not the bilevel optimum


def test_chunks_and_resuming_change_no_bit(seed):
    case = problems.make("quadratic", seed)
    problem = problem_of(case, batch_size=(None, 3))
    run = lambda **kw: bl.run(problem, case.lam, case.w, key=jax.random.key(seed), **kw)
    whole, chunked = run(num_steps=11, chunk=11), run(num_steps=11, chunk=4)
    np.testing.assert_array_equal(whole.lam, chunked.lam)
    np.testing.assert_array_equal(whole.w, chunked.w)
    np.testing.assert_array_equal(whole.history.outer_value, chunked.history.outer_value)
    resumed = run(num_steps=5, chunk=4, state=run(num_steps=6, chunk=4).state)
    np.testing.assert_array_equal(whole.lam, resumed.lam)


def test_no_new_trace_for_numbers_rules_or_a_short_chunk(seed, count_traces):
    case = problems.make("quadratic", seed)
    inner, outer = count_traces(case.inner), count_traces(case.outer)
    problem = bl.Problem(inner, outer, case.inner_data, case.outer_data)
    bl.run(problem, case.lam, case.w, num_steps=4, chunk=4, outer=optax.adam(1e-2))
    counts = inner.count, outer.count
    bl.run(problem, 2 * case.lam, case.w, num_steps=7, chunk=4, outer=optax.adam(1e-2))
    assert (inner.count, outer.count) == counts


def test_transform_projection_schedule_best_and_history(seed):
    """Minimise (log w*)^2 + ... with w* = lam > 0: the natural scale stays positive."""
    inner = lambda w, lam, batch: 0.5 * (w - lam["a"]) ** 2
    outer = lambda w, lam, batch: (w - 0.2) ** 2
    problem = bl.Problem(inner, outer)
    result = bl.run(
        problem,
        {"a": 5.0},
        0.0,
        num_steps=400,
        outer=optax.adam(0.1, b2=0.9),
        transform={"a": bl.transforms.Exp()},
        engine=bl.F2SA(nu=bl.schedules.power(0.1, 0.5)),
    )
    assert abs(float(result.lam["a"]) - 0.2) < 1e-2
    assert result.history.outer_value.shape == (400,)
    assert float(result.best.outer_value) == result.history.outer_value.min()
    boxed = bl.Problem(inner, outer, outer_projection=lambda lam: {"a": jnp.maximum(lam["a"], 1.0)})
    assert float(bl.run(boxed, {"a": 5.0}, 0.0, num_steps=200).lam["a"]) == 1.0


def test_a_start_outside_of_the_projection_is_projected():
    """It might have the best value of all, and be no answer."""
    loss = lambda w, lam, batch: 0.5 * (w - lam) ** 2
    outer = lambda w, lam, batch: w**2
    problem = bl.Problem(loss, outer, outer_projection=lambda lam: jnp.maximum(lam, 1.0))
    result = bl.run(problem, 0.0, 0.0, num_steps=2, outer=optax.sgd(0.1))
    assert result.best.lam == result.lam == 1.0
    np.testing.assert_allclose(result.history.outer_value, 1.0, rtol=1e-5)


def test_failure_stops_and_moves_nothing(seed):
    """The outer loss is NaN below lam = 1: the run stops there with the last good lam."""
    inner = lambda w, lam, batch: 0.5 * (w - lam) ** 2
    outer = lambda w, lam, batch: jnp.sqrt(w - 1.0)
    problem = bl.Problem(inner, outer)
    result = bl.run(problem, 2.0, 0.0, num_steps=100, chunk=10, throw=False)
    assert result.status == bl.Status.NONFINITE and result.stopped == "status"
    assert np.isfinite(result.lam) and np.isfinite(result.best.outer_value)
    assert len(result.history.outer_value) < 100
    with pytest.raises(bl.BilevelError, match="NONFINITE") as error:
        bl.run(problem, 2.0, 0.0, num_steps=100, chunk=10)
    assert np.isfinite(error.value.outcome.lam)


def test_patience_tolerance_and_callback_stop(seed):
    case = problems.make("quadratic", seed)
    run = lambda **kw: bl.run(
        problem_of(case), case.lam, case.w, num_steps=1000, chunk=20, outer=optax.sgd(0.2), **kw
    )
    assert run(outer_tol=1e-3).stopped == "outer_tol"
    assert run(callback=lambda state, history: int(state.step) >= 40).stopped == "callback"
    # A single loop begins with an adjoint, and here a direction, of zero.
    first = {"num_steps": 2, "chunk": 1, "engine": bl.SOBA(step_size=1e-3), "throw": False}
    assert bl.run(problem_of(case), case.lam, case.w, **first).stopped == "num_steps"
    stopped = run(patience=50)
    assert stopped.stopped == "patience" and len(stopped.history.status) < 1000


GOOD = {"lam": jnp.ones(2), "w": jnp.zeros(3)}


def fit(w, lam, batch):
    return jnp.sum(w**2) * jnp.sum(lam)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"lam": jnp.arange(2)}, TypeError, "lam must be floating point"),
        ({"w": {"a": 1}}, TypeError, r"w\['a'\] must be a floating-point array"),
        ({"w": {}}, ValueError, "w holds no arrays"),
        ({"lam": jnp.zeros((0,))}, ValueError, "empty"),
        ({"engine": "implict"}, ValueError, "engine must be one of .*exact, f2sa"),
        ({"solver": "lbgfs"}, ValueError, "solver must be one of"),
        ({"solver": 3}, TypeError, "solver must be an inner solver"),
        ({"engine": "unrolled", "solver": "lbfgs"}, ValueError, "line search"),
        ({"problem": 1}, TypeError, "bilevel.Problem"),
        ({"problem": (lambda w, lam, batch: w, fit)}, ValueError, "inner loss must return"),
        ({"problem": (fit, lambda w, lam, batch: w @ lam)}, ValueError, "outer loss failed on"),
        ({"problem": (lambda w, lam: 0.0, fit)}, TypeError, r"must take \(w, lam, batch\)"),
        (
            {"solver": bl.LBFGS(tol=[1e-3, 1e-8])},
            ValueError,
            r"LBFGS\(tol=...\) must be one number",
        ),
        (
            {"engine": bl.Implicit(bl.CG(rtol=[0.1, 0.2]))},
            ValueError,
            r"CG\(rtol=...\) must be one",
        ),
        ({"engine": bl.Implicit(target=[0.1, 0.2])}, ValueError, r"\(target=...\) must be one"),
        (
            {"engine": "unrolled", "solver": lambda lam: bl.CG()},
            TypeError,
            r"solver\(lam\) must be an inner solver",
        ),
    ],
)
def test_bad_calls_are_refused(change, error, match):
    losses = change.pop("problem", (fit, fit))
    problem = bl.Problem(*losses) if isinstance(losses, tuple) else losses
    for call in (bl.hypergradient, bl.run):
        with pytest.raises(error, match=match):
            arguments = GOOD | change
            call(problem, arguments.pop("lam"), arguments.pop("w"), **arguments)


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: bl.Problem(1, fit), TypeError, r"Problem\(inner=...\) must be a function"),
        (lambda: bl.Problem(fit, fit, np.zeros((0, 3))), ValueError, "empty"),
        (lambda: bl.Problem(fit, fit, np.array(["a"])), TypeError, "numeric"),
        (lambda: bl.Problem(fit, fit, batch_size=2), ValueError, "no rows"),
        (lambda: bl.Problem(fit, fit, np.ones(3), np.ones(3), batch_size=4), ValueError, "larger"),
        (lambda: bl.Problem(fit, fit, np.ones(3), batch_size=(0, None)), ValueError, "at least 1"),
        (lambda: bl.Implicit(damping=-1.0), ValueError, r"Implicit\(damping=...\)"),
        (lambda: bl.Implicit(refine_rtol=0.0), ValueError, r"Implicit\(refine_rtol=...\)"),
        (lambda: bl.Implicit(refine_rtol="1"), ValueError, r"Implicit\(refine_rtol=...\)"),
        # No step of the correction, of which the estimate would say that it is exact.
        (lambda: bl.Implicit(refine_rtol=1.0), ValueError, r"Implicit\(refine_rtol=...\)"),
        (lambda: bl.Implicit("cg"), TypeError, "instance of AbstractLinearSolver, got 'cg'"),
        (
            lambda: bl.Problem(fit, fit, second_order="no"),
            TypeError,
            r"\(second_order=...\) must be",
        ),
        (lambda: bl.Implicit(estimate="no"), TypeError, "must be True or False"),
        (lambda: bl.Implicit(refine=None), TypeError, "must be True or False"),
        (lambda: bl.F2SA(nu=0.0), ValueError, r"F2SA\(nu=...\)"),
        (lambda: bl.LBFGS(max_steps=0), ValueError, r"LBFGS\(max_steps=...\)"),
        (lambda: bl.CG(rtol=float("nan")), ValueError, "NaN"),
        (lambda: bl.OptaxSolver(1), TypeError, "optax"),
        (lambda: bl.schedules.power(1.0, 0.5, offset=0.0), ValueError, "offset must be a positive"),
        (lambda: bl.schedules.geometric(1.0, -0.5), ValueError, "ratio must be a positive"),
    ],
)
def test_bad_settings_are_refused(make, error, match):
    with pytest.raises(error, match=match):
        make()


@pytest.mark.parametrize(
    ("part", "engine", "match"),
    [
        ({"inner_hvp": lambda w, lam, batch, v: jnp.sum(v)}, "implicit", "inner_hvp must take"),
        ({"inner_hvp": lambda w, lam, v: v}, "implicit", r"takes 3 positional arguments"),
        ({"inner_init": lambda lam, batch: jnp.zeros(4)}, "unrolled", "inner_init must take"),
        ({"inner_init": lambda lam, batch: jnp.zeros(3, "f4")}, "unrolled", r"got float32\[3\]"),
        ({"outer_projection": jnp.sum}, "implicit", r"return what is like lam, float64\[2\], got"),
        ({"outer_projection": lambda lam: lam.astype("f4")}, "implicit", r"got float32\[2\]"),
    ],
)
def test_functions_of_a_problem_give_what_is_like_their_variable(part, engine, match):
    """Else a scalar is spread over a whole Hessian-vector product or start, and a dtype is lost on the way."""
    with pytest.raises(ValueError, match=match):
        bl.run(bl.Problem(fit, fit, **part), jnp.ones(2), jnp.ones(3), engine=engine)


@pytest.mark.parametrize("outer_tol", [-1.0, float("nan"), float("inf"), "small", True, [1.0, 2.0]])
def test_bad_settings_of_a_run_are_refused_before_it(outer_tol):
    never = lambda w, lam, batch: pytest.fail("traced")
    with pytest.raises(ValueError, match="outer_tol must be a finite number of at least 0"):
        bl.run(bl.Problem(never, never), 1.0, 1.0, outer_tol=outer_tol)
    with pytest.raises(ValueError, match="time_limit must be a positive number of seconds"):
        bl.run(bl.Problem(never, never), 1.0, 1.0, time_limit=True)
    with pytest.raises(TypeError, match="callback must be a function or None"):
        bl.run(bl.Problem(never, never), 1.0, 1.0, callback=1)


@pytest.mark.parametrize(
    ("name", "value", "error", "calls"),
    [
        ("throw", "no", TypeError, (bl.hypergradient, bl.run, bl.run_population, bl.replay)),
        ("throw", 0, TypeError, (bl.hypergradient,)),
        ("resume", "yes", TypeError, (bl.run, bl.run_population)),
        ("progress", "loud", ValueError, (bl.run, bl.run_population)),
        ("progress", 1, ValueError, (bl.run,)),
        ("progress", "panel", ValueError, (bl.run_population,)),
    ],
)
def test_words_are_no_flags(name, value, error, calls):
    never = lambda w, lam, batch: pytest.fail("traced")
    for call in calls:
        with pytest.raises(error, match=f"{name} must be True"):
            call(bl.Problem(never, never), jnp.ones(2), 1.0, **{name: value})


def test_random_keys_among_the_data(tmp_path):
    noise = lambda key: jax.random.normal(key, (2,))
    inner = lambda w, lam, key: 0.5 * jnp.sum((w - lam) ** 2) + w @ noise(key)
    outer = lambda w, lam, batch: 0.5 * jnp.sum(w**2)
    key, lam = jax.random.key(3), jnp.ones(2)
    problem = bl.Problem(inner, outer, key)
    h = bl.hypergradient(problem, lam, jnp.zeros(2))
    np.testing.assert_allclose(h.grad, lam - noise(key), rtol=1e-6)
    to = {"outer": optax.sgd(0.5), "num_steps": 2, "checkpoint": tmp_path, "resume": True}
    result = bl.run(problem, lam, jnp.zeros(2), **to)
    np.testing.assert_allclose(result.lam - noise(key), h.grad / 4, rtol=1e-6)


def test_the_state_of_another_run_is_refused():
    run = lambda **kw: bl.run(bl.Problem(fit, fit), **(GOOD | {"num_steps": 0} | kw))
    state = run().state
    with pytest.raises(TypeError, match="state must be result.state"):
        run(state=run())
    for change in ({"retries": 1}, {"outer": optax.sgd(1.0)}, {"w": jnp.ones(2)}):
        with pytest.raises(ValueError, match="state is of another run: state.* is .* there and"):
            run(state=state, **change)


def test_throwing_inside_a_trace_names_the_way_out():
    with pytest.raises(TypeError, match="throw=False"):
        jax.jit(lambda lam: bl.hypergradient(bl.Problem(fit, fit), lam, jnp.zeros(3)).grad)(
            jnp.ones(2)
        )
    with pytest.raises(ValueError, match="domain"):
        bl.run(bl.Problem(fit, fit), -jnp.ones(2), jnp.ones(3), transform=bl.transforms.Exp())


def test_a_batch_of_tasks_is_the_same_rows_on_both_levels(seed):
    """The outer loss is zero only where its rows are those that the inner solve saw."""
    inner = lambda w, lam, rows: 0.5 * jnp.sum((w - rows - lam) ** 2)
    outer = lambda w, lam, rows: jnp.sum((w - rows) ** 2)
    rows = np.arange(50.0)
    keys = jax.random.split(jax.random.key(seed), 3)

    def seen(**kwargs):
        problem = bl.Problem(inner, outer, rows, rows, batch_size=4, **kwargs)
        return [bl.hypergradient(problem, 0.0, jnp.zeros(4), key=key) for key in keys]

    tied = seen(same_rows=True)
    np.testing.assert_allclose([h.info.outer_value for h in tied], 0, atol=1e-12)
    assert not np.allclose(tied[0].w, tied[1].w)  # another draw for another key
    assert min(float(h.info.outer_value) for h in seen()) > 1


@pytest.mark.parametrize(
    ("batch_size", "rows", "message"),
    [(None, 5, "one batch_size"), ((2, 3), 5, "one batch_size"), (2, 6, "got 5 and 6")],
)
def test_same_rows_needs_one_batch_size_and_as_many_rows(batch_size, rows, message):
    loss = lambda w, lam, batch: jnp.sum(w)
    with pytest.raises(ValueError, match=message):
        bl.Problem(loss, loss, np.ones(5), np.ones(rows), batch_size=batch_size, same_rows=True)


def test_the_start_may_be_left_to_inner_init():
    inner = lambda w, lam, batch: 0.5 * jnp.sum((w - 1) ** 2)
    outer = lambda w, lam, batch: 0.5 * jnp.sum((w - 3) ** 2)
    problem = bl.Problem(inner, outer, inner_init=lambda lam, batch: 2 * lam)
    settings = {"solver": bl.GradientDescent(0.5, max_steps=2), "engine": "unrolled"}
    h = bl.hypergradient(problem, jnp.ones(3), **settings)
    # Two steps of 1/2 from 2 lam: w = 1 + (2 lam - 1) / 4, so the gradient is (w - 3) / 2.
    np.testing.assert_allclose(h.w, 1.25)
    np.testing.assert_allclose(h.grad, (1.25 - 3) / 2)
    given = bl.hypergradient(problem, jnp.ones(3), jnp.zeros(3), **settings)
    np.testing.assert_array_equal(given.grad, h.grad)
    result = bl.run(problem, jnp.ones(3), num_steps=2, **settings)
    np.testing.assert_allclose(result.history.outer_value[0], h.info.outer_value)
    with pytest.raises(TypeError, match="w is missing"):
        bl.hypergradient(bl.Problem(inner, outer), jnp.ones(3))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize(
    ("transform", "length"), [("Sigmoid", 60), ("Exp", 900), ("Softplus", 900)]
)
def test_a_step_too_long_stays_inside_of_the_domain(transform, length, dtype):
    """0 and 1 have infinite unconstrained values, with zero derivatives: the run would stay there for good."""
    sign = 1 if transform == "Sigmoid" else -1
    inner = lambda w, lam, batch: 0.5 * (w - lam) ** 2
    outer = lambda w, lam, batch: 0.5 * (w - batch) ** 2
    start, target = jnp.asarray(0.5, dtype), jnp.asarray(0.5 + sign * 0.2, dtype)
    problem, scale = (
        bl.Problem(inner, outer, outer_data=target),
        getattr(bl.transforms, transform)(),
    )
    options = {"outer": optax.sign_sgd(length), "transform": scale, "throw": False}
    there, back = (
        bl.run(problem, start, jnp.zeros_like(start), num_steps=n, **options) for n in (1, 2)
    )
    low, high = scale.domain
    assert low < there.lam < high
    assert sign * (back.lam - start) < 0  # on the other side of the target


def test_no_program_is_compiled_beside_those_of_the_run(caplog):
    """NumPy arrays, numbers and the default key would each cost a program."""
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(13, 7)), rng.normal(size=13)

    def loss(w, lam, batch):
        X, y = batch
        return jnp.mean((X @ w - y) ** 2) + lam * jnp.sum(w**2)

    with jax.log_compiles(), caplog.at_level("WARNING"):
        problem = bl.Problem(loss, loss, (X, y), (X, y))
        engine, solver = bl.Implicit(estimate=False, damping=1e-3), bl.Newton(tol=1e-7)
        bl.run(problem, 0.3, np.zeros(7), num_steps=2, engine=engine, solver=solver)
    said = [record.message for record in caplog.records]
    names = [text.split()[4] for text in said if text.startswith("Finished XLA compilation of")]
    assert "jit(steps)" in names
    assert set(names) <= {"jit(steps)", "jit(_first_state)", "jit(<lambda>)"}


def test_the_default_key_is_that_of_seed_0():
    expected = jax.random.key(0)
    assert validation.key(None) == expected and validation.key(None).dtype == expected.dtype
    assert validation.key(jax.random.key(5)) == jax.random.key(5)
