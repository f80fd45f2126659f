"""What the published X-Omni code can run of an export. Its classes have sizes built in that a model of ours may choose."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from xomni_jax.sampling.decoder import DecodeConfig

# Image towers by the names that `modeling_vit.py` knows.
VITS = {
    "siglip2_giant_patch16_384": dict(width=1536, layers=40, mlp=6144),
    "siglip_so400m_patch16_384": dict(width=1152, layers=27, mlp=4304),
}
HEADS = dict.fromkeys(VITS, 16)  # the one size that no tensor shows
# Fields that no argument of the published classes sets.
FIXED: dict[str, dict[str, Any]] = {
    "transformer": dict(order="raster"),
    "siglip_vq": dict(heads=16, patch=16, pos_grid=128, conv_blocks=2, groups=32),
    "mmdit": dict(mlp_ratio=4, prediction="velocity", theta=10000.0),
    "autoencoder": dict(kind="kl"),
}


def vit_name(cfg: Any) -> str | None:
    """The published name of the image tower, if it has one."""
    return next((name for name, sizes in VITS.items() if all(getattr(cfg, key) == n for key, n in sizes.items())), None)


def misfits(name: str, cfg: Any) -> list[str]:
    """Fields of a component that the published class fixes at another value: "patch=8 (16)"."""
    fixed = dict(FIXED.get(name, {}))
    if name == "siglip_vq" and vit_name(cfg) is None:
        fixed |= next(iter(VITS.values()))
    return [f"{key}={getattr(cfg, key)} ({value})" for key, value in fixed.items() if getattr(cfg, key) != value]


def limits(configs: Mapping[str, Any], decode: DecodeConfig) -> str | None:
    """One sentence on what the published code cannot run of these components, and what it can; None if it runs all."""
    found = {name: ", ".join(wrong) for name, cfg in configs.items() if (wrong := misfits(name, cfg))}
    if "mmdit" in configs and "mmdit" not in found and decode.guidance <= 1:
        found["mmdit"] = f"decode.guidance={decode.guidance:g} (above 1)"
    if not found:
        return None
    what = "; ".join(f"{name} with {wrong}" for name, wrong in found.items())
    alone = "transformer" in configs and "transformer" not in found
    runs = "it runs the transformer alone (text and codes), this package runs all" if alone else "this package runs it"
    return f"X-Omni's published code cannot run {what} (what it takes is in brackets); {runs}"
