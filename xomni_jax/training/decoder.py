"""Stage (d): the diffusion decoder, trained by flow matching on the codes of real images (X-Omni section 3.3)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from ml_collections import ConfigDict

from xomni_jax.core.config import ConfigError, RunConfig, build
from xomni_jax.core.preemption import StopSignal
from xomni_jax.data.rendered import RenderedConfig, render_example
from xomni_jax.data.sources import rendered_dataset
from xomni_jax.models.registry import COMPONENTS, init_params
from xomni_jax.sampling.decoder import DecodeConfig, Decoder, to_uint8
from xomni_jax.sampling.flow import Conditioning, flow_training_pair
from xomni_jax.sampling.keys import image_keys
from xomni_jax.sampling.pixels import DECODER_PARTS
from xomni_jax.sharding.arrays import spread, whole
from xomni_jax.sharding.rules import map_rows
from xomni_jax.training.components import PRESETS, DataIterator, ImageSize, export_model, here, open_model, stored_or_preset
from xomni_jax.training.loop import Stage, key_for, tile
from xomni_jax.training.operations import FlopCount
from xomni_jax.training.optimizer import Optimizer, OptimizerConfig, make_optimizer
from xomni_jax.training.state import TrainState, init_state

GRID_IMAGES = 8
SECTIONS = ("optimizer", "siglip_vq", "mmdit", "t5", "clip", "autoencoder", "decoder", "decode", "data")


@dataclasses.dataclass(frozen=True)
class DecoderTrainConfig:
    """How the decoder is trained.

    Attributes:
      drop_condition: share of examples that see zero semantics and the empty prompt, so that guidance has its other side.
      sigma: "logit_normal" or "uniform" noise levels; sigma_mean, sigma_std: of the logit-normal ones.
      train_text_encoders: learn T5 and CLIP along (small models made from scratch) or keep them frozen (released ones).
    """

    drop_condition: float = 0.1
    sigma: str = "logit_normal"
    sigma_mean: float = 0.0
    sigma_std: float = 1.0
    train_text_encoders: bool = True

    def __post_init__(self):
        if not 0 <= self.drop_condition < 1:
            raise ValueError(f"drop_condition={self.drop_condition} is a share; give a number from 0 to below 1")
        if self.sigma not in ("logit_normal", "uniform"):
            raise ValueError(f"sigma={self.sigma!r} is unknown; use logit_normal or uniform")


def flow_loss(
    decoder: Decoder, params: Any, batch: dict[str, Any], semantics_BYXD: jax.Array, key: jax.Array, cfg: DecoderTrainConfig
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean squared error of the velocity under (semantics, prompt), some of them dropped; float32 scalars.

    Args:
      params: {"mmdit", "t5", "clip", "autoencoder"}.
      batch: "pixels" [B, H, W, 3] in [-1, 1], "text" [B, S] T5 ids, "pooled" [B, S'] CLIP ids, "empty" the same two for "".
      semantics_BYXD: of the images' codes.
    """
    pair_key, drop_key = jax.random.split(key)
    latents_BTC = decoder.encode(params, batch["pixels"])
    noisy_BTC, sigma_B, target_BTC = flow_training_pair(
        pair_key, latents_BTC, distribution=cfg.sigma, mean=cfg.sigma_mean, std=cfg.sigma_std
    )
    drop_B = jax.random.uniform(drop_key, sigma_B.shape) < cfg.drop_condition
    text_BS = jnp.where(drop_B[:, None], batch["empty"][0], batch["text"])
    pooled_BS = jnp.where(drop_B[:, None], batch["empty"][1], batch["pooled"])
    cond: Conditioning = decoder.condition(params, text_BS, pooled_BS, jnp.where(drop_B[:, None, None, None], 0.0, semantics_BYXD))
    velocity = lambda rows: decoder.velocity(params, *rows, semantics_BYXD.shape[1:3])  # noqa: E731
    v_BTC = map_rows(velocity, (noisy_BTC, sigma_B, cond))
    error_B = jnp.mean((v_BTC - target_BTC) ** 2, axis=(1, 2))
    loss = jnp.mean(error_B)
    return loss, {
        "loss/flow": loss,
        "loss/flow_low_noise": jnp.sum(jnp.where(sigma_B < 0.5, error_B, 0.0)) / jnp.maximum(jnp.sum(sigma_B < 0.5), 1),
        "loss/flow_high_noise": jnp.sum(jnp.where(sigma_B >= 0.5, error_B, 0.0)) / jnp.maximum(jnp.sum(sigma_B >= 0.5), 1),
    }


def frozen_parts(cfg: DecoderTrainConfig, params: Any) -> tuple[str, ...]:
    """Path patterns of the decoder's parts that do not learn."""
    names = ("autoencoder",) if cfg.train_text_encoders else ("autoencoder", "t5", "clip")
    return tuple(f"{name}/.*" for name in names if jax.tree.leaves(params[name]))  # the identity autoencoder has none


