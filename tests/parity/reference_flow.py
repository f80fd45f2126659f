"""diffusers' FlowMatchEulerDiscreteScheduler with the dynamic shift of FLUX.1-dev."""

from __future__ import annotations

import numpy as np

CASES = ((1, 256), (4, 32), (7, 5184))  # (steps, tokens), inside and outside of the shift's two anchors


def outputs(seed: int = 0) -> dict[str, np.ndarray]:
    """Noise levels and sampling runs under the velocity tanh(3 x) + sigma."""
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    noise = torch.randn(2, 3, generator=torch.Generator().manual_seed(seed))
    out = {"in/noise": noise.numpy()}
    for n_steps, n_tokens in CASES:
        scheduler = FlowMatchEulerDiscreteScheduler(
            shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256, max_image_seq_len=4096
        )
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1.0 / n_steps, n_steps), mu=calculate_shift(n_tokens))
        x = noise
        for t in scheduler.timesteps:
            x = scheduler.step(torch.tanh(3 * x) + t / 1000, t, x, return_dict=False)[0]
        out |= {f"out/sigmas_{n_steps}_{n_tokens}": scheduler.sigmas.numpy(), f"out/data_{n_steps}_{n_tokens}": x.numpy()}
    return out
