"""Released names of the SigLIP-VQ tokenizer: the ViT's `.pth` and the projector's `.pth`."""

from __future__ import annotations

import numpy as np

from xomni_jax.checkpoint.conversion import CONV, COPY, TRANSPOSE, Drop, Fit, Rule, Table, bias_axes, in_axes, out_axes
from xomni_jax.models.siglip_vq import SigLIPVQConfig

# A 1x1 convolution is a matrix here.
POINTWISE = Fit("[O,I,1,1] -> [I,O]", lambda w: w[:, :, 0, 0].T, lambda w: np.ascontiguousarray(w.T)[:, :, None, None])

VIT_DROPS = (
    Drop(r"norm\.(weight|bias)", "a final norm the tokenizer does not apply: the last block's output is the feature"),
    Drop(r"attn_pool\..*", "the pooling head of contrastive training"),
    Drop(r"head\..*", "a classifier head"),
)


def _square(cfg: SigLIPVQConfig) -> Fit:
    """Positions [1, G*G, D] -> [G, G, D]."""
    grid = cfg.pos_grid
    name = f"[1,{grid * grid},D] -> [{grid},{grid},D]"
    return Fit(name, lambda p: p.reshape(grid, grid, -1), lambda p: p.reshape(1, grid * grid, -1))


def vit_table(cfg: SigLIPVQConfig, prefix: str = "") -> Table:
    """Names in the ViT's file; targets below `vit/` of `SigLIPVQ`'s parameters. `prefix` precedes every source key."""
    heads = (cfg.heads, cfg.head_dim)
    rules = [
        Rule("pos_embed", "vit/pos_embed", _square(cfg)),
        Rule("patch_embed.proj.weight", "vit/patch_embed/kernel", CONV),
        Rule("patch_embed.proj.bias", "vit/patch_embed/bias"),
    ]
    fits = {
        "norm1": ("norm1", "scale", COPY, COPY),
        "norm2": ("norm2", "scale", COPY, COPY),
        "attn.qkv": ("qkv", "kernel", out_axes(3, *heads), bias_axes(3, *heads)),
        "attn.proj": ("proj", "kernel", in_axes(*heads), COPY),
        "mlp.fc1": ("fc1", "kernel", TRANSPOSE, COPY),
        "mlp.fc2": ("fc2", "kernel", TRANSPOSE, COPY),
    }
    for i in range(cfg.layers):
        for source, (target, leaf, weight, bias) in fits.items():
            rules.append(Rule(f"blocks.{i}.{source}.weight", f"vit/blocks/{target}/{leaf}", weight, layer=i))
            rules.append(Rule(f"blocks.{i}.{source}.bias", f"vit/blocks/{target}/bias", bias, layer=i))
    escaped = prefix.replace(".", r"\.")
    return Table(
        tuple(rule._replace(source=prefix + rule.source) for rule in rules),
        tuple(Drop(escaped + drop.pattern, drop.reason) for drop in VIT_DROPS),
    )


def projector_table(cfg: SigLIPVQConfig, prefix: str = "") -> Table:
    """Names in the projector's file: everything of `SigLIPVQ` but the ViT. `prefix` precedes every source key."""
    rules = [Rule("quantize.embedding.weight", "codebook")]
    for name in ("quant_conv", "post_quant_conv"):
        rules += [Rule(f"{name}.weight", f"{name}/kernel", POINTWISE), Rule(f"{name}.bias", f"{name}/bias")]
    parts = [(f"{kind}{n}", leaf, fit) for n in (1, 2) for kind, leaf, fit in (("norm", "scale", COPY), ("conv", "kernel", CONV))]
    for i in range(cfg.conv_blocks):
        for name, leaf, fit in parts:
            rules.append(Rule(f"post_conv.{i}.{name}.weight", f"post_conv_{i}/{name}/{leaf}", fit))
            rules.append(Rule(f"post_conv.{i}.{name}.bias", f"post_conv_{i}/{name}/bias"))
    return Table(tuple(rule._replace(source=prefix + rule.source) for rule in rules))


def table(cfg: SigLIPVQConfig, vit_prefix: str = "vit.", projector_prefix: str = "vqproj.") -> Table:
    """Both files as one table for `SigLIPVQ`'s whole parameter tree; the reader puts the prefixes before each file's keys."""
    vit, projector = vit_table(cfg, vit_prefix), projector_table(cfg, projector_prefix)
    return Table((*vit.rules, *projector.rules), (*vit.drops, *projector.drops))
