"""OmniTokenizer: parity with the public code, and what our layers over time promise that the published ones do not.

goldens/omnitokenizer.npz holds weights, inputs and outputs of the public code (FoundationVision/OmniTokenizer 701b619, with torch from 2.1
on) on small random weights: a clip of 9 frames of 24 x 24 pixels and its first frame. Tensors that nothing uses are left out.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import xomni_jax
from tests import name_tables
from tests.checkpoint.writing import write_torch_file
from tests.models import golden
from xomni_jax.checkpoint.convert import convert
from xomni_jax.checkpoint.names import omnitokenizer
from xomni_jax.models.omnitokenizer import OmniTokenizer, OmniTokenizerConfig
from xomni_jax.tokenizers.clips import ClipTokenizer

UNUSED = {
    "encoder.enc_temporal_transformer.layers.0.1.context_norm.gamma": np.ones(36, np.float32),
    "video_discriminator.model0.0.bias": np.ones(4, np.float32),
    "codebook.z_avg": np.ones((59, 5), np.float32),
}


@pytest.fixture(scope="module")
def want():
    return golden.load("omnitokenizer")


@pytest.fixture(scope="module")
def model(tmp_path_factory, want):
    """The golden's weights in a file as Lightning writes it, converted."""
    folder = tmp_path_factory.mktemp("omnitokenizer")
    tensors = {f"state_dict.{key}": value for key, value in (golden.part(want, "w") | UNUSED).items()}
    write_torch_file(folder / "imagenet_k600.ckpt", tensors)
    convert(folder / "imagenet_k600.ckpt", None, folder / "model", say=list)
    return xomni_jax.load(folder / "model")


def clips(want, frames: int = 9) -> np.ndarray:
    return np.moveaxis(want["in/video"][:, :, :frames], 1, -1)


@pytest.mark.parametrize("kind, frames", [("image", 1), ("video", 9)])
def test_the_public_code(kind, frames, model, want):
    cfg, params = model.config("omnitokenizer"), model.params("omnitokenizer")
    net, out = OmniTokenizer(cfg), {key: np.moveaxis(value, 1, -1) for key, value in golden.part(want, kind).items() if value.ndim > 3}
    pixels, codes = clips(want, frames), want[f"{kind}/indices"]

    @jax.jit
    def run(params, pixels, codes):
        bound = net.bind({"params": params})
        return bound.features(pixels), bound.encode(pixels), bound.semantics(codes), bound.decode(codes)

    features, encoded, rows, made = run(params, pixels, codes)
    golden.assert_close(features, out["encoder_out"], "encoder")
    np.testing.assert_array_equal(encoded, codes)
    golden.assert_close(rows, out["quantized"], "rows")
    golden.assert_close(made, out["reconstruction_from_indices"].reshape(made.shape), "pixels")


def test_the_way_back(model, want):
    back = name_tables.to_tensors(model.params("omnitokenizer"), omnitokenizer.table(model.config("omnitokenizer")))
    for name in [name for name in back if name.endswith(".to_k.weight")]:
        key = name.replace(".to_k.", ".to_kv.")
        back[key] = np.concatenate([back.pop(name), back.pop(name.replace(".to_k.", ".to_v."))])
    tensors = golden.part(want, "w")
    assert back.keys() == tensors.keys()
    for key, value in tensors.items():
        np.testing.assert_array_equal(back[key], value, err_msg=key)


def test_later_frames_never_change_earlier_codes(model, want):
    """To the bit with our layers over time, in both directions; with the published ones the first frame already changes."""
    params = model.params("omnitokenizer")
    clip = clips(want)
    other = clip.copy()
    other[:, 5:] = np.random.default_rng(1).uniform(-1, 1, other[:, 5:].shape)
    changed = {}
    for scrambled in (False, True):
        net = OmniTokenizer(dataclasses.replace(model.config("omnitokenizer"), scrambled=scrambled))
        run = jax.jit(lambda p, x, net=net: net.apply({"params": p}, x, method="outputs"))
        first, second = np.asarray(run(params, clip)), np.asarray(run(params, other))
        changed[scrambled] = [bool((first[:, t] != second[:, t]).any()) for t in range(3)]
        if not scrambled:
            image = np.asarray(run(params, clip[:, :1]))
            golden.assert_close(first[:, :1], image, "the image alone", 1e-5)  # float32, summed in another order for other shapes
            codes = np.asarray(jax.jit(lambda p, x, net=net: net.apply({"params": p}, x, method="encode"))(params, clip))
            decode = jax.jit(lambda p, x, net=net: net.apply({"params": p}, x, method="decode"))
            swapped = codes.copy()
            swapped[:, 2] = (swapped[:, 2] + 1) % 59
            same = np.asarray(decode(params, codes)) == np.asarray(decode(params, swapped))
            assert same[:, :5].all() and not same[:, 5:].all()
    assert changed == {False: [False, False, True], True: [True, True, True]}


def test_images_and_clips_through_the_protocol(model, want):
    tokenizer, params = model.image_tokenizer, model.params("omnitokenizer")
    assert tokenizer.layout(24, 24).shape == (1, 6, 6) and tokenizer.layout(24, 48, 9).shape == (3, 6, 12)
    image = clips(want, 1)[:, 0]
    codes = np.asarray(model.encode_pixels(image))
    np.testing.assert_array_equal(codes, want["image/indices"])
    np.testing.assert_array_equal(codes, model.encode_pixels(image[:, None]))  # an image is a clip of one frame
    assert [np.asarray(x).shape for x in model.decode(codes)] == [(24, 24, 3)]
    assert jax.eval_shape(tokenizer.pixels, params, jnp.zeros((1, 3, 6, 6), jnp.int32)).shape == (1, 9, 24, 24, 3)


def test_refusals(model):
    tokenizer = model.image_tokenizer
    with pytest.raises(ValueError, match="8 frames are not one and whole groups of 4; the nearest number that is: 9"):
        tokenizer.layout(24, 24, 8)
    with pytest.raises(ValueError, match="25x24 pixels are not whole 4x4 tokens; the nearest size that is: 24x24"):
        tokenizer.layout(25, 24)
    with pytest.raises(ValueError, match=r"codes must be integers \[B, T, Y, X\]"):
        model.checked(np.zeros((1, 6, 6), int))
    with pytest.raises(ValueError, match="no codes; use one of kind vq"):
        ClipTokenizer(OmniTokenizerConfig(kind="kl"))
    with pytest.raises(ValueError, match="a grid of 5 x 6 tokens does not divide into windows of 3"):
        model.encode_pixels(np.zeros((1, 20, 24, 3), np.float32))
    with pytest.raises(ValueError, match="a clip of 7 frames of 24 x 24 pixels does not divide into 1"):
        tokenizer.encode(model.params("omnitokenizer"), jnp.zeros((1, 7, 24, 24, 3)))
    with pytest.raises(ValueError, match="a block 'a' is unknown"):
        OmniTokenizerConfig(encoder_blocks="ta")
