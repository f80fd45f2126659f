"""Narrow models for the tests: head width 128, as TPU kernels want it, everything else small."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from tests.miniature import ROOT
from xomni_jax.assets import TINY_SFT
from xomni_jax.models.registry import init_params
from xomni_jax.models.transformer import ARConfig
from xomni_jax.training.stage import load_config

SIZES = dict(
    vocab_size=640, mm_vocab_size=576, image_vocab_size=528, d_model=256, mlp_dim=384, n_heads=4, n_kv_heads=2, head_dim=128,
    n_language_layers=3, n_adapter_layers=2, n_head_layers=2,
)  # fmt: skip


def AR(**changes) -> ARConfig:
    """A narrow transformer's config, with changes."""
    return ARConfig(**SIZES | dict(dtype=jnp.bfloat16) | changes)


def abstract_params(cfg: ARConfig):
    """Shapes of its parameters."""
    return nn.meta.unbox(jax.eval_shape(lambda: init_params("transformer", cfg, jax.random.key(0))))


def overrides(**computed) -> list[str]:
    """The narrow transformer as overrides of a configuration."""
    fields = SIZES | dict(preset="tiny", dtype="bfloat16", remat="full", unroll=1) | computed
    return [f"transformer.{name}={value}" for name, value in fields.items()]


def sft(*more: str):
    """Fine-tuning: 8 rows of 256 tokens."""
    rows = ["next_token.rows=8", "next_token.row_length=256", "next_token.chunk=64", "mesh.tensor=2"]
    return load_config(ROOT / "configs" / "tiny" / "sft.py", [*overrides(), *rows, *more])


def grpo(*more: str):
    """GRPO: 4 prompts, 4 rollouts each of 16 + 64 tokens, two micro-batches; the decoder's side is that of the shipped model."""
    rolls = ["batch_size=4", "grpo.rollouts_per_prompt=4", "rollout.chunks=1", "accumulate=2", "rollout.logit_chunk=32",
             "rollout.prompt_length=16", "rollout.reference_dtype=bfloat16", "data.sizes=((64,64),)", "data.text_lengths=((3,6),)",
             f"init_from={TINY_SFT}"]  # fmt: skip
    return load_config(ROOT / "configs" / "tiny" / "grpo.py", [*overrides(), *rolls, "mesh.tensor=2", *more])
