"""On-policy GRPO on pixels: prompts, rollouts, frozen image decoder, remote rewards, one sharded update (X-Omni section 3.4)."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from xomni_jax.core.config import ConfigError, Overrides
from xomni_jax.core.distributed import connect, gather_json
from xomni_jax.core.preemption import StepRefused, StopSignal
from xomni_jax.core.program import Program, Programs, Work
from xomni_jax.data.rendered import SIGNS
from xomni_jax.data.sources import DataSection, batches, first_batch
from xomni_jax.models import autoencoder, mmdit, siglip_vq, text_encoders, transformer, work
from xomni_jax.models.registry import boxed_shapes, init_params
from xomni_jax.models.section import ModelSection
from xomni_jax.pipeline import XOmni
from xomni_jax.rl.advantages import AdvantageConfig, group_advantages
from xomni_jax.rl.image_statistics import image_sums, join_statistics
from xomni_jax.rl.objectives import GRPOConfig
from xomni_jax.rl.rewards import RewardConfig, close_all, open_clients
from xomni_jax.rl.rollouts import RolloutConfig, Rollouts, param_converter
from xomni_jax.rl.update import Policy, RolloutBatch, frozen_logp, make_update
from xomni_jax.sampling.decoder import DECODER_COMPONENTS, DecodeConfig
from xomni_jax.sampling.keys import image_keys
from xomni_jax.sampling.logits import SamplingConfig
from xomni_jax.sampling.programs import RolloutShape, decoder_programs, sampler_programs
from xomni_jax.sampling.sampler import Sampler
from xomni_jax.sequence.padding import pad_prompts
from xomni_jax.sharding import abstract
from xomni_jax.sharding.arrays import share, whole
from xomni_jax.sharding.mesh import MeshConfig, make_mesh
from xomni_jax.sharding.rules import num_data_shards
from xomni_jax.training.components import (
    DataIterator,
    check_heads,
    check_split,
    decode_settings,
    export_model,
    here,
    model_configs,
    open_model,
    read_description,
)
from xomni_jax.training.loop import key_for, tile
from xomni_jax.training.operations import FlopCount
from xomni_jax.training.optimizer import OptimizerConfig, make_optimizer
from xomni_jax.training.stage import GRID_SEED, RunConfig, RunningStage, meshes
from xomni_jax.training.state import TrainState, new_state

SHUFFLE = 2  # purpose of a step's key, beside those of `rollouts`
MODELS = ("transformer", "siglip_vq", *DECODER_COMPONENTS)


@dataclasses.dataclass(frozen=True)
class GRPORun(RunConfig):
    """GRPO with remote rewards.

    Attributes:
      transformer: the policy, and the reference that it starts from
      siglip_vq: frozen, from codes to semantics
      mmdit: frozen diffusion transformer
      t5: frozen text encoder of the prompt's tokens
      clip: frozen text encoder of the pooled prompt
      autoencoder: frozen, from latents to pixels
      decoder_mesh: devices of the image decoder alone; a 0: it shares those of mesh
      grpo: the objective
      advantage: how the rewards of a group become advantages
      sampling: how rollouts are drawn
      rollout: how a batch of rollouts is made and used
      decode: changes to the model's own settings of decoding; None: the model's
      rewards: the scoring services, each under the name of its scorer
      data: where prompts and their targets come from; one image size
    """

    stage: str = "grpo"
    run_dir: str = "runs/grpo"
    batch_size: int = 32
    log_every: int = 1
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-6, warmup_steps=0, schedule="constant")
    transformer: ModelSection = ModelSection(transformer.PRESETS)
    siglip_vq: ModelSection = ModelSection(siglip_vq.PRESETS)
    mmdit: ModelSection = ModelSection(mmdit.PRESETS)
    t5: ModelSection = ModelSection(text_encoders.T5_PRESETS)
    clip: ModelSection = ModelSection(text_encoders.CLIP_PRESETS)
    autoencoder: ModelSection = ModelSection(autoencoder.PRESETS)
    decoder_mesh: MeshConfig = MeshConfig(fsdp=0)
    grpo: GRPOConfig = GRPOConfig()
    advantage: AdvantageConfig = AdvantageConfig()
    sampling: SamplingConfig = SamplingConfig(top_k=0, min_p=0.0)
    rollout: RolloutConfig = RolloutConfig()
    decode: Overrides = Overrides(DecodeConfig)
    rewards: Mapping[str, RewardConfig] = dataclasses.field(
        default_factory=lambda: {
            "ocr": RewardConfig(("http://127.0.0.1:8001",), 1.0),
            "shapes": RewardConfig(("http://127.0.0.1:8002",), 1.0),
            "quality": RewardConfig(("http://127.0.0.1:8003",)),
        }
    )
    data: DataSection = dataclasses.replace(
        SIGNS,
        options=dataclasses.replace(SIGNS.options, sizes=((32, 64),), weights=(1.0,), text_lengths=((3, 6),), shapes=0.0, pseudo_words=0.0),
    )


def micro_batches(prompts: int, grpo: GRPOConfig, rollout: RolloutConfig) -> int:
    """Gradient accumulation steps of an update."""
    minibatch = prompts * grpo.rollouts_per_prompt // grpo.updates_per_batch
    return max(1, minibatch // rollout.micro_batch) if rollout.micro_batch else 1


def make_image_decoder(cfg: GRPORun, model: XOmni) -> XOmni:
    """The model that decodes images: `model`, or one on `decoder_mesh`, whose devices the policy's mesh leaves out."""
    _, devices = meshes(cfg, jax.devices())
    if not devices:
        return model
    mesh = make_mesh(cfg.decoder_mesh.sizes(), devices)
    connect(mesh)
    return model.on(mesh)


