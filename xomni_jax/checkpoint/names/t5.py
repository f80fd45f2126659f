"""Names of the T5 encoder: transformers' T5EncoderModel."""

from __future__ import annotations

from xomni_jax.checkpoint.conversion import TRANSPOSE, Ignored, NameTable, Rule, in_axes, out_axes
from xomni_jax.models.text_encoders import T5Config


def table(cfg: T5Config) -> NameTable:
    """Every tensor of the released encoder for `cfg`."""
    heads = cfg.n_heads, cfg.head_dim
    rules = [
        Rule("shared.weight", "embed/table"),
        Rule("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", "relative_bias"),
        Rule("encoder.final_layer_norm.weight", "final_norm/scale"),
    ]
    for i in range(cfg.n_layers):
        attention, mlp = f"encoder.block.{i}.layer.0", f"encoder.block.{i}.layer.1"
        for name in "qkv":
            rules.append(Rule(f"{attention}.SelfAttention.{name}.weight", f"layers/attention/{name}_proj/kernel", out_axes(*heads), i))
        rules.append(Rule(f"{attention}.SelfAttention.o.weight", "layers/attention/out/kernel", in_axes(*heads), i))
        for source, target in (("wi_0", "gate"), ("wi_1", "up"), ("wo", "down")):
            rules.append(Rule(f"{mlp}.DenseReluDense.{source}.weight", f"layers/{target}/kernel", TRANSPOSE, i))
        rules.append(Rule(f"{attention}.layer_norm.weight", "layers/attention_norm/scale", layer=i))
        rules.append(Rule(f"{mlp}.layer_norm.weight", "layers/mlp_norm/scale", layer=i))
    return NameTable(rules, [Ignored(r"encoder\.embed_tokens\.weight", "the same tensor as shared.weight")])
