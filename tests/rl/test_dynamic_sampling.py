"""Groups without a spread of rewards make room for others, up to a budget."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xomni_jax.rewards.combine import Combined
from xomni_jax.rl.dynamic_sampling import refilled
from xomni_jax.rl.trajectory import Trajectory
from xomni_jax.sampling.logits import SamplingConfig
from xomni_jax.sampling.segments import Segment, image_spec
from xomni_jax.sharding.mesh import make_mesh

P, R, T = 4, 2, 3


def drawn(number, rewards, spent=None):
    """A batch whose codes tell which batch and rollout they are of."""
    total_PR = np.array(rewards, float)
    row_B = 100 * number + jnp.arange(P * R)
    codes_BT = row_B[:, None] * jnp.ones(T, jnp.int32)
    image = Segment(codes_BT, None, jnp.zeros((P * R, T)), None, "image", image_spec(T, SamplingConfig()))
    prompts = jnp.zeros((P * R, 5), jnp.int32), jnp.full(P * R, number)
    ok_B = jnp.asarray(np.isfinite(total_PR).reshape(-1))
    rows = Trajectory(prompts, (image,), (row_B, row_B + 1), (jnp.zeros(P * R),), (ok_B,))
    return rows, Combined(total_PR, np.isfinite(total_PR), 10 * total_PR, {"reward/total/mean": number}), None, spent or {}


FIRST = [[0, 1], [1, 1], [np.nan, 1], [0, 0]]  # one group of four teaches


def test_flat_groups_are_replaced_until_none_is_left_or_the_budget_is_spent():
    others = {1: drawn(1, [[1, 1], [0, 1], [1, 1], [0, 0]], {"perf/rollout_s": 2.0, "reward/ocr/failed_invalid": 3, "reward/x": 9})}
    others[2] = drawn(2, [[0, 1], [1, 1], [1, 0], [0, 1]])
    rows, total, _, _ = drawn(0, FIRST)
    for budget, groups in ((1, [0, 101, 2, 3]), (2, [0, 101, 200, 202]), (9, [0, 101, 200, 202])):
        asked = []
        got, combined, measured = refilled(
            lambda n: asked.append(n) or others[n], budget, rows, total, {"perf/rollout_s": 1.0}, make_mesh({})
        )
        wanted = np.array([100 * (g // 100) + R * (g % 100) + r for g in groups for r in range(R)])
        np.testing.assert_array_equal(got.segments[0].ids, np.tile(wanted[:, None], T))
        np.testing.assert_array_equal(got.negative[1], wanted + 1)
        values = np.array([(drawn(0, FIRST) if g < 100 else others[g // 100])[1].total_PR[g % 100] for g in groups])
        np.testing.assert_array_equal(combined.total_PR, values)
        np.testing.assert_array_equal(combined.advantage_PR, 10 * values)
        np.testing.assert_array_equal(combined.ok_PR.reshape(-1), got.ok[0])
        assert asked == list(range(1, min(budget, 2) + 1)) and combined.stats == {"reward/total/mean": 0}
        counts = {"rollout/refills": len(asked), "rollout/replaced_frac": sum(g >= 100 for g in groups) / P}
        assert measured == {"perf/rollout_s": 3.0, "reward/ocr/failed_invalid": 3} | counts


def test_a_batch_that_teaches_is_left_alone():
    rows, total, _, _ = drawn(0, [[0, 1]] * P)
    got, combined, measured = refilled(lambda n: pytest.fail("nothing is to be drawn"), 3, rows, total, {}, make_mesh({}))
    assert (
        all(jax.tree.leaves(jax.tree.map(np.array_equal, got, rows)))
        and combined is total
        and measured == {"rollout/refills": 0, "rollout/replaced_frac": 0}
    )


def test_groups_lie_on_the_mesh_refilled_or_not():
    mesh = make_mesh(dict(fsdp=4), jax.devices()[:4])
    with jax.set_mesh(mesh):
        for first, lengths in ((FIRST, [0, 1, 1, 1]), ([[0, 1]] * P, [0] * P)):
            got, _, _ = refilled(lambda n: drawn(n, [[0, 1]] * P), 1, *drawn(0, first)[:2], {}, mesh)
            assert all(x.sharding.shard_shape(x.shape)[0] == P * R // 4 for x in jax.tree.leaves(got))
            np.testing.assert_array_equal(got.prompts[1], np.repeat(lengths, R))
