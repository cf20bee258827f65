"""The derivative through all steps of training: time and memory by what is stored.

A 64-128-10 network on digits, batches of 128, gradient descent with momentum, 6 outer variables: learning
rate, momentum, and a decay for each weight and bias. The library's settings, forward mode, and the same
training written by hand in JAX, and where they are given by PyTorch's autograd, by hand and by TorchOpt's `MetaSGD`
(which differentiates the decays only; memory: growth of the process). "less
work" is one fixed batch without momentum: jaxopt's unrolled gradient descent, where it is given optimistix's with
recursive checkpointing, and ours for the same. Then 100,000 steps of a small model.

    python benchmarks/w3.py [--peers DIRECTORY ...] [--repeats 7] [--steps 1000]
        [--out benchmarks/results/w3_cpu.json]
"""

import argparse
import functools
import importlib.util
import resource
import sys
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import bilevel as bl

BATCH = 128
LAM = {
    "rate": jnp.float32(0.1),
    "momentum": jnp.float32(0.9),
    "decay": {"W1": 1e-4, "b1": 1e-4, "W2": 1e-4, "b2": 1e-4},
}
LAM = jax.tree.map(jnp.float32, LAM)


def cross_entropy(w, batch):
    X, y = batch
    logits = jax.nn.relu(X @ w["W1"] + w["b1"]) @ w["W2"] + w["b2"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def inner(w, lam, batch):
    parts = jax.tree.map(lambda decay, leaf: decay * jnp.sum(leaf**2), lam["decay"], w)
    return cross_entropy(w, batch) + 0.5 * sum(jax.tree.leaves(parts))


def outer(w, lam, batch):
    return cross_entropy(w, batch)


def by_hand(problem, w, key, steps, levels, at_once=False):
    """The gradient of training without the library; levels: scan, each step, or sqrt(T) and each step.

    `at_once`: the row numbers of all batches are drawn before the training, not each step's in its turn.
    """
    sampler, validation = problem.inner_sampler(key), problem.outer_batch(key)
    draw = sampler.draw if at_once else sampler

    def step(carry, index, lam):
        w, m = carry
        g = jax.grad(inner)(w, lam, draw(index))
        m = jax.tree.map(lambda a, b: lam["momentum"] * a + b, m, g)
        return (jax.tree.map(lambda a, b: a - lam["rate"] * b, w, m), m), None

    def trained(lam):
        one = lambda carry, index: step(carry, index, lam)
        if levels:
            one = jax.checkpoint(one, prevent_cse=False)
        carry, indices = (w, jax.tree.map(jnp.zeros_like, w)), jnp.arange(steps)
        if at_once:
            indices = jax.vmap(sampler.plan)(indices)
        if levels == 2:
            length = round(steps**0.5)
            whole = steps - steps % length
            block = jax.checkpoint(lambda c, i: jax.lax.scan(one, c, i), prevent_cse=False)
            carry, _ = jax.lax.scan(
                block, carry, indices[:whole].reshape(-1, length, *indices.shape[1:])
            )
            indices = indices[whole:]
        carry, _ = jax.lax.scan(one, carry, indices)
        return outer(carry[0], lam, validation)

    return jax.jit(jax.grad(trained))


def jaxopt_unrolled(problem, w, steps):
    """The same network and decays by jaxopt: fixed batch, no momentum, stored scan."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import jaxopt
    batch = tuple(leaf[:BATCH] for leaf in problem.inner_data)

    def trained(lam):
        solver = jaxopt.GradientDescent(
            lambda w, lam: inner(w, lam, batch),
            maxiter=steps,
            tol=0.0,
            stepsize=0.1,
            acceleration=False,
            implicit_diff=False,
            unroll=True,
            jit=True,
        )
        return outer(solver.run(w, lam).params, lam, problem.outer_data)

    return jax.jit(jax.grad(trained))


def optimistix_unrolled(problem, w, steps):
    """The same network and decays by optimistix, recursive checkpointing: fixed batch, no momentum."""
    import optimistix

    batch = tuple(leaf[:BATCH] for leaf in problem.inner_data)
    solver = optimistix.GradientDescent(learning_rate=0.1, rtol=0.0, atol=0.0)
    adjoint = optimistix.RecursiveCheckpointAdjoint()

    def trained(lam):
        found = optimistix.minimise(
            lambda w, lam: inner(w, lam, batch),
            *(solver, w, lam),
            max_steps=steps,
            adjoint=adjoint,
            throw=False,
        )
        return outer(found.value, lam, problem.outer_data)

    return jax.jit(jax.grad(trained))


class _TorchCase(NamedTuple):
    """The training's batches, validation rows and start as tensors."""

    X: Any
    y: Any
    val: tuple[Any, Any]
    start: dict[str, Any]


def torch_case(problem, w, key, steps) -> _TorchCase:
    import torch

    sampler = problem.inner_sampler(key)
    drawn = jax.jit(jax.vmap(sampler))(jnp.arange(steps))
    X, y = (torch.tensor(np.asarray(leaf)) for leaf in drawn)
    val_X, val_y = (torch.tensor(np.asarray(leaf)) for leaf in problem.outer_data)
    start = {name: torch.tensor(np.asarray(leaf)) for name, leaf in w.items()}
    return _TorchCase(X, y.long(), (val_X, val_y.long()), start)


def torch_loss(w, X, y):
    import torch

    logits = torch.relu(X @ w["W1"] + w["b1"]) @ w["W2"] + w["b2"]
    return torch.nn.functional.cross_entropy(logits, y)


def torchopt_meta(case: _TorchCase):
    """The same by TorchOpt's differentiable optimiser, in the decays alone."""
    import torch
    import torchopt

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for name, x in case.start.items():
                self.register_parameter(name, torch.nn.Parameter(x.clone()))

        def forward(self, X, y):
            return torch_loss({name: getattr(self, name) for name in case.start}, X, y)

    def call():
        decay = {
            name: torch.tensor(float(x), requires_grad=True) for name, x in LAM["decay"].items()
        }
        net = Network()
        rule = torchopt.MetaSGD(net, lr=float(LAM["rate"]), momentum=float(LAM["momentum"]))
        for X, y in zip(case.X, case.y, strict=True):
            penalty = sum(decay[name] * (getattr(net, name) ** 2).sum() for name in decay)
            rule.step(net(X, y) + 0.5 * penalty)
        found = torch.autograd.grad(net(*case.val), [decay[name] for name in sorted(decay)])
        return [jnp.asarray(g.item()) for g in found]

    return call


def torch_by_hand(case: _TorchCase):
    """The same training on the same batches by PyTorch, its graph kept."""
    import torch

    X, y, val, start = case

    def call():
        leaf = lambda x: torch.tensor(float(x), requires_grad=True)
        rate, momentum = leaf(LAM["rate"]), leaf(LAM["momentum"])
        decay = {name: leaf(x) for name, x in LAM["decay"].items()}
        w = {name: x.clone().requires_grad_() for name, x in start.items()}
        m = {name: torch.zeros_like(x) for name, x in w.items()}
        for i in range(len(X)):
            penalty = sum(decay[name] * (w[name] ** 2).sum() for name in w)
            value = torch_loss(w, X[i], y[i]) + 0.5 * penalty
            grads = torch.autograd.grad(value, list(w.values()), create_graph=True)
            m = {name: momentum * m[name] + g for name, g in zip(w, grads, strict=True)}
            w = {name: w[name] - rate * m[name] for name in w}
        leaves = [decay[name] for name in sorted(decay)] + [momentum, rate]
        found = torch.autograd.grad(torch_loss(w, *val), leaves)
        return [jnp.asarray(g.item()) for g in found]  # in the order of jax.tree.leaves(LAM)

    return call


def process_growth(call) -> int:
    """Bytes that the process's peak grows by in a call: a lower bound where it had been higher before."""
    peak = lambda: 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    before = peak()
    call()
    return peak() - before


def long_run(steps):
    """One derivative through `steps` steps of a softmax regression, and the growth of the process."""
    X, y = load_digits(return_X_y=True)
    data = (jnp.asarray(X[:100] / 16, jnp.float32), jnp.asarray(y[:100]))

    def loss(w, lam, batch):
        X, y = batch
        fit = optax.softmax_cross_entropy_with_integer_labels(X @ w, y).mean()
        return fit + 0.5 * lam * jnp.sum(w**2)

    problem = bl.Problem(loss, loss, data, data, batch_size=(8, None))
    solver = bl.GradientDescent(0.05, momentum=0.5, max_steps=steps)
    args = problem, jnp.float32(1e-3), jnp.zeros((64, 10), jnp.float32)
    engine = bl.Unrolled(levels=3, estimate=False)
    memory = bl.memory(*args, solver=solver, engine=engine)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    h = jax.block_until_ready(bl.hypergradient(*args, solver=solver, engine=engine))
    seconds = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "steps": steps,
        "levels": 3,
        "seconds": seconds,
        "predicted_peak_bytes": memory.peak,
        "process_peak_bytes": 1024 * after,
        "process_growth_bytes": 1024 * (after - before),
        "grad": float(h.grad),
        "status": bl.Status(int(h.info.status)).name,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument(
        "--peers", type=Path, nargs="+", default=[], help="directories of optimistix and torch"
    )
    parser.add_argument("--long", type=int, default=100_000)
    default = Path(__file__).parent / "results" / f"w3_{jax.default_backend()}.json"
    parser.add_argument("--out", type=Path, default=default)
    args = parser.parse_args()
    sys.path.extend(map(str, args.peers))

    rng = np.random.default_rng(0)
    X, y = load_digits(return_X_y=True)
    X, y = np.float32(X / 16), np.int32(y)
    problem = bl.Problem(
        inner, outer, (X[:1200], y[:1200]), (X[1200:], y[1200:]), batch_size=(BATCH, None)
    )
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape) / shape[0] ** 0.5, jnp.float32)
    w = {"W1": normal(64, 128), "b1": jnp.zeros(128, jnp.float32)}
    w |= {"W2": normal(128, 10), "b2": jnp.zeros(10, jnp.float32)}
    key = jax.random.key(0)

    def solver(lam):
        return bl.GradientDescent(lam["rate"], momentum=lam["momentum"], max_steps=args.steps)

    programs, memory = {}, {}
    if importlib.util.find_spec("torch"):
        # First, while the process is small, so that its growth is that of the graph.
        case = torch_case(problem, w, key, args.steps)
        programs["torch, by hand"] = torch_by_hand(case)
        memory["torch, by hand"] = process_growth(programs["torch, by hand"])
        if importlib.util.find_spec("torchopt"):
            programs["torchopt (decays)"] = torchopt_meta(case)  # its growth would be hidden
    hands = {"scan": (0, False), "each step": (1, False), "sqrt and step": (2, False)}
    for name, options in (hands | {"sqrt, rows at once": (2, True)}).items():
        grad = by_hand(problem, w, key, args.steps, *options)
        compiled = grad.lower(LAM).compile()
        programs[f"hand: {name}"] = functools.partial(compiled, LAM)
        memory[f"hand: {name}"] = compiled.memory_analysis().temp_size_in_bytes
    engines = {
        "levels=1": bl.Unrolled(levels=1, estimate=False),
        "levels=2 (default)": bl.Unrolled(estimate=False),
        "levels=3": bl.Unrolled(levels=3, estimate=False),
        "forward": bl.Forward(estimate=False),
    }
    for name, engine in engines.items():
        options = {"solver": solver, "engine": engine, "key": key}
        memory[name] = bl.memory(problem, LAM, w, **options).temporary
        programs[name] = lambda o=options: bl.hypergradient(problem, LAM, w, **o, throw=False).grad
    fixed = bl.Problem(
        inner, outer, tuple(leaf[:BATCH] for leaf in problem.inner_data), problem.outer_data
    )
    short = bl.GradientDescent(0.1, max_steps=args.steps, tol=0.0)
    for levels in (1, 2):
        name, engine = f"levels={levels} (less work)", bl.Unrolled(levels=levels, estimate=False)
        options = {"solver": short, "engine": engine}
        memory[name] = bl.memory(fixed, LAM, w, **options).temporary
        programs[name] = lambda o=options: bl.hypergradient(fixed, LAM, w, **o, throw=False).grad
    compiled = jaxopt_unrolled(problem, w, args.steps).lower(LAM).compile()
    programs["jaxopt (less work)"] = functools.partial(compiled, LAM)
    memory["jaxopt (less work)"] = compiled.memory_analysis().temp_size_in_bytes

    if importlib.util.find_spec("optimistix"):
        compiled = optimistix_unrolled(problem, w, args.steps).lower(LAM).compile()
        programs["optimistix (less work)"] = functools.partial(compiled, LAM)
        memory["optimistix (less work)"] = compiled.memory_analysis().temp_size_in_bytes

    reference = jax.tree.leaves(programs["hand: scan"]())
    off = {}

    def check(name, grad):
        if name.endswith("(less work)"):
            return
        found = jax.tree.leaves(grad)  # the decays come first
        pairs = zip(found, reference[: len(found)], strict=True)
        off[name] = max(float(abs(a - b) / abs(b)) for a, b in pairs)
        assert off[name] < 0.02, (name, off[name])

    timings = harness.compare(programs, args.repeats, check=check)
    columns = {"MB": {name: f"{count / 1e6:.1f}" for name, count in memory.items()}}
    print(harness.table(timings, "hand: scan", columns))
    record = {
        "steps": args.steps,
        "temporary_bytes": memory,
        "relative_difference_from_scan": off,
        "timings": timings,
        "time_over_scan": harness.ratios(timings, "hand: scan"),
        "scan_memory_over_default": memory["hand: scan"] / memory["levels=2 (default)"],
        "long": long_run(args.long),
    }
    print(f"memory of the scan over the default's: {record['scan_memory_over_default']:.0f}")
    print(record["long"])
    harness.write(args.out, record)


if __name__ == "__main__":
    main()
