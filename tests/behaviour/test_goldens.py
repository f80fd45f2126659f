"""The recorded cases that take few seconds, and what counts as a difference. All others: python -m tests.behaviour.record --check."""

import pytest

from tests.behaviour.record import HERE, QUICK, check, differences, normal, session


@pytest.fixture(scope="module")
def quick_session():
    """This checkout, in a folder of its own."""
    with session(HERE.parents[1]) as s:
        yield s


@pytest.mark.parametrize("name", QUICK)
def test_the_command_line_computes_what_it_did(name, quick_session):
    assert check(name, quick_session) == []


HASH, OTHER = "0" * 64, "1" * 64


@pytest.mark.parametrize(
    ("golden", "found", "rtol", "told"),
    [
        ({"a": 1.0}, {"a": 1.0, "b": 2}, 0.0, []),
        ({"params": {"a": 1}}, {"params": {"a": 1, "b": 2}}, 0.0, ["/params/b is new"]),
        ({"params": {"mmdit": {}}}, {"params": {"mmdit": {"b": 2}}}, 0.0, ["/params/mmdit/b is new"]),
        ({"a": {"b": 1}}, {"a": {}}, 0.0, ["/a/b is missing"]),
        ({"a": 1.0}, {"a": 1.0 + 1e-9}, 0.0, ["/a: 1.0 became 1.000000001"]),
        ({"a": 1.0}, {"a": 1.0 + 1e-9}, 1e-6, []),
        ({"a": 1.0}, {"a": 1.1}, 1e-6, ["/a: 1.0 became 1.1"]),
        ({"a": float("nan")}, {"a": float("nan")}, 0.0, []),
        ([1, "x"], [1, "y"], 1e-4, ["/1: x became y"]),
        ([1, 2], [1], 1e-4, [": [1, 2] became [1]"]),
        (HASH, OTHER, 0.0, [f": {HASH} became {OTHER}"]),
        (HASH, OTHER, 1e-4, []),
    ],
)
def test_what_counts_as_a_difference(golden, found, rtol, told):
    assert list(differences(golden, found, rtol)) == told


def test_times_addresses_and_folders_are_left_out(quick_session):
    value = {"wall_seconds": 1.5, "url": "http://127.0.0.1:8123/v1", "out": f"{quick_session.work}/x", "counts": {"fitted pictures": 0}}
    assert normal(value, quick_session) == {"url": "URL/v1", "out": "WORK/x", "counts": {"fitted images": 0}}
