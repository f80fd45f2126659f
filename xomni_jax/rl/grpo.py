"""Stage (e): on-policy GRPO on pixels. Prompts -> rollouts -> frozen decoder -> remote rewards -> one sharded update (X-Omni section 3.4)."""

from __future__ import annotations

import dataclasses
import math
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from xomni_jax.core.config import ConfigError, RunConfig, build
from xomni_jax.core.distributed import connect, gather_json
from xomni_jax.core.preemption import StepRefused, StopSignal
from xomni_jax.data.rendered import RenderedConfig
from xomni_jax.data.sources import rendered_dataset
from xomni_jax.models.registry import init_params
from xomni_jax.pipeline import XOmni
from xomni_jax.rl.advantages import AdvantageConfig
from xomni_jax.rl.image_statistics import image_sums, join_statistics
from xomni_jax.rl.objectives import GRPOConfig
from xomni_jax.rl.rewards import close_all, open_clients
from xomni_jax.rl.rollouts import RolloutConfig, Rollouts, make_layout
from xomni_jax.rl.update import Policy, make_update
from xomni_jax.sampling.decoder import DecodeConfig
from xomni_jax.sampling.keys import image_keys
from xomni_jax.sampling.logits import SamplingConfig
from xomni_jax.sampling.pixels import DECODER_PARTS
from xomni_jax.sequence.padding import pad_prompts
from xomni_jax.sharding.arrays import share, whole
from xomni_jax.sharding.mesh import make_mesh, split_devices
from xomni_jax.training.components import PRESETS, DataIterator, check_heads, check_split, export_model, here, open_model, stored_or_preset
from xomni_jax.training.loop import Stage, key_for, tile
from xomni_jax.training.operations import FlopCount
from xomni_jax.training.optimizer import OptimizerConfig, make_optimizer
from xomni_jax.training.state import TrainState, init_state

SHUFFLE = 2  # purpose of a step's key, beside those of `rollouts`
MODELS = ("transformer", "siglip_vq", *DECODER_PARTS)
SECTIONS = (*MODELS, "decoder_mesh", "optimizer", "grpo", "advantage", "sampling", "rollout", "decode", "rewards", "data")


def make(config: ConfigDict, run: RunConfig, mesh: jax.sharding.Mesh, stop: StopSignal) -> Stage:
    """The GRPO stage of a configuration."""
    grpo, rollout = build(GRPOConfig, config.grpo, "config.grpo"), build(RolloutConfig, config.rollout, "config.rollout")
    advantage, sampling = (
        build(AdvantageConfig, config.advantage, "config.advantage"),
        build(SamplingConfig, config.sampling, "config.sampling"),
    )
    data = build(RenderedConfig, config.data, "config.data")
    model = open_model(run.init_from, MODELS, mesh, run.stage)
    for name in MODELS:
        model.set_config(name, stored_or_preset(model, name, config[name], PRESETS[name], f"config.{name}"))
    check_heads(model.config("transformer").n_kv_heads, mesh)
    chosen = {k: v for k, v in config.decode.items() if v is not None}
    decode = build(DecodeConfig, dataclasses.asdict(model.decode_config) | chosen, "config.decode")
    painter = make_painter(config, model)
    if len(data.sizes) != 1:
        raise ConfigError(f"config.data.sizes={data.sizes} must hold one size: rollouts have one static shape")
    grid = model.grid(*data.sizes[0])
    B = run.batch_size * grpo.rollouts_per_prompt
    check_divides(run.batch_size, grpo, rollout, model.ways)
    if jax.process_count() > 1:  # each has its own rows of a chunk's images
        check_split("config.batch_size x grpo.rollouts_per_prompt / rollout.chunks", B // rollout.chunks, painter.mesh)

    # ---- policy, reference ----
    ar, start = model.config("transformer"), model.params("transformer")
    policy = Policy(model.module("transformer"), sampling, rollout.logit_chunk)
    optimizer = make_optimizer(build(OptimizerConfig, config.optimizer, "config.optimizer"), run.steps * grpo.updates_per_batch)
    init = lambda: init_params("transformer", ar, jax.random.key(0))  # noqa: E731
    state = init_state(init, optimizer, mesh).starting_from(start)
    ref_params = make_layout(jax.eval_shape(init), mesh, rollout.reference_dtype)(start) if grpo.kl_coef else None
    model.release("transformer")  # policy and reference are copies
    del start
    clients, weights = open_clients(config.rewards, stop.check_waiting)
    group = grpo.rollouts_per_prompt
    rollouts = Rollouts(model, painter, grid, sampling, decode, rollout, advantage, group, clients, weights, stop.check, stop.check_waiting)
    parts = micro_batches(run.batch_size, grpo, rollout)

    flops = FlopCount()
    update = flops(make_update(policy, optimizer, grpo, advantage, parts))

    def step(state: TrainState, batch: dict[str, Any], number: int):
        key = key_for(run.seed, number, 0)
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
        return state, {k: v for k, v in total.stats.items() if np.isfinite(v)} | metrics | join_statistics(
            gather_json(image_sums(images))
        ) | seconds

    def grid_image(state: TrainState, number: int) -> np.ndarray:
        n = -(-2 // model.ways) * model.ways
        batch = next(iter(rendered_dataset(data, run.seed + 1_000_003, n, prefetch=0)))
        keys_P = image_keys(run.seed, n)
        ids_PS, lengths_P = rollouts.prompt_ids(batch["caption"])
        negative = pad_prompts([model.tokenizer.negative_prompt(*grid)] * n) if sampling.guided else None
        keys_PR = jax.vmap(lambda k: jax.random.split(k, 8))(keys_P)
        out = rollouts.sampler(rollouts.layout(state.params), ids_PS, lengths_P, keys_PR, negative, stop.check)
        images = rollouts.images(out["codes"], [p for p in batch["caption"] for _ in range(8)], jnp.repeat(keys_P, 8))
        return tile(whole(images), columns=8)

    prompts_here = here("config.batch_size", run.batch_size, mesh)

    def to_batch(examples: dict[str, Any]) -> dict[str, list[Any]]:
        return share({name: examples[name] for name in ("caption", "targets")}, prompts_here, run.batch_size)

    batches = DataIterator(rendered_dataset(data, run.seed, run.batch_size, rows=prompts_here), to_batch)

    def export(state: TrainState, directory, note):
        export_model(directory, {"transformer": (state.params, ar)}, run.init_from, note)

    return Stage(state, batches, step, export, grid_image, items_per_step=B, close=lambda: close_all(clients), flops=lambda: flops.total)


def micro_batches(prompts: int, grpo: GRPOConfig, rollout: RolloutConfig) -> int:
    """Gradient accumulation steps of an update."""
    minibatch = prompts * grpo.rollouts_per_prompt // grpo.updates_per_batch
    return max(1, minibatch // rollout.micro_batch) if rollout.micro_batch else 1


def make_painter(config: ConfigDict, model: XOmni) -> XOmni:
    """The model that decodes images: `model`, or one on `config.decoder_mesh`, whose devices the policy's mesh leaves out."""
    apart = math.prod(config.decoder_mesh.values())
    if not apart:
        return model
    _, devices = split_devices(jax.devices(), apart)
    mesh = make_mesh(dict(config.decoder_mesh), devices)
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
