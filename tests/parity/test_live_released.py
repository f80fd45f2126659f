"""Whole passes, text to image and image to answer, against the released program composed from transformers and diffusers."""

from __future__ import annotations

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.linen import meta
from PIL import Image

import xomni_jax
from tests.name_tables import to_params, to_tensors
from tests.parity import released
from xomni_jax.checkpoint.conversion import flatten
from xomni_jax.checkpoint.names import autoencoder, clip, mmdit, siglip_vq, t5, transformer
from xomni_jax.checkpoint.store import save_component, save_settings
from xomni_jax.data.preprocess import ImageLimits, ImageRejected
from xomni_jax.models.registry import COMPONENTS, init_params
from xomni_jax.sampling.decoder import DecodeConfig
from xomni_jax.sampling.keys import NOISE, image_keys
from xomni_jax.sampling.logits import SamplingConfig

pytestmark = pytest.mark.parity

TABLES = dict(autoencoder=autoencoder, clip=clip, mmdit=mmdit, siglip_vq=siglip_vq, t5=t5, transformer=transformer)
PROMPTS = ["a red sign that says AB", "a sign, 2 trees"]
QUESTION = "what does the sign say?"
STEPS, SEED, MAX_NEW = 4, 11, 12


def drawn_image(width: int, height: int, seed: int = 0, mode: str = "RGB") -> Image.Image:
    """Soft blobs of colour."""
    blobs = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(blobs).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def component_configs(program: released.Released) -> dict:
    """{component: config} of the reference's sizes."""
    m = dict(released.MMDIT)
    sizes = {
        "transformer": released.TRANSFORMER,
        "siglip_vq": released.SIGLIP_VQ,
        "mmdit": m | {"d_model": m["n_heads"] * m.pop("head_dim")},
        "autoencoder": released.AUTOENCODER,
        "t5": program.t5_sizes,
        "clip": program.clip_sizes,
    }
    return {name: COMPONENTS[name].config(**s) for name, s in sizes.items()}


