"""Names of a plain SigLIP2 image tower in Hugging Face's layout (fixed-resolution variants), from which a new tokenizer is trained.

The ViT is taken; quantizer, codebook and projector are new. The tokenizer differs from SigLIP in a few computations (exact GELU, no final
norm, no pooling), to which training adapts, as it did in the released tokenizer.
"""

from __future__ import annotations

from xomni_jax.checkpoint.conversion import (
    CONV,
    Ignored,
    Init,
    NameTable,
    Rule,
    Transform,
    bias_axes,
    in_axes,
    norm_rules,
    out_axes,
    weight_and_bias,
)
from xomni_jax.checkpoint.names.initializers import constant, fan_in, unit_rows
from xomni_jax.models.siglip_vq import SigLIPVQConfig

# Keys after the prefix of the image tower.
TOWER_IGNORED = (
    Ignored(r"post_layernorm\..*", "a final norm the tokenizer does not apply: the last block's output is the feature"),
    Ignored(r"head\..*", "the pooling head of contrastive training"),
    Ignored(r"embeddings\.position_ids", "a constant range"),
)
IGNORED = (
    Ignored(r"text_model\..*", "the text tower of contrastive training"),
    Ignored(r"logit_(scale|bias)", "the temperature of contrastive training"),
)


def table(cfg: SigLIPVQConfig, prefix: str = "vision_model.") -> NameTable:
    """The image tower of `cfg`'s sizes, as parameters below `vit/`, and initial values of everything after it.

    Towers saved alone by transformers 5 have no prefix: pass an empty one.
    """
    grid, heads = cfg.pos_grid, (cfg.heads, cfg.head_dim)
    square = Transform(f"[{grid * grid},D] -> [{grid},{grid},D]", lambda p: p.reshape(grid, grid, -1), lambda p: p.reshape(grid * grid, -1))
    rules = [
        Rule(f"{prefix}embeddings.position_embedding.weight", "vit/pos_embed", square),
        *weight_and_bias(f"{prefix}embeddings.patch_embedding", "vit/patch_embed", CONV),
    ]
    for i in range(cfg.layers):
        source = f"{prefix}encoder.layers.{i}."
        for n in (1, 2):
            rules += norm_rules(f"{source}layer_norm{n}", f"vit/blocks/norm{n}", i)
        rules += weight_and_bias(f"{source}self_attn.out_proj", "vit/blocks/proj", in_axes(*heads), layer=i)
        for n in (1, 2):
            rules += weight_and_bias(f"{source}mlp.fc{n}", f"vit/blocks/fc{n}", layer=i)
        for part, name in enumerate("qkv"):
            key = f"{source}self_attn.{name}_proj."
            rules.append(Rule(key + "weight", "vit/blocks/qkv/kernel", out_axes(*heads), i, (1, part)))
            rules.append(Rule(key + "bias", "vit/blocks/qkv/bias", bias_axes(*heads), i, (0, part)))
    escaped = prefix.replace(".", r"\.")
    return NameTable(rules, (*(Ignored(escaped + d.pattern, d.reason) for d in TOWER_IGNORED), *IGNORED), _new(cfg))


def _new(cfg: SigLIPVQConfig) -> list[Init]:
    inits = [Init("codebook", unit_rows())]
    for name in ("quant_conv", "post_quant_conv"):
        inits += [Init(f"{name}/kernel", fan_in()), Init(f"{name}/bias", constant(0))]
    for i in range(cfg.conv_blocks):
        for n in (1, 2):
            inits += [Init(f"post_conv_{i}/conv{n}/kernel", fan_in()), Init(f"post_conv_{i}/conv{n}/bias", constant(0))]
            inits += [Init(f"post_conv_{i}/norm{n}/scale", constant(1)), Init(f"post_conv_{i}/norm{n}/bias", constant(0))]
    return inits
