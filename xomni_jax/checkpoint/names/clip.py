"""Names of CLIP's text tower: transformers' CLIPTextModel as released files spell it."""

from __future__ import annotations

from xomni_jax.checkpoint.conversion import TRANSPOSE, Drop, Rule, Table, bias_axes, in_axes, out_axes
from xomni_jax.models.text_encoders import CLIPTextConfig


def table(cfg: CLIPTextConfig, prefix: str = "text_model.") -> Table:
    """Every tensor of the text tower for `cfg`. Files written by transformers 5 have no prefix: pass an empty one."""
    heads = cfg.n_heads, cfg.head_dim
    rules = [
        Rule(f"{prefix}embeddings.token_embedding.weight", "embed/table"),
        Rule(f"{prefix}embeddings.position_embedding.weight", "positions"),
        Rule(f"{prefix}final_layer_norm.weight", "final_norm/scale"),
        Rule(f"{prefix}final_layer_norm.bias", "final_norm/bias"),
    ]
    for i in range(cfg.n_layers):
        source = f"{prefix}encoder.layers.{i}"
        for name in "qkv":
            rules.append(Rule(f"{source}.self_attn.{name}_proj.weight", f"layers/attention/{name}_proj/kernel", out_axes(*heads), i))
            rules.append(Rule(f"{source}.self_attn.{name}_proj.bias", f"layers/attention/{name}_proj/bias", bias_axes(*heads), i))
        rules.append(Rule(f"{source}.self_attn.out_proj.weight", "layers/attention/out/kernel", in_axes(*heads), i))
        rules.append(Rule(f"{source}.self_attn.out_proj.bias", "layers/attention/out/bias", layer=i))
        for name, target in (("mlp.fc1", "up"), ("mlp.fc2", "down")):
            rules.append(Rule(f"{source}.{name}.weight", f"layers/{target}/kernel", TRANSPOSE, i))
            rules.append(Rule(f"{source}.{name}.bias", f"layers/{target}/bias", layer=i))
        for name, target in (("layer_norm1", "attention_norm"), ("layer_norm2", "mlp_norm")):
            rules.append(Rule(f"{source}.{name}.weight", f"layers/{target}/scale", layer=i))
            rules.append(Rule(f"{source}.{name}.bias", f"layers/{target}/bias", layer=i))
    return Table(rules, [Drop(rf"{prefix}embeddings\.position_ids", "a constant range")])
