"""The MMDiT's forward pass against diffusers' FluxTransformer2DModel with the same weights and the semantic map added."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from tests.benchmarks import peers
from tests.benchmarks.products import products
from tests.benchmarks.timing import Case, relative_difference
from xomni_jax.models.mmdit import PRESETS, MMDiT, MMDiTConfig

PACKAGES = ("torch", "diffusers")
# FLUX predicts velocity, whatever the preset does.
TINY = dataclasses.replace(PRESETS["tiny"], prediction="velocity")
# size -> (configuration, token grid, batches)
SIZES: dict[str, tuple[MMDiTConfig, tuple[int, int], tuple[int, ...]]] = {
    "tiny": (TINY, (4, 8), (1, 32)),
    "small": (
        dataclasses.replace(TINY, d_model=512, n_heads=8, axes_dims=(16, 24, 24), n_double=2, text_dim=512),
        (12, 16),
        (1, 4),
    ),
}
REST = "the attention scores are written out whole, where torch's fused attention keeps them in cache"


def cases(cfg: MMDiTConfig, grid: tuple[int, int], batches: Sequence[int], text: int = 32) -> tuple[str, list[Case]]:
    """Title and cases: one velocity per batch size, all conditions given."""
    model, params, (Y, X) = MMDiT(cfg), peers.random_params("mmdit", cfg), grid
    net, T = peers.flux(cfg, params), Y * X
    # Rotary positions as diffusers wants them: (0, row, column) of every token.
    image_ids = np.stack([np.zeros(grid), *np.mgrid[:Y, :X]], axis=-1).reshape(T, 3).astype(np.float32)

    def velocity(params, x):
        inputs = x["latents"], x["sigma"], x["text"], x["pooled"], grid, x["semantics"], x.get("guidance")
        return model.apply({"params": params}, *inputs)

    run, out = jax.jit(velocity), []
    for B in batches:
        rng = np.random.default_rng(B)
        shapes = {"latents": (B, T, cfg.in_channels), "semantics": (B, T, cfg.semantic_dim), "text": (B, text, cfg.text_dim)}
        shapes["pooled"] = (B, cfg.pooled_dim)
        x = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
        x["sigma"] = rng.uniform(size=B).astype(np.float32)
        if cfg.guidance_embed:
            x["guidance"] = np.full(B, 3.5, np.float32)
        ours = lambda arrays=jax.device_put(x): run(params, arrays)  # noqa: E731
        out.append(Case(f"forward, batch {B}", ours, _peer(net, x, image_ids, text), relative_difference, 1e-4, B, "images"))
        out.append(products(B * (T + text), cfg.d_model, cfg.mlp_dim))
    size = f"MMDiT of {cfg.n_double} + {cfg.n_single} blocks, width {cfg.d_model}, float32"
    title = f"one velocity of a {Y} x {X} grid with {text} text tokens; {size}"
    return title, sorted(out, key=lambda case: case.yardstick)


def _peer(net: Any, x: dict[str, np.ndarray], image_ids: np.ndarray, text: int):
    import torch

    t = {name: peers.tensor(value) for name, value in x.items()}
    inputs = dict(
        hidden_states=t["latents"], encoder_hidden_states=t["text"], pooled_projections=t["pooled"], timestep=t["sigma"],
        img_ids=peers.tensor(image_ids), txt_ids=peers.tensor(np.zeros((text, 3), np.float32)), guidance=t.get("guidance"),
        return_dict=False,
    )  # fmt: skip

    def run():
        with torch.inference_mode():
            return net(t["semantics"], **inputs)[0].cpu()

    return run
