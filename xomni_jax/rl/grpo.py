"""On-policy GRPO on pixels: prompts, rollouts, frozen image decoder, remote rewards, one sharded update (X-Omni section 3.4)."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from xomni_jax.core.config import ConfigError, Count, Overrides, checked
from xomni_jax.core.distributed import connect, gather_json
from xomni_jax.core.preemption import StopSignal
from xomni_jax.core.program import Program, Programs, Work
from xomni_jax.data.rendered import SIGNS
from xomni_jax.data.sources import DataSection, batches, first_batch
from xomni_jax.models import autoencoder, mmdit, siglip_vq, text_encoders, transformer, work
from xomni_jax.models.lora import LoRAConfig, beside, join
from xomni_jax.models.registry import boxed_shapes
from xomni_jax.models.section import ModelSection
from xomni_jax.pipeline import XOmni
from xomni_jax.rl.advantages import AdvantageConfig, group_advantages
from xomni_jax.rl.control import Control, EntropyConfig, RestraintConfig, check_control
from xomni_jax.rl.dynamic_sampling import refilled
from xomni_jax.rl.image_statistics import image_sums, join_statistics
from xomni_jax.rl.monitors import USUAL, Watch, crossings
from xomni_jax.rl.objectives import GRPOConfig
from xomni_jax.rl.prompts import Prompts, Size, all_prompts, asked, check_prompts, prompt_size
from xomni_jax.rl.rewards import RewardConfig, Rewards, check_rewards
from xomni_jax.rl.rollouts import RolloutConfig, Rollouts, param_converter
from xomni_jax.rl.supervised import SideBySide, SupervisedConfig, supervised_batches, supervised_gradient
from xomni_jax.rl.trajectory import Rows, Trajectory
from xomni_jax.rl.update import Advantages, Policy, frozen_logp, make_update
from xomni_jax.sampling.decoder import DECODER_COMPONENTS, DecodeConfig
from xomni_jax.sampling.keys import image_keys
from xomni_jax.sampling.logits import SamplingConfig
from xomni_jax.sampling.programs import RolloutShape, decoder_programs, sampler_programs
from xomni_jax.sampling.sampler import Sampler
from xomni_jax.sampling.segments import Segment, image_spec
from xomni_jax.sharding import abstract
from xomni_jax.sharding.arrays import local_rows, owned_rows, whole
from xomni_jax.sharding.mesh import MeshConfig, make_mesh
from xomni_jax.sharding.rules import num_data_shards
from xomni_jax.tokenizers.registry import IMAGE_TOKENIZERS, tokenizer_in
from xomni_jax.training.adapters import export_trained, frozen_base, learned_params
from xomni_jax.training.components import (
    DataIterator,
    check_heads,
    check_split,
    check_trainable,
    decode_settings,
    model_configs,
    open_model,
    read_description,
)
from xomni_jax.training.guard import guarded
from xomni_jax.training.loop import key_for
from xomni_jax.training.operations import FlopCount, say
from xomni_jax.training.optimizer import Optimizer, OptimizerConfig
from xomni_jax.training.pretrain import abstract_rows
from xomni_jax.training.stage import GRID_SEED, Grid, RunConfig, RunningStage, meshes
from xomni_jax.training.state import TrainState, new_state

SHUFFLE = 2  # purpose of a step's key, beside those of `rollouts`
GRID_PROMPTS, GRID_COLUMNS = 2, 8  # of an image grid: a row per prompt, a column per sample
MODELS = ("transformer", "siglip_vq", *DECODER_COMPONENTS)


@dataclasses.dataclass(frozen=True)
class GRPORun(RunConfig):
    """GRPO with remote rewards.

    Attributes:
      transformer: the policy, and the reference that it starts from
      lora: adapters of the transformer, which are then all that learns; the reference is the transformer without them, not a copy
      siglip_vq: frozen, from codes to semantics
      mmdit: frozen diffusion transformer
      t5: frozen text encoder of the prompt's tokens
      clip: frozen text encoder of the pooled prompt
      autoencoder: frozen, from latents to pixels
      decoder_mesh: devices of the image decoder alone; a 0: it shares those of mesh
      grpo: the objective
      advantage: how the rewards of a group become advantages
      entropy: the entropy bonus
      restraint: what strengthens the KL term and the entropy bonus while signals fall that no reward pays for
      sampling: how rollouts are drawn
      rollout: how a batch of rollouts is made and used
      sft: supervised fine-tuning beside it
      decode: changes to the model's own settings of decoding; None: the model's
      rewards: the scoring services, each under the name of its scorer
      watch: metrics with their smallest and largest values, such as ('reward/judge/mean', 0.5, 1.0) of a judge of weight 0: a warning is
        printed when one leaves its range
      data: where prompts and their targets come from; every batch has images of one size, and every size programs of its own
    """

    stage: str = "grpo"
    run_dir: str = "runs/grpo"
    batch_size: Count = 32
    log_every: Count = 1
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-6, warmup_steps=0, schedule="constant")
    transformer: ModelSection = ModelSection(transformer.PRESETS)
    lora: LoRAConfig = LoRAConfig()
    siglip_vq: ModelSection = ModelSection(siglip_vq.PRESETS)
    mmdit: ModelSection = ModelSection(mmdit.PRESETS)
    t5: ModelSection = ModelSection(text_encoders.T5_PRESETS)
    clip: ModelSection = ModelSection(text_encoders.CLIP_PRESETS)
    autoencoder: ModelSection = ModelSection(autoencoder.PRESETS)
    decoder_mesh: MeshConfig = MeshConfig(fsdp=0)
    grpo: GRPOConfig = GRPOConfig()
    advantage: AdvantageConfig = AdvantageConfig()
    entropy: EntropyConfig = EntropyConfig()
    restraint: RestraintConfig = RestraintConfig()
    sampling: SamplingConfig = SamplingConfig(top_k=0, min_p=0.0)
    rollout: RolloutConfig = RolloutConfig()
    sft: SupervisedConfig = SupervisedConfig()
    decode: Overrides = Overrides(DecodeConfig)
    rewards: Mapping[str, RewardConfig] = dataclasses.field(
        default_factory=lambda: {
            "ocr": RewardConfig(("http://127.0.0.1:8001",), weight=1.0),
            "shapes": RewardConfig(("http://127.0.0.1:8002",), weight=1.0),
            "quality": RewardConfig(("http://127.0.0.1:8003",)),
        }
    )
    watch: Watch = USUAL
    data: DataSection = dataclasses.replace(
        SIGNS,
        options=dataclasses.replace(SIGNS.options, sizes=((32, 64),), weights=(1.0,), text_lengths=((3, 6),), shapes=0.0, pseudo_words=0.0),
    )

    def __post_init__(self):
        super().__post_init__()
        if self.average_reference and not self.ema.decay and self.ema.every == 1:
            raise ConfigError("config.rollout.reference=average: the run keeps no average; set config.ema.decay, or config.ema.every")
        if self.rollout.weights == "int8" and not self.grpo.importance_cap:
            raise ConfigError("config.rollout.weights=int8 draws with other weights than learn; set config.grpo.importance_cap, such as 2")
        if self.rollout.weights == "int8" and self.lora.rank:
            raise ConfigError("config.rollout.weights=int8: adapters are not rounded; set config.transformer.int8=True, the base in 8 bits")

    @property
    def average_reference(self) -> bool:
        """Whether the KL term pulls towards the running average of the policy."""
        return self.rollout.reference == "average"


def loss_control(cfg: GRPORun, codes: int) -> Control:
    """The weights of the run's updates; `codes` among which one is drawn."""
    return Control(cfg.entropy, cfg.restraint, cfg.grpo.kl_coef, cfg.steps * cfg.grpo.updates_per_batch, codes)


