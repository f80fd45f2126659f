"""The least arithmetic and traffic of a pass of the models, with which compiled programs are compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp

from xomni_jax.core.program import Work
from xomni_jax.models.transformer import ARConfig
from xomni_jax.sharding.abstract import leaves


def layer_weights(c: ARConfig) -> int:
    """Parameters in the matrices of one transformer layer."""
    return 2 * c.d_model * c.n_heads * c.head_dim + 2 * c.d_model * c.n_kv_heads * c.head_dim + 3 * c.d_model * c.mlp_dim


def causal(c: ARConfig, rows: int, length: int) -> float:
    """Operations of causal attention in a forward pass over whole rows."""
    return 2.0 * rows * length * length * c.n_heads * c.head_dim * c.n_layers


def telling(c: ARConfig, *vocabularies: int) -> tuple[int, ...]:
    """The sizes by which logits are told from other arrays: those that no layer of a small model has as its width."""
    return tuple(n for n in vocabularies if n not in (c.d_model, c.mlp_dim))


def next_token(c: ARConfig, rows: int, length: int, targets: int, language: bool, chunk: int, mesh: Mapping[str, int]) -> Work:
    """A step of pre-training or fine-tuning, in which both output heads see every target; `language`: the language layers learn."""
    tokens, heads = rows * length, c.d_model * (c.vocab_size + c.image_vocab_size)
    share = 6 if language else 4  # frozen language layers pass gradients on, but have none of their own
    new = c.n_adapter_layers + c.n_head_layers
    layers = layer_weights(c) * (6 * new + share * c.n_language_layers)
    text_head = 6 if language else 4
    learned = layers * tokens + rows * targets * c.d_model * (text_head * c.vocab_size + 6 * c.image_vocab_size)
    gathered, reduced = fsdp_bytes(c, 1, heads, mesh, c.n_layers if language else new)
    return Work(
        learned=learned, attention=3 * causal(c, rows, length), tokens=tokens, gathered=gathered, reduced=reduced,
        logits_limit=rows * (chunk or targets), vocabularies=telling(c, c.vocab_size, c.image_vocab_size), head_gathers=2,
    )  # fmt: skip


def next_token_forward(c: ARConfig, rows: int, length: int, targets: int, chunk: int, mesh: Mapping[str, int]) -> Work:
    """The loss of such a step without its gradient."""
    whole, heads = next_token(c, rows, length, targets, True, chunk, mesh), c.d_model * (c.vocab_size + c.image_vocab_size)
    gathered, _ = fsdp_bytes(c, 1, heads, mesh, 0, passes=1)
    return dataclasses.replace(whole, learned=0.0, forward=whole.learned / 3, attention=whole.attention / 3, gathered=gathered, reduced=0.0)


def policy_update(
    c: ARConfig, rows: int, prompt: int, codes: int, parts: int, sides: int, reference: bool, chunk: int, mesh: Mapping[str, int]
) -> Work:
    """An update on rollouts. `sides` is 2 with guidance; a reference adds a pass without a gradient."""
    length = prompt + codes
    per_pass = sides * rows * (length * c.n_layers * layer_weights(c) + codes * c.d_model * c.image_vocab_size)
    gathered, reduced = fsdp_bytes(c, parts, c.d_model * c.image_vocab_size, mesh, c.n_layers)
    passes = fsdp_bytes(c, parts, c.d_model * c.image_vocab_size, mesh, 0, passes=1)[0] if reference else 0.0
    return Work(
        learned=6.0 * per_pass, forward=2.0 * per_pass if reference else 0.0,
        attention=(3 + reference) * sides * causal(c, rows, length), tokens=rows * length, gathered=gathered + passes, reduced=reduced,
        logits_limit=rows // parts * (chunk or codes), vocabularies=telling(c, c.image_vocab_size), head_gathers=1 + reference,
    )  # fmt: skip


def joined(parts: Iterable[Work]) -> Work:
    """All of them in one program."""
    first, *others = parts
    for one in others:
        sums = ("learned", "forward", "attention", "tokens", "gathered", "reduced", "head_gathers")
        added = {name: getattr(first, name) + getattr(one, name) for name in sums}
        widths = tuple(dict.fromkeys(first.vocabularies + one.vocabularies))
        first = dataclasses.replace(first, **added, vocabularies=widths, logits_limit=max(first.logits_limit, one.logits_limit))
    return first


def replay(c: ARConfig, rows: int, prompt: int, codes: int, parts: int, sides: int, chunk: int, mesh: Mapping[str, int]) -> Work:
    """Log-probs of rollouts without a gradient."""
    whole = policy_update(c, rows, prompt, codes, parts, sides, True, chunk, mesh)
    gathered, _ = fsdp_bytes(c, parts, c.d_model * c.image_vocab_size, mesh, 0, passes=1)
    return dataclasses.replace(whole, learned=0.0, attention=whole.attention / 4, gathered=gathered, reduced=0.0, head_gathers=1)


def fsdp_bytes(c: ARConfig, parts: int, heads: int, mesh: Mapping[str, int], learned_layers: int, passes: int = 3) -> tuple[float, float]:
    """Bytes (gathered, reduced) of a device: the weights of the layers once per pass (forward, remat, backward) in the compute dtype and
    those of the heads once; the gradients, before they are scattered, once for each part of the batch."""
    if mesh["fsdp"] == 1:
        return 0.0, 0.0
    size = jnp.dtype(c.dtype).itemsize / mesh["tensor"]
    layer = layer_weights(c) * size
    gathered = parts * passes * c.n_layers * layer + heads * size
    return gathered, (parts * (learned_layers * layer + heads * size) if learned_layers else 0.0)


def rollout(c: ARConfig, prompts: int, rollouts: int, prompt: int, codes: int, segment: int, sides: int, mesh: Mapping[str, int]) -> Work:
    """A segment of sampling. Each step reads all weights and the whole cache, which is counted as full; attention is that of the mean
    segment."""
    batch, tensor = mesh["replica"] * mesh["data"] * mesh["fsdp"], mesh["tensor"]
    n = prompts * rollouts * sides
    decode = 2.0 * n * segment * (c.n_layers * layer_weights(c) + c.d_model * c.image_vocab_size)
    weights = ((1.0 if c.int8 else 2.0) * c.n_layers * layer_weights(c) + 2.0 * c.d_model * c.image_vocab_size) / tensor
    token = c.n_layers * 2 * c.n_kv_heads * c.head_dim * 2
    cache = (prompts * sides * prompt + n * codes) * token / batch / tensor
    attention = 4.0 * n * segment * (prompt + codes / 2) * c.n_heads * c.head_dim * c.n_layers
    return Work(forward=decode, attention=attention, tokens=prompts * rollouts * segment, floor=weights + cache, cache=cache, steps=segment)


def answer(c: ARConfig, rows: int, prompt: int) -> Work:
    """Prefill of the questions and one token of the answers, whose length is unknown; only the language layers see new tokens."""
    read = prefill(c, rows, prompt, 1)
    new = 2.0 * rows * (c.n_language_layers * layer_weights(c) + c.d_model * c.vocab_size)
    return dataclasses.replace(read, forward=read.forward + new, tokens=rows * (prompt + 1), open_loops=1)


def prefill(c: ARConfig, prompts: int, prompt: int, sides: int) -> Work:
    """The forward pass over the prompts, once per prompt."""
    rows = prompts * sides
    return Work(forward=2.0 * rows * prompt * c.n_layers * layer_weights(c), attention=causal(c, rows, prompt), tokens=prompts * prompt)


def dense(params: Any, tokens: Mapping[str, int]) -> float:
    """Forward operations, 2 x values x tokens, of all kernels; `tokens` by the start of the path, one where none matches."""
    total = 0.0
    for name, x in leaves(params):
        if name.rsplit("/", 1)[-1] == "kernel":
            total += 2.0 * x.size * next((n for start, n in tokens.items() if name.startswith(start)), 1)
    return total


def mmdit_tokens(image: int, text: int) -> dict[str, int]:
    """Tokens by kernel of the MMDiT: modulations and condition vectors see one row an image."""
    once = {f"{block}_blocks/{m}modulation": 1 for block in ("double", "single") for m in ("text_", "image_", "")}
    streams = {"double_blocks/text": text, "double_blocks/image": image, "single_blocks": image + text}
    return once | streams | {"text_embed": text, "latent_embed": image, "siglip_embed": image, "out/": image}
