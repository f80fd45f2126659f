"""The components of a model directory: one row each, from which a component is built, initialised and restored."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh

from xomni_jax.models import autoencoder, mmdit, siglip_vq, text_encoders, transformer
from xomni_jax.models.autoencoder import Autoencoder, AutoencoderConfig
from xomni_jax.models.mmdit import MMDiT, MMDiTConfig
from xomni_jax.models.siglip_vq import SigLIPVQ, SigLIPVQConfig
from xomni_jax.models.text_encoders import CLIPTextConfig, CLIPTextEncoder, T5Config, T5Encoder
from xomni_jax.models.transformer import ARConfig, ARTransformer
from xomni_jax.sharding.abstract import placed
from xomni_jax.sharding.rules import RULES, param_shardings, unconstrained


class Component(NamedTuple):
    """How one component is built: config class, module, presets by name, and inputs small enough to trace its initialisation."""

    config: type
    module: Callable[[Any], nn.Module]
    presets: Mapping[str, Any]
    inputs: Callable[[Any], tuple[Any, ...]]
    options: dict[str, Any] = {}


def _mmdit_inputs(c: MMDiTConfig):
    return (
        jnp.zeros((1, 4, c.in_channels)),
        jnp.zeros((1,)),
        jnp.zeros((1, 3, c.text_dim)),
        jnp.zeros((1, c.pooled_dim)),
        (2, 2),
        jnp.zeros((1, 4, c.semantic_dim)),
    )


COMPONENTS: dict[str, Component] = {
    "transformer": Component(ARConfig, ARTransformer, transformer.PRESETS, lambda c: (jnp.zeros((1, 2), jnp.int32),)),
    "siglip_vq": Component(
        SigLIPVQConfig, SigLIPVQ, siglip_vq.PRESETS, lambda c: (jnp.zeros((1, 2 * c.patch, c.patch, 3)),), {"train": False}
    ),
    "mmdit": Component(MMDiTConfig, MMDiT, mmdit.PRESETS, _mmdit_inputs),
    "autoencoder": Component(AutoencoderConfig, Autoencoder, autoencoder.PRESETS, lambda c: (jnp.zeros((1, 16, 16, 3)),)),
    "t5": Component(T5Config, T5Encoder, text_encoders.T5_PRESETS, lambda c: (jnp.zeros((1, 2), jnp.int32),)),
    "clip": Component(CLIPTextConfig, CLIPTextEncoder, text_encoders.CLIP_PRESETS, lambda c: (jnp.zeros((1, 2), jnp.int32),)),
}


def init_params(name: str, cfg: Any, key: jax.Array) -> Any:
    """Boxed parameters (they carry their logical axes) of a component; pure, so `jax.eval_shape` gives its shapes.

    A component without parameters gives an empty tree.
    """
    row = COMPONENTS[name]
    inputs = row.inputs(cfg)
    with unconstrained():
        return row.module(cfg).init(key, *inputs, **row.options).get("params", {})


def boxed_shapes(name: str, cfg: Any) -> Any:
    """Shapes of a component's parameters with their logical axes."""
    return jax.eval_shape(lambda: init_params(name, cfg, jax.random.key(0)))


def abstract_params(name: str, cfg: Any, mesh: Mesh, rules: Mapping = RULES) -> Any:
    """Shapes of a component's parameters with their shardings."""
    shapes = boxed_shapes(name, cfg)
    return placed(nn.meta.unbox(shapes), param_shardings(shapes, mesh, rules))
