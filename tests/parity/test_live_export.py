"""Exported checkpoints are loaded by transformers, diffusers and torch, which compute from them what we compute."""

import json
import shutil

import jax
import numpy as np
import pytest

import xomni_jax
from tests.checkpoint import released_dirs as dirs
from tests.encoder_tokenizers import CLIP_TOKENS, write_clip, write_t5
from xomni_jax.checkpoint.convert import convert
from xomni_jax.checkpoint.export import export

pytestmark = pytest.mark.parity
S = dirs.SMALL


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(our model, its export), in single precision."""
    folder = tmp_path_factory.mktemp("exported")
    x, f = dirs.write_xomni(folder / "x", vision_dtype="float32"), dirs.write_flux(folder / "f")
    convert(x, f, folder / "model", "float32", say=list)
    export(folder / "model", folder / "back", shard_bytes=40_000, say=list)
    return xomni_jax.load(folder / "model"), folder / "back"


def close(ours, theirs):
    a, b = np.asarray(ours, np.float64), theirs.detach().numpy().astype(np.float64)
    assert a.shape == b.shape and np.abs(a - b).max() < 1e-4 * np.abs(b).max()


def test_transformers_loads_the_language_part(exported):
    import torch
    from safetensors.torch import load_file
    from transformers import Qwen2Config, Qwen2ForCausalLM

    model, back = exported
    index = json.loads((back / "model.safetensors.index.json").read_text())["weight_map"]
    state = {}
    for shard in sorted(set(index.values())):
        state |= load_file(back / shard)
    assert set(state) == set(index) == set(dirs.ar(S["ar"]))
    config = json.loads((back / "config.json").read_text())
    first, count = config["num_mm_adap_layers"], S["ar"]["language"]
    names = {
        "model.embed_tokens.weight": "model.lm_embed_tokens.weight",
        "model.norm.weight": "model.lm_norm.weight",
        "lm_head.weight": "lm_head.weight",
    }
    for key in state:
        if key.startswith("model.layers.") and first <= (i := int(key.split(".")[2])) < first + count:
            names[key.replace(f"layers.{i}.", f"layers.{i - first}.", 1)] = key
    known = {
        k: config[k]
        for k in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "rms_norm_eps",
        )
    }
    qwen = Qwen2Config(
        **known,
        num_hidden_layers=count,
        rope_parameters={"rope_type": "default", "rope_theta": config["rope_theta"]},
        tie_word_embeddings=False,
    )
    peer = Qwen2ForCausalLM(qwen).eval()
    peer.load_state_dict({ours: state[theirs] for ours, theirs in names.items()}, strict=True)
    ids = np.random.default_rng(0).integers(0, S["ar"]["vocab"], (2, 9))
    with torch.no_grad():
        close(model.logits(ids, "text")[:, :, : S["ar"]["vocab"]], peer(torch.tensor(ids)).logits)


def test_diffusers_loads_the_mmdit(exported):
    import torch
    from diffusers import FluxTransformer2DModel

    model, back = exported
    peer = FluxTransformer2DModel.from_pretrained(back / "mmdit").eval()  # leaves siglip_embed, which is X-Omni's own, aside
    c, rng, Y, X = S["mmdit"], np.random.default_rng(0), 2, 3
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    latents, text, pooled = draw(2, Y * X, c["channels"]), draw(2, 5, c["text"]), draw(2, c["pooled"])
    sigma, guidance = np.array([0.83, 0.17], np.float32), np.array([1.0, 3.5], np.float32)
    ids = np.stack([np.zeros((Y, X)), *np.mgrid[:Y, :X]], -1).reshape(-1, 3).astype(np.float32)
    as_torch = dict(
        hidden_states=latents,
        encoder_hidden_states=text,
        pooled_projections=pooled,
        timestep=sigma,
        guidance=guidance,
        img_ids=ids,
        txt_ids=np.zeros((5, 3), np.float32),
    )
    with torch.no_grad():
        theirs = peer(**{k: torch.from_numpy(v) for k, v in as_torch.items()}, return_dict=False)[0]
    close(model.module("mmdit").apply({"params": model.params("mmdit")}, latents, sigma, text, pooled, (Y, X), None, guidance), theirs)


def test_diffusers_loads_the_vae(exported):
    import torch
    from diffusers import AutoencoderKL

    model, back = exported
    peer = AutoencoderKL.from_pretrained(back / "flux" / "vae").eval()
    latents = np.random.default_rng(0).normal(size=(1, 4, 6, 3)).astype(np.float32)
    ours = model.module("autoencoder").apply({"params": model.params("autoencoder")}, latents, method="decode")
    scaled = torch.from_numpy(latents).permute(0, 3, 1, 2) / peer.config.scaling_factor + peer.config.shift_factor
    with torch.no_grad():
        close(ours, peer.decode(scaled).sample.permute(0, 2, 3, 1))


def test_transformers_loads_the_text_encoders(exported):
    import torch
    from transformers import CLIPTextModel, T5EncoderModel

    model, back = exported
    rng = np.random.default_rng(0)
    ids = rng.integers(0, S["t5"]["vocab"], (2, 7))
    with torch.no_grad():
        theirs = T5EncoderModel.from_pretrained(back / "flux" / "text_encoder_2").eval()(torch.tensor(ids)).last_hidden_state
    close(model.module("t5").apply({"params": model.params("t5")}, ids), theirs)
    ids = rng.integers(0, S["clip"]["vocab"] - 1, (2, 9))
    ids[0, 5:], ids[1, 7:] = S["clip"]["vocab"] - 1, S["clip"]["vocab"] - 1
    with torch.no_grad():
        theirs = CLIPTextModel.from_pretrained(back / "flux" / "text_encoder").eval()(torch.tensor(ids))
    hidden, pooled = model.module("clip").apply({"params": model.params("clip")}, ids)
    close(hidden, theirs.last_hidden_state), close(pooled, theirs.pooler_output)


@pytest.mark.parametrize("trained", ["all", "vae"])
def test_diffusers_opens_the_flux_folder(trained, tmp_path):
    """As a FluxPipeline, alone or with the transformer passed as the published code does; what was not exported is FLUX.1-dev's."""
    import torch
    from diffusers import FluxPipeline, FluxTransformer2DModel

    sizes = S | {"t5": S["t5"] | dict(vocab=write_t5(tmp_path / "t5")), "clip": S["clip"] | dict(vocab=len(CLIP_TOKENS), length=77)}
    x, f = dirs.write_xomni(tmp_path / "x", sizes, vision_dtype="float32"), dirs.write_flux(tmp_path / "f", sizes)
    for name in ("tokenizer", "tokenizer_2"):
        shutil.rmtree(f / name)
    (tmp_path / "t5").rename(f / "tokenizer_2"), write_clip(f / "tokenizer")
    convert(x, f, tmp_path / "model", "float32", say=list)
    lines, back = [], tmp_path / "back"
    export(tmp_path / "model", back, only=None if trained == "all" else trained, say=lines.append)
    for name in () if trained == "all" else lines[-1].removeprefix("flux: diffusers opens it once ").split(" of ")[0].split(", "):
        shutil.copytree(f / name, back / "flux" / name)
    passed = {"transformer": FluxTransformer2DModel.from_pretrained(back / "mmdit")} if trained == "all" else {}
    pipe = FluxPipeline.from_pretrained(back / "flux", torch_dtype=torch.float32, **passed)
    assert FluxPipeline.from_pretrained(back / "flux").transformer.config.num_layers == S["mmdit"]["double"]
    model, prompts = xomni_jax.load(tmp_path / "model"), ["a red sign that says 7", ""]
    with torch.no_grad():
        text, pooled, _ = pipe.encode_prompt(prompts, None)
    ids = model.text_ids(prompts)
    close(model.module("t5").apply({"params": model.params("t5")}, ids[0]), text)
    close(model.module("clip").apply({"params": model.params("clip")}, ids[1])[1], pooled)
    assert pipe.vae.config.scaling_factor == 0.3611 and pipe.scheduler.config.max_shift == 1.25


