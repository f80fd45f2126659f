"""Combination of several rewards into one per rollout, in numpy on the host. P prompts, R rollouts per prompt.

X-Omni (arXiv 2507.22058, section 3.3) takes a weighted sum and does not publish its weights.

A value may be missing for two reasons. *Absent*: the reward does not apply to the prompt (OCR without a text). It adds nothing, which
is harmless because it holds for the whole group. *Failed*: the reward applies, but the image could not be scored. The rollout is
masked out of its group, since a sum that lacks a term cannot be compared with the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from xomni_jax.rewards.protocol import Score

MODES = ("sum_then_normalize", "normalize_then_sum")


class Column(NamedTuple):
    """One reward for every rollout: `value_PR` with NaN where absent or failed, `failed_PR` telling the two apart."""

    value_PR: np.ndarray
    failed_PR: np.ndarray


class Combined(NamedTuple):
    """`total_PR`: weighted sum, NaN where not ok. `advantage_PR`: of normalize_then_sum, else None."""

    total_PR: np.ndarray
    ok_PR: np.ndarray
    advantage_PR: np.ndarray | None
    stats: dict[str, float]


def column(scores: Sequence[Score], prompts: int) -> Column:
    """A client's answers, rollouts of one prompt next to each other, as [P, R].

    A reward absent for a part of a group only is a failure there: as zero in the sum it would punish that rollout for its scorer.
    """
    if not scores or len(scores) % prompts:
        raise ValueError(f"{len(scores)} scores do not divide over {prompts} prompts; give every prompt the same number of rollouts")
    value_PR = np.array([np.nan if s.value is None else s.value for s in scores], np.float64).reshape(prompts, -1)
    failed_PR = np.array([s.failed for s in scores]).reshape(prompts, -1)
    applies_P1 = (np.isfinite(value_PR) | failed_PR).any(-1, keepdims=True)
    return Column(value_PR, failed_PR | (applies_P1 & ~np.isfinite(value_PR)))


def combine(
    rewards: Mapping[str, Column],
    weights: Mapping[str, float],
    mode: str = "sum_then_normalize",
    *,
    ddof: int = 1,
    eps: float = 1e-4,
) -> Combined:
    """One number per rollout from named columns. ValueError for an unknown mode, a missing weight or unequal shapes.

    sum_then_normalize   total = sum_k w_k r_k, to be normalised in its group afterwards (TRL's default)
    normalize_then_sum   every reward normalised in its group first, then the weighted sum, then once more over the whole batch:
                         weights mean the same whatever a reward's scale

    A rollout with a failed reward, or with none that applies, is not ok: NaN in total, 0 in advantage, in no mean.
    A reward of weight 0 is only reported; its failures mask nothing.
    Stats: reward/<name>/{mean, std (inside groups, averaged), fail_frac, applies_frac}, reward/total/{mean, std},
    reward/masked_frac; those without any value are left out.
    """
    _check(rewards, weights, mode)
    counted = [k for k in rewards if weights[k]]
    shape = next(iter(rewards.values())).value_PR.shape
    some_PR, failed_PR, total_PR = np.zeros(shape, bool), np.zeros(shape, bool), np.zeros(shape)
    for k in counted:
        known_PR = np.isfinite(rewards[k].value_PR)
        some_PR |= known_PR
        failed_PR |= rewards[k].failed_PR
        total_PR += weights[k] * np.where(known_PR, rewards[k].value_PR, 0.0)
    ok_PR = some_PR & ~failed_PR
    advantage_PR = None
    if mode == "normalize_then_sum":
        sum_PR = np.zeros(shape)
        for k in counted:
            sum_PR += weights[k] * standardise(rewards[k].value_PR, ok_PR & np.isfinite(rewards[k].value_PR), -1, ddof, eps)
        advantage_PR = standardise(sum_PR, ok_PR, None, ddof, eps)
    total_PR = np.where(ok_PR, total_PR, np.nan)
    stats = {f"reward/{k}/{name}": v for k, c in rewards.items() for name, v in _column_stats(c).items()}
    stats |= {
        "reward/total/mean": _mean(total_PR),
        "reward/total/std": _group_std(total_PR),
        "reward/masked_frac": float(1 - ok_PR.mean()),
    }
    return Combined(total_PR, ok_PR, advantage_PR, {k: v for k, v in stats.items() if np.isfinite(v)})


def standardise(x_PR: np.ndarray, ok_PR: np.ndarray, axis: int | None, ddof: int = 1, eps: float = 1e-4) -> np.ndarray:
    """(x - mean) / (std + eps) over the ok entries along `axis` (None: all); 0 where not ok and where fewer than two are."""
    n = ok_PR.sum(axis, keepdims=True)
    mean = np.where(ok_PR, x_PR, 0.0).sum(axis, keepdims=True) / np.maximum(n, 1)
    dev_PR = np.where(ok_PR, x_PR - mean, 0.0)
    std = np.sqrt((dev_PR**2).sum(axis, keepdims=True) / np.maximum(n - ddof, 1))
    return np.where(n > 1, dev_PR / (std + eps), 0.0)


def _check(rewards: Mapping[str, Column], weights: Mapping[str, float], mode: str) -> None:
    if mode not in MODES:
        raise ValueError(f"reward combination {mode!r} is unknown; choose {' or '.join(MODES)}")
    if not rewards or set(rewards) != set(weights):
        raise ValueError(f"rewards {sorted(rewards)} and weights {sorted(weights)} must have the same names; give every reward a weight")
    if not any(weights.values()) or not all(np.isfinite(w) for w in weights.values()):
        raise ValueError(f"reward weights {dict(weights)} must be finite and not all zero")
    shapes = {k: (c.value_PR.shape, c.failed_PR.shape) for k, c in rewards.items()}
    if len({s for pair in shapes.values() for s in pair}) != 1:
        raise ValueError(f"rewards must all be of one shape [P, R], got {shapes}")


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
