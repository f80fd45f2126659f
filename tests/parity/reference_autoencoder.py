"""diffusers' AutoencoderKL in FLUX.1's configuration, small."""

from __future__ import annotations

import numpy as np

SIZES = dict(latent_channels=5, block_channels=(6, 10, 14), layers_per_block=2, groups=2, scaling_factor=0.7, shift_factor=0.2)


def build(seed: int, s: dict = SIZES):
    """The VAE with random weights."""
    import torch
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    n = len(s["block_channels"])
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * n, up_block_types=("UpDecoderBlock2D",) * n, block_out_channels=s["block_channels"],
        layers_per_block=s["layers_per_block"], latent_channels=s["latent_channels"], norm_num_groups=s["groups"],
        scaling_factor=s["scaling_factor"], shift_factor=s["shift_factor"], use_quant_conv=False, use_post_quant_conv=False,
    ).eval()  # fmt: skip
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=0.0, std=p[0].numel() ** -0.5 if p.ndim > 1 else 0.5)
    return model


def outputs(seed: int = 0) -> dict[str, np.ndarray]:
    """Weights, pixels [B, H, W, 3], posterior moments, scaled latents of a given z and their decoding; images channels-last."""
    import torch

    model, s = build(seed), SIZES
    pixels, z = torch.rand(2, 3, 12, 20) * 2 - 1, torch.randn(2, s["latent_channels"], 3, 5)
    with torch.no_grad():
        posterior = model.encode(pixels).latent_dist
        arrays = {
            "in/pixels": pixels,
            "in/latents": (z - s["shift_factor"]) * s["scaling_factor"],
            "out/mean": posterior.mean,
            "out/logvar": posterior.logvar,
            "out/pixels": model.decode(z).sample,
        }
    out = {k: v.permute(0, 2, 3, 1).contiguous().numpy() for k, v in arrays.items()}
    return out | {f"w/{k}": v.numpy() for k, v in model.state_dict().items()}
