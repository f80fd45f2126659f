"""Several codes per pass: the same images, in no more passes, at every image's own pace."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.sampling.test_generate import BOXED, CFG, FREE, IDS, LENGTHS, MODEL, NEGATIVE, PARAMS, keys_of
from xomni_jax.sampling.engine import Engine
from xomni_jax.sampling.logits import SamplingConfig
from xomni_jax.sampling.parallel import ParallelSampler
from xomni_jax.sampling.sampler import Sampler
from xomni_jax.sampling.segments import SegmentSpec, image_spec
from xomni_jax.sharding.mesh import make_mesh
from xomni_jax.sharding.rules import param_shardings

GRID, KEYS = (3, 5), keys_of(3, 4)
TRUNCATED = SamplingConfig(temperature=0.7, top_k=6, min_p=0.05, guidance=2.5)


def windowed(sampling: SamplingConfig, window: int) -> SamplingConfig:
    return SamplingConfig(**{**vars(sampling), "window": window})


@functools.cache
def drawn(sampling: SamplingConfig, most: int = 512):
    sampler = Sampler.make(MODEL, GRID, sampling, most, return_mask=True)
    return jax.tree.map(np.asarray, sampler(PARAMS, IDS, LENGTHS, KEYS, NEGATIVE if sampling.guided else None))


@pytest.mark.parametrize("window", [2, 4, 16, 32])
@pytest.mark.parametrize("sampling", [FREE, TRUNCATED, SamplingConfig(temperature=0.0)], ids=["free", "truncated and guided", "greedy"])
def test_the_images_are_those_drawn_one_by_one(sampling, window):
    expected, found = drawn(sampling), drawn(windowed(sampling, window))
    np.testing.assert_array_equal(found["codes"], expected["codes"])
    np.testing.assert_array_equal(found["sampling_mask"], expected["sampling_mask"])
    # Float32 sums over the same numbers in passes of another shape.
    np.testing.assert_allclose(found["logp"], expected["logp"], rtol=0, atol=1e-5)


def test_in_calls_between_which_the_caller_may_stop():
    calls, sampler = [], Sampler.make(MODEL, GRID, windowed(FREE, 4), 5)
    found = sampler(PARAMS, IDS, LENGTHS, KEYS, None, lambda: calls.append(1))
    assert sampler.segments == 3 and len(calls) == 2
    np.testing.assert_array_equal(found["codes"], drawn(FREE)["codes"])


def test_on_a_mesh():
    mesh = make_mesh(dict(fsdp=2, tensor=2), jax.devices()[:4])
    params = jax.device_put(PARAMS, param_shardings(BOXED, mesh))
    rows = [np.concatenate([x, x[:1]]) for x in (IDS, LENGTHS)]
    keys = jnp.concatenate([KEYS, KEYS[:1]])
    with jax.set_mesh(mesh):
        found = Sampler.make(MODEL, GRID, windowed(FREE, 4))(params, *rows, keys, None)
    np.testing.assert_array_equal(found["codes"][:3], drawn(FREE)["codes"])


@functools.cache
def passes(window: int, temperature: float) -> np.ndarray:
    """[P, R] passes of every image."""
    parallel = ParallelSampler(Engine(MODEL), image_spec(15, SamplingConfig(temperature, 0, min_p=0.0, window=window)), 5)

    @jax.jit
    def run():
        prompt, state = parallel.engine.start(PARAMS, (IDS, LENGTHS), 4, parallel.room)
        return parallel.advance(PARAMS, prompt, parallel.begin(PARAMS, state, KEYS), KEYS, 15).passes

    return np.asarray(run())


def test_every_image_goes_on_at_its_own_pace():
    """Whichever guesses are right: none needs more passes than codes, and codes that hardly vary are guessed."""
    found = passes(4, 0.1)
    assert found.max() <= 15 and found.min() < found.max() and found.min() >= 4
    assert found.mean() < 0.8 * 15 and passes(2, 0.1).mean() > found.mean()


def test_what_follows_the_image_sees_it_alone():
    """A text after images of unequal pace is that after images drawn one by one."""
    text, engine = SegmentSpec("text", "text", 6, SamplingConfig(top_k=0, min_p=0.0), (4,)), Engine(MODEL)

    def state_after(window):
        spec = image_spec(15, windowed(FREE, window))
        parallel = ParallelSampler(engine, spec, 5)
        prompt, state = engine.start(PARAMS, (IDS, LENGTHS), 4, 15 + window + text.length)
        if window > 1:
            return prompt, parallel.advance(PARAMS, prompt, parallel.begin(PARAMS, state, KEYS), KEYS, 15).state
        return prompt, engine.sample(PARAMS, prompt, state, spec, KEYS)[0]

    def words(window):
        prompt, state = state_after(window)
        return engine.sample(PARAMS, prompt, state, text, KEYS)[1]

    expected, found = jax.jit(words, static_argnums=0)(1), jax.jit(words, static_argnums=0)(4)
    np.testing.assert_array_equal(found.ids, expected.ids)
    np.testing.assert_allclose(found.logp, expected.logp, rtol=0, atol=1e-5)


def test_windows_that_cannot_be():
    for window in (0, 257):
        with pytest.raises(ValueError, match=rf"sampling window={window} is not a number of codes from 1 to 256"):
            SamplingConfig(window=window)
    assert CFG.image_vocab_size == 14