def test_torch_loads_the_pth(exported):
    import torch

    model, back = exported
    vit = torch.load(back / "vit" / "siglip2_giant.pth", weights_only=True)
    assert {k: tuple(v.shape) for k, v in vit.items()} == {
        k: s for k, s in dirs.vit(S["vit"]).items() if not k.startswith(("norm.", "attn_pool", "head"))
    }
    kernel = model.params("siglip_vq")["vit"]["blocks"]["fc1"]["kernel"]
    np.testing.assert_array_equal(vit["blocks.1.mlp.fc1.weight"].numpy(), np.asarray(kernel[1]).T)


@pytest.mark.parametrize("kind", ["vit", "projector"])
def test_files_that_torch_saved_are_converted(kind, tmp_path):
    """torch.save's own .pth, tensors in shared and transposed storages, inside an ordered dict."""
    import collections

    import torch

    x = dirs.write_xomni(tmp_path / "x")
    file = x / "vit" / ("siglip2_giant.pth" if kind == "vit" else "projector.pth")
    state = collections.OrderedDict(torch.load(file, weights_only=True))
    key = "blocks.1.mlp.fc2.weight" if kind == "vit" else "quantize.embedding.weight"
    whole = torch.zeros(2, *reversed(state[key].shape))
    whole[1] = state[key].T
    state[key] = whole[1].T
    torch.save(state, file)
    convert(x, None, tmp_path / "out", only="tokenizer", say=list)
    params = xomni_jax.load(tmp_path / "out").params("siglip_vq")
    ours = params["vit"]["blocks"]["fc2"]["kernel"][1].T if kind == "vit" else params["codebook"]
    np.testing.assert_array_equal(np.asarray(ours), state[key].numpy())
    assert jax.tree.leaves(params)


