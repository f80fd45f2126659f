"""Greedy decoding and the train step of the AR transformer against transformers' Qwen2ForCausalLM, same weights.

A text-only sequence through the unified transformer is plain Qwen2. Qwen2 has no vision layers, so here all are language layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from tests.benchmarks import peers
from tests.benchmarks.products import products
from tests.benchmarks.timing import Case, relative_difference, unequal_share
from xomni_jax.models.transformer import PRESETS, ARConfig, ARTransformer
from xomni_jax.models.vocab_heads import head_logp
from xomni_jax.sampling.generate import generate_text
from xomni_jax.training.optimizer import Optimizer, OptimizerConfig
from xomni_jax.training.state import TrainState

PACKAGES = ("torch", "transformers")
SIZES: dict[str, ARConfig] = {
    "tiny": dataclasses.replace(PRESETS["tiny"], n_adapter_layers=0, n_language_layers=5, n_head_layers=0),
    "small": ARConfig(
        vocab_size=4096, mm_vocab_size=64, image_vocab_size=32, d_model=512, mlp_dim=1536, n_heads=8, n_kv_heads=4, head_dim=64,
        n_adapter_layers=0, n_language_layers=8, n_head_layers=0,
    ),
}  # fmt: skip
OPTIMIZER = OptimizerConfig(learning_rate=1e-3, warmup_steps=0, schedule="constant", weight_decay=0.1)
DECODE_REST = "every step writes the cache, and each product reads its layer's weights as a slice of the stacked ones"
# Timed part by part, tiny, one core: MLPs run at the speed of their products; attention and its projections, backward, do not.
TRAIN_REST = "attention is separate products and a softmax, torch has one fused kernel, and its projections are slow backward"


def size_of(cfg: ARConfig) -> str:
    """The model in words."""
    return f"Qwen2 of {cfg.n_language_layers} layers, width {cfg.d_model}, MLP {cfg.mlp_dim}, {cfg.vocab_size} tokens, float32"


def decode_cases(cfg: ARConfig, batches: Sequence[int] = (1, 16), prompt: int = 23, new: int = 64) -> tuple[str, list[Case]]:
    """Title and cases: `new` tokens after prompts of `prompt` tokens, greedy, both sides with a key-value cache.

    The peer is run twice: by `generate()`, as its users call it, and by a bare loop over its forward pass and its cache.
    """
    import torch
    from transformers import DynamicCache

    model, params = ARTransformer(cfg), peers.random_params("transformer", cfg)
    net, cases = peers.qwen2(cfg, params), []
    run = jax.jit(lambda params, ids, lengths: generate_text(model, params, ids, lengths, new, ()))

    def bare(ids):
        cache, made, step = DynamicCache(config=net.config), [], ids
        with torch.inference_mode():
            for _ in range(new):
                out = net(input_ids=step, past_key_values=cache, use_cache=True, logits_to_keep=1)
                step = out.logits[:, -1].argmax(-1, keepdim=True)
                made.append(step)
            return torch.cat(made, dim=1).cpu()

    def generate(ids):
        with torch.inference_mode():
            options = dict(attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new, min_new_tokens=new)
            return net.generate(input_ids=ids, **options)[:, prompt:].cpu()

    for B in batches:
        ids = np.random.default_rng(B).integers(0, cfg.vocab_size, (B, prompt))
        arrays = jax.device_put(ids.astype(np.int32)), jnp.full(B, prompt, jnp.int32)
        for name, peer in (("bare loop", bare), ("generate()", generate)):
            ours = lambda arrays=arrays: run(params, *arrays)  # noqa: E731
            theirs = lambda peer=peer, ids=peers.tensor(ids): peer(ids)  # noqa: E731
            cases.append(Case(f"batch {B}, peer's {name}", ours, theirs, unequal_share, 0.0, B * new, "tokens"))
    cases += [products(B, cfg.d_model, cfg.mlp_dim) for B in batches]
    return f"{new} tokens after a prompt of {prompt}, greedy, cached; {size_of(cfg)}", cases


def train_cases(cfg: ARConfig, batch: int = 16, length: int = 96) -> tuple[str, list[Case]]:
    """Title and cases: one train step (forward, backward, clipping, AdamW) on the same rows, again and again; both sides learn.

    The losses of the first steps must agree: from the second on they show that the updates do.
    """
    import torch
    from torch.nn.functional import cross_entropy

    model, params = ARTransformer(cfg), peers.random_params("transformer", cfg)
    ids = np.random.default_rng(0).integers(0, cfg.vocab_size, (batch, length))
    net = peers.qwen2(cfg, params).train()
    # What only images use does not exist on the other side: it is not trained here.
    optimizer = Optimizer(OPTIMIZER, 1, freeze=("mm_.*",))
    # A copy: the step donates its state, and these parameters belong to the caller.
    state = TrainState(jnp.int32(0), jax.tree.map(jnp.copy, params), optimizer.transform.init(params), {})
    ids_BL, tokens = jax.device_put(ids.astype(np.int32)), peers.tensor(ids)

    def loss(params, ids_BL):
        hidden_BLD = model.apply({"params": params}, ids_BL)
        return -jnp.mean(head_logp(model, params, "text", hidden_BLD[:, :-1], ids_BL[:, 1:], chunk=0)[0])

    def step(state, ids_BL):
        value, grads = jax.value_and_grad(loss)(state.params, ids_BL)
        state, metrics = state.apply(optimizer, grads)
        return state, value, metrics

    compiled = jax.jit(step, donate_argnums=0)

    def ours():
        nonlocal state
        state, value, metrics = jax.block_until_ready(compiled(state, ids_BL))
        return value

    decays = [p for name, p in net.named_parameters() if not name.endswith("bias") and "norm" not in name]
    others = [p for name, p in net.named_parameters() if name.endswith("bias") or "norm" in name]
    groups = [{"params": decays, "weight_decay": OPTIMIZER.weight_decay}, {"params": others, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=OPTIMIZER.learning_rate, betas=(OPTIMIZER.b1, OPTIMIZER.b2), eps=1e-8, fused=True)

    def peer():
        adamw.zero_grad(set_to_none=True)
        logits = net(input_ids=tokens, use_cache=False).logits
        value = cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        value.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), OPTIMIZER.clip_norm)
        adamw.step()
        return value.detach().cpu()

    work = batch * length
    cases = [
        Case(f"train step, {batch} x {length}", ours, peer, relative_difference, 1e-4, work, "tokens"),
        products(work, cfg.d_model, cfg.mlp_dim),
    ]
    return f"forward, backward, clipping and AdamW on {batch} rows of {length} tokens; {size_of(cfg)}", cases
