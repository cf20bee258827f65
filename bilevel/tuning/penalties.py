"""Many penalties from few numbers: two statistics of each feature, groups, or one penalty each.

Searched freely, one penalty per feature fits the noise of the held-out rows. Here the log-penalties are
linear in a few numbers, and a weak prior on those is worth as much as a few rows.
"""

import jax.numpy as jnp
import numpy as np

from bilevel.tuning.models import Rule
from bilevel.tuning.scaling import mean_and_scale

EXPONENT_BOUNDS = ((0.0, 3.0), (0.0, 2.0))
"""Of the score statistic and of the ridge statistic."""


def score_statistic(X: np.ndarray, y: np.ndarray) -> np.ndarray:
    """How strongly each feature alone speaks about the target: (n, d), (n, C) -> (d,).

    `t_j = n mean_k cov(x_j, y_k)^2 / (var x_j var y_k)`, the score test of `w_j = 0` at the model with an
    intercept alone; mean 1 for a feature of pure noise, 0 here for a constant one.
    """
    n = len(X)
    X, y = ((a - mean) / scale for a, (mean, scale) in ((a, mean_and_scale(a)) for a in (X, y)))
    return n * np.square(X.T @ y / n).mean(axis=1)


def ridge_statistic(coef: np.ndarray) -> np.ndarray:
    """`u_j = sum_k coef_jk^2` of the pilot fit: (d, C) -> (d,)."""
    return np.square(coef).sum(axis=1)


def relative_penalties(score: np.ndarray, ridge: np.ndarray) -> np.ndarray:
    """The two rows that exponents multiply, (2, d), centred over features.

    `s1 = -(q1 - mean q1)`, `q1 = log(1 + t)`; `s2` likewise with `q2 = log(u / mean u + 0.01)`.
    """
    mean = ridge.mean()
    q = np.stack([np.log1p(score), np.log((ridge / mean if mean > 0 else 1.0) + 0.01 + 0 * ridge)])
    return q.mean(axis=1, keepdims=True) - q


def fixed(penalty: float | np.ndarray, num_features: int) -> Rule:
    """Given penalties, a number or (d,), for one fold at `theta = [1]`; no prior."""
    log_penalty = np.broadcast_to(np.log(penalty), (num_features,))
    return _rule(log_penalty[None, None, :], np.ones(1), np.zeros((1, 1)), 0.0, 1)


def single(num_features: int, num_rows: int) -> Rule:
    """One penalty, without a prior."""
    return make_rule("single", np.zeros((1, 2, num_features)), None, 0.0, num_rows)


def line(rule: Rule) -> np.ndarray:
    """The direction of theta along which the level rises, and nothing else: `level @ line = 1`, (p,)."""
    level = np.asarray(rule.level)
    return level / (level @ level)


def at(theta: np.ndarray, rule: Rule) -> np.ndarray:
    """Penalties on the host, (K, d) or (1, d)."""
    return np.exp(theta @ np.asarray(rule.design))


def make_rule(
    kind: str, relative: np.ndarray, group: np.ndarray | None, weight: float, num_rows: int
) -> Rule:
    """The rule of one of `options.PENALTIES`; what it does not need is ignored.

    Args:
      relative: (K, 2, d), `relative_penalties` of each fold's training part.
      group: (d,), the number of each feature's group.
      weight: of the prior, the loss that one unit of log-likelihood is worth.
    """
    d = relative.shape[2]
    if kind == "single":
        return _rule(np.ones((1, 1, d)), np.ones(1), np.zeros((1, 1)), weight, num_rows)
    if kind == "per-feature":
        # log lam_kj = a + b1 s1_kj + b2 s2_kj, b ~ N(0, 1/4)
        design = np.concatenate([np.ones_like(relative[:, :1]), relative], axis=1)
        return _rule(design, np.array([1.0, 0, 0]), np.diag([0.0, 4, 4]), weight, num_rows)
    # log lam_j = theta_g(j), each with standard deviation 2 around their free mean where there are groups
    group = np.arange(d) if group is None else group
    count = int(group.max()) + 1
    precision = 0.0 if kind == "free" else 0.25
    return _rule(
        np.eye(count)[:, group][None],
        np.full(count, 1 / count),
        precision * (np.eye(count) - 1 / count),
        weight,
        num_rows,
    )


def _rule(
    design: np.ndarray, level: np.ndarray, precision: np.ndarray, weight: float, num_rows: int
) -> Rule:
    numbers = (design, level, precision, weight, np.log(num_rows))
    return Rule(*(jnp.asarray(number, float) for number in numbers))
