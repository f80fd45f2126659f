"""One object, text and images in and out: an image depends on its seed, its place and its prompt alone."""

import json
import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import xomni_jax
from tests.encoder_tokenizers import CLIP_EOS, write_clip, write_t5
from tests.miniature import CODES, GRID, SIZE, configs
from xomni_jax.checkpoint.store import TOKENIZERS, CheckpointError, copy_components
from xomni_jax.sequence.tokenizer import encoder_ids, fixed_length_ids, read_tokenizer
from xomni_jax.sharding.mesh import make_mesh

PROMPTS = ["a red sign", "a blue sign that says AB", "x"]


@pytest.fixture(scope="module")
def model(model_dir):
    """On one device."""
    return xomni_jax.load(model_dir)


@pytest.fixture(scope="module")
def images(model):
    """Three prompts in one batch."""
    return [np.asarray(p) for p in model.generate(PROMPTS, seed=5)]


def test_generate_makes_one_image_per_prompt_at_the_models_own_size(images):
    assert [p.shape for p in images] == [(*SIZE, 3)] * 3 and images[0].dtype == np.uint8
    assert not np.array_equal(images[0], images[1])


def test_an_image_does_not_depend_on_its_batch(model, images):
    again = [np.asarray(p) for p in model.generate([PROMPTS[0], "another prompt", PROMPTS[2]], seed=5)]
    np.testing.assert_array_equal(again[0], images[0])
    np.testing.assert_array_equal(again[2], images[2])
    assert not np.array_equal(model.generate(PROMPTS[:1], seed=6)[0], images[0])