def shapes(name: str, cfg) -> dict[str, tuple[int, ...]]:
    """{parameter path: shape} of a component."""
    return {k: x.shape for k, x in flatten(meta.unbox(jax.eval_shape(lambda: init_params(name, cfg, jax.random.key(0))))).items()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The reference, its weights in a model directory brought there by the name tables, and both for comparison."""
    directory = tmp_path_factory.mktemp("released") / "model"
    program = released.Released(directory, seed=3)
    stop_somewhere(program)
    params, tensors, configs = {}, program.tensors(), component_configs(program)
    for name, cfg in configs.items():
        params[name] = to_params(tensors[name], TABLES[name].table(cfg), shapes(name, cfg))
        save_component(directory, name, params[name], cfg)
    save_settings(directory, decode=DecodeConfig(steps=STEPS), preprocess=ImageLimits(**released.LIMITS))
    return types.SimpleNamespace(program=program, directory=directory, params=params, tensors=tensors, configs=configs)


def stop_somewhere(program: released.Released) -> None:
    """Makes the end of turn the likeliest in the middle of one answer, by swapping it with the word said there in the text head."""
    said = program.chat(drawn_image(61, 45), QUESTION, MAX_NEW)[1]
    at = next(i for i in range(3, MAX_NEW) if said[i] not in said[:i])
    stop = program.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert stop not in said[: at + 1]
    weight = program.net.lm_head.weight.data
    weight[[said[at], stop]] = weight[[stop, said[at]]]


def gumbel(keys_B, steps: int) -> np.ndarray:
    """The noise [B, T, V] with which `jax.random.categorical` draws."""
    draw = lambda key, t: jax.random.gumbel(jax.random.fold_in(key, t), (released.TRANSFORMER["image_vocab_size"],))  # noqa: E731
    return np.asarray(jax.vmap(lambda key: jax.vmap(lambda t: draw(key, t))(jnp.arange(steps)))(keys_B))


def test_every_tensor_passes_the_tables_there_and_back(whole):
    for name, table in TABLES.items():
        back, taken = to_tensors(whole.params[name], table.table(whole.configs[name])), whole.tensors[name]
        assert set(back) <= set(taken)
        for key, array in back.items():
            assert array.dtype == taken[key].dtype and array.tobytes() == np.ascontiguousarray(taken[key]).tobytes(), f"{name}: {key}"
        left = {k for k in taken if k not in back}  # of T5, the second name of its one table
        assert left <= {"encoder.embed_tokens.weight"}, left


def test_encoders_get_the_ids_of_the_flux_pipeline(whole):
    """A short prompt, the empty one, one too long for CLIP, one too long for T5."""
    prompts = ["A red Sign that's 12", "", "a red sign that says so, " * 12, "a red sign?  " * 200]
    seen, pipe = {}, whole.program.pipe
    hooks = [
        encoder.register_forward_pre_hook(lambda module, args, name=name: seen.update({name: args[0].numpy()}))
        for name, encoder in (("t5", pipe.text_encoder_2), ("clip", pipe.text_encoder))
    ]
    pipe.encode_prompt(prompts, None)
    for hook in hooks:
        hook.remove()
    ours = dict(zip(("t5", "clip"), xomni_jax.load(whole.directory).text_ids(prompts)))
    for name, length in (("t5", 512), ("clip", 77)):
        assert ours[name].shape == (4, length)
        np.testing.assert_array_equal(ours[name], seen[name])
    assert ours["t5"][1].tolist() == [1] + [0] * 511 and (ours["t5"][3] != 0).all() and ours["t5"][3, -1] == 1
    assert (ours["clip"][:, 0] == released.CLIP_EOS - 1).all() and (ours["clip"][:, -1] == released.CLIP_EOS).all()


@pytest.mark.parametrize(
    "grid, sampling, settings, decoder_guidance",
    [
        # What the released script passes; its top-k of 50 comes with transformers.
        ((3, 5), SamplingConfig(), dict(temperature=1.0, min_p=0.03, top_p=1.0, guidance_scale=1.0), 1.0),
        ((7, 3), SamplingConfig(guidance=2.5), dict(temperature=1.0, min_p=0.03, top_p=1.0, guidance_scale=2.5), None),
        (
            (2, 5),
            SamplingConfig(temperature=1.4, top_k=30, top_p=0.9, min_p=0.05, guidance=1.5),
            dict(temperature=1.4, top_k=30, top_p=0.9, min_p=0.05, guidance_scale=1.5),
            3.5,
        ),
        ((5, 2), SamplingConfig(temperature=0.0, guidance=1.7), dict(guidance_scale=1.7), None),
    ],
    ids=["released-defaults", "guided", "truncated", "greedy"],
)
def test_text_to_image(whole, grid, sampling, settings, decoder_guidance):
    """Codes equal, latents and pixels to 1e-4 before clipping, images to one level, for two prompts in one batch.

    Without `decoder_guidance` the codes alone: the decoder is compared with and without guidance, which is where its programs differ.
    """
    save_settings(whole.directory, decode=DecodeConfig(steps=STEPS, guidance=decoder_guidance or 1.0))
    model, n = xomni_jax.load(whole.directory), grid[0] * grid[1]
    keys_B, program = image_keys(SEED, len(PROMPTS)), whole.program
    noise_BTC = np.asarray(model.noise(image_keys(SEED, len(PROMPTS), NOISE), grid))
    noise_BTV = [None] * len(PROMPTS) if sampling.greedy else gumbel(keys_B, n)

    codes = np.stack([program.sample(p, grid, g, **settings) for p, g in zip(PROMPTS, noise_BTV)])
    assert len(np.unique(codes)) > 4 and not np.array_equal(codes[0], codes[1])
    np.testing.assert_array_equal(model.sample_codes(PROMPTS, grid, keys_B[:, None], sampling)["codes"][:, 0], codes)
    if decoder_guidance is None:
        return

    expected = [program.decode(c, p, x, STEPS, decoder_guidance) for c, p, x in zip(codes, PROMPTS, noise_BTC)]
    latents, pixels = (np.stack([e[i] for e in expected]) for i in (0, 1))
    with jax.set_mesh(model.mesh):
        params, args = model.decoder_params(), (*model.text_ids(PROMPTS), model.text_ids([""]), noise_BTC, model.decode_config)
        our_latents = jax.jit(lambda p, s: model.decoder.latents(p, s, *args))(params, model.semantics(codes))
        our_pixels = jax.jit(model.decoder.pixels)(params, our_latents)
    np.testing.assert_allclose(our_latents, latents, rtol=0, atol=1e-4)
    np.testing.assert_allclose(our_pixels, pixels, rtol=0, atol=1e-4)
    assert np.isfinite(pixels).all() and pixels.std() > 0.2 and np.mean(np.abs(pixels) < 1) > 0.5  # an image, not a clipped plane

    s = sampling
    ours = model.generate(PROMPTS, 16 * grid[0], 16 * grid[1], SEED, s.temperature, s.top_k, s.top_p, s.min_p, s.guidance)
    for image, (*_, theirs) in zip(ours, expected, strict=True):
        assert image.size == theirs.size == (16 * grid[1], 16 * grid[0])
        levels = np.abs(np.asarray(image).astype(int) - np.asarray(theirs))
        assert levels.max() <= 1 and np.mean(levels > 0) < 1e-3  # a value at .5 may round to either side


def test_generate_without_settings_is_the_released_script(whole):
    """The defaults of `generate`, not only a configuration that spells them out; both filters among them change these images."""
    save_settings(whole.directory, decode=DecodeConfig(steps=STEPS, guidance=1.5))
    model, sample = xomni_jax.load(whole.directory), whole.program.sample
    noise_BTC = np.asarray(model.noise(image_keys(SEED, len(PROMPTS), NOISE), (3, 5)))
    script = dict(temperature=1.0, min_p=0.03, top_p=1.0, guidance_scale=1.0)
    changed = {"top_k": [], "min_p": []}
    ours = model.generate(PROMPTS, 48, 80, SEED)
    for prompt, noise_TV, noise_TC, image in zip(PROMPTS, gumbel(image_keys(SEED, len(PROMPTS)), 15), noise_BTC, ours, strict=True):
        codes = sample(prompt, (3, 5), noise_TV, **script)
        theirs = whole.program.decode(codes, prompt, noise_TC, STEPS, 1.5)[-1]
        assert np.abs(np.asarray(image).astype(int) - np.asarray(theirs)).max() <= 1
        for name in changed:
            changed[name].append(not np.array_equal(sample(prompt, (3, 5), noise_TV, **script | {name: 0}), codes))
    assert all(map(any, changed.values())), changed


def test_what_the_decoder_is_told_matters(whole):
    """Every condition of the reference moves its latents by far more than the tolerance above, so none of them could be lost."""
    decode, rng = whole.program.decode, np.random.default_rng(1)
    codes, noise = rng.integers(0, 311, (3, 5)), rng.normal(size=(15, 20)).astype(np.float32)
    base = decode(codes, PROMPTS[0], noise, STEPS, 1.0)[0]
    others = {
        "prompt": decode(codes, PROMPTS[1], noise, STEPS, 1.0)[0],
        "codes": decode(codes[::-1].copy(), PROMPTS[0], noise, STEPS, 1.0)[0],
        "guidance": decode(codes, PROMPTS[0], noise, STEPS, 2.0)[0],
        "steps": decode(codes, PROMPTS[0], noise, STEPS + 1, 1.0)[0],
    }
    for name, latents in others.items():
        assert np.abs(latents - base).max() > 0.02, name


@pytest.mark.parametrize("size, question", [((61, 45), QUESTION), ((45, 131), "which colour?"), ((90, 77), "A or B?\nSay one.")], ids=str)
def test_chat(whole, size, question):
    """Codes of the image, ids of the turn, logits, ids of the answer; the first answer stops by itself."""
    model, image, tok = xomni_jax.load(whole.directory), drawn_image(*size), whole.program.tokenizer
    codes = model.encode([image])[0]
    np.testing.assert_array_equal(codes, whole.program.tokenize(image))
    assert len(np.unique(codes)) > 4
    turn, answer = whole.program.chat(image, question, MAX_NEW)
    assert tok.decode(turn).startswith("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<SOM>")
    assert model.tokenizer.understanding_prompt(codes, question).tolist() == turn
    ours = model.answer_ids([codes], [question], MAX_NEW)[0].tolist()
    assert ours[: len(answer)] == answer and ours[len(answer) :] == [model.tokenizer.pad] * (MAX_NEW - len(answer))
    stop = tok.convert_tokens_to_ids("<|im_end|>")
    if question == QUESTION:
        assert 3 < len(answer) < MAX_NEW and answer[-1] == stop
    assert model.chat(image, question, MAX_NEW) == tok.decode(answer, skip_special_tokens=True).strip()
    least = np.finfo(np.float32).min
    for mode in ("text", "image"):
        got, expected = np.asarray(model.logits(np.array([turn]), mode)), reference_logits(whole.program, turn, mode)
        np.testing.assert_array_equal(got == least, expected == least)
        np.testing.assert_allclose(np.where(got == least, 0, got), np.where(expected == least, 0, expected), rtol=0, atol=1e-4)


def reference_logits(program: released.Released, ids: list[int], mode: str) -> np.ndarray:
    """[1, L, text + multimodal ids]."""
    import torch

    program.language.mode = mode
    with torch.no_grad():
        return program.language(torch.tensor([ids])).logits.numpy()


def test_an_image_that_is_refused_there_is_refused_here(whole):
    model = xomni_jax.load(whole.directory)
    for size in ((29, 40), (31, 94), (200, 20)):
        assert released.preprocess(drawn_image(*size)) is None
        with pytest.raises(ImageRejected):
            model.encode([drawn_image(*size)])
    assert json.loads((whole.directory / "model.json").read_text())["settings"]["preprocess"]["min_short_size"] == 30
