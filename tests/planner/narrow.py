"""A narrow transformer for the tests: head width 128, as TPU kernels want it, everything else small."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from xomni_jax.models.registry import init_params
from xomni_jax.models.transformer import ARConfig


def AR(**changes) -> ARConfig:
    """Its config, with changes."""
    sizes = dict(
        vocab_size=640, mm_vocab_size=576, image_vocab_size=512, d_model=256, mlp_dim=384, n_heads=4, n_kv_heads=2, head_dim=128,
        n_language_layers=3, n_adapter_layers=2, n_head_layers=2, dtype=jnp.bfloat16,
    )  # fmt: skip
    return ARConfig(**sizes | changes)


def abstract_params(cfg: ARConfig):
    """Shapes of its parameters."""
    return nn.meta.unbox(jax.eval_shape(lambda: init_params("transformer", cfg, jax.random.key(0))))
