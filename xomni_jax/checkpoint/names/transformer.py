"""Names of the unified transformer: released X-Omni keys <-> `models.transformer` parameters."""

from __future__ import annotations

from xomni_jax.checkpoint.conversion import TRANSPOSE, Ignored, NameTable, Rule, bias_axes, in_axes, out_axes, weight_and_bias
from xomni_jax.models.transformer import ARConfig


def _layer(c: ARConfig, i: int, stack: str, row: int) -> list[Rule]:
    source, heads = f"model.layers.{i}.", {"q": c.n_heads, "k": c.n_kv_heads, "v": c.n_kv_heads}
    rules = [
        Rule(source + "input_layernorm.weight", f"{stack}/attn_norm/scale", layer=row),
        Rule(source + "post_attention_layernorm.weight", f"{stack}/mlp_norm/scale", layer=row),
        Rule(source + "self_attn.o_proj.weight", f"{stack}/attn/o_proj/kernel", in_axes(c.n_heads, c.head_dim), row),
    ]
    for name, n in heads.items():
        transforms = out_axes(n, c.head_dim), bias_axes(n, c.head_dim)
        rules += weight_and_bias(f"{source}self_attn.{name}_proj", f"{stack}/attn/{name}_proj", *transforms, row)
    for name in ("gate", "up", "down"):
        rules.append(Rule(f"{source}mlp.{name}_proj.weight", f"{stack}/mlp/{name}_proj/kernel", TRANSPOSE, row))
    return rules


def table(cfg: ARConfig) -> NameTable:
    """The rules of all parameters. The released file counts layers through the three stacks: adapters, language, heads."""
    rules = [Rule(f"model.{kind}_embed_tokens.weight", f"{kind}_embed/table") for kind in ("lm", "mm")]
    rules += [Rule(f"model.{kind}_norm.weight", f"{kind}_norm/scale") for kind in ("lm", "mm")]
    rules += [Rule(f"{kind}_head.weight", f"{kind}_head/kernel", TRANSPOSE) for kind in ("lm", "mm")]
    rows = [(stack, row) for stack, n in cfg.layers.items() for row in range(n)]
    for i, (stack, row) in enumerate(rows):
        rules += _layer(cfg, i, stack, row)
    return NameTable(tuple(rules), (Ignored(r"model\.rotary_emb\.inv_freq", "computed from rope_theta"),))
