"""The diffusion decoder, trained by flow matching on the codes of real images (X-Omni section 3.3)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from xomni_jax.core.config import BelowOne, Finite, NonNegative, check_known
from xomni_jax.core.preemption import StopSignal
from xomni_jax.core.program import Program, Programs, Work
from xomni_jax.data.preprocess import to_pixels
from xomni_jax.data.rendered import SIGNS
from xomni_jax.data.sources import DataSection, batches, first_batch
from xomni_jax.models import autoencoder, mmdit, siglip_vq, text_encoders
from xomni_jax.models.lora import LoRAConfig, init_adapters, join
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
from xomni_jax.tokenizers.protocol import ImageTokenizer
from xomni_jax.tokenizers.registry import IMAGE_TOKENIZERS
from xomni_jax.training.accumulate import gradient
from xomni_jax.training.adapters import export_trained, frozen_base
from xomni_jax.training.components import DataIterator, ImageSize, check_split, check_trainable, model_configs, open_model
from xomni_jax.training.guard import guarded
from xomni_jax.training.loop import key_for
from xomni_jax.training.operations import FlopCount
from xomni_jax.training.optimizer import Optimizer, OptimizerConfig
from xomni_jax.training.stage import GRID_SEED, Grid, RunConfig, RunningStage
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
    """

    drop_condition: BelowOne = 0.1
    sigma: str = "logit_normal"
    sigma_mean: Finite = 0.0
    sigma_std: NonNegative = 1.0

    def __post_init__(self):
        check_known(self, sigma=("logit_normal", "uniform"))


@dataclasses.dataclass(frozen=True)
class DecoderRun(RunConfig):
    """Training of the diffusion decoder.

    Attributes:
      siglip_vq: the frozen tokenizer, whose codes the decoder learns to draw
      mmdit: the diffusion transformer
      lora: adapters of the MMDiT, which are then all that learns
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
    lora: LoRAConfig = LoRAConfig()
    t5: ModelSection = ModelSection(text_encoders.T5_PRESETS, "tiny")
    clip: ModelSection = ModelSection(text_encoders.CLIP_PRESETS, "tiny")
    autoencoder: ModelSection = ModelSection(autoencoder.PRESETS, "identity-4")
    decoder: DecoderTrainConfig = DecoderTrainConfig()
    decode: DecodeConfig = DecodeConfig(steps=8, text_length=32, pooled_length=32)
    data: DataSection = SIGNS


class FlowRows(NamedTuple):
    """A batch as `flow_loss` reads it, one row per example: noisy latents, their noise level and velocity, and conditions."""

    noisy_BTC: jax.Array
    sigma_B: jax.Array
    target_BTC: jax.Array
    text_BS: jax.Array
    pooled_BS: jax.Array
    semantics_BYXD: jax.Array


def flow_rows(
    decoder: Decoder, params: Any, batch: dict[str, Any], semantics_BYXD: jax.Array, key: jax.Array, cfg: DecoderTrainConfig
) -> FlowRows:
    """Draws noise, its level and which conditions are dropped.

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
    return FlowRows(noisy_BTC, sigma_B, target_BTC, text_BS, pooled_BS, jnp.where(drop_B[:, None, None, None], 0.0, semantics_BYXD))


