"""transformers' CLIPTextModel, small."""

from __future__ import annotations

import numpy as np

SIZES = dict(vocab_size=21, d_model=15, n_layers=2, n_heads=3, mlp_dim=22, max_length=11, eos_id=17)


def build(seed: int, s: dict = SIZES, eos_token_id: int | None = None):
    """The text tower with random weights; `eos_token_id` of its config, where that is not the tokenizer's."""
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(seed)
    eos_token_id = s["eos_id"] if eos_token_id is None else eos_token_id
    model = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=s["vocab_size"], hidden_size=s["d_model"], intermediate_size=s["mlp_dim"], num_hidden_layers=s["n_layers"],
            num_attention_heads=s["n_heads"], max_position_embeddings=s["max_length"], eos_token_id=eos_token_id,
            bos_token_id=0, pad_token_id=s["eos_id"],
            hidden_act="quick_gelu",
        )
    ).eval()  # fmt: skip
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, mean=1.0 if "norm" in name and p.ndim == 1 else 0.0, std=0.4)
    return model


def released_names(model) -> dict:
    """Parameters by their names in released files; transformers 5 leaves the prefix out."""
    return {"text_model." + key.removeprefix("text_model."): p for key, p in model.named_parameters()}


def outputs(seed: int = 0) -> dict[str, np.ndarray]:
    """Weights, ids with repeated end-of-text tokens, hidden and pooled states, and gradients of their sum with cotangents."""
    import torch

    model, s = build(seed), SIZES
    ids = torch.randint(s["eos_id"], (2, 9))
    ids[0, 4:], ids[1, 7:] = s["eos_id"], s["eos_id"]
    ids[1, 8] = s["vocab_size"] - 1  # a higher id than end-of-text must not draw the pooling to itself
    result = model(input_ids=ids)
    hidden, pooled = result.last_hidden_state, result.pooler_output
    cotangents = torch.randn_like(hidden), torch.randn_like(pooled)
    ((hidden * cotangents[0]).sum() + (pooled * cotangents[1]).sum()).backward()
    out = {"in/ids": ids.numpy().astype(np.int32), "in/cotangent": cotangents[0].numpy(), "in/pooled_cotangent": cotangents[1].numpy()}
    out |= {"out/hidden": hidden.detach().numpy(), "out/pooled": pooled.detach().numpy()}
    for key, p in released_names(model).items():
        out |= {f"w/{key}": p.detach().numpy(), f"grad/{key}": p.grad.numpy()}
    return out
