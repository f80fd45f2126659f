"""Batches of endless and of finite sources: the same after a restore and on any number of hosts; sources named by their file."""

import itertools

import numpy as np
import pytest

from xomni_jax.core.config import ConfigError, Text
from xomni_jax.data.rendered import SIGNS, RenderedConfig, render_example
from xomni_jax.data.sources import BatchOrder, DataSection, batches

CONFIG = RenderedConfig()
DATA = DataSection("rendered", CONFIG)
NUMBERS = '''
from dataclasses import dataclass

import numpy as np


class Numbers:
    @dataclass(frozen=True)
    class Options:
        """How many.

        Attributes:
          sizes: (height, width) of the images
          count: number of examples
        """

        sizes: tuple[tuple[int, int], ...] = ((16, 32),)
        count: int = 10

    def __init__(self, options, seed, batch_size):
        self.options = options

    def __len__(self):
        return self.options.count

    def __getitem__(self, index):
        return {"id": f"n{index}", "caption": str(index), "image": np.full((*self.options.sizes[0], 3), index, np.uint8)}


class Sizeless:
    @dataclass(frozen=True)
    class Options:
        count: int = 10
'''


@pytest.fixture
def numbers(tmp_path):
    """Ten examples, from a source named by its file."""
    (tmp_path / "numbers.py").write_text(NUMBERS)
    return SIGNS.updated({"source": f"{tmp_path}/numbers.py:Numbers"}, "config.data")


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
    sizes = list(batches(DATA, seed=0, batch_size=2, count=4, transform=lambda b: {"n": len(b["id"])}))
    assert [set(size) for size in sizes] == [{"id", "n"}] * 4 and [size["n"] for size in sizes] == [2, 2, 2, 2]


def test_a_finite_source_is_shuffled_anew_in_every_epoch(numbers):
    def epochs(seed):
        taken = _take(iter(batches(numbers, seed, batch_size=4)), 10)  # 40 examples: batches cross the borders of epochs
        ids = [k for b in taken for k in b["id"]]
        return [ids[n : n + 10] for n in range(0, 40, 10)]

    orders = epochs(seed=0)
    assert all(sorted(order) == [f"n{i}" for i in range(10)] for order in orders)
    assert len(set(map(tuple, orders))) == 4
    assert epochs(seed=0) == orders != epochs(seed=1)


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_finite_source_resumes_in_a_later_epoch(numbers, prefetch):
    first = iter(batches(numbers, seed=3, batch_size=4, prefetch=prefetch))
    _take(first, 4)
    second = iter(batches(numbers, seed=3, batch_size=4, prefetch=prefetch))
    second.set_state(first.get_state())
    _same(_take(first, 7), _take(second, 7))


def test_hosts_share_the_batches_of_a_finite_source(numbers):
    whole = _take(iter(batches(numbers, seed=1, batch_size=4)), 6)
    hosts = [_take(iter(batches(numbers, seed=1, batch_size=4, rows=rows)), 6) for rows in ((0, 2), (1, 3))]
    for batch, even, odd in zip(whole, *hosts, strict=True):
        assert batch["id"] == [even["id"][0], odd["id"][0], even["id"][1], odd["id"][1]]
        np.testing.assert_array_equal(batch["image"][::2], even["image"])


def test_a_source_named_by_its_file(numbers, tmp_path):
    assert numbers.as_dict() == {"source": f"{tmp_path}/numbers.py:Numbers", "sizes": ((16, 32),), "count": 10}
    assert numbers.sizes == ((16, 32),) and numbers.explained()["count"] == "number of examples"
    fewer = numbers.updated({"count": 3}, "config.data")
    assert len(fewer.open(seed=0, batch_size=4)) == 3 and len(numbers.open(0, 4)) == 10
    typed = {"source": Text("files"), "path": Text("a"), "sizes": ((16, 32),), "count": 3}  # count: of the file's own source
    assert fewer.updated(typed, "config.data").as_dict()["path"] == "a"
    back = fewer.updated({"source": "rendered", "shapes": 0.5}, "config.data")
    assert back.options == RenderedConfig(shapes=0.5)  # the source's own defaults, not those of a stage


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"count": "many"}, r"config.data.count='many': expected int, such as 10"),
        ({"shapes": 0.5}, r"config.data.shapes: unknown key; known here: count, sizes"),
        ({"source": "dreams"}, r"config.data.source: the source 'dreams' is unknown; use one of rendered"),
        ({"source": "{folder}/nothing.py:Numbers"}, r"config.data.source: .*nothing.py: no such file"),
        ({"source": "{folder}/numbers.py:Letters"}, r"config.data.source: .*numbers.py defines no 'Letters'; it defines Numbers, Sizeless"),
        ({"source": "{folder}/numbers.py:Sizeless"}, r"config.data.source=.*: is no source: it has no Options with `sizes`"),
    ],
)
def test_data_sections_that_are_refused(numbers, changes, words, tmp_path):
    changes = {key: value.format(folder=tmp_path) if isinstance(value, str) else value for key, value in changes.items()}
    with pytest.raises(ConfigError, match=words):
        numbers.updated(changes, "config.data")


def test_records_that_are_read_together_are_drawn_in_windows():
    blocks = np.concatenate([np.repeat(np.arange(40), 10), np.full(100, -1)])  # the last hundred are read alone
    members = {(8, 8): np.arange(0, 500, 2), (8, 16): np.arange(1, 500, 2)}
    order = BatchOrder(members, seed=3, batch_size=5, blocks=blocks)
    drawn = [order[n][0] for n in range(1000)]  # two epochs
    assert sorted(drawn[:500]) == sorted(drawn[500:]) == list(range(500))
    assert drawn[:500] != drawn[500:]
    for epoch in (drawn[:500], drawn[500:]):
        places = {block: [n for n, number in enumerate(epoch) if blocks[number] == block] for block in range(-1, 40)}
        spans = [max(found) - min(found) for block, found in places.items() if block >= 0]
        assert np.median(spans) < 200 and max(spans) < 300  # of 500, where both sizes have a window of 8 blocks of 40
        assert min(places[-1]) < 50 and max(places[-1]) > 450
    alike = BatchOrder(members, seed=3, batch_size=5)
    assert sorted(alike[n][0] for n in range(500)) == list(range(500))
    assert [alike[n][1] for n in range(500)] == [order[n][1] for n in range(500)]
