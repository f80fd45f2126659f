"""Names of a plain SigLIP2 image tower in Hugging Face's layout (fixed-resolution variants): the tokenizer a new training starts from.

The ViT is taken; quantizer, codebook and projector are new. Numerics differ from SigLIP's own in what `model.md` lists (exact GELU, no final
norm, no pooling): training adapts to them, as it did in the released tokenizer.
"""

from __future__ import annotations

from xomni_jax.checkpoint.conversion import CONV, COPY, TRANSPOSE, Drop, Fit, Make, Rule, Table, bias_axes, in_axes, out_axes
from xomni_jax.checkpoint.names import new
from xomni_jax.models.siglip_vq import SigLIPVQConfig

# Behind the prefix of the image tower, then in the whole file.
TOWER_DROPS = (
    Drop(r"post_layernorm\..*", "a final norm the tokenizer does not apply: the last block's output is the feature"),
    Drop(r"head\..*", "the pooling head of contrastive training"),
    Drop(r"embeddings\.position_ids", "a constant range"),
)
DROPS = (
    Drop(r"text_model\..*", "the text tower of contrastive training"),
    Drop(r"logit_(scale|bias)", "the temperature of contrastive training"),
)


def table(cfg: SigLIPVQConfig, prefix: str = "vision_model.") -> Table:
    """The image tower of `cfg`'s sizes below `vit/`, and how everything behind it starts.

    Towers saved alone by transformers 5 have no prefix: pass an empty one.
    """
    grid, heads = cfg.pos_grid, (cfg.heads, cfg.head_dim)
    square = Fit(f"[{grid * grid},D] -> [{grid},{grid},D]", lambda p: p.reshape(grid, grid, -1), lambda p: p.reshape(grid * grid, -1))
    source = f"{prefix}embeddings."
    rules = [
        Rule(source + "position_embedding.weight", "vit/pos_embed", square),
        Rule(source + "patch_embedding.weight", "vit/patch_embed/kernel", CONV),
        Rule(source + "patch_embedding.bias", "vit/patch_embed/bias"),
    ]
    fits = {
        "layer_norm1": ("norm1", "scale", COPY),
        "layer_norm2": ("norm2", "scale", COPY),
        "self_attn.out_proj": ("proj", "kernel", in_axes(*heads)),
        "mlp.fc1": ("fc1", "kernel", TRANSPOSE),
        "mlp.fc2": ("fc2", "kernel", TRANSPOSE),
    }
    for i in range(cfg.layers):
        source = f"{prefix}encoder.layers.{i}."
        for name, (target, leaf, fit) in fits.items():
            rules.append(Rule(f"{source}{name}.weight", f"vit/blocks/{target}/{leaf}", fit, i))
            rules.append(Rule(f"{source}{name}.bias", f"vit/blocks/{target}/bias", layer=i))
        for part, name in enumerate("qkv"):
            key = f"{source}self_attn.{name}_proj."
            rules.append(Rule(key + "weight", "vit/blocks/qkv/kernel", out_axes(*heads), i, (1, part)))
            rules.append(Rule(key + "bias", "vit/blocks/qkv/bias", bias_axes(*heads), i, (0, part)))
    escaped = prefix.replace(".", r"\.")
    return Table(rules, (*(Drop(escaped + d.pattern, d.reason) for d in TOWER_DROPS), *DROPS), _new(cfg))


def _new(cfg: SigLIPVQConfig) -> list[Make]:
    makes = [Make("codebook", "rows of length 1, uniform directions", new.unit_rows)]
    for name in ("quant_conv", "post_quant_conv"):
        makes += [Make(f"{name}/kernel", *new.fan_in()), Make(f"{name}/bias", *new.constant(0))]
    for i in range(cfg.conv_blocks):
        for n in (1, 2):
            makes += [Make(f"post_conv_{i}/conv{n}/kernel", *new.fan_in()), Make(f"post_conv_{i}/conv{n}/bias", *new.constant(0))]
            makes += [Make(f"post_conv_{i}/norm{n}/scale", *new.constant(1)), Make(f"post_conv_{i}/norm{n}/bias", *new.constant(0))]
    return makes
