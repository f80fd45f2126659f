"""Counted keys."""

import jax
import numpy as np

from xomni_jax.sampling.keys import item_keys


def test_keys_depend_on_all_they_are_named_for():
    data = lambda *args: np.asarray(jax.random.key_data(item_keys(*args)))  # noqa: E731
    keys = data(7, "suite", ["a", "b"], 3, 0)
    assert keys.shape[:2] == (2, 3) and len({tuple(k) for k in keys.reshape(6, -1)}) == 6
    np.testing.assert_array_equal(keys[1:, :2], data(7, "suite", ["b"], 2, 0))  # whoever is beside it, however many repeats
    for other in ((8, "suite", ["a"], 3, 0), (7, "suits", ["a"], 3, 0), (7, "suite", ["c"], 3, 0), (7, "suite", ["a"], 3, 1)):
        assert not (data(*other) == keys[:1]).all(-1).any()
