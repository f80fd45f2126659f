"""Names of the VAE: diffusers' AutoencoderKL without quant convolutions, as FLUX.1 configures it."""

from __future__ import annotations

from collections.abc import Iterator

from xomni_jax.checkpoint.conversion import CONV, NameTable, Rule, norm_rules, weight_and_bias
from xomni_jax.models.autoencoder import AutoencoderConfig


def table(cfg: AutoencoderConfig) -> NameTable:
    """Every tensor of the released VAE for `cfg`; empty for the identity kind."""
    if cfg.kind == "identity":
        return NameTable([])
    rules, widths = [], cfg.block_channels
    for half in ("encoder", "decoder"):
        rules += _conv(f"{half}.conv_in", f"{half}/conv_in")
        rules += _middle(f"{half}.mid_block", f"{half}/middle")
        rules += norm_rules(f"{half}.conv_norm_out", f"{half}/norm_out")
        rules += _conv(f"{half}.conv_out", f"{half}/conv_out")
        up = half == "decoder"
        side, order = ("up", widths[::-1]) if up else ("down", widths)
        previous = order[0]
        for i, width in enumerate(order):
            for j in range(cfg.layers_per_block + up):
                rules += _resnet(f"{half}.{side}_blocks.{i}.resnets.{j}", f"{half}/{side}_{i}_resnet_{j}", skip=previous != width)
                previous = width
            if i < len(order) - 1:
                rules += _conv(f"{half}.{side}_blocks.{i}.{side}samplers.0.conv", f"{half}/{side}_{i}_sample")
    return NameTable(rules)


def _conv(source: str, target: str) -> list[Rule]:
    return weight_and_bias(source, target, CONV)


def _resnet(source: str, target: str, skip: bool = False) -> Iterator[Rule]:
    for i in (1, 2):
        yield from norm_rules(f"{source}.norm{i}", f"{target}/norm{i}")
        yield from _conv(f"{source}.conv{i}", f"{target}/conv{i}")
    if skip:
        yield from _conv(f"{source}.conv_shortcut", f"{target}/skip")


def _middle(source: str, target: str) -> Iterator[Rule]:
    for i in (0, 1):
        yield from _resnet(f"{source}.resnets.{i}", f"{target}/resnet_{i}")
    yield from norm_rules(f"{source}.attentions.0.group_norm", f"{target}/attention/norm")
    for name, ours in (("to_q", "q_proj"), ("to_k", "k_proj"), ("to_v", "v_proj"), ("to_out.0", "out")):
        yield from weight_and_bias(f"{source}.attentions.0.{name}", f"{target}/attention/{ours}")