def flow_loss(decoder: Decoder, params: Any, rows: FlowRows, whole: FlowRows) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean squared error of the velocity; float32 scalars. `rows` may be some of `whole`: the results of all parts add up."""
    cond: Conditioning = decoder.condition(params, rows.text_BS, rows.pooled_BS, rows.semantics_BYXD)
    velocity = lambda r: decoder.velocity(params, *r, rows.semantics_BYXD.shape[1:3])  # noqa: E731
    v_BTC = map_rows(velocity, (rows.noisy_BTC, rows.sigma_B, cond))
    error_B = jnp.mean((v_BTC - rows.target_BTC) ** 2, axis=(1, 2))

    def mean(where):
        return jnp.sum(jnp.where(where(rows.sigma_B), error_B, 0.0)) / jnp.maximum(jnp.sum(where(whole.sigma_B)), 1)

    loss = jnp.sum(error_B) / whole.sigma_B.size
    return loss, {
        "loss/flow": loss,
        "loss/flow_low_noise": mean(lambda sigma_B: sigma_B < 0.5),
        "loss/flow_high_noise": mean(lambda sigma_B: sigma_B >= 0.5),
    }


def make_update(decoder: Decoder, vq: ImageTokenizer, optimizer: Optimizer, cfg: DecoderRun) -> Callable[..., Any]:
    """The jitted step (state, base of adapters | None, tokenizer's parameters, batch, key) -> (state, metrics); the state is donated."""

    def update(state: TrainState, base, vq_params, batch, key):
        codes_BYX = vq.encode(vq_params, batch["pixels"])
        semantics = vq.semantics(vq_params, codes_BYX)
        complete = lambda p: join(base, p, cfg.lora.scale)  # noqa: E731
        rows = flow_rows(decoder, complete(state.params), batch, semantics, key, cfg.decoder)
        loss = lambda p, part: flow_loss(decoder, complete(p), part, rows)  # noqa: E731
        grads, metrics, _ = gradient(loss, state.params, rows, cfg.accumulate)
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
        check_split("config.batch_size", cfg.batch_size, mesh, cfg.accumulate)
        configs = {name: models[name] for name in DECODER_COMPONENTS}
        decoder = Decoder(**{name: COMPONENTS[name].module(c) for name, c in configs.items()})

        def init():
            return {n: init_params(n, c, key_for(cfg.seed, i, 7)) for i, (n, c) in enumerate(configs.items())}

        if cfg.lora.rank:
            base = {n: abstract_params(n, c, mesh) for n, c in configs.items()}
            optimizer, key = cfg.make_optimizer(), key_for(cfg.seed, 0, 8)
            adapters = lambda: {"mmdit": init_adapters("mmdit", configs["mmdit"], cfg.lora, key)}
            create, state = new_state(adapters, optimizer, mesh, cfg.guard)
        else:
            base = None
            fixed = jax.tree.leaves(jax.eval_shape(init)["autoencoder"])  # the identity has no parameters
            optimizer = cfg.make_optimizer(("autoencoder/.*",) if fixed else ())
            create, state = new_state(init, optimizer, mesh, cfg.guard)
        params = base or state.params
        vq, vq_params = IMAGE_TOKENIZERS["siglip_vq"](models["siglip_vq"]), abstract_params("siglip_vq", models["siglip_vq"], mesh)
        (height, width), c = cfg.data.sizes[0], models["siglip_vq"]
        B, S, P, T = cfg.batch_size, cfg.decode.text_length, cfg.decode.pooled_length, vq.layout(height, width).length
        ids = lambda n, length: abstract.array(mesh, (n, length), jnp.int32, *(("batch",) if n > 1 else ()))
        batch = {
            "pixels": abstract.rows(mesh, (B, height, width, 3), jnp.float32),
            "text": ids(B, S),
            "pooled": ids(B, P),
            "empty": (ids(1, S), ids(1, P)),
        }
        learned = (2 if base else 3) * dense(params["mmdit"], mmdit_tokens(T, S)) * B
        text = dense(params["t5"], {"": S}) * B + dense(params["clip"], {"": P}) * B
        reads = any(name.startswith(("t5/", "clip/")) for name in optimizer.trained(state.params))
        searched = 2.0 * T * B * c.code_width * c.codebook_size
        encode = dense(vq_params, {"vit": T, "quant_conv": T, "post": T}) * B + searched
        update = Program(
            guarded(make_update(decoder, vq, optimizer, cfg), cfg.guard),
            (state, base, vq_params, batch, abstract.keys(mesh, ())),
            f"{B} images of {height}x{width}",
            Work(learned=learned + 2 * text * reads, forward=text + encode, tokens=B * (S + T), images=B),
            uses=("state", "base", "siglip_vq"),
            state=state,
        )
        return Programs(
            mesh, {"decoder-update": update}, {"state": state, "siglip_vq": vq_params} | ({"base": base} if base else {}), create
        )

    @classmethod
    def make(cls, cfg: DecoderRun, mesh: Mesh, stop: StopSignal) -> RunningStage:
        """A run on the data of the configuration, starting from the decoder of `init_from` where that has one."""
        model = open_model(cfg.init_from, ("siglip_vq",), mesh, cfg.stage)
        models, lora = model_configs(cfg, MODELS, model), cfg.lora
        check_trainable(models, DECODER_COMPONENTS if not lora.rank else ())
        model.set_config("siglip_vq", models["siglip_vq"])
        made = cls.programs(cfg, models, mesh)
        state, stored = made.create(), model.description["components"]
        if lora.rank:
            base = {name: frozen_base(model, models, name, lora) for name in DECODER_COMPONENTS}
        else:
            base, state = None, state.starting_from({n: model.params(n) if n in stored else p for n, p in state.params.items()})
            for name in DECODER_COMPONENTS:
                model.release(name)
        vq_params, empty = model.params("siglip_vq"), model.text_ids([""], cfg.decode)
        rows, flops = local_rows(mesh, cfg.batch_size), FlopCount()
        update, whole_params = flops(made["decoder-update"].fn), functools.partial(join, base, scale=lora.scale)

        def to_batch(examples: dict[str, Any]) -> dict[str, Any]:
            text_BS, pooled_BS = model.text_ids(examples["caption"], cfg.decode)
            return {"pixels": to_pixels(examples["image"]), "text": text_BS, "pooled": pooled_BS}

        def to_mesh(batch: dict[str, Any]) -> dict[str, Any]:
            return spread(mesh, {name: x for name, x in batch.items() if name != "id"}, cfg.batch_size) | {"empty": empty}

        def step(state: TrainState, batch: dict[str, Any], number: int):
            return update(state, base, vq_params, batch, key_for(cfg.seed, number, 0))

        def export(state: TrainState, directory: Path, note: dict[str, Any]) -> None:
            settings = {"decode": cfg.decode, "size": ImageSize(*cfg.data.sizes[0], cfg.data.sizes[1:])}
            trained = {name: (state.params.get(name, {}), models[name]) for name in DECODER_COMPONENTS}
            export_trained(directory, trained, lora, model, note, settings)

        return RunningStage(
            state,
            DataIterator(batches(cfg.data, cfg.seed, cfg.batch_size, rows=rows, transform=to_batch, fields=("image", "caption")), to_mesh),
            step,
            export,
            functools.partial(reconstruct, cfg, model, models, whole_params),
            items_per_step=cfg.batch_size,
            flops=lambda: flops.total,
        )


def reconstruct(
    cfg: DecoderRun, model: XOmni, models: Mapping[str, Any], whole_params: Callable[[Any], Any], state: TrainState, number: int
) -> Grid:
    """Images decoded from the codes of the first examples of the run's own data, one row of them above one of the real images."""
    examples = first_batch(cfg.data, cfg.seed + GRID_SEED, GRID_IMAGES)
    params = whole_params(state.params)
    for name in DECODER_COMPONENTS:
        model.set_params(name, params.get(name, {}), models[name])
    codes_BYX = model.encode_pixels(to_pixels(examples["image"]))
    noise = model.noise(image_keys(cfg.seed, GRID_IMAGES), codes_BYX.shape[1:])
    images = whole(model.decode_images(codes_BYX, examples["caption"], noise, cfg.decode))
    return Grid(np.concatenate([images, examples["image"]]), GRID_IMAGES, {"caption": examples["caption"]})
