"""Mixtures: exact shares, the same batches on any number of hosts and after a restore, and what is refused."""

import itertools
from collections import Counter

import numpy as np
import pytest
from ml_collections import ConfigDict

from tests.data.test_sources import NUMBERS
from xomni_jax.core.config import Changes, ConfigError, Text, as_dict
from xomni_jax.data.mixture import PERIOD, interleaved, summary
from xomni_jax.data.rendered import SIGNS
from xomni_jax.data.sources import batches
from xomni_jax.training.stage import resolve

SMALL = dict(source="rendered", sizes=((32, 64),), weights=(1.0,), text_lengths=((3, 6),))


@pytest.fixture
def parts(tmp_path):
    """Three sources: one endless, one of ten examples, one of three."""
    (tmp_path / "numbers.py").write_text(NUMBERS)
    numbers = dict(source=f"{tmp_path}/numbers.py:Numbers", sizes=((32, 64),))
    return dict(signs=SMALL | dict(weight=5), ten=numbers | dict(weight=3), three=numbers | dict(weight=2, count=3))


def mixture(parts):
    return SIGNS.updated({"source": "mixture", "parts": parts}, "config.data")


def drawn(data, count, batch_size=4, seed=1, rows=None, state=None):
    iterator = iter(batches(data, seed, batch_size, rows=rows, prefetch=0))
    if state:
        iterator.set_state(state)
    return list(itertools.islice(iterator, count)), iterator.get_state()


@pytest.mark.parametrize("weights", [(1,), (2, 1), (0.85, 0.1, 0.05), (1, 1, 1), (7, 0.01, 2.5, 90.49)])
def test_the_shares_are_exact_and_even(weights):
    counts, part, number = interleaved(weights)
    exact = PERIOD * np.array(weights) / sum(weights)
    assert counts.sum() == len(part) == PERIOD and np.abs(counts - exact).max() < 1
    for k, n in enumerate(counts):
        assert number[part == k].tolist() == list(range(n))
        taken = np.cumsum(part == k)
        assert np.abs(taken - np.arange(1, PERIOD + 1) * n / PERIOD).max() <= len(weights)  # nowhere far from its share


