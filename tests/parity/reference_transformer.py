"""The unified transformer in torch: transformers' Qwen2 layers under the released masking rule. Torch is imported inside functions."""

from __future__ import annotations

import numpy as np

SIZES = dict(
    vocab_size=23, mm_vocab_size=19, image_vocab_size=13, d_model=20, mlp_dim=28, n_heads=6, n_kv_heads=2, head_dim=4,
    n_language_layers=3, n_adapter_layers=1, n_head_layers=2,
)  # fmt: skip


def _config(s):
    from transformers import Qwen2Config

    config = Qwen2Config(
        vocab_size=s["vocab_size"], hidden_size=s["d_model"], intermediate_size=s["mlp_dim"], num_attention_heads=s["n_heads"],
        num_key_value_heads=s["n_kv_heads"], head_dim=s["head_dim"], num_hidden_layers=s["n_language_layers"], rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6}, tie_word_embeddings=False, attention_dropout=0.0,
    )  # fmt: skip
    config._attn_implementation = "eager"
    return config


def build(seed: int, s: dict = SIZES):
    """A module whose state has the released key names, and its forward pass: ids [B, L] -> (hidden, text logits, image logits)."""
    import torch
    from torch import nn
    from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2RMSNorm, Qwen2RotaryEmbedding

    config = _config(s)
    n_layers = s["n_adapter_layers"] + s["n_language_layers"] + s["n_head_layers"]
    net, net.model = nn.Module(), nn.Module()
    for kind, rows in (("lm", s["vocab_size"]), ("mm", s["mm_vocab_size"])):
        setattr(net.model, f"{kind}_embed_tokens", nn.Embedding(rows, s["d_model"]))
        setattr(net.model, f"{kind}_norm", Qwen2RMSNorm(s["d_model"], 1e-6))
        setattr(net, f"{kind}_head", nn.Linear(s["d_model"], rows, bias=False))
    # The layer only looks its number up in config.layer_types, all of them full attention.
    net.model.layers = nn.ModuleList(Qwen2DecoderLayer(config, 0) for _ in range(n_layers))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in net.named_parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.25 + ("norm" in name))
    rotary = Qwen2RotaryEmbedding(config)

    def forward(ids):
        model, L = net.model, ids.shape[1]
        image = (ids >= s["vocab_size"])[..., None]
        text_ids, image_ids = ids.clamp(max=s["vocab_size"] - 1), (ids - s["vocab_size"]).clamp(min=0)
        x = torch.where(image, model.mm_embed_tokens(image_ids), model.lm_embed_tokens(text_ids))
        causal = torch.full((L, L), torch.finfo(torch.float32).min).triu(1)[None, None]
        positions = rotary(x, torch.arange(L)[None])
        for i, layer in enumerate(model.layers):
            y = layer(x, attention_mask=causal, position_embeddings=positions)
            vision = i < s["n_adapter_layers"] or i >= n_layers - s["n_head_layers"]
            x = torch.where(image, y, x) if vision else y
        hidden = torch.where(image, model.mm_norm(x), model.lm_norm(x))
        return hidden, net.lm_head(hidden), net.mm_head(hidden)[..., : s["image_vocab_size"]]

    return net, forward


def _plain(net, ids, cotangent) -> dict[str, np.ndarray]:
    """A plain Qwen2ForCausalLM that holds the language layers alone: its logits and gradients, under the mixed model's names."""
    import torch
    from transformers import Qwen2ForCausalLM

    a, n = SIZES["n_adapter_layers"], SIZES["n_language_layers"]
    names = {"model.embed_tokens.weight": "model.lm_embed_tokens.weight", "model.norm.weight": "model.lm_norm.weight"}
    plain, state = Qwen2ForCausalLM(_config(SIZES)), net.state_dict()
    for i in range(n):
        prefix = f"model.layers.{i}."
        names |= {k: k.replace(prefix, f"model.layers.{a + i}.", 1) for k in plain.state_dict() if k.startswith(prefix)}
    plain.load_state_dict({k: state[names.get(k, k)] for k in plain.state_dict()})
    logits = plain.eval()(input_ids=ids).logits
    torch.sum(logits * cotangent).backward()
    grads = {f"plain/{names.get(k, k)}": p.grad.numpy() for k, p in plain.named_parameters()}
    return {"out/plain_logits": logits.detach().numpy()} | grads


def outputs(seed: int = 0) -> dict[str, np.ndarray]:
    """Weights, a mixed and a text-only batch, outputs and gradients of sum(logits * cotangent) of both."""
    import torch

    net, forward = build(seed)
    rng, s = np.random.default_rng(seed), SIZES
    ids = rng.integers(0, s["vocab_size"], (2, 11))
    ids[0, 3:8] = s["vocab_size"] + rng.integers(0, s["mm_vocab_size"], 5)
    ids[1, [0, 1, 5, 6, 7, 8, 10]] = s["vocab_size"] + rng.integers(0, s["mm_vocab_size"], 7)
    text_ids = rng.integers(0, s["vocab_size"], (2, 7))
    draws = {
        "text_cotangent": rng.normal(size=(2, 11, s["vocab_size"])),
        "image_cotangent": rng.normal(size=(2, 11, s["image_vocab_size"])),
        "plain_cotangent": rng.normal(size=(2, 7, s["vocab_size"])),
    }
    draws = {k: v.astype(np.float32) for k, v in draws.items()}
    hidden, text, image = forward(torch.tensor(ids))
    loss = (text * torch.tensor(draws["text_cotangent"])).sum() + (image * torch.tensor(draws["image_cotangent"])).sum()
    loss.backward()
    out = {f"w/{k}": v.numpy() for k, v in net.state_dict().items()}
    out |= {f"grad/{k}": p.grad.numpy() for k, p in net.named_parameters()}
    out |= {"in/ids": ids.astype(np.int32), "in/text_ids": text_ids.astype(np.int32)} | {f"in/{k}": v for k, v in draws.items()}
    out |= {"out/hidden": hidden.detach().numpy(), "out/text_logits": text.detach().numpy(), "out/image_logits": image.detach().numpy()}
    return out | _plain(net, torch.tensor(text_ids), torch.tensor(draws["plain_cotangent"]))
