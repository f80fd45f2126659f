"""The grain data set: same batches after a restore, the same data on any number of hosts, one size per batch."""

import itertools

import numpy as np
import pytest

from xomni_jax.data.rendered import RenderedConfig, render_example
from xomni_jax.data.sources import DataSection, batches

CONFIG = RenderedConfig()
DATA = DataSection("rendered", CONFIG)


def _take(iterator, n):
    return list(itertools.islice(iterator, n))


def _same(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert x["id"] == y["id"] and x["caption"] == y["caption"]
        np.testing.assert_array_equal(x["image"], y["image"])


@pytest.mark.parametrize("prefetch", [0, 2])
def test_restored_iterator_continues(prefetch):
    dataset = batches(DATA, seed=7, batch_size=3, prefetch=prefetch)
    first = iter(dataset)
    _take(first, 5)
    state = first.get_state()
    second = iter(batches(DATA, seed=7, batch_size=3, prefetch=prefetch))
    second.set_state(state)
    _same(_take(first, 4), _take(second, 4))


def test_shards_cover_every_batch_once():
    whole = _take(iter(batches(DATA, seed=1, batch_size=6)), 8)
    shards = [_take(iter(batches(DATA, seed=1, batch_size=6, rows=(2 * i, 2 * i + 1))), 8) for i in range(3)]
    for n, batch in enumerate(whole):
        parts = [s[n] for s in shards]
        assert [k for p in parts for k in p["id"]] == batch["id"]
        np.testing.assert_array_equal(np.concatenate([p["image"] for p in parts]), batch["image"])
    ids = [k for b in whole for k in b["id"]]
    assert len(set(ids)) == len(ids) == 48


def test_batches_have_one_size_and_all_sizes_come():
    taken = _take(iter(batches(DATA, seed=2, batch_size=5)), 30)
    shapes = {b["image"].shape for b in taken}
    assert shapes == {(5, 32, 64, 3), (5, 32, 128, 3)}
    assert all(b["columns"].shape == (5, b["image"].shape[1] // 8, b["image"].shape[2] // 8) for b in taken)
    alone = render_example(2, 11, CONFIG, taken[2]["image"].shape[1:3])
    np.testing.assert_array_equal(taken[2]["image"][1], alone["image"])


def test_counted_and_transformed():
    sizes = list(batches(DATA, seed=0, batch_size=2, count=4, transform=lambda b: len(b["id"])))
    assert sizes == [2, 2, 2, 2]


def test_errors():
    with pytest.raises(ValueError, match=r"batch_size=4, rows \(3, 4\): need rows from 0 to below batch_size"):
        batches(DATA, 0, 4, rows=(3, 4))
    with pytest.raises(ValueError, match=r"batch_size=0, rows \(\)"):
        batches(DATA, 0, 0)
