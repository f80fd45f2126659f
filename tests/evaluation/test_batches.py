"""Static shapes and counted keys."""

import jax
import numpy as np
import pytest

from xomni_jax.evaluation.batches import bucket, item_keys, make_batches


@pytest.mark.parametrize(
    "steps, lengths, padded",
    [(1, (1, 32, 33, 64, 65, 1000), (32, 32, 64, 64, 128, 1024)), (4, (32, 33, 40, 41, 65, 129, 1025), (32, 40, 40, 48, 80, 160, 1280))],
)
def test_buckets(steps, lengths, padded):
    assert tuple(bucket(n, steps) for n in lengths) == padded
    assert all(bucket(b, steps) == b for b in padded)


def test_batches_hold_every_item_once_in_one_shape():
    lengths = [3, 70, 20, 33, 31, 100, 5]
    batches = make_batches(range(7), lengths, 2)
    assert [(b.length, b.items) for b in batches] == [(128, (1, 5)), (64, (3,)), (32, (0, 2)), (32, (4, 6))]
    assert all(len(b.filled) == 2 for b in batches) and batches[1].filled == [3, 3]


def test_keys_depend_on_all_they_are_named_for():
    data = lambda *args: np.asarray(jax.random.key_data(item_keys(*args)))  # noqa: E731
    keys = data(7, "suite", ["a", "b"], 3, 0)
    assert keys.shape[:2] == (2, 3) and len({tuple(k) for k in keys.reshape(6, -1)}) == 6
    np.testing.assert_array_equal(keys[1:, :2], data(7, "suite", ["b"], 2, 0))  # whoever is beside it, however many repeats
    for other in ((8, "suite", ["a"], 3, 0), (7, "suits", ["a"], 3, 0), (7, "suite", ["c"], 3, 0), (7, "suite", ["a"], 3, 1)):
        assert not (data(*other) == keys[:1]).all(-1).any()
