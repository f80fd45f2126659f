"""Best-of-N against the mean over all subsets, intervals against known cases."""

import itertools

import numpy as np
import pytest

from xomni_jax.evaluation.statistics import (
    best_of_weights,
    bootstrap_mean,
    held_up_to,
    paired_difference,
    paired_ratio,
    weighted_rows,
)


def brute_force(metric, selection, n):
    """Mean over all subsets of size n of the known samples; ties inside a subset are averaged."""
    known = [i for i in range(len(selection)) if np.isfinite(selection[i])]
    values = []
    for subset in itertools.combinations(known, n):
        top = max(selection[i] for i in subset)
        values.append(np.mean([metric[i] for i in subset if selection[i] == top]))
    return np.mean(values)


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_best_of_is_the_mean_over_all_subsets(rng, n):
    selection = rng.integers(0, 4, (6, 7)).astype(float)  # many ties
    selection[0, 2] = selection[3, 0] = np.nan
    metric = rng.random((6, 7))
    expected = [brute_force(m, s, n) for m, s in zip(metric, selection)]
    np.testing.assert_allclose(weighted_rows(metric, best_of_weights(selection, n)), expected, rtol=1e-12)


def test_best_of_all_takes_the_best():
    weights = best_of_weights(np.array([[0.1, 0.9, 0.5], [1.0, 1.0, 0.0]]), 3)
    np.testing.assert_allclose(weights, [[0, 1, 0], [0.5, 0.5, 0]])


def test_too_few_known_scores_leave_the_prompt_out():
    table = np.array([[0.1, np.nan, np.nan], [0.1, 0.2, np.nan]])
    values = weighted_rows(np.ones((2, 3)), best_of_weights(table, 2))
    assert np.isnan(values[0]) and values[1] == 1


def test_an_unknown_metric_is_left_out():
    weights = np.array([[0.25, 0.5, 0.25], [0.0, 0.0, 1.0]])
    metric = np.array([[1.0, np.nan, 0.0], [1.0, 1.0, np.nan]])
    values = weighted_rows(metric, weights)
    assert values[0] == 0.5 and np.isnan(values[1])


def test_bootstrap_interval_covers_and_repeats(rng):
    values = rng.normal(0.3, 1.0, 400)
    a, b = bootstrap_mean(values, seed=3), bootstrap_mean(values, seed=3)
    assert a == b and a.low < a.value < a.high and a.prompts == 400
    # The normal interval is 1.96 standard errors to each side.
    assert (a.high - a.low) / 2 == pytest.approx(1.96 * values.std() / 20, rel=0.1)
    assert bootstrap_mean(np.array([np.nan, 1.0, 1.0])) == (1.0, 1.0, 1.0, 2)
    assert np.isnan(bootstrap_mean(np.array([np.nan])).value)


def test_pairs_remove_what_both_share(rng):
    prompt = rng.normal(0, 5, 200)
    a, b = prompt + 0.5 + rng.normal(0, 0.1, 200), prompt + rng.normal(0, 0.1, 200)
    b[0] = np.nan
    difference = paired_difference(a, b)
    assert difference.low > 0.45 and difference.high < 0.55 and difference.prompts == 199


def test_ratio():
    a, b = np.array([1.0, 1.0, 0.0, 1.0]), np.array([1.0, 0.0, 0.0, 0.5])
    ratio = paired_ratio(a, b, seed=1)
    assert ratio.value == pytest.approx(2.0) and ratio.low <= 2 <= ratio.high
    assert np.isnan(paired_ratio(a, np.zeros(4)).value)


def test_held_up_to_stops_at_the_first_that_is_not_beaten():
    best = {1: 0.2, 2: 0.4, 4: 0.5, 8: 0.3}
    assert [held_up_to(single, best) for single in (0.1, 0.2, 0.3, 0.45, 0.6, np.nan)] == [0, 0, 1, 2, 8, 0]
    assert held_up_to(0.9, {1: 0.2, 2: np.nan, 4: 0.1}) == 1
