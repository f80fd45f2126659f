"""transformers' T5EncoderModel, small, in the v1.1 form (gated GELU)."""

from __future__ import annotations

import numpy as np

# The longest distance exceeds max_distance, so that every kind of bucket is met.
SIZES = dict(vocab_size=23, d_model=14, n_layers=2, n_heads=3, head_dim=5, mlp_dim=18, n_buckets=12, max_distance=9)


def build(seed: int, s: dict = SIZES):
    """The encoder with random weights, norm scales away from one."""
    import torch
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(seed)
    model = T5EncoderModel(
        T5Config(
            vocab_size=s["vocab_size"], d_model=s["d_model"], d_kv=s["head_dim"], d_ff=s["mlp_dim"], num_layers=s["n_layers"],
            num_heads=s["n_heads"],
            relative_attention_num_buckets=s["n_buckets"], relative_attention_max_distance=s["max_distance"],
            feed_forward_proj="gated-gelu",
        )
    ).eval()  # fmt: skip
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=1.0 if p.ndim == 1 else 0.0, std=0.4)
    return model


def outputs(seed: int = 0) -> dict[str, np.ndarray]:
    """Weights, ids, hidden states, and gradients of sum(hidden * cotangent)."""
    import torch

    model, s = build(seed), SIZES
    ids = torch.randint(s["vocab_size"], (2, 17))
    hidden = model(input_ids=ids).last_hidden_state
    cotangent = torch.randn_like(hidden)
    (hidden * cotangent).sum().backward()
    out = {"in/ids": ids.numpy().astype(np.int32), "in/cotangent": cotangent.numpy(), "out/hidden": hidden.detach().numpy()}
    for key, p in model.named_parameters():
        out |= {f"w/{key}": p.detach().numpy(), f"grad/{key}": p.grad.numpy()}
    return out
