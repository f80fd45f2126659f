"""Released directories as the published code lays them out: names and shapes written by hand from that code, not from our tables."""

from __future__ import annotations

import copy
import json
import math
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np

from tests.checkpoint.writing import write_safetensors, write_torch_file
from xomni_jax.sequence.tokenizer import TINY_TOKENIZER

# Odd, distinct sizes where the model allows them: a swapped axis cannot pass. The ViT has 16 heads and 32 groups, whatever its width.
SMALL = {
    "ar": dict(vocab=384, mm=22, image=13, d=20, mlp=28, heads=6, kv=2, head=4, language=3, adapters=1, tail=2),
    "vit": dict(d=96, layers=2, mlp=40, patch=4, grid=5),
    "vq": dict(codes=13, width=10, blocks=2),
    "mmdit": dict(channels=12, heads=2, head=12, axes=(2, 4, 6), double=2, single=3, text=14, pooled=18),
    "vae": dict(channels=(16, 24, 24), layers=2, latent=3, groups=8),
    "t5": dict(vocab=29, d=14, layers=2, heads=3, head=5, mlp=22, buckets=12, distance=9),
    "clip": dict(vocab=31, d=18, layers=2, heads=3, mlp=26, length=11),
}
# The released 7B, by its published configs.
RELEASED = {
    "ar": dict(vocab=152064, mm=16448, image=16384, d=3584, mlp=18944, heads=28, kv=4, head=128, language=28, adapters=4, tail=4),
    "vit": dict(d=1536, layers=40, mlp=6144, patch=16, grid=128),
    "vq": dict(codes=16384, width=2048, blocks=2),
    "mmdit": dict(channels=64, heads=24, head=128, axes=(16, 56, 56), double=19, single=38, text=4096, pooled=768),
    "vae": dict(channels=(128, 256, 512, 512), layers=2, latent=16, groups=32),
    "t5": dict(vocab=32128, d=4096, layers=24, heads=64, head=64, mlp=10240, buckets=32, distance=128),
    "clip": dict(vocab=49408, d=768, layers=12, heads=12, mlp=3072, length=77),
}


def linear(name: str, out: int, into: int, bias: bool = True) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out, into)} | ({f"{name}.bias": (out,)} if bias else {})


def conv(name: str, out: int, into: int, size: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out, into, size, size), f"{name}.bias": (out,)}


def norm(name: str, d: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (d,), f"{name}.bias": (d,)}


def qwen_layer(s: dict, i: int) -> dict[str, tuple[int, ...]]:
    at, d = f"model.layers.{i}.", s["d"]
    out = {f"{at}input_layernorm.weight": (d,), f"{at}post_attention_layernorm.weight": (d,)}
    for name, n in (("q", s["heads"]), ("k", s["kv"]), ("v", s["kv"])):
        out |= linear(f"{at}self_attn.{name}_proj", n * s["head"], d)
    out |= linear(f"{at}self_attn.o_proj", d, s["heads"] * s["head"], False)
    out |= linear(f"{at}mlp.gate_proj", s["mlp"], d, False) | linear(f"{at}mlp.up_proj", s["mlp"], d, False)
    return out | linear(f"{at}mlp.down_proj", d, s["mlp"], False)


def ar(s: dict) -> dict[str, tuple[int, ...]]:
    d = s["d"]
    out = {"model.lm_embed_tokens.weight": (s["vocab"], d), "model.mm_embed_tokens.weight": (s["mm"], d)}
    out |= {"model.lm_norm.weight": (d,), "model.mm_norm.weight": (d,), "lm_head.weight": (s["vocab"], d), "mm_head.weight": (s["mm"], d)}
    for i in range(s["adapters"] + s["language"] + s["tail"]):
        out |= qwen_layer(s, i)
    return out


def qwen(s: dict) -> dict[str, tuple[int, ...]]:
    out = {"model.embed_tokens.weight": (s["vocab"], s["d"]), "model.norm.weight": (s["d"],), "lm_head.weight": (s["vocab"], s["d"])}
    for i in range(s["language"]):
        out |= qwen_layer(s, i)
    return out