def check_divides(prompts: int, grpo: GRPOConfig, rollout: RolloutConfig, ways: int) -> None:
    """Refuses batch sizes that do not split evenly, naming the keys."""
    if prompts % rollout.chunks:
        raise ConfigError(f"config.rollout.chunks={rollout.chunks} does not divide config.batch_size={prompts} prompts; use a divisor")
    chunk = prompts // rollout.chunks
    if chunk % ways:
        raise ConfigError(
            f"config.batch_size={prompts} in config.rollout.chunks={rollout.chunks} leaves {chunk} prompts a chunk, which config.mesh cannot "
            f"split {ways} ways (replica x data x fsdp); raise batch_size or lower those axes"
        )
    rollouts = prompts * grpo.rollouts_per_prompt
    if rollouts % grpo.updates_per_batch:
        raise ConfigError(
            f"config.grpo.updates_per_batch={grpo.updates_per_batch} does not divide the {rollouts} rollouts of a step; use a divisor"
        )
    minibatch = rollouts // grpo.updates_per_batch
    micro = rollout.micro_batch or minibatch
    if minibatch % micro:
        raise ConfigError(f"config.rollout.micro_batch={micro} does not divide the {minibatch} rollouts of an update; use a divisor")
    if micro % ways:
        key = "config.rollout.micro_batch" if rollout.micro_batch else "config.grpo.updates_per_batch"
        raise ConfigError(f"{key}: {micro} rollouts at a time do not split over the {ways} ways of config.mesh; use a multiple of {ways}")


