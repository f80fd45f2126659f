"""Interleaving, warm-up, equality before timing. Nothing here asserts how long anything takes."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.benchmarks import timing
from tests.benchmarks.timing import BenchError, Case, Result, measure, relative_difference, unequal_share


def case(calls, ours=1.0, peer=1.0, tolerance=1e-4):
    def side(name, value):
        def run():
            calls.append(name)
            return jnp.asarray(value)

        return run

    return Case("adding", side("ours", ours), side("peer", peer), relative_difference, tolerance, 6, "sums")


def test_pairs_are_interleaved_and_the_first_side_changes():
    calls = []
    result = measure(case(calls), repeats=4, seconds=60)
    warm = 2 * timing.WARM_UPS
    assert calls[:warm] == ["ours", "peer"] * timing.WARM_UPS
    pairs = [tuple(calls[i : i + 2]) for i in range(warm, len(calls), 2)]
    assert pairs == [("peer", "ours"), ("ours", "peer")] * 2
    assert result.ours_s.shape == result.peer_s.shape == (4,) and (result.ours_cpu_s > 0).all()


def test_the_budget_ends_it_after_the_least_number_of_pairs():
    assert len(measure(case([]), repeats=50, seconds=1e-9).ratios) == timing.MIN_PAIRS
    assert len(measure(case([]), repeats=2, seconds=60).ratios) == 2


@pytest.mark.parametrize("values", [dict(ours=1.0, peer=1.001), dict(ours=np.nan), dict(ours=[1.0, 1.0])], ids=str)
def test_sides_that_differ_are_not_timed(values):
    calls = []
    with pytest.raises(BenchError, match=r"adding: the two sides differ by .* \(limit 0.0001\) in run 1, nothing was timed"):
        measure(case(calls, **values), repeats=5, seconds=60)
    assert calls == ["ours", "peer"]


def test_numbers_by_hand():
    wall, cpu = (np.array([1.0, 2.0, 4.0]), np.array([2.0, 8.0, 4.0])), (np.full(3, 2.0), np.full(3, 5.0))
    result = Result(case([]), *wall, *cpu, 9.0, 3.0, 1e-6)
    said = result.as_json()
    assert said["ratio"] == {"median": 2.0, "min": 1.0, "max": 4.0}
    assert (said["ours_seconds"], said["peer_seconds"], said["pairs"]) == (2.0, 4.0, 3)
    assert said["cpu_ratio"] == 2.5
    assert said["rate"] == {"unit": "sums/s", "ours": 3.0, "peer": 1.5}
    assert said["first_run_seconds"] == {"ours": 9.0, "peer": 3.0}
    assert said["difference"] == {"largest": 1e-6, "tolerance": 1e-4}
    assert unequal_share([1, 2, 3, 4], [1, 2, 0, 4]) == 0.25
    assert unequal_share([1, 2], [1, 2, 3]) == float("inf")
    np.testing.assert_allclose(relative_difference([1.0, -4.0], [1.0, -5.0]), 0.2)
