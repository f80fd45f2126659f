"""Names of LlamaGen's class-conditional models (`c2i_B_256.pt`, ...), which become an `ARTransformer` with rotary positions on a grid.

Class numbers are its text ids, the last one standing for no class. A class is a prompt of one token, never a target: the text head is zero.
"""

from __future__ import annotations

from xomni_jax.checkpoint.conversion import TRANSPOSE, Ignored, Init, NameTable, Rule, Transform, in_axes, out_axes
from xomni_jax.checkpoint.names.initializers import constant
from xomni_jax.checkpoint.tensors import TensorFiles
from xomni_jax.models.transformer import ARConfig

IGNORED = (Ignored(r"freqs_cis", "computed from the grid"),)
SAME_NORM = "norm.weight (before the text head)"


def prepare(sources: TensorFiles, layers: int) -> TensorFiles:
    """Gives names of their own to what the files hold fused or once: q, k and v, and the final norm, which ours has for both heads."""
    sources.tie(SAME_NORM, "norm.weight")
    for i in range(layers):
        name = f"layers.{i}.attention.wqkv.weight"
        if name in sources.infos:
            rows = sources.infos[name].shape[0] // 3
            sources.split(name, {f"layers.{i}.attention.w{part}.weight": rows for part in "qkv"})
    return sources


def _rotary(heads: int, head_dim: int) -> Transform:
    """[O, I] -> [I, heads, head_dim], from pairs (2i, 2i + 1) of a head to pairs (i, i + head_dim / 2)."""
    plain = out_axes(heads, head_dim)

    def halves(w_OI, *pairs: int):
        return w_OI.reshape(heads, *pairs, w_OI.shape[-1]).swapaxes(1, 2).reshape(w_OI.shape)

    return Transform(
        f"pairs to halves, {plain.name}",
        lambda w: plain.to_jax(halves(w, head_dim // 2, 2)),
        lambda w: halves(plain.to_torch(w), 2, head_dim // 2),
    )


def table(cfg: ARConfig) -> NameTable:
    """Every tensor of a published model after `prepare`."""
    heads = cfg.n_heads, cfg.head_dim
    rules = [
        Rule("tok_embeddings.weight", "mm_embed/table"),
        Rule("cls_embedding.embedding_table.weight", "lm_embed/table"),
        Rule("norm.weight", "mm_norm/scale"),
        Rule(SAME_NORM, "lm_norm/scale"),
        Rule("output.weight", "mm_head/kernel", TRANSPOSE),
    ]
    for i in range(cfg.n_language_layers):
        source = f"layers.{i}."
        for name, transform in (("q", _rotary(*heads)), ("k", _rotary(*heads)), ("v", out_axes(*heads)), ("o", in_axes(*heads))):
            rules.append(Rule(f"{source}attention.w{name}.weight", f"language/attn/{name}_proj/kernel", transform, i))
        for name, target in (("w1", "gate"), ("w3", "up"), ("w2", "down")):
            rules.append(Rule(f"{source}feed_forward.{name}.weight", f"language/mlp/{target}_proj/kernel", TRANSPOSE, i))
        for name, target in (("attention_norm", "attn_norm"), ("ffn_norm", "mlp_norm")):
            rules.append(Rule(f"{source}{name}.weight", f"language/{target}/scale", layer=i))
    return NameTable(rules, IGNORED, [Init("lm_head/kernel", constant(0))])
