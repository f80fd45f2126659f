"""The image decoder with some noisy denoising steps: what it draws, keeps of it, and learns from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from xomni_jax.models.autoencoder import unpack
from xomni_jax.rl.flow_objective import FlowConfig, add_up, flow_loss
from xomni_jax.sampling.decoder import DecodeConfig, Decoder, to_uint8
from xomni_jax.sampling.flow import flow_sigmas
from xomni_jax.sampling.flow_sde import FlowPath, sde_sample
from xomni_jax.sharding.rules import constrain, map_rows
from xomni_jax.training.accumulate import gradient

FROZEN = ("t5", "clip", "autoencoder")


class FlowRows(NamedTuple):
    """What the image decoder's update needs, one row per rollout: its noisy steps, and the prompts as T5 and CLIP ids."""

    path: FlowPath
    text_BS: jax.Array
    pooled_BS: jax.Array


def make_flow_decode(vq: nn.Module, decoder: Decoder, cfg: DecodeConfig, flow: FlowConfig) -> Callable[..., Any]:
    """The jitted (tokenizer's parameters, decoder's, codes [B, Y, X], T5 ids, CLIP ids, noise, keys [B], first step of the window) ->
    (uint8 images, path)."""

    def decode(vq_params, params, codes_BYX, text_BS, pooled_BS, noise_BTC, keys_B, first):
        grid = codes_BYX.shape[1:]
        semantics = vq.apply({"params": vq_params}, codes_BYX, method="semantics")
        cond = decoder.condition(params, text_BS, pooled_BS, semantics)

        def denoise(rows):
            noise_BTC, keys_B, cond = rows
            velocity = lambda x, sigma_B: decoder.velocity(params, x, sigma_B, cond, grid)  # noqa: E731
            return sde_sample(velocity, noise_BTC, noise_levels(cfg, grid), keys_B, first, flow.window, flow.level)

        latents_BTC, path = map_rows(denoise, (noise_BTC, keys_B, cond), decoder.mmdit.cfg.microbatch)
        images = to_uint8(decoder.pixels(params, unpack(latents_BTC, grid)))
        return constrain(images, "batch", None, None, None, name="images"), path

    return jax.jit(decode)


def noise_levels(cfg: DecodeConfig, grid: Sequence[int]) -> np.ndarray:
    """Noise levels [n + 1] of images with a grid of codes."""
    return flow_sigmas(cfg.steps, math.prod(grid), base_shift=cfg.base_shift, max_shift=cfg.max_shift)


def flow_gradient(
    decoder: Decoder,
    vq: nn.Module,
    sigmas: np.ndarray,
    grid: tuple[int, int],
    params: Any,
    frozen: Any,
    rows: Any,
    cfg: FlowConfig,
    parts: int,
) -> tuple[Any, dict[str, jax.Array]]:
    """Gradient of the MMDiT, and metrics, over the noisy steps of (rollouts, their `FlowRows`), in `parts` pieces."""
    steps = cfg.window
    n_items = jnp.maximum(jnp.sum(rows[0].ok[0]), 1) * steps

    def loss(params, part):
        batch, flow = part
        codes_BYX = batch.segments[0].ids.reshape(-1, *grid)
        semantics = vq.apply({"params": frozen["siglip_vq"]}, codes_BYX, method="semantics")
        cond = decoder.condition(frozen, flow.text_BS, flow.pooled_BS, semantics)

        @jax.checkpoint  # one step's activations at a time
        def one(offset):
            x, sigma_B = flow.path.before_BWTC[:, offset], jnp.asarray(sigmas)[flow.path.step_B + offset]
            velocity = decoder.velocity({"mmdit": params}, x, sigma_B, cond, grid)
            reference = decoder.velocity(frozen, x, sigma_B, cond, grid) if cfg.penalty_coef else None
            return flow_loss(velocity, reference, flow.path, offset, sigmas, batch.advantage[0], batch.ok[0], cfg, n_items)

        values, metrics = jax.lax.map(one, jnp.arange(steps))
        return jnp.sum(values), add_up(metrics)

    grads, metrics, value = gradient(loss, params, rows, parts, add_up)
    return grads, metrics | {"flow/loss": value}


class NoisySteps:
    """Decodes the chunks of one batch with noisy steps, and keeps these.

    Attributes:
      decode: the program of `make_flow_decode`. frozen: parameters of the components beside the MMDiT.
    """

    def __init__(self, flow: FlowConfig, decode: Callable[..., Any], frozen: Mapping[str, Any]):
        self.flow, self.decode, self.frozen = flow, decode, frozen
        self._kept: list[FlowRows] = []

    def begin(self, mmdit: Any, key: jax.Array) -> None:
        """A new batch: the parameters that it is decoded with, and the key of its noise."""
        self._kept.clear()
        self._params = {name: self.frozen[name] for name in FROZEN} | {"mmdit": mmdit}
        window_key, self._key = jax.random.split(key)
        self._first = jax.random.randint(window_key, (), 0, self.flow.within - self.flow.window + 1, jnp.int32)

    def __call__(self, codes_BYX: jax.Array, text_BS: np.ndarray, pooled_BS: np.ndarray, noise_BTC: jax.Array) -> jax.Array:
        """uint8 images [B, H, W, 3] of the batch's next chunk."""
        before = sum(len(rows.text_BS) for rows in self._kept)
        keys_B = jax.vmap(lambda n: jax.random.fold_in(self._key, n))(before + jnp.arange(len(codes_BYX)))
        texts = jnp.asarray(text_BS), jnp.asarray(pooled_BS)
        images, path = self.decode(self.frozen["siglip_vq"], self._params, codes_BYX, *texts, noise_BTC, keys_B, self._first)
        self._kept.append(FlowRows(path, *texts))
        return images

    def rows(self) -> FlowRows:
        """The steps of all chunks."""
        return jax.tree.map(lambda *parts: jnp.concatenate(parts), *self._kept)
