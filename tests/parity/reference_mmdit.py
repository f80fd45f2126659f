"""diffusers' FluxTransformer2DModel with the semantic map added between its two kinds of blocks."""

from __future__ import annotations

import numpy as np

SIZES = dict(in_channels=6, n_heads=3, head_dim=10, axes_dims=(2, 2, 6), n_double=2, n_single=3, text_dim=11, pooled_dim=9, semantic_dim=7)
GRID, TEXT, BATCH = (3, 4), 5, 2


def build(seed: int, s: dict = SIZES):
    """The transformer with `siglip_embed` and random weights."""
    import torch
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(seed)
    model = FluxTransformer2DModel(
        in_channels=s["in_channels"], num_layers=s["n_double"], num_single_layers=s["n_single"], attention_head_dim=s["head_dim"],
        num_attention_heads=s["n_heads"], joint_attention_dim=s["text_dim"], pooled_projection_dim=s["pooled_dim"],
        guidance_embeds=True, axes_dims_rope=s["axes_dims"],
    )  # fmt: skip
    model.siglip_embed = torch.nn.Linear(s["semantic_dim"], s["n_heads"] * s["head_dim"], bias=False)
    for p in model.parameters():
        # Norm scales away from one, and modulations large enough that a swapped chunk shows.
        torch.nn.init.normal_(p, mean=1.0 if p.ndim == 1 and p.shape[0] == s["head_dim"] else 0.0, std=0.2)
    return model


def outputs(seed: int = 0) -> dict[str, np.ndarray]:
    """Weights, inputs, velocity with and without semantics, and gradients of sum(velocity * cotangent)."""
    import torch

    model, s = build(seed), SIZES
    Y, X = GRID
    inputs = {
        "latents": torch.randn(BATCH, Y * X, s["in_channels"]),
        "sigma": torch.tensor([0.83, 0.17]),
        "guidance": torch.tensor([1.0, 3.5]),
        "text": torch.randn(BATCH, TEXT, s["text_dim"]),
        "pooled": torch.randn(BATCH, s["pooled_dim"]),
        "semantics": torch.randn(BATCH, Y * X, s["semantic_dim"]),
        "cotangent": torch.randn(BATCH, Y * X, s["in_channels"]),
    }
    rows, columns = torch.meshgrid(torch.arange(Y), torch.arange(X), indexing="ij")
    image_ids = torch.stack([torch.zeros(Y, X), rows, columns], dim=-1).reshape(-1, 3).float()

    def forward(semantics):
        hook = model.transformer_blocks[-1].register_forward_hook(
            lambda _module, _inputs, streams: streams if semantics is None else (streams[0], streams[1] + model.siglip_embed(semantics))
        )
        velocity = model(
            hidden_states=inputs["latents"], encoder_hidden_states=inputs["text"], pooled_projections=inputs["pooled"],
            timestep=inputs["sigma"],
            img_ids=image_ids, txt_ids=torch.zeros(TEXT, 3), guidance=inputs["guidance"], return_dict=False,
        )[0]  # fmt: skip
        hook.remove()
        return velocity

    velocity = forward(inputs["semantics"])
    (velocity * inputs["cotangent"]).sum().backward()
    with torch.no_grad():
        plain = forward(None)
    out = {f"in/{k}": v.numpy() for k, v in inputs.items()}
    out |= {"out/velocity": velocity.detach().numpy(), "out/velocity_without_semantics": plain.numpy()}
    for key, p in model.named_parameters():
        out |= {f"w/{key}": p.detach().numpy(), f"grad/{key}": p.grad.numpy()}
    return out