def test_ten_thousand_examples_have_the_ratio_of_the_weights(parts):
    source = mixture(parts).open(seed=3, batch_size=4)
    for start in (0, 2 * PERIOD):
        places = [source.place(i) for i in range(start, start + PERIOD)]
        assert Counter(source.names[k] for k, _ in places) == {"signs": 5000, "ten": 3000, "three": 2000}
        assert [n for k, n in places if k == 1] == list(range(start * 3 // 10, start * 3 // 10 + 3000))


def test_hosts_share_the_batches(parts):
    whole, _ = drawn(mixture(parts), 5)
    for hosts in (2, 4):
        shares = [drawn(mixture(parts), 5, rows=range(k * 4 // hosts, (k + 1) * 4 // hosts))[0] for k in range(hosts)]
        for n, batch in enumerate(whole):
            assert [(i, s) for own in shares for i, s in zip(own[n]["id"], own[n]["source"])] == list(zip(batch["id"], batch["source"]))
            np.testing.assert_array_equal(np.concatenate([own[n]["image"] for own in shares]), batch["image"])


def test_a_mixture_resumes_in_the_middle(parts):
    whole, _ = drawn(mixture(parts), 9)
    first, state = drawn(mixture(parts), 4)
    rest, _ = drawn(mixture(parts), 5, state=state)
    for a, b in zip(whole, first + rest, strict=True):
        assert (a["id"], a["source"], a["epoch"]) == (b["id"], b["source"], b["epoch"])
        np.testing.assert_array_equal(a["image"], b["image"])


def test_epochs_of_a_part(parts):
    batch, _ = drawn(mixture(parts), 10)
    rows = [row for b in batch for row in zip(b["source"], b["epoch"], b["id"])]
    assert [epoch for name, epoch, _ in rows if name == "three"] == pytest.approx([n / 3 for n in range(8)])
    assert all(epoch is None for name, epoch, _ in rows if name == "signs")
    ids = [i for name, _, i in rows if name == "ten"]
    assert len(ids) == 12 and len(set(ids[:10])) == 10  # every record once, and then again


def test_another_part_does_not_change_the_order_of_the_others(parts):
    less = [
        i for b in drawn(mixture({"ten": parts["ten"], "signs": parts["signs"]}), 8)[0] for i, s in zip(b["id"], b["source"]) if s == "ten"
    ]
    more = [i for b in drawn(mixture(parts), 8)[0] for i, s in zip(b["id"], b["source"]) if s == "ten"]
    assert less[: len(more)] == more and len(more) > 5


def test_what_a_run_takes_is_said(parts):
    lines = summary(mixture(parts), 0, 4, 5)
    assert lines == [
        "config.data.parts.signs: 50.00% of the examples, 10 in 5 steps, endless",
        "config.data.parts.ten: 30.00% of the examples, 6 in 5 steps, from 10 records",
        "config.data.parts.three: 20.00% of the examples, 4 in 5 steps, from 3 records; the source is shorter than the run, so every record"
        " comes about 1.33 times",
    ]
    assert summary(SIGNS, 0, 4, 1) == []


def test_a_configuration_of_a_mixture(parts):
    def changes(**command):
        config = ConfigDict(dict(stage="sft", data=dict(source="mixture", parts=parts))).to_dict()
        config["data"]["parts"]["ten"] |= command
        return Changes(config)

    data = resolve(changes(weight=Text("0"), count=Text("7"))).data
    assert data.names == ("signs", "three") and data.as_dict()["parts"]["ten"]["count"] == 7
    assert data.sizes == ((32, 64),)
    again = SIGNS.updated(as_dict(data), "config.data")
    assert again.as_dict() == data.as_dict()
    assert again.updated({"parts": {"ten": {"weight": 1}}}, "config.data").names == ("signs", "ten", "three")


@pytest.mark.parametrize(
    "change, words",
    [
        (
            dict(ten=dict(weight=0), three=dict(weight=0), signs=dict(weight=0)),
            r"config.data: the weights of the parts \(.*\) sum to 0; give",
        ),
        (dict(ten=dict(weight=1e-5)), r"parts.ten.weight=1e-05 is below 1/10000 of the sum"),
        (dict(ten=dict(weight=-1)), r"config.data.parts.ten.weight=-1: expected"),
        (dict(ten=dict(weigth=1)), r"config.data.parts.ten.weigth: unknown key"),
        (dict(four=dict(weight=1)), r"config.data.parts.four: give a part a plain name and a section"),
        ({"a/b": SMALL}, r"config.data.parts.a/b: give a part a plain name"),
        (dict(four=3), r"config.data.parts.four: give a part"),
        (dict(four=dict(source="mixture", parts=dict(one=SMALL))), r"config.data: parts.four is a mixture itself; name its parts here"),
        (dict(four=dict(source="dreams")), r"config.data.parts.four.source: the source 'dreams' is unknown"),
    ],
)
def test_mixtures_that_are_refused(parts, change, words):
    with pytest.raises(ConfigError, match=words):
        mixture(parts).updated({"parts": change}, "config.data")


def test_a_part_that_cannot_be_opened_is_named(tmp_path):
    (tmp_path / "text.txt").write_text("a text\n")
    for path, words in (
        ("none/*.txt", "parts.books.path=none/.*: no file fits"),
        ("text.txt", "text.txt:1: no image.*parts.books.imageless"),
    ):
        books = dict(source="files", path=str(tmp_path / path), sizes=((32, 64),))
        with pytest.raises(ConfigError, match=words.replace("none/", f"{tmp_path}/none/")):
            mixture(dict(books=books)).open(0, 4)


def test_no_parts():
    with pytest.raises(ConfigError, match=r"the weights of the parts \(there are none\) sum to 0"):
        SIGNS.updated({"source": "mixture"}, "config.data")


def test_images_of_several_sizes_meet_only_where_a_stage_takes_them(parts):
    data = mixture(parts | {"tall": parts["ten"] | dict(sizes=((64, 32),))})
    with pytest.raises(ConfigError, match="images of the sizes .* meet in one batch; this stage needs one size"):
        batches(data, 0, 4)
    batch = next(iter(batches(data, 0, 16, mixed=True, prefetch=0)))
    assert {image.shape for image in batch["image"]} == {(32, 64, 3), (64, 32, 3)}


def test_what_no_part_offers_is_said(parts):
    numbers = {name: parts[name] for name in ("ten", "three")}
    with pytest.raises(ConfigError, match="its examples have no question, which this stage learns from, but only caption, id, image;"):
        batches(mixture(numbers), 0, 4, fields=("caption|turns", "question"), mixed=True)
    batches(mixture(parts), 0, 4, fields=("caption|turns", "question"), mixed=True)
    with pytest.raises(ConfigError, match="its examples have no question"):
        batches(mixture(parts), 0, 4, fields=("question",))


def test_a_weight_changes_with_the_step(parts):
    """Straight between its steps, constant beyond them; by the number of the example alone, and never the same example twice."""
    weights = dict(signs=2.0, ten=((10, 1.0), (50, 4.0), (90, 0.0)))
    data = mixture({name: parts[name] | dict(weight=weight) for name, weight in weights.items()})
    source = data.open(seed=2, batch_size=40)
    places = [source.place(n) for n in range(100 * 40)]
    ten = np.reshape([source.names[part] == "ten" for part, _ in places], (100, 40)).mean(-1)  # its share of every step
    for step, weight in ((0, 1), (10, 1), (30, 2.5), (50, 4), (70, 2), (90, 0), (99, 0)):
        assert ten[step] == pytest.approx(weight / (2 + weight), abs=0.05)
    assert source.shares(100) == pytest.approx([1 - ten.mean(), ten.mean()], abs=0.01)
    assert len(set(places)) == 4000 and places[1000:1100] == [data.open(2, 40).place(n) for n in range(1000, 1100)]


def test_a_mixture_whose_weights_change_resumes_on_any_number_of_hosts(parts):
    data = mixture({name: parts[name] | dict(weight=((0, w), (4, 1.0 - w))) for name, w in (("ten", 0.9), ("three", 0.1))})
    whole, _ = drawn(data, 6)
    first, state = drawn(data, 4, rows=range(2, 4))
    rest, _ = drawn(data, 2, rows=range(2, 4), state=state)
    assert [b["id"] for b in first + rest] == [b["id"][2:] for b in whole]
    assert whole[0]["source"].count("ten") > whole[5]["source"].count("ten")


@pytest.mark.parametrize(
    "weight, words",
    [
        (((0, 1.0), (0, 2.0)), "the steps must increase"),
        ((), "the steps must increase"),
        (((0, -1.0),), "expected float >= 0"),
        (((0, 1), (9, 0)), r"the weights of the parts at step 9 \(.*\) sum to 0"),
    ],
)
def test_changing_weights_that_are_refused(parts, weight, words):
    with pytest.raises(ConfigError, match=words):
        mixture(dict(ten=parts["ten"] | dict(weight=weight)))


@pytest.mark.parametrize("weight", [1.0, ((0, 2.0), (9, 1.0))], ids=["constant", "changing"])
def test_whole_batches_come_from_one_part(parts, weight):
    """So that parts of different sizes share a run whose batches have one."""
    tall = parts["signs"] | dict(sizes=((64, 32),), text_lengths=((2, 3),), shapes=0.0, weight=weight)
    both = dict(signs=parts["signs"] | dict(weight=1.0), tall=tall)
    data = SIGNS.updated({"source": "mixture", "parts": both, "whole_batches": True}, "config.data")
    found, _ = drawn(data, 12)
    assert all(len(set(batch["source"])) == len(set(batch["size"])) == 1 for batch in found)
    assert {batch["source"][0] for batch in found} == {"signs", "tall"}
    assert len({i for batch in found for i in batch["id"]}) == 48
