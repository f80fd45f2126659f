"""A model that nobody holds is freed, with every array of it."""

import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np

import xomni_jax
from tests.miniature import GRID
from xomni_jax.sampling.logits import SamplingConfig


def use_everything(model) -> None:
    """Calls every public method that computes something."""
    (image,) = model.generate(["a red sign"], seed=5)
    model.chat(image, "what colour?", 2)
    codes = np.stack(model.encode([image]))
    model.answer(codes, ["what colour?"], 2)
    model.decode(codes)
    model.semantics(codes)
    model.velocity(jnp.zeros((1, 8, 192)), jnp.ones(1), codes, [""])
    model.logits([[5, 6]], "text")
    model.logits([[5, 6]], "image")
    model.encode_pixels(np.zeros((1, 16, 32, 3), np.float32))
    model.text_ids(["a"])
    model.sample_codes(["a"], GRID, jax.random.split(jax.random.key(0), (1, 1)), SamplingConfig())


def test_a_model_that_nobody_holds_is_freed(model_dir):
    gc.collect()
    before = jax.live_arrays()
    model = xomni_jax.load(model_dir)
    use_everything(model)
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None
    assert [x.shape for x in jax.live_arrays() if not any(x is y for y in before)] == []