def vit(s: dict) -> dict[str, tuple[int, ...]]:
    d = s["d"]
    out = {"pos_embed": (1, s["grid"] ** 2, d)} | conv("patch_embed.proj", d, 3, s["patch"])
    for i in range(s["layers"]):
        at = f"blocks.{i}."
        out |= norm(at + "norm1", d) | norm(at + "norm2", d) | linear(at + "attn.qkv", 3 * d, d) | linear(at + "attn.proj", d, d)
        out |= linear(at + "mlp.fc1", s["mlp"], d) | linear(at + "mlp.fc2", d, s["mlp"])
    # What the file holds beside: a final norm, timm's attention pooling, a classifier.
    out |= norm("norm", d) | {"attn_pool.latent": (1, 1, d)} | linear("attn_pool.q", d, d) | linear("attn_pool.kv", 2 * d, d)
    return out | norm("attn_pool.norm", d) | linear("attn_pool.mlp.fc1", s["mlp"], d) | linear("head", 7, d)


def projector(s: dict, d: int) -> dict[str, tuple[int, ...]]:
    out = (
        conv("quant_conv", s["width"], d, 1)
        | conv("post_quant_conv", d, s["width"], 1)
        | {"quantize.embedding.weight": (s["codes"], s["width"])}
    )
    for i in range(s["blocks"]):
        for n in (1, 2):
            out |= conv(f"post_conv.{i}.conv{n}", d, d, 3) | norm(f"post_conv.{i}.norm{n}", d)
    return out


def flux(s: dict, semantics: int | None) -> dict[str, tuple[int, ...]]:
    d = s["heads"] * s["head"]
    out = {} if semantics is None else {"siglip_embed.weight": (d, semantics)}
    out |= linear("x_embedder", d, s["channels"]) | linear("context_embedder", d, s["text"])
    for name, into in (("timestep", 256), ("guidance", 256), ("text", s["pooled"])):
        out |= linear(f"time_text_embed.{name}_embedder.linear_1", d, into) | linear(f"time_text_embed.{name}_embedder.linear_2", d, d)
    for i in range(s["double"]):
        at = f"transformer_blocks.{i}."
        out |= linear(at + "norm1.linear", 6 * d, d) | linear(at + "norm1_context.linear", 6 * d, d)
        for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out.0", "to_add_out"):
            out |= linear(f"{at}attn.{name}", d, d)
        out |= {f"{at}attn.norm_{name}.weight": (s["head"],) for name in ("q", "k", "added_q", "added_k")}
        for name in ("ff", "ff_context"):
            out |= linear(f"{at}{name}.net.0.proj", 4 * d, d) | linear(f"{at}{name}.net.2", d, 4 * d)
    for i in range(s["single"]):
        at = f"single_transformer_blocks.{i}."
        out |= linear(at + "norm.linear", 3 * d, d) | linear(at + "proj_mlp", 4 * d, d) | linear(at + "proj_out", d, 5 * d)
        for name in ("to_q", "to_k", "to_v"):
            out |= linear(f"{at}attn.{name}", d, d)
        out |= {f"{at}attn.norm_{name}.weight": (s["head"],) for name in "qk"}
    return out | linear("norm_out.linear", 2 * d, d) | linear("proj_out", s["channels"], d)


def resnet(at: str, into: int, out: int) -> dict[str, tuple[int, ...]]:
    shapes = norm(f"{at}.norm1", into) | conv(f"{at}.conv1", out, into, 3) | norm(f"{at}.norm2", out) | conv(f"{at}.conv2", out, out, 3)
    return shapes | (conv(f"{at}.conv_shortcut", out, into, 1) if into != out else {})


def vae(s: dict) -> dict[str, tuple[int, ...]]:
    widths, latent, out = s["channels"], s["latent"], {}
    top = widths[-1]
    out |= conv("encoder.conv_in", widths[0], 3, 3) | norm("encoder.conv_norm_out", top) | conv("encoder.conv_out", 2 * latent, top, 3)
    out |= conv("decoder.conv_in", top, latent, 3) | norm("decoder.conv_norm_out", widths[0]) | conv("decoder.conv_out", 3, widths[0], 3)
    for half in ("encoder", "decoder"):
        at = f"{half}.mid_block."
        out |= resnet(f"{at}resnets.0", top, top) | resnet(f"{at}resnets.1", top, top) | norm(f"{at}attentions.0.group_norm", top)
        for name in ("to_q", "to_k", "to_v", "to_out.0"):
            out |= linear(f"{at}attentions.0.{name}", top, top)
    before = widths[0]
    for i, width in enumerate(widths):
        for j in range(s["layers"]):
            out |= resnet(f"encoder.down_blocks.{i}.resnets.{j}", before, width)
            before = width
        if i < len(widths) - 1:
            out |= conv(f"encoder.down_blocks.{i}.downsamplers.0.conv", width, width, 3)
    before = top
    for i, width in enumerate(reversed(widths)):
        for j in range(s["layers"] + 1):
            out |= resnet(f"decoder.up_blocks.{i}.resnets.{j}", before, width)
            before = width
        if i < len(widths) - 1:
            out |= conv(f"decoder.up_blocks.{i}.upsamplers.0.conv", width, width, 3)
    return out