def check_divides(cfg: GRPORun, mesh: Mesh) -> None:
    """Refuses batch sizes that do not split evenly over the mesh, naming the keys."""
    prompts, grpo, rollout, shards = cfg.batch_size, cfg.grpo, cfg.rollout, num_data_shards(mesh)
    if prompts % rollout.chunks:
        raise ConfigError(f"config.rollout.chunks={rollout.chunks} does not divide config.batch_size={prompts} prompts; use a divisor")
    chunk = prompts // rollout.chunks
    if chunk % shards:
        raise ConfigError(
            f"config.batch_size={prompts} in config.rollout.chunks={rollout.chunks} leaves {chunk} prompts a chunk, which "
            f"config.mesh cannot split {shards} ways (replica x data x fsdp); raise batch_size or lower those axes"
        )
    if rollout.refills and len(cfg.data.sizes) > 1:
        raise ConfigError(
            "config.rollout.refills: a step's prompts may be of another size than those that follow; give data.sizes one size"
        )
    rollouts = prompts * grpo.rollouts_per_prompt
    if rollouts % grpo.updates_per_batch:
        raise ConfigError(
            f"config.grpo.updates_per_batch={grpo.updates_per_batch} does not divide the {rollouts} rollouts of a step; use a divisor"
        )
    if cfg.sft.weight:
        check_split("config.sft.next_token.rows", cfg.sft.next_token.rows, mesh, cfg.accumulate)
    check_split("rollouts per config.grpo.updates_per_batch", rollouts // grpo.updates_per_batch, mesh, cfg.accumulate)


# ---- programs ----
def abstract_batch(cfg: GRPORun, ar: transformer.ARConfig, grid: tuple[int, int], mesh: Mesh) -> Trajectory:
    """Shapes of all rollouts of a step, on the mesh; `grid` of an image's codes."""
    codes, B, S = math.prod(grid), cfg.batch_size * cfg.grpo.rollouts_per_prompt, cfg.rollout.prompt_length
    rows = lambda dtype, *shape: abstract.rows(mesh, (B, *shape), dtype)
    kept = rows(jnp.uint8, codes, -(-ar.image_vocab_size // 8)) if cfg.sampling.truncates else None
    order = None if ar.order == "raster" else rows(jnp.int32, codes)
    image = Segment(rows(jnp.int32, codes), None, rows(jnp.float32, codes), kept, "image", image_spec(codes, cfg.sampling), order)
    prompts = rows(jnp.int32, S), rows(jnp.int32)
    return Trajectory(prompts, (image,), prompts if cfg.sampling.guided else None, (rows(jnp.float32),), (rows(jnp.bool_),))


def learner_programs(
    cfg: GRPORun,
    policy: Policy,
    optimizer: Optimizer,
    advantages: Advantages | None,
    state: TrainState,
    frozen: Any,
    batch: Rows,
    mesh: Mesh,
) -> dict[str, Program]:
    """The update of the policy, and, with a KL term, the log-probs of the reference, which are a part of it.

    Args:
      state, frozen: shapes of the training state and of the parameters of the reference, or of the adapters' base; None without both.
      batch: shapes of the rollouts.
    """
    ar, parts, sides, reference = policy.model.cfg, cfg.accumulate, 1 + cfg.sampling.guided, bool(cfg.grpo.kl_coef)
    chunk, control, B = cfg.rollout.logit_chunk, loss_control(cfg, ar.image_vocab_size), batch.ok[0].shape[0]
    sizes = [(t.prompts[0].shape[1], *(sum(s.ids.shape[1] for s in x) for x in (t.segments, t.drawn))) for t in batch.passes]
    sizes = [(S + others - drawn, drawn) for S, others, drawn in sizes]
    rewards = abstract.rows(mesh, (cfg.batch_size, B // cfg.batch_size), jnp.float32)
    signals = abstract.array(mesh, (len(cfg.restraint.signals),), jnp.float32) if cfg.restraint.signals else None
    shape = f"{B} rollouts of {', '.join(f'{S} + {drawn}' for S, drawn in sizes)} tokens"
    least = work.joined(work.policy_update(ar, B, S, drawn, parts, sides, reference, chunk, mesh.shape) for S, drawn in sizes)
    beside, packed = None, None
    if cfg.sft.weight:
        beside, packed = functools.partial(supervised_gradient, cfg.sft), abstract_rows(cfg.sft.next_token, cfg.sft.data.names, mesh)
        (rows, length), targets = packed.ids_BL.shape, packed.text_at_BM.shape[1]
        next_token = work.next_token(ar, rows, length, targets, not cfg.lora.rank, cfg.sft.next_token.chunk, mesh.shape)
        shape, least = f"{shape} and {rows} packed rows of {length}", work.joined([least, next_token])
    update = Program(
        guarded(make_update(policy, optimizer, cfg.grpo, advantages, control, parts, cfg.lora, cfg.average_reference, beside), cfg.guard),
        (state, frozen, batch, rewards, None, abstract.keys(mesh, ()), signals, packed),
        f"{shape} in {parts} micro-batches",
        least,
        uses=("params", "optimizer", "average", "reference"),
        freed=("sampler",),
        state=state,
    )
    if not reference or cfg.average_reference:
        return {"policy-update": update}
    replay = Program(
        jax.jit(lambda params, batch: frozen_logp(policy, params, batch, parts)),
        (frozen, batch),
        f"log-probs of {shape}",
        work.joined(work.replay(ar, B, S, drawn, parts, sides, chunk, mesh.shape) for S, drawn in sizes),
        uses=("reference",),
        freed=("sampler",),
        per_step=0,
    )
    return {"policy-update": update, "reference": replay}


class GRPOStage:
    """GRPO, registered as a stage."""

    Config: ClassVar[type] = GRPORun
    components: ClassVar[tuple[str, ...]] = MODELS
    own_advantages: ClassVar[bool] = False  # the rollouts bring those of each segment
    own_rewards: ClassVar[bool] = False  # the rollouts have rewards beside those of services
    fields: ClassVar[tuple[str, ...]] = ("caption", "targets")  # of an example
    abstract_batch: ClassVar[Callable[..., Rows]] = staticmethod(abstract_batch)

    @staticmethod
    def advantages(cfg: GRPORun, reward_PR: jax.Array, ok_PR: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Advantages [P, R] of P groups of R rewards, of which only those marked `ok_PR` are known, and metrics.

        A method of your own may override it.
        """
        return group_advantages(reward_PR, ok_PR, cfg.advantage)

    @classmethod
    def programs(cls, cfg: GRPORun, models: Mapping[str, Any], mesh: Mesh, decoder_mesh: Mesh | None = None) -> Programs:
        """The programs of a step, for images of each of the data's sizes (see `bucket_names`)."""
        ar, c = models["transformer"], cfg.rollout
        check_heads(ar.n_kv_heads, mesh)
        check_divides(cfg, mesh)
        R, part = cfg.grpo.rollouts_per_prompt, cfg.batch_size // c.chunks
        if decoder_mesh is not None and len({d.process_index for d in decoder_mesh.devices.flat}) > 1:
            check_split("config.batch_size x grpo.rollouts_per_prompt / rollout.chunks", part * R, decoder_mesh)

        # ---- arrays that stay ----
        optimizer = cfg.make_optimizer(updates_per_step=cfg.grpo.updates_per_batch)
        init, frozen = learned_params("transformer", ar, cfg.lora, cfg.seed, mesh)
        create, state = new_state(init, optimizer, mesh, cfg.guard, loss_control(cfg, ar.image_vocab_size).initial)
        boxed, params = boxed_shapes("transformer", ar), state.params
        if frozen:
            boxed, params = beside(boxed, jax.eval_shape(init)), beside(frozen, params)
        elif cfg.grpo.kl_coef and not cfg.average_reference:
            frozen = jax.eval_shape(param_converter(boxed, mesh, c.reference_dtype), params)
        tokenizer = IMAGE_TOKENIZERS[tokenizer_in(models)](models[tokenizer_in(models)])
        grids = {size: tokenizer.layout(*size).shape for size in cfg.data.sizes}
        batches = {size: cls.abstract_batch(cfg, ar, grid, mesh) for size, grid in grids.items()}
        text = any(s.kind == "text" for s in batches[cfg.data.sizes[0]].drawn)
        drawn, int8 = ar, c.weights == "int8"
        if int8:
            drawn = dataclasses.replace(ar, int8=True)
            boxed = boxed_shapes("transformer", drawn)
        layout = param_converter(boxed, mesh, ar.dtype, ar.image_vocab_size, text, int8)
        weights = jax.eval_shape(layout, params)
        persistent = {
            "params": state.params,
            "optimizer": state.opt_state,
            "average": state.ema or None,
            "reference": frozen,
            "sampler": weights,
        }

        # ---- programs ----
        policy = Policy(transformer.ARTransformer(ar), c.logit_chunk)
        about = "the policy's weights in the sampler's layout and number format"
        convert = Program(layout, (params,), about, Work(), uses=("params",), freed=("sampler",))
        decode = decode_settings(cfg.decode, read_description(cfg.init_from))
        programs, decoder_params = dict[str, Program](), {}
        for size, bucket in bucket_names(cfg.data.sizes).items():
            advantages = None if cls.own_advantages else functools.partial(cls.advantages, cfg)
            learning = learner_programs(cfg, policy, optimizer, advantages, state, frozen, batches[size], mesh)
            drawing = cls.drawing(cfg, transformer.ARTransformer(drawn), grids[size], weights, mesh)
            decoder_params, decoding = decoder_programs(models, grids[size], decode, part * R, c.chunks, decoder_mesh or mesh)
            decoding = {name: dataclasses.replace(p, on_decoder_mesh=decoder_mesh is not None) for name, p in decoding.items()}
            once = {} if bucket else {"layout": convert}
            for name, program in (learning | once | drawing | decoding).items():
                # Every step has images of one size; a plan reckons with the first.
                programs[name + bucket] = dataclasses.replace(program, per_step=0) if bucket else program
        return Programs(
            mesh,
            programs,
            {name: arrays for name, arrays in persistent.items() if arrays is not None} | decoder_params,
            create,
            decoder_mesh,
            tuple(decoder_params) if decoder_mesh else (),
        )

    @classmethod
    def prompts(cls, cfg: GRPORun, model: XOmni, rows: Sequence[int], examples: dict[str, Any]) -> dict[str, Any]:
        """What a step asks for, of all processes, from this one's `rows` of a batch of examples."""
        return all_prompts(cfg, rows, examples)

    @classmethod
    def drawing(cls, cfg: GRPORun, net: transformer.ARTransformer, grid: tuple[int, int], weights: Any, mesh: Mesh) -> dict[str, Program]:
        """The programs that draw a chunk's rollouts. `weights`: abstract parameters as they take them."""
        c, sampler = cfg.rollout, Sampler.make(net, grid, cfg.sampling, cfg.rollout.segment, return_mask=cfg.sampling.truncates)
        shape = RolloutShape(cfg.batch_size // c.chunks, cfg.grpo.rollouts_per_prompt, c.prompt_length, math.prod(grid))
        return sampler_programs(sampler, net.cfg, weights, shape, cfg.sampling.guided, c.chunks, mesh)

    @classmethod
    def rollouts(cls, run: GRPORun, programs: Mapping[str, Callable[..., Any]], model: XOmni, image_decoder: XOmni, **own: Any) -> Rollouts:
        """What draws, decodes and scores the rollouts of a step. `programs`: the functions of `drawing`. `own`: its other parts."""
        codes = math.prod(own["grid"])
        sampler = Sampler.of(programs["prefill"], programs["rollout"], codes, run.rollout.segment, run.sampling.window > 1)
        return Rollouts(model, image_decoder, sampler=sampler, **own)

    @classmethod
    def make(cls, cfg: GRPORun, mesh: Mesh, stop: StopSignal) -> RunningStage:
        """A run on the prompts of the configuration, starting from the transformer of `init_from`."""
        check_prompts(cfg)
        check_control(cfg.restraint, cfg.grpo.kl_coef or cfg.entropy.coef, check_rewards(cfg.rewards, cls.own_rewards))
        rows = local_rows(mesh, cfg.batch_size)
        fields = (*cls.fields, "size") if len(cfg.data.sizes) > 1 else cls.fields
        prompts = batches(cfg.data, cfg.seed, cfg.batch_size, rows=rows, fields=fields)
        model = open_model(cfg.init_from, cls.components, mesh, cfg.stage)
        models = model_configs(cfg, cls.components, model)
        for name, config in models.items():
            model.set_config(name, config)
        decode = decode_settings(cfg.decode, model.description)
        grids = checked(lambda: {size: model.grid(*size) for size in cfg.data.sizes}, "config.data.sizes")
        image_decoder = make_image_decoder(cfg, model)
        made = cls.programs(cfg, models, mesh, None if image_decoder is model else image_decoder.mesh)

        ar, lora, state, base = models["transformer"], cfg.lora, made.create(), None
        check_trainable(models, ("transformer",) if not lora.rank else ())
        if lora.rank:
            frozen = base = frozen_base(model, models, "transformer", lora)
        else:
            start = model.params("transformer")
            state = state.starting_from(start)
            keep = param_converter(boxed_shapes("transformer", ar), mesh, cfg.rollout.reference_dtype)
            frozen = keep(start) if cfg.grpo.kl_coef and not cfg.average_reference else None
            del start
        model.release("transformer")  # policy and reference are copies, or the base is held here
        packed = supervised_batches(cfg.sft, model, cfg.seed) if cfg.sft.weight else None
        rewards = open_rewards(cfg, image_decoder.mesh, stop, cls.own_rewards)
        flops, buckets = FlopCount(), {}
        for size, name in bucket_names(cfg.data.sizes).items():
            rollouts = cls.rollouts(
                cfg,
                {program.removesuffix(name): made[program].fn for program in made.programs if program.endswith(name)},
                model,
                image_decoder,
                grid=grids[size],
                group=cfg.grpo.rollouts_per_prompt,
                cfg=cfg.rollout,
                advantage=cfg.advantage,
                sampling=cfg.sampling,
                decode=decode,
                sampler_params=lambda params: made["layout"].fn(join(base, params, lora.scale)),
                rewards=rewards,
                stop=stop,
            )
            buckets[size] = Bucket(rollouts, flops(made["policy-update" + name].fn))
        data = Prompts(prompts, functools.partial(cls.prompts, cfg, model, rows), rewards)
        return RunningStage(
            state,
            SideBySide(data, packed) if packed else data,
            functools.partial(train_step, cfg, buckets, frozen, set(), data),
            lambda state, directory, note: export_trained(directory, {"transformer": (state.params, ar)}, lora, model, note),
            functools.partial(sample_grid, cfg, buckets),
            items_per_step=cfg.batch_size * cfg.grpo.rollouts_per_prompt,
            close=rewards.close,
            flops=lambda: flops.total,
            record={"rewards": rewards.record()},
        )


# ---- a run ----
class Bucket(NamedTuple):
    """What makes and learns rollouts of one image size."""

    rollouts: Rollouts
    update: Callable[..., Any]


def bucket_names(sizes: Sequence[Size]) -> dict[Size, str]:
    """{(height, width): what the names of its programs end in}: nothing for the first size, @HEIGHTxWIDTH for the others."""
    return {size: f"@{size[0]}x{size[1]}" if n else "" for n, size in enumerate(sizes)}


def open_rewards(cfg: GRPORun, decoder_mesh: Mesh, stop: StopSignal, others: bool = False) -> Rewards:
    """The configured rewards. Raises as `Rewards.open` and `Rewards.check_together`."""
    rewards, group, chunks = (
        Rewards.open(cfg.rewards, stop.check_waiting, Path(cfg.run_dir), say, others),
        cfg.grpo.rollouts_per_prompt,
        cfg.rollout.chunks,
    )
    chunk = cfg.batch_size // chunks * group
    try:
        rewards.check_together(owned_rows(decoder_mesh, chunk), chunk, chunks, group)
    except ConfigError:
        rewards.close()
        raise
    return rewards


def make_image_decoder(cfg: GRPORun, model: XOmni) -> XOmni:
    """The model that decodes images: `model`, or one on `decoder_mesh`, whose devices the policy's mesh leaves out."""
    _, devices = meshes(cfg, jax.devices())
    if not devices:
        return model
    mesh = make_mesh(cfg.decoder_mesh.sizes(), devices)
    connect(mesh)
    return model.on(mesh)


def train_step(
    cfg: GRPORun,
    buckets: Mapping[Size, Bucket],
    frozen: Any,
    outside: set[str],
    data: DataIterator,
    state: TrainState,
    batch: dict[str, Any],
    number: int,
) -> tuple[TrainState, dict[str, Any]]:
    """Rollouts of a batch of prompts, and the update on them -> (state, metrics).

    Raises:
      StepRefused: too many rollouts could not be scored.
      FloatingPointError: sampler and trainer disagree about the log-prob of a code, or its weights in 8 bits are too far from it.
    """
    key, (rollouts, update) = key_for(cfg.seed, number, 0), buckets[batch["size"]]
    rows, total, images, measured = rollouts(state.params, *asked(batch), key, number / cfg.steps)
    if cfg.rollout.refills:
        again = lambda n: rollouts(state.params, *asked(next(data)), key_for(cfg.seed, number, n), number / cfg.steps)  # noqa: E731
        ids = data.ids
        rows, total, measured = refilled(again, cfg.rollout.refills, rows, total, measured, rollouts.model.mesh)
        data.ids = ids + data.ids
    began = time.perf_counter()
    reward_PR = jnp.asarray(np.nan_to_num(total.total_PR), jnp.float32)
    given_PR = None if total.advantage_PR is None else jnp.asarray(total.advantage_PR, jnp.float32)
    measured |= join_statistics(gather_json(image_sums(images)))
    seen = total.stats | measured
    signal_S = jnp.array([seen.get(name, np.nan) for name, _ in cfg.restraint.signals], jnp.float32) if cfg.restraint.signals else None
    state, metrics = update(state, frozen, rows, reward_PR, given_PR, jax.random.fold_in(key, SHUFFLE), signal_S, batch.get("packed"))
    gap, limit = float(metrics.get("grpo/logp_gap_max", 0.0)), cfg.rollout.max_logp_gap
    if limit and gap > limit and cfg.rollout.weights == "policy" and rollouts.model.config("transformer").dtype == jnp.float32:
        raise FloatingPointError(f"sampler and trainer differ by {gap:.2e} in a log-prob at step {number + 1} (limit {limit:g})")
    if (apart := float(metrics.get("grpo/sampler_kl", 0.0))) > cfg.rollout.max_sampler_kl:
        raise FloatingPointError(
            f"the sampler is {apart:.2g} nats a code away from the policy at step {number + 1} (limit config.rollout.max_sampler_kl="
            f"{cfg.rollout.max_sampler_kl:g}); set config.rollout.weights=policy"
        )
    measured["perf/update_s"] = time.perf_counter() - began
    metrics = total.stats | metrics | measured
    for line in crossings(cfg.watch, metrics, outside):
        say(line)
    rollouts.rewards.commit()
    return state, metrics


def sample_grid(cfg: GRPORun, buckets: Mapping[Size, Bucket], state: TrainState, number: int) -> Grid:
    """Samples of the policy for the first prompts of its own data, a row per prompt."""
    examples = first_batch(cfg.data, cfg.seed + GRID_SEED, GRID_PROMPTS)
    rollouts, captions = buckets[prompt_size(cfg, examples)].rollouts, examples["caption"]
    (batch,) = rollouts.model.batches(GRID_PROMPTS)
    keys_P, prompts = batch.take(image_keys(cfg.seed, GRID_PROMPTS)), batch.take(captions)
    keys_PR = jax.vmap(lambda k: jax.random.split(k, GRID_COLUMNS))(keys_P)
    inputs = rollouts.sampler_inputs(prompts, keys_PR)
    out = rollouts.sampler(rollouts.sampler_params(state.params), *inputs, rollouts.stop.check, **rollouts.orders(keys_PR))
    images = rollouts.images(out["codes"], [p for p in prompts for _ in range(GRID_COLUMNS)], jnp.repeat(keys_P, GRID_COLUMNS))
    return Grid(whole(images)[: GRID_PROMPTS * GRID_COLUMNS], GRID_COLUMNS, {"caption": captions}, by="row")
