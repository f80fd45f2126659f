"""The other side of the comparisons: torch models with our weights. Torch is imported inside functions."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import jax
import numpy as np
from flax.linen import meta

from tests.benchmarks.machine import cores
from tests.benchmarks.timing import BenchError
from tests.name_tables import to_tensors
from xomni_jax.checkpoint.names import mmdit as mmdit_names
from xomni_jax.checkpoint.names import transformer as transformer_names
from xomni_jax.models.mmdit import MMDiTConfig
from xomni_jax.models.registry import init_params
from xomni_jax.models.transformer import ARConfig

# Where the released model's text half differs in name from the Qwen2 it was made of.
QWEN2_NAMES = {"model.lm_embed_tokens.weight": "model.embed_tokens.weight", "model.lm_norm.weight": "model.norm.weight"}


def need(benchmark: str, packages: Sequence[str]) -> list[ModuleType]:
    """The peers' packages, torch first and on all cores.

    Raises:
      BenchError: one is not installed; names the extra that brings it. Or torch has no GPU where JAX has one.
    """
    modules = []
    for name in packages:
        try:
            modules.append(importlib.import_module(name))
        except ImportError:
            raise BenchError(
                f"bench {benchmark} compares with {name}, which is not installed; pip install 'xomni_jax[parity]' brings it"
            ) from None
        if name == "torch":
            modules[-1].set_num_threads(cores())
    if device() == "cuda":
        if not modules[0].cuda.is_available():
            raise BenchError(
                f"bench {benchmark}: JAX runs on a GPU and this torch on CPUs; install a torch for CUDA, or set JAX_PLATFORMS=cpu"
            )
        jax.config.update("jax_default_matmul_precision", "highest")  # full float32, as torch computes
    return modules


def device() -> str:
    """Where torch runs: on the GPU if JAX does."""
    return "cuda" if jax.default_backend() == "gpu" else "cpu"


def tensor(array: np.ndarray) -> Any:
    """The array as a tensor of the peer's device."""
    import torch

    return torch.from_numpy(array).to(device())


def random_params(component: str, cfg: Any, seed: int = 0) -> Any:
    """Random float32 parameters, norm scales around 1, nothing at zero: a fresh MMDiT's shut gates would hide most of it."""
    shapes = meta.unbox(jax.eval_shape(lambda: init_params(component, cfg, jax.random.key(0))))
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        return (0.05 * rng.normal(size=leaf.shape) + (path[-1].key == "scale")).astype(np.float32)

    return jax.device_put(jax.tree_util.tree_map_with_path(draw, shapes))


def qwen2(cfg: ARConfig, params: Mapping[str, Any]) -> Any:
    """transformers' Qwen2ForCausalLM, float32, with the text weights of an `ARTransformer` that has language layers alone."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    if cfg.n_adapter_layers or cfg.n_head_layers:
        raise BenchError("a plain Qwen2 has no vision layers; set n_adapter_layers=0 and n_head_layers=0")
    config = Qwen2Config(
        vocab_size=cfg.vocab_size, hidden_size=cfg.d_model, intermediate_size=cfg.mlp_dim, num_attention_heads=cfg.n_heads,
        num_key_value_heads=cfg.n_kv_heads, head_dim=cfg.head_dim, num_hidden_layers=cfg.n_language_layers,
        rms_norm_eps=cfg.rms_eps, rope_parameters={"rope_type": "default", "rope_theta": cfg.rope_theta},
        tie_word_embeddings=False, attention_dropout=0.0,
        bos_token_id=None, eos_token_id=None,
        pad_token_id=None,  # its row of the embedding would get no gradient
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    tensors = to_tensors(params, transformer_names.table(cfg)).items()
    return _load(model, {QWEN2_NAMES.get(k, k): v for k, v in tensors if not k.startswith(("model.mm_", "mm_"))})


def flux(cfg: MMDiTConfig, params: Mapping[str, Any]) -> Any:
    """diffusers' FluxTransformer2DModel, float32, with the weights of an `MMDiT`.

    Called as `model(semantics, **inputs)`: the semantic map is added to the image stream after the last double block.
    """
    import torch
    from diffusers import FluxTransformer2DModel

    class WithSemantics(FluxTransformer2DModel):
        def forward(self, semantics, **inputs):
            last = self.transformer_blocks[-1]
            handle = last.register_forward_hook(lambda _module, _inputs, out: (out[0], out[1] + self.siglip_embed(semantics)))
            try:
                return super().forward(**inputs)
            finally:
                handle.remove()

    model = WithSemantics(
        in_channels=cfg.in_channels, num_layers=cfg.n_double, num_single_layers=cfg.n_single, attention_head_dim=cfg.head_dim,
        num_attention_heads=cfg.n_heads, joint_attention_dim=cfg.text_dim, pooled_projection_dim=cfg.pooled_dim,
        guidance_embeds=cfg.guidance_embed, axes_dims_rope=cfg.axes_dims,
    )  # fmt: skip
    model.siglip_embed = torch.nn.Linear(cfg.semantic_dim, cfg.d_model, bias=False)
    return _load(model, to_tensors(params, mmdit_names.table(cfg)))


def _load(model: Any, tensors: Mapping[str, np.ndarray]) -> Any:
    import torch

    # Copies: a tensor that shared memory with a JAX array would change it under JAX's feet when it is trained.
    model.load_state_dict({k: torch.from_numpy(np.array(v)) for k, v in tensors.items()}, strict=True)
    return model.to(device()).eval()