def test_the_mesh_changes_nothing(model_dir, images):
    """Two ways: three prompts are padded to four rows, one image to two, and cut off again."""
    sharded = xomni_jax.load(model_dir, make_mesh({"fsdp": 2}, jax.devices()[:2]))
    assert sharded.num_data_shards == 2
    for ours, theirs in zip(sharded.generate(PROMPTS, seed=5), images, strict=True):
        assert np.abs(np.asarray(ours).astype(int) - theirs).max() <= 1  # a rounding of the last bit
    kernel = sharded.params("siglip_vq")["vit"]["blocks"]["fc1"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (1, 32 // 2, 48)
    assert sharded.encode([images[0]])[0].shape == GRID
    (batch,) = sharded.batches(3)
    assert batch.take(np.arange(3)).tolist() == [0, 1, 2, 0] and batch.cut(np.arange(4)).tolist() == [0, 1, 2]
    assert [b.size for b in sharded.batches(7, 2)] == [4, 4] and [b.size for b in sharded.batches(1, 16)] == [2]


def test_the_batch_size_changes_nothing(model, images):
    for ours, theirs in zip(model.generate(PROMPTS, seed=5, batch_size=2), images, strict=True):
        # Products of another batch may round float32 differently, and so the last step to 8 bits: by one at most.
        assert np.abs(np.asarray(ours, int) - np.asarray(theirs, int)).max() <= 1
    codes = model.encode([*images, np.zeros((16, 48, 3), np.uint8)], batch_size=2)
    assert codes[3].shape == (2, 6)
    np.testing.assert_array_equal(model.encode([images[2]])[0], codes[2])
    questions = ["one?", "what does the sign say?", "two?"]
    assert model.answer(codes[:3], questions, 4, batch_size=2) == model.answer(codes[:3], questions, 4)


def test_codes_there_and_back(model, images):
    codes = model.encode([images[0], np.zeros((16, 48, 3), np.uint8)])
    assert codes[0].shape == GRID and codes[1].shape == (2, 6) and codes[0].max() < CODES
    semantics = model.semantics(codes[0][None])
    assert semantics.shape == (1, *GRID, configs()["siglip_vq"].width)
    assert model.velocity(jnp.zeros((1, 8, 192)), jnp.ones(1), codes[0][None], [""]).shape == (1, 8, 192)
    again = model.decode(codes[0][None], [PROMPTS[0]], seed=3)
    assert again[0].size == (SIZE[1], SIZE[0])
    np.testing.assert_array_equal(again[0], model.decode(codes[0][None], [PROMPTS[0]], seed=3)[0])
    assert not np.array_equal(again[0], model.decode(codes[0][None], [PROMPTS[0]], seed=4)[0])


def test_decoder_guidance_changes_the_image(model):
    import dataclasses

    codes, noise = np.arange(8).reshape(1, *GRID), jnp.ones((1, 8, 192))
    plain = model.decode_images(codes, ["a sign"], noise)
    guided = model.decode_images(codes, ["a sign"], noise, dataclasses.replace(model.decode_config, guidance=3.0))
    assert not np.array_equal(plain, guided)


def test_logits_by_mode(model):
    ids = np.array([[5, 6, 384 + 3, 384 + 9]])
    text, image = np.asarray(model.logits(ids, "text")), np.asarray(model.logits(ids, "image"))
    least = np.finfo(np.float32).min
    assert text.shape == image.shape == (1, 4, 384 + 576)
    assert (text[..., 384:] == least).all() and (text[..., :384] > least).all()
    assert (image[..., :384] == least).all() and (image[..., 384 + CODES :] == least).all()
    assert (image[..., 384 : 384 + CODES] > least).all()
    net, params = model.module("transformer"), model.params("transformer")
    hidden = net.apply({"params": params}, ids)
    np.testing.assert_allclose(text[..., :384], net.apply({"params": params}, hidden, method="text_logits"), rtol=1e-5, atol=1e-6)


def test_chat_answers_with_text(model, images):
    answer = model.chat(images[0], "what does the sign say?", 4)
    assert isinstance(answer, str) and "<|" not in answer  # specials are left out
    assert model.answer(model.encode(images[:2]), ["one?", "two?"], 4)[0] == model.chat(images[0], "one?", 4)


def test_a_cast_reaches_every_parameter(model_dir):
    params = xomni_jax.load(model_dir, dtype=jnp.bfloat16).params("siglip_vq")
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize(
    "arguments, words",
    [
        ((["a sign"], 16, 30), "16x30 pixels are not whole 8x8 tokens; the nearest size that is: 16x32"),
        ((["a sign"], 16, 64), "at most 48 pixels"),
        ((["a sign"], 8, 40), "at most a factor of 4"),
        ((["a sign"], 0, 32), "not whole 8x8 tokens"),
        ((["a", " "],), "prompt 2 is empty"),
        (([],), "no prompts given"),
        (([40 * "sign "],), "tokens, this model's decoder takes 31; shorten it"),
        ((["<MM-Token-3>"],), "contains the multimodal token <MM-Token-3>"),
        ((["a"], None, None, -1), "seed=-1 must lie within"),
    ],
)
def test_generate_refuses(model, arguments, words):
    with pytest.raises(ValueError, match=words) as error:
        model.generate(*arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "codes, words",
    [
        (np.full((1, *GRID), CODES), f"must lie within 0..{CODES - 1}, got {CODES}..{CODES}"),
        (np.full((1, *GRID), -1), "got -1..-1"),
        (np.zeros(GRID, int), r"integers \[B, Y, X\], got int64 \(2, 4\)"),
        (np.zeros((1, *GRID)), "integers"),
        (np.zeros((0, *GRID), int), "integers"),
    ],
)
def test_codes_are_checked(model, codes, words):
    for use in (model.decode, model.semantics):
        with pytest.raises(ValueError, match=words):
            use(codes)


def test_one_prompt_per_image(model):
    with pytest.raises(ValueError, match="2 prompts for 1 images' codes"):
        model.decode(np.zeros((1, *GRID), int), ["a", "b"])


def test_an_unknown_mode_is_refused(model):
    with pytest.raises(ValueError, match="mode='both' is unknown"):
        model.logits([[1]], "both")


def test_a_missing_part_is_named_when_used(model_dir, tmp_path):
    copy_components(model_dir, tmp_path / "part", ("siglip_vq", "mmdit", "t5", "clip", "autoencoder"))
    part = xomni_jax.load(tmp_path / "part")
    assert part.decode(np.zeros((1, *GRID), int))[0].size == (32, 16)  # needs no transformer
    with pytest.raises(ValueError, match="this model has no transformer"):
        part.generate("a sign")


@pytest.fixture
def with_encoders(model_dir, tmp_path):
    """A copy of the model whose text encoders have tokenizers of their own."""
    directory = tmp_path / "with_encoders"
    shutil.copytree(model_dir, directory)
    write_t5(directory / "tokenizer_t5")
    write_clip(directory / "tokenizer_clip")
    description = json.loads((directory / "model.json").read_text())
    description["components"]["clip"]["config"]["eos_id"] = CLIP_EOS
    (directory / "model.json").write_text(json.dumps(description))
    return directory


def test_encoders_read_their_own_tokenizers(model, images, with_encoders):
    own = xomni_jax.load(with_encoders)
    t5, clip = own.text_ids(PROMPTS)
    np.testing.assert_array_equal(t5, encoder_ids(read_tokenizer(with_encoders / "tokenizer_t5"), PROMPTS, 32))
    np.testing.assert_array_equal(clip, encoder_ids(read_tokenizer(with_encoders / "tokenizer_clip"), PROMPTS, 16))
    for ids, length in zip(model.text_ids(PROMPTS), (32, 16)):
        np.testing.assert_array_equal(ids, fixed_length_ids(model.tokenizer, PROMPTS, length))
    assert not np.array_equal(np.asarray(own.generate(PROMPTS, seed=5)[0]), images[0])


def test_tokenizers_travel_with_the_components(with_encoders, tmp_path):
    copy_components(with_encoders, tmp_path / "copy", ("t5", "clip"))
    for name in TOKENIZERS:
        assert {p.name for p in (tmp_path / "copy" / name).iterdir()} == {p.name for p in (with_encoders / name).iterdir()}


def test_a_long_prompt_is_cut_for_an_encoder_with_its_own_tokenizer(with_encoders):
    own = xomni_jax.load(with_encoders)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        own.check_prompts(["a red sign " * 10])  # 30 tokens for T5, far too many for CLIP: no news
    with pytest.warns(UserWarning, match="prompt 2 .* has 33 tokens, this model's decoder takes 31: its codes are sampled from all of it"):
        own.check_prompts(["a sign", "a red sign " * 11])


@pytest.mark.parametrize(
    "name, change, words",
    [
        ("clip", {}, f"ends texts with id {CLIP_EOS}, the encoder pools at 381; take both from one checkpoint"),
        ("clip", {"vocab_size": 50}, f"{CLIP_EOS + 1} tokens for an encoder of 50"),
        ("t5", {"vocab_size": 50}, "tokens for an encoder of 50; take both from one checkpoint"),
    ],
)
def test_a_foreign_tokenizer_is_refused(model_dir, tmp_path, name, change, words):
    copy_components(model_dir, tmp_path / "part", (name,))
    {"t5": write_t5, "clip": write_clip}[name](tmp_path / "part" / f"tokenizer_{name}")
    part = xomni_jax.load(tmp_path / "part")
    config = part.description["components"][name]["config"]
    config.update({"eos_id": 1} if change and name == "clip" else {}, **change)
    with pytest.raises(CheckpointError, match=words):
        part.encoder_tokenizer(name)


def test_a_tokenizer_without_padding_is_refused(model_dir, tmp_path):
    copy_components(model_dir, tmp_path / "part", ("t5",))
    folder = tmp_path / "part" / "tokenizer_t5"
    write_t5(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "pad_token"}))
    with pytest.raises(CheckpointError, match="names no padding token; copy the whole folder of FLUX.1-dev"):
        xomni_jax.load(tmp_path / "part").encoder_tokenizer("t5")


def test_answer_ids_end_with_the_turn(model, images):
    codes = model.encode(images[:1])
    first = int(model.answer_ids(codes, ["one?"], 4)[0, 0])
    model_ends = xomni_jax.load(model.path)
    model_ends.tokenizer.end_of_turn = first  # whatever a random model says first
    assert model_ends.answer_ids(codes, ["one?"], 4).tolist() == [[first, *[model.tokenizer.pad] * 3]]


def test_fields_of_older_models_are_read(model_dir):
    old = xomni_jax.load(model_dir)
    config = old.description["components"]["mmdit"]["config"]
    config["at_once"] = config.pop("microbatch") + 3
    assert old.config("mmdit").microbatch == 3
