"""What readers found in the images of a step, counted by hand."""

import pytest

from xomni_jax.rewards import Score
from xomni_jax.rl.text_statistics import join_text_counts, text_counts


def item(*targets, group="0"):
    return {"prompt": "", "targets": {"text": list(targets)}, "group": group}


def read(text, exact=False):
    return Score(0.5, None, {"text": text, "exact": exact})


def test_counts_by_hand():
    """Group 0 shows one wrong text twice; in group 1 it is another prompt's; what is right may be equal, and empty texts are no texts."""
    rows = [
        (item("OPEN"), read("OPEN", True)),
        (item("OPEN"), read("OPEN", True)),
        (item("OPEN"), read("Open open")),
        (item("OPEN"), read("OPENOP EN")),
        (item("SALE", group="1"), read("OPEN OPEN")),
        (item("SALE", group="1"), read("")),
        (item("SALE", group="1"), read("")),
        (item("SALE", group="1"), Score(None, "no answer")),
        (item("SALE", group="1"), Score(0.25)),
    ]
    counts = text_counts(*zip(*rows))
    assert counts == [7, 2, 3, 2]
    assert join_text_counts([counts, [1, 1, 1, 0]]) == {"text/repeated_frac": 3 / 8, "text/alike_frac": 2 / 4}
    assert join_text_counts([]) == join_text_counts([[0, 0, 0, 0]]) == {}


@pytest.mark.parametrize(
    "targets, text, repeated",
    [
        (["HA"], "HAHA", 1),
        (["HA", "HA"], "HA HA", 0),
        (["HAHA"], "HAHA", 0),
        (["HA", "HAHA"], "HAHA HA", 0),  # the second holds the first
        (["HA", "HAHA"], "HA HAHA HA", 1),
        (["ON", "OFF"], "ON OFF ON", 1),
        (["好"], "好好", 1),
    ],
)
def test_a_target_stands_more_often_than_asked_for(targets, text, repeated):
    assert text_counts([item(*targets)], [read(text)])[1] == repeated


def test_details_of_others_are_left_alone():
    details = [{"text": ["A"], "exact": 1}, {"text": "A"}, {"text": None, "exact": False}]
    assert text_counts([item("A")] * 3, [Score(0.5, None, detail) for detail in details]) == [0, 0, 0, 0]
    for target in (None, 3 * [None]):
        assert text_counts([{"prompt": "", "targets": {"text": target}}], [read("A")])[:2] == [1, 0]


def test_a_single_target_may_be_a_string():
    assert text_counts([{"prompt": "", "targets": {"text": "OPEN"}}], [read("OPEN OPEN")])[:2] == [1, 1]