def t5(s: dict) -> dict[str, tuple[int, ...]]:
    d, inner = s["d"], s["heads"] * s["head"]
    out = {"shared.weight": (s["vocab"], d), "encoder.final_layer_norm.weight": (d,)}
    out["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = (s["buckets"], s["heads"])
    for i in range(s["layers"]):
        at = f"encoder.block.{i}.layer."
        for name in "qkv":
            out |= linear(f"{at}0.SelfAttention.{name}", inner, d, False)
        out |= linear(f"{at}0.SelfAttention.o", d, inner, False) | {f"{at}0.layer_norm.weight": (d,), f"{at}1.layer_norm.weight": (d,)}
        for name, o, n in (("wi_0", s["mlp"], d), ("wi_1", s["mlp"], d), ("wo", d, s["mlp"])):
            out |= linear(f"{at}1.DenseReluDense.{name}", o, n, False)
    return out


def clip(s: dict) -> dict[str, tuple[int, ...]]:
    d, top = s["d"], "text_model."
    out = {f"{top}embeddings.token_embedding.weight": (s["vocab"], d), f"{top}embeddings.position_embedding.weight": (s["length"], d)}
    out |= norm(f"{top}final_layer_norm", d)
    for i in range(s["layers"]):
        at = f"{top}encoder.layers.{i}."
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            out |= linear(f"{at}self_attn.{name}", d, d)
        out |= (
            norm(at + "layer_norm1", d)
            | norm(at + "layer_norm2", d)
            | linear(at + "mlp.fc1", s["mlp"], d)
            | linear(at + "mlp.fc2", d, s["mlp"])
        )
    return out


def siglip(s: dict, heads: int = 3) -> dict[str, tuple[int, ...]]:
    """Hugging Face's SiglipModel, both towers."""
    d, top = s["d"], "vision_model."
    out = conv(f"{top}embeddings.patch_embedding", d, 3, s["patch"]) | {f"{top}embeddings.position_embedding.weight": (s["grid"] ** 2, d)}
    for i in range(s["layers"]):
        at = f"{top}encoder.layers.{i}."
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            out |= linear(f"{at}self_attn.{name}", d, d)
        out |= (
            norm(at + "layer_norm1", d)
            | norm(at + "layer_norm2", d)
            | linear(at + "mlp.fc1", s["mlp"], d)
            | linear(at + "mlp.fc2", d, s["mlp"])
        )
    out |= norm(f"{top}post_layernorm", d) | {f"{top}head.probe": (1, 1, d), "logit_scale": (1,), "logit_bias": (1,)}
    return out | {"text_model.embeddings.token_embedding.weight": (5, d)}


# ---- configs ----
def ar_config(s: dict) -> dict:
    return {
        "architectures": ["XOmniForCausalLM"], "model_type": "x-omni", "vocab_size": s["vocab"], "mm_vocab_size": s["mm"],
        "image_vocab_size": s["image"], "hidden_size": s["d"], "intermediate_size": s["mlp"], "num_attention_heads": s["heads"],
        "num_key_value_heads": s["kv"], "head_dim": s["head"], "num_hidden_layers": s["adapters"] + s["language"] + s["tail"],
        "num_mm_adap_layers": s["adapters"], "num_mm_head_layers": s["tail"], "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
        "rope_scaling": None, "hidden_act": "silu", "use_sliding_window": False, "torch_dtype": "bfloat16", "tie_word_embeddings": False,
        "mm_special_tokens": ["<SOM>", "<EOM>", "<IMAGE>"],
    }  # fmt: skip


def xomni_config(sizes: dict, dtype: str = "bfloat16") -> dict:
    v, q = sizes["vit"], sizes["vq"]
    vision = {
        "dtype": dtype,
        "transform": {
            "short_size": 384, "long_size": 1152, "patch_size": v["patch"], "random_ratio": None, "min_short_size": 128,
            "max_aspect_ratio": 3.0, "filtering": True,
        },
        "encoder": {
            "siglip_name": "siglip2_giant_patch16_384", "siglip_path": "vit/siglip2_giant.pth", "projector_path": "vit/projector.pth",
            "z_channels": v["d"], "codebook_size": q["codes"], "codebook_dim": q["width"], "with_norm": True,
        },
        "decoder": {"model_path": "mmdit", "upscale_factor": 16, "num_inference_steps": 7, "cfg_scale": 1.5, "cfg_scale_2": 1.5},
    }  # fmt: skip
    return ar_config(sizes["ar"]) | {"vision_config": vision}


def flux_config(s: dict) -> dict:
    return {
        "_class_name": "FluxTransformer2DModel", "patch_size": 1, "in_channels": s["channels"], "num_layers": s["double"],
        "num_single_layers": s["single"], "attention_head_dim": s["head"], "num_attention_heads": s["heads"],
        "joint_attention_dim": s["text"], "pooled_projection_dim": s["pooled"], "guidance_embeds": True, "axes_dims_rope": list(s["axes"]),
    }  # fmt: skip


def vae_config(s: dict) -> dict:
    n = len(s["channels"])
    return {
        "_class_name": "AutoencoderKL", "act_fn": "silu", "block_out_channels": list(s["channels"]),
        "down_block_types": ["DownEncoderBlock2D"] * n,
        "up_block_types": ["UpDecoderBlock2D"] * n, "in_channels": 3, "out_channels": 3, "latent_channels": s["latent"],
        "layers_per_block": s["layers"], "mid_block_add_attention": True, "norm_num_groups": s["groups"], "scaling_factor": 0.3611,
        "shift_factor": 0.1159, "use_quant_conv": False, "use_post_quant_conv": False, "latents_mean": None, "latents_std": None,
    }  # fmt: skip


def t5_config(s: dict) -> dict:
    return {
        "model_type": "t5", "vocab_size": s["vocab"], "d_model": s["d"], "num_layers": s["layers"], "num_heads": s["heads"],
        "d_kv": s["head"],
        "d_ff": s["mlp"], "relative_attention_num_buckets": s["buckets"], "relative_attention_max_distance": s["distance"],
        "feed_forward_proj": "gated-gelu",
    }  # fmt: skip


def clip_config(s: dict) -> dict:
    return {
        "model_type": "clip_text_model", "vocab_size": s["vocab"], "hidden_size": s["d"], "num_hidden_layers": s["layers"],
        "num_attention_heads": s["heads"], "intermediate_size": s["mlp"], "max_position_embeddings": s["length"],
        "hidden_act": "quick_gelu",
        "eos_token_id": 2, "bos_token_id": 0, "pad_token_id": 1,
    }  # fmt: skip


SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True, "base_shift": 0.25, "max_shift": 1.25,
    "base_image_seq_len": 256, "max_image_seq_len": 4096, "shift": 3.0,
}  # fmt: skip


