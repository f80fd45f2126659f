"""The one table of components: how each is built, initialised and restored."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh

from xomni_jax.models import autoencoder, llamagen_vq, mmdit, omnitokenizer, siglip_vq, text_encoders, transformer
from xomni_jax.sharding.abstract import placed
from xomni_jax.sharding.rules import RULES, param_shardings, unconstrained


class Component(NamedTuple):
    """How one component is built.

    Attributes:
      config: its config class. module: (config) -> its linen module. presets: its named configs.
      inputs: (config) -> inputs small enough to trace its initialisation.
    """

    config: type
    module: Callable[[Any], nn.Module]
    presets: Mapping[str, Any]
    inputs: Callable[[Any], tuple[Any, ...]] = lambda c: (jnp.zeros((1, 2), jnp.int32),)


def _mmdit_inputs(c: mmdit.MMDiTConfig):
    return (
        jnp.zeros((1, 4, c.in_channels)),
        jnp.zeros((1,)),
        jnp.zeros((1, 3, c.text_dim)),
        jnp.zeros((1, c.pooled_dim)),
        (2, 2),
        jnp.zeros((1, 4, c.semantic_dim)),
    )


COMPONENTS: dict[str, Component] = {
    "transformer": Component(transformer.ARConfig, transformer.ARTransformer, transformer.PRESETS),
    "siglip_vq": Component(
        siglip_vq.SigLIPVQConfig,
        siglip_vq.SigLIPVQ,
        siglip_vq.PRESETS,
        lambda c: (jnp.zeros((1, 2 * c.patch, c.patch, 3)),),
    ),
    "mmdit": Component(mmdit.MMDiTConfig, mmdit.MMDiT, mmdit.PRESETS, _mmdit_inputs),
    "autoencoder": Component(
        autoencoder.AutoencoderConfig, autoencoder.Autoencoder, autoencoder.PRESETS, lambda c: (jnp.zeros((1, 16, 16, 3)),)
    ),
    "llamagen_vq": Component(
        llamagen_vq.LlamaGenVQConfig,
        llamagen_vq.LlamaGenVQ,
        llamagen_vq.PRESETS,
        lambda c: (jnp.zeros((1, 2 * c.patch, c.patch, c.pixel_channels)),),
    ),
    "omnitokenizer": Component(
        omnitokenizer.OmniTokenizerConfig,
        omnitokenizer.OmniTokenizer,
        omnitokenizer.PRESETS,
        lambda c: (jnp.zeros((1, 1, c.window * c.patch, c.window * c.patch, c.pixel_channels)),),
    ),
    "t5": Component(text_encoders.T5Config, text_encoders.T5Encoder, text_encoders.T5_PRESETS),
    "clip": Component(text_encoders.CLIPTextConfig, text_encoders.CLIPTextEncoder, text_encoders.CLIP_PRESETS),
}


def init_params(name: str, cfg: Any, key: jax.Array) -> Any:
    """Boxed parameters (they carry their logical axes) of a component; pure, so `jax.eval_shape` gives its shapes.

    A component without parameters gives an empty tree.
    """
    component = COMPONENTS[name]
    with unconstrained():
        return component.module(cfg).init(key, *component.inputs(cfg)).get("params", {})


def boxed_shapes(name: str, cfg: Any) -> Any:
    """Shapes of a component's parameters with their logical axes."""
    return jax.eval_shape(lambda: init_params(name, cfg, jax.random.key(0)))


def abstract_params(name: str, cfg: Any, mesh: Mesh, rules: Mapping = RULES) -> Any:
    """Shapes of a component's parameters with their shardings."""
    shapes = boxed_shapes(name, cfg)
    return placed(nn.meta.unbox(shapes), param_shardings(shapes, mesh, rules))
