"""Dynamic sampling (DAPO, arXiv 2503.14476, section 3.2): groups that teach nothing make room for groups of further prompts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from xomni_jax.rewards.combine import Combined
from xomni_jax.rl.advantages import flat_groups
from xomni_jax.rl.trajectory import Trajectory
from xomni_jax.sharding import abstract

Drawn = tuple[Trajectory, Combined, np.ndarray, Mapping[str, float]]  # what `Rollouts` returns


def refilled(
    again: Callable[[int], Drawn], budget: int, rows: Trajectory, total: Combined, measured: Mapping[str, float], mesh: Mesh
) -> tuple[Trajectory, Combined, dict[str, float]]:
    """Rollouts of which as many groups as possible have a spread of rewards.

    The statistics of `total` stay those of the first prompts: they tell how good the policy is, which chosen groups would not. Times and
    failures are added up.

    Args:
      again: draws a batch of the next prompts with the same policy; it is told which of at most `budget` batches this is, from 1.
      rows, total, measured: of the first prompts. mesh: where the rows of the result lie, refilled or not: the update is compiled once.
    """
    measured, P, batches, replaced = dict(measured), len(total.ok_PR), 0, 0
    rows = pick_groups(rows, rows, np.arange(P), mesh)
    while batches < budget and len(flat := np.flatnonzero(flat_groups(total.total_PR, total.ok_PR))):
        batches += 1
        other_rows, other, _, spent = again(batches)
        fresh = np.flatnonzero(~flat_groups(other.total_PR, other.ok_PR))[: len(flat)]
        source_P = np.arange(P)
        source_P[flat[: len(fresh)]] = P + fresh
        rows = pick_groups(rows, other_rows, source_P, mesh)
        pairs = {name: (getattr(total, name), getattr(other, name)) for name in ("total_PR", "ok_PR", "advantage_PR")}
        total = total._replace(**{name: np.concatenate(pair)[source_P] for name, pair in pairs.items() if pair[0] is not None})
        replaced += len(fresh)
        for name, value in spent.items():
            if name.startswith("perf/") or "/failed_" in name:
                measured[name] = measured.get(name, 0) + value
    return rows, total, measured | {"rollout/refills": batches, "rollout/replaced_frac": replaced / P}


def pick_groups(rows: Trajectory, others: Trajectory, source_P: np.ndarray, mesh: Mesh) -> Trajectory:
    """The groups `source_P` [P] of both, of which those from P on are of `others`, split over the mesh as batches are."""
    shardings = tuple(abstract.rows(mesh, x.shape, x.dtype).sharding for x in jax.tree.leaves(rows))
    return jax.tree.unflatten(jax.tree.structure(rows), _pick(rows, others, source_P, shardings))


@functools.partial(jax.jit, static_argnames="shardings")
def _pick(rows, others, source_P, shardings):
    def one(x, y):
        groups = jnp.concatenate([a.reshape(len(source_P), -1, *a.shape[1:]) for a in (x, y)])
        return groups[source_P].reshape(x.shape)

    picked = jax.tree.leaves(jax.tree.map(one, rows, others))
    return [jax.lax.with_sharding_constraint(x, sharding) for x, sharding in zip(picked, shardings, strict=True)]
