"""The diffusion decoder, trained by flow matching on the codes of real images (X-Omni section 3.3)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh

from xomni_jax.core.config import BelowOne, ConfigError, Finite, NonNegative, check_known
from xomni_jax.core.preemption import StopSignal
from xomni_jax.core.program import Program, Programs, Work
from xomni_jax.data.preprocess import to_pixels
from xomni_jax.data.rendered import SIGNS
from xomni_jax.data.sources import DataSection, batches, first_batch
from xomni_jax.models import autoencoder, mmdit, siglip_vq, text_encoders
from xomni_jax.models.registry import COMPONENTS, abstract_params, init_params
from xomni_jax.models.section import ModelSection
from xomni_jax.models.work import dense, mmdit_tokens
from xomni_jax.pipeline import XOmni
from xomni_jax.sampling.decoder import DECODER_COMPONENTS, DecodeConfig, Decoder
from xomni_jax.sampling.flow import Conditioning, flow_training_pair
from xomni_jax.sampling.keys import image_keys
from xomni_jax.sharding import abstract
from xomni_jax.sharding.arrays import local_rows, spread, whole
from xomni_jax.sharding.rules import map_rows
from xomni_jax.training.components import DataIterator, ImageSize, check_split, export_model, model_configs, open_model
from xomni_jax.training.loop import key_for, tile
from xomni_jax.training.operations import FlopCount
from xomni_jax.training.optimizer import Optimizer, OptimizerConfig
from xomni_jax.training.stage import GRID_SEED, RunConfig, RunningStage
from xomni_jax.training.state import TrainState, new_state

GRID_IMAGES = 8
MODELS = ("siglip_vq", *DECODER_COMPONENTS)


@dataclasses.dataclass(frozen=True)
class DecoderTrainConfig:
    """How the decoder is trained.

    Attributes:
      drop_condition: share of examples that see zero semantics and the empty prompt, so that guidance has its other side
      sigma: distribution of noise levels: logit_normal or uniform
      sigma_mean: mean of the logit-normal distribution
      sigma_std: standard deviation of the logit-normal distribution
      train_text_encoders: train T5 and CLIP along (small models made from scratch) or keep them frozen (released ones)
    """

    drop_condition: BelowOne = 0.1
    sigma: str = "logit_normal"
    sigma_mean: Finite = 0.0
    sigma_std: NonNegative = 1.0
    train_text_encoders: bool = True

    def __post_init__(self):
        check_known(self, sigma=("logit_normal", "uniform"))


@dataclasses.dataclass(frozen=True)
class DecoderRun(RunConfig):
    """Training of the diffusion decoder.

    Attributes:
      siglip_vq: the frozen tokenizer, whose codes the decoder learns to draw
      mmdit: the diffusion transformer
      t5: text encoder of the prompt's tokens
      clip: text encoder of the pooled prompt
      autoencoder: frozen, between pixels and latents
      decoder: noise levels, dropped conditions and what learns
      decode: how images are decoded; stored in the model as its own settings
      data: where images and captions come from
    """

    stage: str = "decoder"
    run_dir: str = "runs/decoder"
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-3)
    siglip_vq: ModelSection = ModelSection(siglip_vq.PRESETS)
    mmdit: ModelSection = ModelSection(mmdit.PRESETS, "tiny")
    t5: ModelSection = ModelSection(text_encoders.T5_PRESETS, "tiny")
    clip: ModelSection = ModelSection(text_encoders.CLIP_PRESETS, "tiny")
    autoencoder: ModelSection = ModelSection(autoencoder.PRESETS, "identity-4")
    decoder: DecoderTrainConfig = DecoderTrainConfig()
    decode: DecodeConfig = DecodeConfig(steps=8, text_length=32, pooled_length=32)
    data: DataSection = SIGNS


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


class DecoderStage:
    """Training of the diffusion decoder, registered as a stage."""

    Config: ClassVar[type] = DecoderRun
    components: ClassVar[tuple[str, ...]] = MODELS

    @classmethod
    def programs(cls, cfg: DecoderRun, models: Mapping[str, Any], mesh: Mesh, decoder_mesh: Mesh | None = None) -> Programs:
        """The update on a batch of images of the data's main size."""
        check_split("config.batch_size", cfg.batch_size, mesh)
        configs = {name: models[name] for name in DECODER_COMPONENTS}
        decoder = Decoder(**{name: COMPONENTS[name].module(c) for name, c in configs.items()})

        def init():
            return {n: init_params(n, c, key_for(cfg.seed, i, 7)) for i, (n, c) in enumerate(configs.items())}

        frozen = frozen_parts(cfg.decoder, jax.eval_shape(init))
        optimizer = Optimizer(cfg.optimizer, cfg.steps, freeze=frozen)
        create, state = new_state(init, optimizer, mesh)
        vq, vq_params = COMPONENTS["siglip_vq"].module(models["siglip_vq"]), abstract_params("siglip_vq", models["siglip_vq"], mesh)
        (height, width), c = cfg.data.sizes[0], models["siglip_vq"]
        B, S, P, T = cfg.batch_size, cfg.decode.text_length, cfg.decode.pooled_length, height // c.patch * (width // c.patch)
        ids = lambda n, length: abstract.array(mesh, (n, length), jnp.int32, *(("batch",) if n > 1 else ()))
        batch = {
            "pixels": abstract.rows(mesh, (B, height, width, 3), jnp.float32),
            "text": ids(B, S),
            "pooled": ids(B, P),
            "empty": (ids(1, S), ids(1, P)),
        }
        learned = 3 * dense(state.params["mmdit"], mmdit_tokens(T, S)) * B
        text = dense(state.params["t5"], {"": S}) * B + dense(state.params["clip"], {"": P}) * B
        searched = 2.0 * T * B * c.code_width * c.codebook_size
        encode = dense(vq_params, {"vit": T, "quant_conv": T, "post": T}) * B + searched
        update = Program(
            make_update(decoder, vq, optimizer, cfg.decoder),
            (state, vq_params, batch, abstract.keys(mesh, ())),
            f"{B} images of {height}x{width}",
            Work(
                learned=learned + (2 * text if cfg.decoder.train_text_encoders else 0), forward=text + encode, tokens=B * (S + T), images=B
            ),
            uses=("state", "siglip_vq"),
            state=state,
        )
        return Programs(mesh, {"decoder-update": update}, {"state": state, "siglip_vq": vq_params}, create)

    @classmethod
    def make(cls, cfg: DecoderRun, mesh: Mesh, stop: StopSignal) -> RunningStage:
        """A run on the data of the configuration, starting from the decoder of `init_from` where that has one."""
        model = open_model(cfg.init_from, ("siglip_vq",), mesh, cfg.stage)
        models = model_configs(cfg, MODELS, model)
        for name in DECODER_COMPONENTS:
            if getattr(models[name], "int8", False):
                raise ConfigError(
                    f"config.{name}.int8=True: kernels in 8 bits cannot learn; leave it False here and set it where the model is frozen"
                )
        model.set_config("siglip_vq", models["siglip_vq"])
        made = cls.programs(cfg, models, mesh)
        state, stored = made.create(), model.description["components"]
        state = state.replace(params={n: model.params(n) if n in stored else p for n, p in state.params.items()})
        vq_params, empty = model.params("siglip_vq"), model.text_ids([""], cfg.decode)
        rows, flops = local_rows(mesh, cfg.batch_size), FlopCount()
        update = flops(made["decoder-update"].fn)

        def to_batch(examples: dict[str, Any]) -> dict[str, Any]:
            text_BS, pooled_BS = model.text_ids(examples["caption"], cfg.decode)
            return {"pixels": to_pixels(examples["image"]), "text": text_BS, "pooled": pooled_BS}

        def to_mesh(batch: dict[str, Any]) -> dict[str, Any]:
            return spread(mesh, batch, cfg.batch_size) | {"empty": empty}

        def step(state: TrainState, batch: dict[str, Any], number: int):
            return update(state, vq_params, batch, key_for(cfg.seed, number, 0))

        def export(state: TrainState, directory: Path, note: dict[str, Any]) -> None:
            trained = {name: (state.params.get(name, {}), models[name]) for name in DECODER_COMPONENTS}
            size = ImageSize(*cfg.data.sizes[0], cfg.data.sizes[1:])
            export_model(directory, trained, cfg.init_from, note, {"decode": cfg.decode, "size": size})

        return RunningStage(
            state,
            DataIterator(batches(cfg.data, cfg.seed, cfg.batch_size, rows=rows, transform=to_batch, fields=("image", "caption")), to_mesh),
            step,
            export,
            functools.partial(reconstruct, cfg, model, models),
            items_per_step=cfg.batch_size,
            flops=lambda: flops.total,
        )


def reconstruct(cfg: DecoderRun, model: XOmni, models: Mapping[str, Any], state: TrainState, number: int) -> np.ndarray:
    """Images decoded from the codes of the first examples of the run's own data, one row of them above one of the real images."""
    examples = first_batch(cfg.data, cfg.seed + GRID_SEED, GRID_IMAGES)
    for name in DECODER_COMPONENTS:
        model.set_params(name, state.params.get(name, {}), models[name])
    codes_BYX = model.encode_pixels(to_pixels(examples["image"]))
    noise = model.noise(image_keys(cfg.seed, GRID_IMAGES), codes_BYX.shape[1:])
    images = whole(model.decode_images(codes_BYX, examples["caption"], noise, cfg.decode))
    return tile(np.concatenate([images, examples["image"]]), columns=GRID_IMAGES)
