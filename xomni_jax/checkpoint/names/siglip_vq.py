"""Released names of the SigLIP-VQ tokenizer: the ViT's `.pth` and the projector's `.pth`."""

from __future__ import annotations

from xomni_jax.checkpoint.conversion import (
    CONV,
    POINTWISE,
    Ignored,
    NameTable,
    Rule,
    Transform,
    bias_axes,
    in_axes,
    norm_rules,
    out_axes,
    weight_and_bias,
)
from xomni_jax.models.siglip_vq import SigLIPVQConfig

VIT_IGNORED = (
    Ignored(r"norm\.(weight|bias)", "a final norm the tokenizer does not apply: the last block's output is the feature"),
    Ignored(r"attn_pool\..*", "the pooling head of contrastive training"),
    Ignored(r"head\..*", "a classifier head"),
)


def _square(cfg: SigLIPVQConfig) -> Transform:
    """Positions [1, G*G, D] -> [G, G, D]."""
    grid = cfg.pos_grid
    name = f"[1,{grid * grid},D] -> [{grid},{grid},D]"
    return Transform(name, lambda p: p.reshape(grid, grid, -1), lambda p: p.reshape(1, grid * grid, -1))


def vit_table(cfg: SigLIPVQConfig) -> NameTable:
    """Names in the ViT's file; targets below `vit/` of `SigLIPVQ`'s parameters."""
    heads = (cfg.heads, cfg.head_dim)
    rules = [Rule("pos_embed", "vit/pos_embed", _square(cfg)), *weight_and_bias("patch_embed.proj", "vit/patch_embed", CONV)]
    for i in range(cfg.layers):
        source, target = f"blocks.{i}", "vit/blocks"
        rules += norm_rules(f"{source}.norm1", f"{target}/norm1", i)
        rules += norm_rules(f"{source}.norm2", f"{target}/norm2", i)
        rules += weight_and_bias(f"{source}.attn.qkv", f"{target}/qkv", out_axes(3, *heads), bias_axes(3, *heads), i)
        rules += weight_and_bias(f"{source}.attn.proj", f"{target}/proj", in_axes(*heads), layer=i)
        for name in ("fc1", "fc2"):
            rules += weight_and_bias(f"{source}.mlp.{name}", f"{target}/{name}", layer=i)
    return NameTable(rules, VIT_IGNORED)


def projector_table(cfg: SigLIPVQConfig) -> NameTable:
    """Names in the projector's file: everything of `SigLIPVQ` but the ViT."""
    rules = [Rule("quantize.embedding.weight", "codebook")]
    for name in ("quant_conv", "post_quant_conv"):
        rules += weight_and_bias(name, name, POINTWISE)
    for i in range(cfg.conv_blocks):
        for n in (1, 2):
            rules += norm_rules(f"post_conv.{i}.norm{n}", f"post_conv_{i}/norm{n}")
            rules += weight_and_bias(f"post_conv.{i}.conv{n}", f"post_conv_{i}/conv{n}", CONV)
    return NameTable(rules)


def table(cfg: SigLIPVQConfig) -> NameTable:
    """Both files as one table for `SigLIPVQ`'s whole parameter tree; keys have the prefix "vit." or "vqproj."."""
    rules = [rule._replace(source=f"vit.{rule.source}") for rule in vit_table(cfg).rules]
    rules += [rule._replace(source=f"vqproj.{rule.source}") for rule in projector_table(cfg).rules]
    return NameTable(rules, [Ignored(rf"vit\.{entry.pattern}", entry.reason) for entry in VIT_IGNORED])
