"""Names of slices: as XLA calls them, as they are rented, and what is said of the others."""

import importlib.util

import pytest

from xomni_jax.planner import chips


@pytest.mark.parametrize(
    "given, name, devices, rented",
    [
        ("v6e:8x8", "v6e:8x8", 64, "v6e-64"),
        ("v5p-64", "v5p:2x4x4", 32, "v5p-64"),  # counts cores, two a chip
        ("v5litepod-256", "v5e:16x16", 256, "v5litepod-256"),
        ("v5e-256", "v5e:16x16", 256, "v5litepod-256"),
        ("v5litepod-4", "v5e:2x2", 4, "v5litepod-4"),
        ("v6e-64", "v6e:8x8", 64, "v6e-64"),
        ("tpu7x-128", "tpu7x:4x4x4", 128, "tpu7x-128"),  # two devices a chip
        ("cpu:8", "cpu:8", 8, "cpu:8"),
    ],
)
def test_names(given, name, devices, rented):
    topology = chips.parse(given)
    assert (topology.name, topology.size, topology.cloud) == (name, devices, rented)


@pytest.mark.parametrize(
    "given, words",
    [
        ("v9:2x2", "topology 'v9:2x2' is unknown; known are v4:{2x2x1,.*v6e:{2x2,2x4,4x4,4x8,8x8,8x16,16x16}.*cpu:N"),
        ("v5p-63", "'v5p-63' is no slice of v5p; there are v5p-8, v5p-16, v5p-32, v5p-64"),
        ("v6e:3x3", "a v6e slice has 2 sides, the first two even; such as v6e:4x8"),
        ("v5p:4x4", "a v5p slice has 3 sides"),
        ("cpu:0", "known are"),
    ],
)
def test_what_is_unknown(given, words):
    with pytest.raises(ValueError, match=words):
        chips.parse(given)


def test_without_libtpu_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs libtpu to compile for it: pip install 'xomni_jax\[plan\]' brings it; cpu:8 works without"):
        chips.devices(chips.parse("v6e:2x2"))


@pytest.mark.parametrize(
    "whole, size, slice_",
    [("v6e:8x8", 48, "v6e:6x8"), ("v5p:2x4x4", 8, "v5p:2x2x2"), ("tpu7x:4x4x4", 64, "tpu7x:2x4x4"), ("cpu:8", 3, "cpu:3")],
)
def test_a_part_of_a_slice_is_the_most_compact_of_its_size(whole, size, slice_):
    part = chips.part(chips.parse(whole), size)
    assert (part.name, part.size) == (slice_, size)


def test_a_part_that_is_no_slice():
    with pytest.raises(ValueError, match="15 of v6e:8x8's 64 devices are no v6e slice of their own, which planning needs"):
        chips.part(chips.parse("v6e:8x8"), 15)
