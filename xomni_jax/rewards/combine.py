"""Combination of several rewards into one per rollout, in numpy on the host. P prompts, R rollouts per prompt.

X-Omni (arXiv 2507.22058, section 3.3) takes a weighted sum and does not publish its weights.

A value may be missing for two reasons. *Absent*: the reward does not apply to the prompt (OCR without a text). It adds nothing, which
is harmless because it holds for the whole group. *Failed*: the reward applies, but the image could not be scored. The rollout is
masked out of its group, since a sum that lacks a term cannot be compared with the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from xomni_jax.rewards.protocol import Score

MODES = ("sum_then_normalize", "normalize_then_sum", "normalize_each")


class Column(NamedTuple):
    """One reward of every rollout: `value_PR` is NaN where the reward is absent or failed, `failed_PR` tells which."""

    value_PR: np.ndarray
    failed_PR: np.ndarray


class Combined(NamedTuple):
    """One value per rollout.

    Attributes:
      total_PR: weighted sum, NaN where not ok.
      ok_PR: whether the rollout takes part in its group.
      advantage_PR: in the modes that normalise each reward, else None; 0 where not ok.
      stats: reward/<name>/{mean, std (inside groups, averaged), fail_frac, applies_frac}, reward/total/{mean, std},
        reward/masked_frac; without those that have no value.
    """

    total_PR: np.ndarray
    ok_PR: np.ndarray
    advantage_PR: np.ndarray | None
    stats: dict[str, float]


def column(scores: Sequence[Score], prompts: int) -> Column:
    """The scores of a batch, rollouts of one prompt side by side, as [P, R].

    A reward that is absent for a part of a group only counts as failed there: as 0 in the sum it would punish those rollouts.
    """
    value_PR = np.array([np.nan if s.value is None else s.value for s in scores], np.float64).reshape(prompts, -1)
    applies_P1 = np.array([s.applies for s in scores]).reshape(prompts, -1).any(-1, keepdims=True)
    return Column(value_PR, applies_P1 & np.isnan(value_PR))


def smallest(columns: Sequence[Column]) -> Column:
    """The smallest value of several rewards, of those that apply; failed where one of them is."""
    failed_PR = np.any([c.failed_PR for c in columns], axis=0)
    return Column(np.where(failed_PR, np.nan, np.fmin.reduce([c.value_PR for c in columns])), failed_PR)


def combine(
    rewards: Mapping[str, Column],
    weights: Mapping[str, float | np.ndarray],
    mode: str = "sum_then_normalize",
    *,
    minimum: Mapping[str, Sequence[str]] = MappingProxyType({}),
    ddof: int = 1,
    eps: float = 1e-4,
) -> Combined:
    """One number per rollout from named rewards of one shape [P, R] and their weights, of which at least one is not 0.

    A weight is a number, or one for each prompt [P, 1]: rewards of weight 0 for a prompt do not apply to it. `minimum` names rewards
    beside which a reward counts as the smallest of all: two recognisers are harder to please than one.

    sum_then_normalize   total = sum_k w_k r_k, to be normalised in its group afterwards (TRL's default)
    normalize_then_sum   every reward is normalised in its group, then the weighted sum over the whole batch: a weight means the same
                         whatever the scale of its reward
    normalize_each       the same without the last normalisation: the sum of separate advantages (arXiv 2603.23086), each with its weight

    A rollout with a failed reward, or with none that applies, is not ok. A reward of weight 0 is only reported; its failures mask
    nothing.
    """
    counted = {k: smallest([rewards[k], *(rewards[other] for other in minimum.get(k, ()))]) for k in rewards if np.any(weights[k])}
    known = {k: np.isfinite(c.value_PR) & (weights[k] != 0) for k, c in counted.items()}
    failed_PR = np.any([c.failed_PR & (weights[k] != 0) for k, c in counted.items()], axis=0)
    ok_PR = np.any(list(known.values()), axis=0) & ~failed_PR
    total_PR = sum(weights[k] * np.where(known[k], c.value_PR, 0.0) for k, c in counted.items())
    total_PR = np.where(ok_PR, total_PR, np.nan)
    advantage_PR = None
    if mode != "sum_then_normalize":
        advantage_PR = sum(weights[k] * standardise(c.value_PR, ok_PR & known[k], -1, ddof, eps) for k, c in counted.items())
        if mode == "normalize_then_sum":
            advantage_PR = standardise(advantage_PR, ok_PR, None, ddof, eps)
    stats = {f"reward/{k}/{name}": v for k, c in rewards.items() for name, v in _column_stats(c).items()}
    stats |= {
        "reward/total/mean": _mean(total_PR),
        "reward/total/std": _group_std(total_PR),
        "reward/masked_frac": float(1 - ok_PR.mean()),
    }
    return Combined(total_PR, ok_PR, advantage_PR, {k: v for k, v in stats.items() if np.isfinite(v)})


def source_means(sources: Sequence[str | None], rewards: Mapping[str, Column], combined: Combined) -> dict[str, float]:
    """The means over the prompts of each source, reward/<name or total>/mean/<source>, without those that have no value."""
    table = {name: c.value_PR for name, c in rewards.items()} | {"total": combined.total_PR}
    rows = {source: [n for n, s in enumerate(sources) if s == source] for source in set(sources) - {None}}
    means = {f"reward/{name}/mean/{source}": _mean(x_PR[own]) for source, own in rows.items() for name, x_PR in table.items()}
    return {name: mean for name, mean in means.items() if np.isfinite(mean)}


def standardise(x_PR: np.ndarray, ok_PR: np.ndarray, axis: int | None, ddof: int = 1, eps: float = 1e-4) -> np.ndarray:
    """(x - mean) / (std + eps) over the ok entries along `axis` (None: all); 0 where not ok and where fewer than two are."""
    dev_PR, std, n = deviations(x_PR, ok_PR, axis, ddof)
    return np.where(n > 1, dev_PR / (std + eps), 0.0)


def deviations(x_PR: Any, ok_PR: Any, axis: int | None, ddof: int) -> tuple[Any, Any, Any]:
    """(x - mean, standard deviation, number) of the ok entries along `axis` (None: all), in numpy or in JAX; x - mean is 0 where not ok."""
    xp = x_PR.__array_namespace__()
    n = ok_PR.sum(axis=axis, keepdims=True)
    mean = xp.where(ok_PR, x_PR, 0.0).sum(axis=axis, keepdims=True) / xp.maximum(n, 1)
    dev_PR = xp.where(ok_PR, x_PR - mean, 0.0)
    return dev_PR, xp.sqrt((dev_PR**2).sum(axis=axis, keepdims=True) / xp.maximum(n - ddof, 1)), n


def _column_stats(c: Column) -> dict[str, float]:
    known_PR = np.isfinite(c.value_PR)
    applies = int((known_PR | c.failed_PR).sum())
    return {
        "mean": _mean(c.value_PR),
        "std": _group_std(c.value_PR),
        "fail_frac": float(c.failed_PR.sum() / max(applies, 1)),
        "applies_frac": applies / c.value_PR.size,
    }


def _mean(x_PR: np.ndarray) -> float:
    known = x_PR[np.isfinite(x_PR)]
    return float(known.mean()) if known.size else float("nan")


def _group_std(x_PR: np.ndarray) -> float:
    """Mean over groups of the deviation inside each: what GRPO can learn from."""
    groups = [row[np.isfinite(row)] for row in x_PR]
    stds = [g.std(ddof=1) for g in groups if g.size > 1]
    return float(np.mean(stds)) if stds else float("nan")
