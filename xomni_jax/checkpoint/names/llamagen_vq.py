"""Names of LlamaGen's VQ tokenizer, as its published `vq_ds16_*.pt` and `vq_ds8_*.pt` spell them."""

from __future__ import annotations

from collections.abc import Iterator

from xomni_jax.checkpoint.conversion import CONV, POINTWISE, Ignored, NameTable, Rule, norm_rules, weight_and_bias
from xomni_jax.models.llamagen_vq import LlamaGenVQConfig

IGNORED = (Ignored(r"quantize\.codebook_used", "a window of recent codes, for a metric of training"),)


def table(cfg: LlamaGenVQConfig) -> NameTable:
    """Every tensor of the published tokenizer for `cfg`. The source counts the decoder's levels from the deepest, as ours does."""
    rules, last = [Rule("quantize.embedding.weight", "codebook")], len(cfg.block_channels) - 1
    for name in ("quant_conv", "post_quant_conv"):
        rules += weight_and_bias(name, name, POINTWISE)
    for half, side in (("encoder", "down"), ("decoder", "up")):
        rules += weight_and_bias(f"{half}.conv_in", f"{half}/conv_in", CONV)
        rules += norm_rules(f"{half}.norm_out", f"{half}/norm_out")
        rules += weight_and_bias(f"{half}.conv_out", f"{half}/conv_out", CONV)
        for i, target in ((0, "resnet_0"), (2, "resnet_1")):
            rules += _resnet(f"{half}.mid.{i}", f"{half}/middle/{target}")
        rules += _attention(f"{half}.mid.1", f"{half}/middle/attention")
        up = half == "decoder"
        widths = cfg.block_channels[::-1] if up else cfg.block_channels
        previous, deepest = (widths[0], 0) if up else (cfg.in_features, last)
        for i, width in enumerate(widths):
            source, target = f"{half}.conv_blocks.{i}", f"{half}/{side}_{i}"
            for j in range(cfg.layers_per_block + up):
                rules += _resnet(f"{source}.res.{j}", f"{target}_resnet_{j}", skip=previous != width)
                if i == deepest:
                    rules += _attention(f"{source}.attn.{j}", f"{target}_attention_{j}")
                previous = width
            if i < last:
                rules += weight_and_bias(f"{source}.{side}sample.conv", f"{target}_sample", CONV)
    return NameTable(rules, IGNORED)


def _resnet(source: str, target: str, skip: bool = False) -> Iterator[Rule]:
    for i in (1, 2):
        yield from norm_rules(f"{source}.norm{i}", f"{target}/norm{i}")
        yield from weight_and_bias(f"{source}.conv{i}", f"{target}/conv{i}", CONV)
    if skip:
        yield from weight_and_bias(f"{source}.nin_shortcut", f"{target}/skip", CONV)


def _attention(source: str, target: str) -> Iterator[Rule]:
    yield from norm_rules(f"{source}.norm", f"{target}/norm")
    for name, ours in (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("proj_out", "out")):
        yield from weight_and_bias(f"{source}.{name}", f"{target}/{ours}", POINTWISE)
