"""Any number of items in batches of one size."""

import jax.numpy as jnp
import numpy as np
import pytest

from xomni_jax.sampling.batches import batches_by_shape, in_order, make_batches, run_batches
from xomni_jax.sequence.padding import bucket, pad_prompts


@pytest.mark.parametrize("items, size, sizes", [(5, 2, [2, 2, 1]), (4, 2, [2, 2]), (1, 3, [1]), (0, 3, [])])
def test_the_last_batch_is_filled_and_cut_again(items, size, sizes):
    started = []

    def program(batch):
        rows = jnp.asarray(batch.take(np.arange(items)))
        assert len(batch.take(list(range(items)))) == len(rows) == size
        started.append(rows.tolist())
        return {"twice": 2 * rows}

    results = list(run_batches(program, make_batches(items, size)))
    assert [len(batch.items) for batch, _ in results] == sizes
    assert in_order((batch, out["twice"]) for batch, out in results) == [2 * i for i in range(items)]
    assert not started or started[-1][sizes[-1] :] == [started[-1][0]] * (size - sizes[-1])


def test_the_next_batch_starts_before_the_last_one_is_fetched():
    events = []
    for batch, _ in run_batches(lambda batch: events.append(f"start {batch.items}") or jnp.zeros(1), make_batches(3, 1)):
        events.append(f"got {batch.items}")
    assert events == ["start (0,)", "start (1,)", "got (0,)", "start (2,)", "got (1,)", "got (2,)"]


def test_batches_hold_every_item_once_in_one_shape():
    batches = batches_by_shape([bucket(n) for n in (3, 70, 20, 33, 31, 100, 5)], 2)
    assert [(b.shape, b.items) for b in batches] == [(128, (1, 5)), (64, (3,)), (32, (2, 4)), (16, (0, 6))]
    assert batches[1].take("abcdefg") == ["d", "d"] and batches[1].cut(["d", "d"]) == ["d"]
    assert in_order((b, b.items) for b in batches) == list(range(7))


def test_a_full_batch_is_not_copied():
    rows = np.arange(3)
    (batch,) = make_batches(3, 3)
    assert batch.take(rows) is rows and batch.cut(rows) is rows


@pytest.mark.parametrize(
    "steps, lengths, padded",
    [
        (1, (1, 16, 17, 32, 33, 64, 65, 1000), (16, 16, 32, 32, 64, 64, 128, 1024)),
        (4, (32, 33, 40, 41, 65, 129, 1025), (32, 40, 40, 48, 80, 160, 1280)),
    ],
)
def test_buckets(steps, lengths, padded):
    assert tuple(bucket(n, steps) for n in lengths) == padded
    assert all(bucket(b, steps) == b for b in padded)


def test_prompts_are_padded_on_the_right_to_one_length():
    ids, lengths = pad_prompts([[1, 2], list(range(20))])
    assert ids.shape == (2, 32) and ids.dtype == np.int32 and lengths.tolist() == [2, 20]
    assert ids[0].tolist() == [1, 2] + [0] * 30 and ids[1, :20].tolist() == list(range(20))
    assert pad_prompts([[1]], 5)[0].shape == (1, 5)