def make_update(decoder: Decoder, vq: nn.Module, optimizer: Optimizer, cfg: DecoderTrainConfig) -> Callable[..., Any]:
    """The jitted step (state, tokenizer's parameters, batch, key) -> (state, metrics); the state is donated."""

    def update(state: TrainState, vq_params, batch, key):
        codes_BYX = vq.apply({"params": vq_params}, batch["pixels"], method="encode")
        semantics = vq.apply({"params": vq_params}, codes_BYX, method="semantics")
        (_, metrics), grads = jax.value_and_grad(lambda p: flow_loss(decoder, p, batch, semantics, key, cfg), has_aux=True)(state.params)
        state, optim = state.apply(optimizer, grads)
        return state, metrics | optim

    return jax.jit(update, donate_argnums=0)


def make(config: ConfigDict, run: RunConfig, mesh: jax.sharding.Mesh, stop: StopSignal) -> Stage:
    """The decoder stage of a configuration."""
    cfg, data = build(DecoderTrainConfig, config.decoder, "config.decoder"), build(RenderedConfig, config.data, "config.data")
    decode = build(DecodeConfig, config.decode, "config.decode")
    rows = here("config.batch_size", run.batch_size, mesh)
    model = open_model(run.init_from, ("siglip_vq",), mesh, run.stage)
    stored = model.description["components"]
    configs = {n: stored_or_preset(model, n, config[n], PRESETS[n], f"config.{n}") for n in DECODER_PARTS}
    for name, c in configs.items():
        if getattr(c, "int8", False):
            raise ConfigError(
                f"config.{name}.int8=True: kernels in 8 bits cannot learn; leave it False here and set it where the model is frozen"
            )
    model.set_config("siglip_vq", stored_or_preset(model, "siglip_vq", config.siglip_vq, PRESETS["siglip_vq"], "config.siglip_vq"))
    decoder = Decoder(**{name: COMPONENTS[name].module(c) for name, c in configs.items()})

    def init():
        return {n: init_params(n, c, key_for(run.seed, i, 7)) for i, (n, c) in enumerate(configs.items())}

    frozen = frozen_parts(cfg, jax.eval_shape(init))
    optimizer = make_optimizer(build(OptimizerConfig, config.optimizer, "config.optimizer"), run.steps, freeze=frozen)
    state = init_state(init, optimizer, mesh)
    state = state.replace(params={n: model.params(n) if n in stored else p for n, p in state.params.items()})
    vq, vq_params = model.module("siglip_vq"), model.params("siglip_vq")

    flops = FlopCount()
    update = flops(make_update(decoder, vq, optimizer, cfg))
    ids = functools.partial(model.text_ids, cfg=decode)
    empty = ids([""])
    empties = tuple(np.repeat(x, model.ways, axis=0) for x in empty)  # as many rows as the mesh splits

    def to_batch(examples: dict[str, Any]) -> dict[str, Any]:
        text_BS, pooled_BS = ids(examples["caption"])
        return {"pixels": examples["image"].astype(np.float32) / 127.5 - 1.0, "text": text_BS, "pooled": pooled_BS}

    def to_mesh(batch: dict[str, Any]) -> dict[str, Any]:
        return spread(mesh, batch, run.batch_size) | {"empty": empty}

    batches = DataIterator(rendered_dataset(data, run.seed, run.batch_size, rows=rows, transform=to_batch), to_mesh)

    def step(state: TrainState, batch, number: int):
        return update(state, vq_params, batch, key_for(run.seed, number, 0))

    @jax.jit
    def reconstruct(params, vq_params, pixels, text_BS, pooled_BS, noise):
        codes_BYX = vq.apply({"params": vq_params}, pixels, method="encode")
        semantics = vq.apply({"params": vq_params}, codes_BYX, method="semantics")
        return to_uint8(decoder.decode(params, semantics, text_BS, pooled_BS, empties, noise, decode))

    def grid(state: TrainState, number: int) -> np.ndarray:
        size = data.sizes[0]
        n = -(-GRID_IMAGES // model.ways) * model.ways
        examples = [render_example(run.seed + 1_000_003, i, data, size) for i in range(n)]
        real = np.stack([e["image"] for e in examples])
        noise_shape = (size[0] * size[1] // vq.cfg.patch**2, configs["mmdit"].in_channels)
        noise = jax.vmap(lambda k: jax.random.normal(k, noise_shape))(image_keys(run.seed, n))
        pixels = real.astype(np.float32) / 127.5 - 1.0
        drawn = reconstruct(state.params, vq_params, pixels, *ids([e["caption"] for e in examples]), noise)
        return tile(np.concatenate([whole(drawn), real]), columns=n)

    def export(state: TrainState, directory, note):
        trained = {name: (state.params.get(name, {}), c) for name, c in configs.items()}
        export_model(directory, trained, run.init_from, note, {"decode": decode, "size": ImageSize(*data.sizes[0])})

    return Stage(state, batches, step, export, grid, items_per_step=run.batch_size, flops=lambda: flops.total)