def test_a_tower_that_transformers_saved_becomes_a_tokenizer(tmp_path, monkeypatch):
    """Features of the converted image tower are those of transformers' own, with the tokenizer's GELU and positions."""
    import torch

    from tests.parity.reference_siglip_vq import SIZES, build_vit
    from xomni_jax.checkpoint.component_source import NewParts

    monkeypatch.setitem(SIZES, "width", 96)  # the released projector has 32 groups
    tower, features = build_vit(3)
    tower.save_pretrained(tmp_path / "siglip")
    convert(tmp_path / "siglip", None, tmp_path / "out", parts=NewParts(19, 22, code_width=10), say=list)
    model = xomni_jax.load(tmp_path / "out")
    pixels = np.random.default_rng(0).uniform(-1, 1, (2, 12, 28, 3)).astype(np.float32)
    ours = model.module("siglip_vq").apply({"params": model.params("siglip_vq")}, pixels, method="features")
    with torch.no_grad():
        close(ours, features(torch.from_numpy(pixels).permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
    assert model.config("siglip_vq").width == SIZES["width"]


@pytest.mark.parametrize("tied", [False, True])
def test_a_language_model_that_transformers_saved_becomes_a_start(tied, tmp_path):
    """Untrained vision layers around it change no text: its logits are those of transformers."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from xomni_jax.checkpoint.component_source import NewParts

    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 12345.0}
    config = Qwen2Config(
        vocab_size=23, hidden_size=24, intermediate_size=28, num_attention_heads=6, num_key_value_heads=2, num_hidden_layers=3,
        rope_parameters=rope, tie_word_embeddings=tied, rms_norm_eps=1e-5,
    )  # fmt: skip
    peer = Qwen2ForCausalLM(config).eval()
    with torch.no_grad():
        for p in peer.parameters():
            p.add_(0.2 * torch.randn_like(p))
    peer.save_pretrained(tmp_path / "qwen")
    convert(tmp_path / "qwen", None, tmp_path / "out", parts=NewParts(13, 16, 2, 1), say=list)
    ids = np.random.default_rng(0).integers(0, 23, (2, 9))
    model = xomni_jax.load(tmp_path / "out")
    with torch.no_grad():
        close(model.logits(ids, "text")[:, :, :23], peer(torch.tensor(ids)).logits)
    assert model.config("transformer").rope_theta == 12345.0
