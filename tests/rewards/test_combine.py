"""Weights, absent and failed rewards, both orders of normalising; worked numbers from TRL's own code."""

import numpy as np
import pytest

from xomni_jax.rewards import Score
from xomni_jax.rewards.combine import MODES, Column, column, combine, source_means, standardise

NAN = float("nan")


def columns(table, group):
    """Rows of rewards, one per rollout -> named columns without failures."""
    table = np.array(table, float)
    return {str(k): Column(table[:, k].reshape(-1, group), np.zeros((len(table) // group, group), bool)) for k in range(table.shape[1])}


def weights(values):
    return {str(k): w for k, w in enumerate(values)}


def test_adv_06_three_rewards_one_missing():
    table = [[0.28, 0.6, NAN], [0.31, 0.8, 0.9], [0.25, 0.4, 0.1], [0.3, 0.6, 0.5]]
    out = combine(columns(table, 4), weights([1.0, 0.5, 2.0]))
    want = [-0.8286125598907998, 1.289562593207536, -0.7517875543380105, 0.2908375210212743]
    np.testing.assert_allclose(standardise(out.total_PR, out.ok_PR, -1)[0], want, atol=1e-6)
    assert out.advantage_PR is None and out.ok_PR.all()


def test_adv_07_normalize_then_sum():
    table = [[0.28, 0.6], [0.31, 0.8], [0.25, 0.4], [0.3, 0.6], [0.2, 1.0], [0.2, 0.0], [0.2, 1.0], [0.2, 0.0]]
    out = combine(columns(table, 4), weights([1.0, 1.0]), "normalize_then_sum")
    want = [-0.1307877787286309, 1.5042235164234623, -1.7657990738807252, 0.3923633361858924] + [
        0.6015060228452921,
        -0.6015060228452915,
    ] * 2
    np.testing.assert_allclose(out.advantage_PR.ravel(), want, atol=1e-6)
    np.testing.assert_allclose(out.total_PR.ravel(), np.sum(table, -1))


def test_separate_advantages():
    """The weighted sum of the rewards' own advantages: what is absent from a group adds nothing to it."""
    table = [[0.28, 60, NAN], [0.31, 80, NAN], [0.25, 40, NAN], [0.3, 60, NAN], [0.2, 1.0, 5], [0.2, 0.0, 6], [0.2, 1.0, 7], [0.2, 0.0, 8]]
    rewards = columns(table, 4)
    out = combine(rewards, weights([1.0, 2.0, 0.5]), "normalize_each")
    own = {k: standardise(c.value_PR, np.isfinite(c.value_PR), -1) for k, c in rewards.items()}
    np.testing.assert_allclose(out.advantage_PR, own["0"] + 2 * own["1"] + 0.5 * own["2"], rtol=1e-12)
    assert (own["2"][0] == 0).all() and np.abs(out.advantage_PR[0]).max() > 2


def test_xomni_01_reward_absent_for_the_prompt():
    table = [[0.27, 3.2, 0.8, NAN], [0.31, 3.9, 0.9, NAN], [0.29, 3.0, 0.4, NAN], [0.25, 3.5, 0.7, NAN]]
    out = combine(columns(table, 4), weights([1.0, 0.2, 1.0, 1.0]))
    np.testing.assert_allclose(out.total_PR[0], [1.71, 1.99, 1.29, 1.65], atol=1e-9)
    want = [0.17370164363180185, 1.1464308479698915, -1.2853921628753329, -0.034740328726361146]
    np.testing.assert_allclose(standardise(out.total_PR, out.ok_PR, -1)[0], want, atol=1e-6)
    assert out.stats["reward/3/applies_frac"] == 0 and "reward/3/mean" not in out.stats


@pytest.mark.parametrize("mode", MODES)
def test_failed_rollout_leaves_its_group(mode):
    """The other rollouts get what they would get if the failed one had never been drawn."""
    a = np.array([[0.1, 0.9, 0.4, 0.6, 0.2]])
    b = np.array([[1.0, 0.0, NAN, 0.5, 0.3]])
    failed = np.isnan(b)
    out = combine({"a": Column(a, np.zeros_like(failed)), "b": Column(b, failed)}, {"a": 1.0, "b": 0.5}, mode)
    keep = ~failed[0]
    rest = combine({k: Column(v[:, keep], np.zeros((1, 4), bool)) for k, v in (("a", a), ("b", b))}, {"a": 1.0, "b": 0.5}, mode)
    assert np.isnan(out.total_PR[failed]).all() and (out.ok_PR == ~failed).all()
    np.testing.assert_allclose(out.total_PR[:, keep], rest.total_PR)
    if mode != "sum_then_normalize":
        np.testing.assert_allclose(out.advantage_PR[:, keep], rest.advantage_PR)
        assert (out.advantage_PR[failed] == 0).all()
    assert out.stats["reward/b/fail_frac"] == 0.2 and out.stats["reward/masked_frac"] == pytest.approx(0.2)


def test_column_tells_absent_from_failed():
    scores = [
        Score(0.5),
        Score(None, "timed out"),
        Score(0.25),
        Score(None),
        Score(None),
        Score(None),
        Score(0.5),
        Score(None),
        Score(1.0),
    ]
    c = column(scores, 3)
    np.testing.assert_array_equal(
        c.failed_PR, [[False, True, False], [False] * 3, [False, True, False]]
    )  # absent inside a scored group: failed
    np.testing.assert_array_equal(np.isnan(c.value_PR), [[False, True, False], [True] * 3, [False, True, False]])


def test_stats_by_hand_and_weight_zero():
    value = np.array([[0.0, 1.0], [0.25, 0.75]])
    broken = Column(np.array([[NAN, 1.0], [1.0, 1.0]]), np.array([[True, False], [False, False]]))
    out = combine({"ocr": Column(value, np.zeros((2, 2), bool)), "watched": broken}, {"ocr": 2.0, "watched": 0.0})
    assert out.ok_PR.all() and out.stats["reward/watched/fail_frac"] == 0.25  # reported, masks nothing
    assert out.stats["reward/ocr/mean"] == 0.5
    assert out.stats["reward/ocr/std"] == pytest.approx((0.7071067811865476 + 0.3535533905932738) / 2)
    np.testing.assert_allclose(out.total_PR, 2 * value)


@pytest.mark.parametrize("mode", MODES)
def test_weights_of_each_prompt(mode):
    """A reward of weight 0 for a prompt neither adds to it nor, having failed, masks it."""
    value = np.array([[1.0, 2.0], [3.0, 5.0]])
    failed = np.array([[False, False], [True, False]])
    rewards = {"a": Column(value, np.zeros((2, 2), bool)), "b": Column(np.where(failed, NAN, 10 * value), failed)}
    out = combine(rewards, {"a": np.array([[1.0], [0.5]]), "b": np.array([[2.0], [0.0]])}, mode, eps=1e-9)
    assert out.ok_PR.all()
    np.testing.assert_allclose(out.total_PR, [[21.0, 42.0], [1.5, 2.5]])
    alone = combine({"a": rewards["a"]}, {"a": np.array([[3.0], [0.5]])}, mode, eps=1e-9)  # a and b differ in scale alone
    if mode != "sum_then_normalize":
        np.testing.assert_allclose(out.advantage_PR, alone.advantage_PR, rtol=1e-7)


def test_means_of_each_source():
    """Over what is known of its own prompts; a reward that none of them is judged by has no mean."""
    none = np.zeros((3, 2), bool)
    rewards = {
        "a": Column(np.array([[1.0, 2.0], [3.0, NAN], [6.0, 7.0]]), none),
        "b": Column(np.array([[NAN] * 2, [8.0, 8.0], [NAN] * 2]), none),
    }
    means = source_means(["x", "y", "x"], rewards, combine(rewards, {"a": 2.0, "b": 0.0}))
    assert means == {
        "reward/a/mean/x": 4.0,
        "reward/total/mean/x": 8.0,
        "reward/a/mean/y": 3.0,
        "reward/b/mean/y": 8.0,
        "reward/total/mean/y": 6.0,
    }
    assert source_means([None] * 3, rewards, combine(rewards, {"a": 1.0, "b": 1.0})) == {}


def test_no_reward_at_all_is_not_ok():
    nothing = Column(np.full((1, 3), NAN), np.zeros((1, 3), bool))
    out = combine({"ocr": nothing}, {"ocr": 1.0}, "normalize_then_sum")
    assert not out.ok_PR.any() and (out.advantage_PR == 0).all() and np.isnan(out.total_PR).all()