MODEL_INDEX = {
    "_class_name": "FluxPipeline", "_diffusers_version": "0.30.0.dev0", "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"], "text_encoder_2": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"], "tokenizer_2": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "FluxTransformer2DModel"], "vae": ["diffusers", "AutoencoderKL"],
}  # fmt: skip


# ---- directories ----
def drawn(shapes: dict[str, tuple[int, ...]], dtype=ml_dtypes.bfloat16, seed: int = 0) -> dict[str, np.ndarray]:
    """Random tensors without a zero among them; norms about 1."""
    rng = np.random.default_rng(seed)
    return {k: (float(len(s) == 1 and k.endswith("weight")) + 0.2 * rng.standard_normal(s)).astype(dtype) for k, s in shapes.items()}


def write_json(path: Path, data: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1))


def write_xomni(folder: Path, sizes: dict = SMALL, dtype=ml_dtypes.bfloat16, vision_dtype: str = "bfloat16") -> Path:
    """A released X-Omni directory."""
    write_json(folder / "config.json", xomni_config(sizes, vision_dtype))
    tensors = drawn(ar(sizes["ar"]), dtype, 1)
    write_safetensors(folder, tensors, shard_bytes=sum(t.nbytes for t in tensors.values()) // 3)
    (folder / "vit").mkdir()
    write_torch_file(folder / "vit" / "siglip2_giant.pth", drawn(vit(sizes["vit"]), np.float32, 2))
    write_torch_file(folder / "vit" / "projector.pth", drawn(projector(sizes["vq"], sizes["vit"]["d"]), np.float32, 3))
    write_json(folder / "mmdit" / "config.json", flux_config(sizes["mmdit"]))
    tensors = drawn(flux(sizes["mmdit"], sizes["vit"]["d"]), dtype, 4)
    write_safetensors(folder / "mmdit", tensors, sum(t.nbytes for t in tensors.values()) // 2, "diffusion_pytorch_model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TINY_TOKENIZER / name, folder / name)
    return folder


def write_flux(folder: Path, sizes: dict = SMALL, dtype=ml_dtypes.bfloat16) -> Path:
    """FLUX.1-dev, its own transformer included."""
    write_json(folder / "model_index.json", MODEL_INDEX)
    write_json(folder / "transformer" / "config.json", flux_config(sizes["mmdit"]))
    write_safetensors(folder / "transformer", drawn(flux(sizes["mmdit"], None), dtype, 5), name="diffusion_pytorch_model")
    write_json(folder / "vae" / "config.json", vae_config(sizes["vae"]))
    write_safetensors(folder / "vae", drawn(vae(sizes["vae"]), dtype, 6), name="diffusion_pytorch_model")
    write_json(folder / "text_encoder" / "config.json", clip_config(sizes["clip"]))
    write_safetensors(folder / "text_encoder", drawn(clip(sizes["clip"]), dtype, 7))
    write_json(folder / "text_encoder_2" / "config.json", t5_config(sizes["t5"]))
    tensors = drawn(t5(sizes["t5"]), dtype, 8)
    write_safetensors(folder / "text_encoder_2", tensors, sum(t.nbytes for t in tensors.values()) // 2)
    write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
    for name in ("tokenizer", "tokenizer_2"):
        write_json(folder / name / "tokenizer_config.json", {"which": name})
    return folder


def write_qwen(folder: Path, tied: bool = False) -> Path:
    """A plain Qwen2.5."""
    s = SMALL["ar"]
    config = {k: v for k, v in ar_config(s).items() if not k.startswith(("num_mm", "mm_", "image_"))}
    config |= {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "num_hidden_layers": s["language"],
        "tie_word_embeddings": tied,
        "initializer_range": 0.02,
    }
    write_json(folder / "config.json", config)
    tensors = drawn(qwen(s), seed=9)
    if tied:
        del tensors["lm_head.weight"]
    write_safetensors(folder, tensors)
    tokenizer = json.loads((TINY_TOKENIZER / "tokenizer.json").read_text())
    tokenizer["added_tokens"] = [
        t for t in tokenizer["added_tokens"] if "MM-Token" not in t["content"] and t["content"] not in ("<SOM>", "<EOM>", "<IMAGE>")
    ]
    write_json(folder / "tokenizer.json", tokenizer)
    shutil.copyfile(TINY_TOKENIZER / "tokenizer_config.json", folder / "tokenizer_config.json")
    return folder


def write_siglip(folder: Path) -> Path:
    """A plain SigLIP2, both towers."""
    s = SMALL["vit"]
    vision = {"hidden_size": s["d"], "num_attention_heads": 3, "image_size": s["grid"] * s["patch"], "patch_size": s["patch"]}
    write_json(folder / "config.json", {"model_type": "siglip", "vision_config": vision, "text_config": {}})
    write_safetensors(folder, drawn(siglip(s), np.float32, 10))
    return folder


def total(shapes: dict[str, tuple[int, ...]]) -> int:
    """Parameters."""
    return sum(map(math.prod, shapes.values()))


def edit_config(folder: Path, **changes) -> None:
    """Replaces entries of a directory's config.json; a dotted key reaches into sections, None removes."""
    data = json.loads((folder / "config.json").read_text())
    for key, value in copy.deepcopy(changes).items():
        *sections, last = key.split("__")
        at = data
        for section in sections:
            at = at[section]
        if value is None:
            at.pop(last)
        else:
            at[last] = value
    write_json(folder / "config.json", data)
