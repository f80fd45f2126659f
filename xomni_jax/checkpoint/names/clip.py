"""Names of CLIP's text tower: transformers' CLIPTextModel as released files spell it."""

from __future__ import annotations

from xomni_jax.checkpoint.conversion import Ignored, NameTable, Rule, bias_axes, in_axes, norm_rules, out_axes, weight_and_bias
from xomni_jax.models.text_encoders import CLIPTextConfig


def table(cfg: CLIPTextConfig, prefix: str = "text_model.") -> NameTable:
    """Every tensor of the text tower for `cfg`. Files written by transformers 5 have no prefix: pass an empty one."""
    heads = cfg.n_heads, cfg.head_dim
    rules = [
        Rule(f"{prefix}embeddings.token_embedding.weight", "embed/table"),
        Rule(f"{prefix}embeddings.position_embedding.weight", "positions"),
        *norm_rules(f"{prefix}final_layer_norm", "final_norm"),
    ]
    for i in range(cfg.n_layers):
        source = f"{prefix}encoder.layers.{i}"
        for name in "qkv":
            transforms = out_axes(*heads), bias_axes(*heads)
            rules += weight_and_bias(f"{source}.self_attn.{name}_proj", f"layers/attention/{name}_proj", *transforms, i)
        rules += weight_and_bias(f"{source}.self_attn.out_proj", "layers/attention/out", in_axes(*heads), layer=i)
        for name, target in (("mlp.fc1", "up"), ("mlp.fc2", "down")):
            rules += weight_and_bias(f"{source}.{name}", f"layers/{target}", layer=i)
        for name, target in (("layer_norm1", "attention_norm"), ("layer_norm2", "mlp_norm")):
            rules += norm_rules(f"{source}.{name}", f"layers/{target}", i)
    return NameTable(rules, [Ignored(rf"{prefix}embeddings\.position_ids", "a constant range")])
