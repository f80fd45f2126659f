"""Names of a plain Qwen2.5 language model, from which an X-Omni starts.

Text embedding, text head, final norm and all layers are copied; the layers become the language stack. Vision layers, image embedding and
image head are drawn at random; the norm before the image head starts at 1. Before training, text is computed exactly as Qwen2.5 computes
it, since text positions pass through vision layers unchanged.
"""

from __future__ import annotations

import math

from xomni_jax.checkpoint.conversion import Ignored, Init, NameTable
from xomni_jax.checkpoint.names import transformer as released
from xomni_jax.checkpoint.names.initializers import constant, normal
from xomni_jax.models.transformer import ARConfig

RENAMED = {
    "model.lm_embed_tokens.weight": "model.embed_tokens.weight",
    "model.lm_norm.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
}
IGNORED = (Ignored(r"model\.(rotary_emb|layers\.\d+\.self_attn\.rotary_emb)\.inv_freq", "computed from rope_theta"),)


def table(cfg: ARConfig, std: float = 0.02) -> NameTable:
    """Every tensor of the language model, and the new parameters.

    Args:
      cfg: sizes of the whole model, vision layers included.
      std: of new embeddings, heads and projections (the language model's `initializer_range`); projections into the residual stream start
        at std / sqrt(2 x all layers), so that 8 more layers leave its scale alone.
    """
    rules = []
    for rule in released.table(cfg).rules:
        if rule.target.startswith("language/"):
            layer = f"model.layers.{rule.layer + cfg.n_adapter_layers}."
            rules.append(rule._replace(source=rule.source.replace(layer, f"model.layers.{rule.layer}.", 1)))
        elif rule.source in RENAMED:
            rules.append(rule._replace(source=RENAMED[rule.source]))
    inits = [Init("mm_embed/table", normal(std)), Init("mm_head/kernel", normal(std)), Init("mm_norm/scale", constant(1))]
    for stack in set(cfg.layers) - {"language"}:
        inits += _stack(stack, std, std / math.sqrt(2 * cfg.n_layers))
    return NameTable(rules, IGNORED, inits)


def _stack(stack: str, std: float, residual: float) -> list[Init]:
    inits = [Init(f"{stack}/{name}_norm/scale", constant(1), True) for name in ("attn", "mlp")]
    for name in "qkv":
        inits.append(Init(f"{stack}/attn/{name}_proj/kernel", normal(std), True))
        inits.append(Init(f"{stack}/attn/{name}_proj/bias", constant(0), True))
    inits.append(Init(f"{stack}/attn/o_proj/kernel", normal(residual), True))
    inits += [Init(f"{stack}/mlp/{name}_proj/kernel", normal(std), True) for name in ("gate", "up")]
    return [*inits, Init(f"{stack}/mlp/down_proj/kernel", normal(residual), True)]