class GRPOStage:
    """GRPO, registered as a stage."""

    Config: ClassVar[type] = GRPORun
    components: ClassVar[tuple[str, ...]] = MODELS

    @staticmethod
    def advantages(cfg: GRPORun, reward_PR: jax.Array, ok_PR: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Advantages [P, R] of P groups of R rewards, of which only those marked `ok_PR` are known, and metrics; a method may differ here."""
        return group_advantages(reward_PR, ok_PR, cfg.advantage)

    @classmethod
    def programs(cls, cfg: GRPORun, models: Mapping[str, Any], mesh: Mesh, decoder_mesh: Mesh | None = None) -> Programs:
        """The programs of a step, for images of the data's size."""
        ar, c, sampling = models["transformer"], cfg.rollout, cfg.sampling
        check_heads(ar.n_kv_heads, mesh)
        check_divides(cfg.batch_size, cfg.grpo, c, num_data_shards(mesh))
        patch, (height, width) = models["siglip_vq"].patch, cfg.data.sizes[0]
        grid = height // patch, width // patch
        P, R, S, T = cfg.batch_size, cfg.grpo.rollouts_per_prompt, c.prompt_length, grid[0] * grid[1]
        B, part, sides, parts = P * R, P // c.chunks, 2 if sampling.guided else 1, micro_batches(P, cfg.grpo, c)

        # ---- arrays that stay ----
        optimizer = make_optimizer(cfg.optimizer, cfg.steps * cfg.grpo.updates_per_batch)
        create, state = new_state(lambda: init_params("transformer", ar, jax.random.key(0)), optimizer, mesh)
        boxed = boxed_shapes("transformer", ar)
        layout = param_converter(boxed, mesh, ar.dtype, ar.image_vocab_size)
        weights = jax.eval_shape(layout, state.params)
        keep_reference = param_converter(boxed, mesh, c.reference_dtype)
        reference = jax.eval_shape(keep_reference, state.params) if cfg.grpo.kl_coef else None

        # ---- a batch of rollouts ----
        ids = lambda n, *more: abstract.rows(mesh, (n, *more), jnp.int32)
        f32 = lambda *shape: abstract.rows(mesh, shape, jnp.float32)
        kept = abstract.rows(mesh, (B, T, -(-ar.image_vocab_size // 8)), jnp.uint8) if sampling.truncates else None
        negative = (ids(B, S), ids(B)) if sampling.guided else None
        ok = abstract.rows(mesh, (B,), jnp.bool_)
        batch = RolloutBatch(ids(B, S), ids(B), ids(B, T), f32(B, T), kept, negative, f32(B), ok)

        # ---- programs ----
        policy = Policy(transformer.ARTransformer(ar), sampling, c.logit_chunk)
        shape = f"{B} rollouts of {S} + {T} tokens"
        update = Program(
            make_update(policy, optimizer, cfg.grpo, functools.partial(cls.advantages, cfg), parts),
            (state, reference, batch, f32(P, R), None, abstract.keys(mesh, ())),
            f"{shape} in {parts} micro-batches",
            work.policy_update(ar, B, S, T, parts, sides, bool(cfg.grpo.kl_coef), c.logit_chunk, mesh.shape),
            uses=("params", "optimizer", "reference"),
            freed=("sampler",),
            state=state,
        )
        replay = Program(
            jax.jit(lambda params, batch: frozen_logp(policy, params, batch, parts)),
            (reference, batch),
            f"log-probs of {shape}",
            work.replay(ar, B, S, T, parts, sides, c.logit_chunk, mesh.shape),
            uses=("reference",),
            freed=("sampler",),
            per_step=0,
        )
        convert = Program(
            layout,
            (state.params,),
            "the policy's weights in the sampler's layout and number format",
            Work(),
            uses=("params",),
            freed=("sampler",),
        )
        sampler = Sampler.make(policy.model, T, sampling, c.segment, return_mask=sampling.truncates)
        drawing = sampler_programs(sampler, ar, weights, RolloutShape(part, R, S, T), sampling.guided, c.chunks, mesh)
        if decoder_mesh is not None and len({d.process_index for d in decoder_mesh.devices.flat}) > 1:
            check_split("config.batch_size x grpo.rollouts_per_prompt / rollout.chunks", part * R, decoder_mesh)
        decode = decode_settings(cfg.decode, read_description(cfg.init_from))
        frozen, decoding = decoder_programs(models, grid, decode, part * R, c.chunks, decoder_mesh or mesh)
        decoding = {name: dataclasses.replace(p, on_decoder_mesh=decoder_mesh is not None) for name, p in decoding.items()}
        return Programs(
            mesh,
            {"policy-update": update} | ({"reference": replay} if reference is not None else {}) | {"layout": convert} | drawing | decoding,
            {"params": state.params, "optimizer": state.opt_state}
            | ({"reference": reference} if reference is not None else {})
            | {"sampler": weights}
            | frozen,
            create,
            decoder_mesh,
            tuple(frozen) if decoder_mesh else (),
        )

    @classmethod
    def make(cls, cfg: GRPORun, mesh: Mesh, stop: StopSignal) -> RunningStage:
        """A run on the prompts of the configuration, starting from the transformer of `init_from`."""
        group, rollout = cfg.grpo.rollouts_per_prompt, cfg.rollout
        model = open_model(cfg.init_from, MODELS, mesh, cfg.stage)
        models = model_configs(cfg, MODELS, model)
        for name, config in models.items():
            model.set_config(name, config)
        decode = decode_settings(cfg.decode, model.description)
        image_decoder = make_image_decoder(cfg, model)
        if len(cfg.data.sizes) != 1:
            raise ConfigError(f"config.data.sizes={cfg.data.sizes} must hold one size: rollouts have one static shape")
        grid = model.grid(*cfg.data.sizes[0])
        B = cfg.batch_size * group
        check_divides(cfg.batch_size, cfg.grpo, rollout, model.num_data_shards)
        if jax.process_count() > 1:  # each has its own rows of a chunk's images
            check_split("config.batch_size x grpo.rollouts_per_prompt / rollout.chunks", B // rollout.chunks, image_decoder.mesh)

        # ---- policy, reference, rollouts ----
        ar, start = models["transformer"], model.params("transformer")
        made = cls.programs(cfg, models, mesh)
        state = made.create().starting_from(start)
        ref_params = param_converter(boxed_shapes("transformer", ar), mesh, rollout.reference_dtype)(start) if cfg.grpo.kl_coef else None
        model.release("transformer")  # policy and reference are copies
        del start
        clients, weights = open_clients(cfg.rewards, stop.check_waiting)
        sampler = Sampler.of(made["prefill"].fn, made["rollout"].fn, grid[0] * grid[1], rollout.segment)
        rollouts = Rollouts(
            model,
            image_decoder,
            grid,
            group,
            rollout,
            cfg.advantage,
            cfg.sampling,
            decode,
            sampler,
            made["layout"].fn,
            clients,
            weights,
            stop,
        )
        flops = FlopCount()
        update = flops(made["policy-update"].fn)

        def step(state: TrainState, batch: dict[str, Any], number: int):
            key = key_for(cfg.seed, number, 0)
            rows, total, images, seconds = rollouts(state.params, batch["caption"], batch["targets"], key)
            failed = 1.0 - float(total.ok_PR.mean())
            if failed > rollout.max_fail_frac:
                raise StepRefused(
                    f"{failed:.0%} of the rollouts of step {number + 1} could not be scored (limit config.rollout.max_fail_frac="
                    f"{rollout.max_fail_frac:.0%}); check the services with `xomni rewards` and run the same command again"
                )
            began = time.perf_counter()
            reward_PR = jnp.asarray(np.nan_to_num(total.total_PR), jnp.float32)
            given_PR = None if total.advantage_PR is None else jnp.asarray(total.advantage_PR, jnp.float32)
            state, metrics = update(state, ref_params, rows, reward_PR, given_PR, jax.random.fold_in(key, SHUFFLE))
            gap = float(metrics["grpo/logp_gap_max"])
            if rollout.max_logp_gap and ar.dtype == jnp.float32 and gap > rollout.max_logp_gap:
                raise FloatingPointError(
                    f"sampler and trainer differ by {gap:.2e} in a log-prob at step {number + 1} (limit {rollout.max_logp_gap:g})"
                )
            seconds["perf/update_s"] = time.perf_counter() - began
            rewards = {k: v for k, v in total.stats.items() if np.isfinite(v)}
            return state, rewards | metrics | join_statistics(gather_json(image_sums(images))) | seconds

        def grid_image(state: TrainState, number: int) -> np.ndarray:
            n = -(-2 // model.num_data_shards) * model.num_data_shards
            prompts = first_batch(cfg.data, cfg.seed + GRID_SEED, n)["caption"]
            keys_P = image_keys(cfg.seed, n)
            ids_PS, lengths_P = rollouts.prompt_ids(prompts)
            negative = pad_prompts([model.tokenizer.image_prefix(*grid)] * n) if cfg.sampling.guided else None
            keys_PR = jax.vmap(lambda k: jax.random.split(k, 8))(keys_P)
            out = rollouts.sampler(rollouts.sampler_params(state.params), ids_PS, lengths_P, keys_PR, negative, stop.check)
            images = rollouts.images(out["codes"], [p for p in prompts for _ in range(8)], jnp.repeat(keys_P, 8))
            return tile(whole(images), columns=8)

        prompts_here = here("config.batch_size", cfg.batch_size, mesh)

        def to_batch(examples: dict[str, Any]) -> dict[str, list[Any]]:
            return share({name: examples[name] for name in ("caption", "targets")}, prompts_here, cfg.batch_size)

        data = DataIterator(batches(cfg.data, cfg.seed, cfg.batch_size, rows=prompts_here), to_batch)

        def export(state: TrainState, directory: Path, note: dict[str, Any]) -> None:
            export_model(directory, {"transformer": (state.params, ar)}, cfg.init_from, note)

        return RunningStage(
            state, data, step, export, grid_image, items_per_step=B, close=lambda: close_all(clients), flops=lambda: flops.total
        )
