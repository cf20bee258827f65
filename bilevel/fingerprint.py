"""What a problem computes, as digests: another program after a break is told."""

import hashlib
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import Array

from bilevel import transforms
from bilevel.tasks import Tasks
from solvers import tree
from solvers.types import Tree


def digests(problem: Any, w: Tree, lam: Tree, key: Array, scales: Any) -> dict[str, str]:
    """By name: losses and other functions of the problem, transform, and how rows and tasks are drawn.

    Of a function, its program at these shapes and the arrays that it closes over. The same in another process of
    the same version of JAX. What cannot be traced apart has none.
    """
    shared, one, data = problem, lambda _: problem, None
    if isinstance(problem, Tasks):
        first = lambda rows: jax.tree.map(lambda leaf: leaf[0], rows)
        shared, one = problem.problem, problem.task
        data, w = jax.eval_shape(first, (problem.task_data, w))
    batch = lambda: jax.eval_shape(lambda data: one(data).inner_sampler(key)(0), data)
    outer_batch = lambda: jax.eval_shape(lambda data: one(data).outer_batch(key), data)
    step = jax.ShapeDtypeStruct((), tree.accumulation_dtype(w))
    scaled = lambda x: (transforms.forward(scales, x), transforms.inverse(scales, x))
    functions: dict[str, tuple[Any, Callable[[], tuple]]] = {
        "inner loss": (shared.inner, lambda: (w, lam, batch())),
        "outer loss": (shared.outer, lambda: (w, lam, outer_batch())),
        "transform": (scaled, lambda: (lam,)),
    }
    others = {
        "inner_init": lambda: (lam, batch()),
        "inner_prox": lambda: (w, step, lam),
        "inner_penalty": lambda: (w, lam),
        "inequality": lambda: (w, lam),
        "equality": lambda: (w, lam),
        "joint_projection": lambda: (w, lam),
        "outer_projection": lambda: (lam,),
    }
    functions |= {name: (getattr(shared, name, None), args) for name, args in others.items()}
    found = {name: _of_function(function, args) for name, (function, args) in functions.items()}
    sizes = [getattr(problem, name, None) for name in ("batch_size", "same_rows", "per_step")]
    return {**{n: d for n, d in found.items() if d is not None}, "sampling": repr(sizes)}


def _of_function(function: Any, arguments: Callable[[], tuple]) -> str | None:
    if function is None:
        return "none"
    try:
        made = jax.make_jaxpr(lambda *args: function(*args))(*arguments())
    except Exception:  # of a problem of another kind: then nothing is compared
        return None
    digest = hashlib.blake2b(digest_size=16)
    # Functions that are named in it have addresses, and constants no values.
    digest.update(re.sub(r"0x[0-9a-f]+", "", str(made.jaxpr)).encode())
    for const in made.consts:
        if isinstance(const, jax.Array) and not const.is_fully_addressable:
            continue
        digest.update(np.asarray(const).tobytes())
    return digest.hexdigest()
