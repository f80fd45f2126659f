"""Credit: which reward goes to which segment."""

import numpy as np
import pytest

from xomni_jax.core.config import ConfigError
from xomni_jax.rl.trajectory import check_credit, credited

CREDIT = (("ocr", "first", 0.5), ("ocr", "last", 1.0), ("verdict", "judge", 2.0), ("verdict", "last", -1.0))


def test_segments_get_the_weighted_advantages_of_their_rewards():
    advantage = {"ocr": np.array([1.0, -2.0, np.nan]), "verdict": np.array([3.0, np.nan, 4.0])}
    ok = {"ocr": np.array([True, True, False]), "verdict": np.array([True, False, True])}
    got, known = credited(CREDIT, advantage, ok, ("first", "judge", "last", "thought"))
    # A reward that is not known leaves out exactly the segments that it goes to; a segment without a reward is left out.
    np.testing.assert_array_equal(np.array(known), [[1, 1, 0], [1, 0, 1], [1, 0, 0], [0, 0, 0]])
    np.testing.assert_array_equal(np.array(got), [[0.5, -1, 0], [6, 0, 8], [-2, 0, 0], [0, 0, 0]])


@pytest.mark.parametrize(
    "rewards, segments, message",
    [
        (("ocr",), ("first", "judge", "last"), "names the reward 'verdict'; this run has ocr"),
        (("ocr", "verdict"), ("first", "last"), "the credit of reward 'verdict' names the segment 'judge'; the method draws first, last"),
    ],
)
def test_unknown_names_are_refused(rewards, segments, message):
    check_credit(CREDIT, ("ocr", "verdict"), ("first", "judge", "last"))
    with pytest.raises(ConfigError, match=message):
        check_credit(CREDIT, rewards, segments)
