"""Names of the MMDiT: diffusers' FluxTransformer2DModel, plus `siglip_embed`."""

from __future__ import annotations

from collections.abc import Iterator

from xomni_jax.checkpoint.conversion import TRANSPOSE, NameTable, Rule, bias_axes, in_axes, out_axes, weight_and_bias
from xomni_jax.models.mmdit import MMDiTConfig


def table(cfg: MMDiTConfig) -> NameTable:
    """Every tensor of the released decoder for `cfg`."""
    rules = [Rule("siglip_embed.weight", "siglip_embed/kernel", TRANSPOSE)]
    embeds = {"timestep": "time_embed", "text": "pooled_embed"} | ({"guidance": "guidance_embed"} if cfg.guidance_embed else {})
    for source, target in embeds.items():
        for i, half in ((1, "in"), (2, "out")):
            rules += weight_and_bias(f"time_text_embed.{source}_embedder.linear_{i}", f"{target}/{half}")
    rules += weight_and_bias("x_embedder", "latent_embed")
    rules += weight_and_bias("context_embedder", "text_embed")
    for i in range(cfg.n_double):
        rules += _double(cfg, i)
    for i in range(cfg.n_single):
        rules += _single(cfg, i)
    rules += _chunks(cfg, "norm_out.linear", "final_modulation", 2)
    rules += weight_and_bias("proj_out", "out")
    return NameTable(rules)


def _chunks(cfg: MMDiTConfig, source: str, target: str, chunks: int, layer: int | None = None) -> list[Rule]:
    sizes = chunks, cfg.d_model
    return weight_and_bias(source, f"{target}/linear", out_axes(*sizes), bias_axes(*sizes), layer)


def _to_heads(cfg: MMDiTConfig, source: str, target: str, layer: int, *lead: int) -> list[Rule]:
    sizes = *lead, cfg.n_heads, cfg.head_dim
    return weight_and_bias(source, target, out_axes(*sizes), bias_axes(*sizes), layer)


def _from_heads(cfg: MMDiTConfig, source: str, target: str, layer: int, *lead: int) -> list[Rule]:
    return weight_and_bias(source, target, in_axes(*lead, cfg.n_heads, cfg.head_dim), layer=layer)


def _double(cfg: MMDiTConfig, i: int) -> Iterator[Rule]:
    source, target = f"transformer_blocks.{i}", "double_blocks"
    yield from _chunks(cfg, f"{source}.norm1.linear", f"{target}/image_modulation", 6, i)
    yield from _chunks(cfg, f"{source}.norm1_context.linear", f"{target}/text_modulation", 6, i)
    for stream, pattern, norm in (("image", "to_{}", "norm_{}"), ("text", "add_{}_proj", "norm_added_{}")):
        for name in "qkv":
            yield from _to_heads(cfg, f"{source}.attn.{pattern.format(name)}", f"{target}/{stream}_qkv/{name}_proj", i)
        for name in "qk":
            yield Rule(f"{source}.attn.{norm.format(name)}.weight", f"{target}/{stream}_qkv/{name}_norm/scale", layer=i)
    yield from _from_heads(cfg, f"{source}.attn.to_out.0", f"{target}/image_out", i)
    yield from _from_heads(cfg, f"{source}.attn.to_add_out", f"{target}/text_out", i)
    for stream, mlp in (("image", "ff"), ("text", "ff_context")):
        yield from weight_and_bias(f"{source}.{mlp}.net.0.proj", f"{target}/{stream}_mlp/in", layer=i)
        yield from weight_and_bias(f"{source}.{mlp}.net.2", f"{target}/{stream}_mlp/out", layer=i)


def _single(cfg: MMDiTConfig, i: int) -> Iterator[Rule]:
    source, target = f"single_transformer_blocks.{i}", "single_blocks"
    yield from _chunks(cfg, f"{source}.norm.linear", f"{target}/modulation", 3, i)
    for name in "qkv":
        yield from _to_heads(cfg, f"{source}.attn.to_{name}", f"{target}/qkv/{name}_proj", i)
    for name in "qk":
        yield Rule(f"{source}.attn.norm_{name}.weight", f"{target}/qkv/{name}_norm/scale", layer=i)
    yield from _to_heads(cfg, f"{source}.proj_mlp", f"{target}/mlp_in", i, cfg.mlp_ratio)
    # The source concatenates attention and MLP in this order along its inputs: one more row of the ratio axis.
    yield from _from_heads(cfg, f"{source}.proj_out", f"{target}/out", i, cfg.mlp_ratio + 1)
