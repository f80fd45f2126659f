"""Names of OmniTokenizer's Lightning checkpoints (`imagenet_k600.ckpt`, ...), VQ and KL."""

from __future__ import annotations

import numpy as np

from xomni_jax.checkpoint.conversion import Ignored, NameTable, Rule, Transform, in_axes, norm_rules, out_axes, weight_and_bias
from xomni_jax.checkpoint.tensors import TensorFiles
from xomni_jax.models.omnitokenizer import OmniTokenizerConfig

IGNORED = (
    Ignored(r".*\.(norm|norm_out|context_norm)\.beta", "zeros, a constant of its layer norms"),
    Ignored(r".*\.context_norm\.gamma", "used nowhere"),
    Ignored(r".*\.spatial_rel_pos_bias\..*", "positions that the published code builds and, since torch 2.1, does not apply"),
    Ignored(r".*\.relative_position_index", "computed from the window"),
    Ignored(r"codebook\.(N|z_avg|codebook_usage)", "averages of training"),
    Ignored(r"(image|video)_discriminator\..*|perceptual_model\..*", "losses of training"),
)
STACKS = {
    "encoder.enc_spatial_transformer": "encoder_space",
    "encoder.enc_temporal_transformer": "encoder_time",
    "decoder.dec_temporal_transformer": "decoder_time",
    "decoder.dec_spatial_transformer": "decoder_space",
}
PATCHES = {"to_patch_emb_first_frame": "first", "to_patch_emb": "rest"}
DEPTHWISE = Transform(
    "[D,1,T,Y,X] -> [T,Y,X,1,D]", lambda w: w.transpose(2, 3, 4, 1, 0), lambda w: np.ascontiguousarray(w.transpose(4, 3, 0, 1, 2))
)


def blocks_of(cfg: OmniTokenizerConfig, stack: str) -> str:
    """The layers of a stack of ours, a letter each."""
    return {"encoder_space": cfg.encoder_blocks, "decoder_space": cfg.decoder_blocks}.get(stack, "t" * cfg.temporal_layers)


def prepare(sources: TensorFiles) -> TensorFiles:
    """Gives keys and values, which the file holds fused, names of their own."""
    for name in [name for name in sources.infos if name.endswith(".to_kv.weight")]:
        rows = sources.infos[name].shape[0] // 2
        sources.split(name, {name.replace("to_kv", f"to_{part}"): rows for part in "kv"})
    return sources


def table(cfg: OmniTokenizerConfig) -> NameTable:
    """Every tensor of the published tokenizer after `prepare`."""
    rules = [*weight_and_bias("pre_vq_conv.1", "pre_vq"), *weight_and_bias("post_vq_conv.1", "post_vq")]
    ignored = IGNORED
    if cfg.kind == "vq":
        rules.append(Rule("codebook.embeddings", "codebook"))
    else:
        ignored = (*IGNORED, Ignored(r"codebook\.embeddings", "latents of a KL tokenizer have no codes"))
    for source, target in PATCHES.items():
        rules += norm_rules(f"encoder.{source}.1", f"patches/{target}_norm_in")
        rules += weight_and_bias(f"encoder.{source}.2", f"patches/{target}_embed")
        rules += norm_rules(f"encoder.{source}.3", f"patches/{target}_norm_out")
    for source, target in (("to_pixels_first_frame", "first"), ("to_pixels", "rest")):
        rules += weight_and_bias(f"decoder.{source}.0", f"to_pixels/{target}")
    for source, target in STACKS.items():
        for i, block in enumerate(blocks_of(cfg, target)):
            rules += _layer(cfg, block, f"{source}.layers.{i}", f"{target}/layer_{i}")
        rules.append(Rule(f"{source}.norm_out.gamma", f"{target}/norm_out/scale"))
    return NameTable(rules, ignored)


def _layer(cfg: OmniTokenizerConfig, block: str, source: str, target: str) -> list[Rule]:
    heads, window_heads = (cfg.heads, cfg.head_dim), (cfg.heads, cfg.width // cfg.heads)
    rules = [Rule(f"{source}.1.norm.gamma", f"{target}_attention/norm/scale")]
    if block == "w":
        rules.append(Rule(f"{source}.1.qkv.weight", f"{target}_attention/qkv/kernel", out_axes(3, *window_heads)))
        rules.append(Rule(f"{source}.1.relative_position_bias_table", f"{target}_attention/relative_bias"))
        rules += weight_and_bias(f"{source}.1.proj", f"{target}_attention/out", in_axes(*window_heads))
    else:
        rules += weight_and_bias(f"{source}.0.dsconv", f"{target}_position", DEPTHWISE)
        for name in "qkv":
            rules.append(Rule(f"{source}.1.to_{name}.weight", f"{target}_attention/{name}_proj/kernel", out_axes(*heads)))
        rules += [Rule(f"{source}.1.{name}_scale", f"{target}_attention/{name}_scale") for name in "qk"]
        rules.append(Rule(f"{source}.1.to_out.weight", f"{target}_attention/out/kernel", in_axes(*heads)))
    rules += norm_rules(f"{source}.3.0", f"{target}_mlp/norm")
    rules.append(Rule(f"{source}.3.1.weight", f"{target}_mlp/in/kernel", out_axes(2, cfg.mlp)))
    rules.append(Rule(f"{source}.3.4.weight", f"{target}_mlp/out/kernel", in_axes(cfg.mlp)))
    return rules
