"""Stage (a): the SigLIP-VQ tokenizer, trained through visual understanding (X-Omni section 3.1)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from xomni_jax.core.config import ConfigError, RunConfig, build
from xomni_jax.core.preemption import StopSignal
from xomni_jax.data.preprocess import ImageLimits
from xomni_jax.data.rendered import N_COLUMN_CLASSES, RenderedConfig
from xomni_jax.data.sources import rendered_dataset
from xomni_jax.models import siglip_vq
from xomni_jax.models.quantizer import dead_codes, restart_dead_codes, start_codebook
from xomni_jax.sequence.tokenizer import MultimodalTokenizer
from xomni_jax.sharding.arrays import spread
from xomni_jax.sharding.rules import unconstrained
from xomni_jax.training import understanding
from xomni_jax.training.components import DataIterator, export_model, from_preset, here
from xomni_jax.training.loop import Stage, key_for
from xomni_jax.training.operations import FlopCount
from xomni_jax.training.optimizer import Optimizer, OptimizerConfig, make_optimizer
from xomni_jax.training.state import TrainState, init_state

CODEBOOK_SEED = 2_000_003  # added to the seed of the examples the codebook starts from
SECTIONS = ("optimizer", "siglip_vq", "reader", "tokenizer", "preprocess", "data")


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """Schedule of the codebook.

    Attributes:
      warmup_steps: steps on continuous features, before there is a codebook.
      ramp_steps: steps over which quantisation grows to its full share after that.
      start_batches: batches of other examples, whose encoder outputs the codebook is started from.
      restart_every: steps between restarts of dead codes; 0 is never. restart_until: the last share of training that restarts codes.
      usage_decay: of the running average of code usage.
      text_length: tokens of question and answer.
      answer_weight, dense_weight, quantizer_weight: of the terms of the loss.
    """

    warmup_steps: int = 200
    ramp_steps: int = 100
    start_batches: int = 8
    restart_every: int = 25
    restart_until: float = 0.7
    usage_decay: float = 0.98
    text_length: int = 48
    answer_weight: float = 1.0
    dense_weight: float = 1.0
    quantizer_weight: float = 1.0

    def __post_init__(self):
        for name in ("warmup_steps", "ramp_steps", "restart_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        for name in ("start_batches", "text_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")


def answer_batch(examples: dict[str, Any], tokenizer: MultimodalTokenizer, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Question, newline, answer, end of turn as ids [B, L] with a mask [B, L] on the answer; cut at `length`."""
    n = len(examples["question"])
    ids_BL, mask_BL = np.full((n, length), tokenizer.pad, np.int32), np.zeros((n, length), bool)
    for i, (question, answer) in enumerate(zip(examples["question"], examples["answer"], strict=True)):
        asked = tokenizer.encode_text(question + "\n")
        ids = np.concatenate([asked, tokenizer.encode_text(answer), [tokenizer.end_of_turn]])[:length]
        ids_BL[i, : len(ids)], mask_BL[i, len(asked) : len(ids)] = ids, True
    return ids_BL, mask_BL


def make_update(learner: understanding.TokenizerLearner, optimizer: Optimizer, cfg: TokenizerConfig) -> Callable[..., Any]:
    """The jitted step (state, batch, key, strength of quantisation) -> (state, metrics, encoder outputs); the state is donated."""
    weights = understanding.Weights(cfg.answer_weight, cfg.dense_weight, cfg.quantizer_weight)

    def update(state: TrainState, batch, key, strength):
        grad = jax.value_and_grad(understanding.tokenizer_loss, has_aux=True)
        (_, aux), grads = grad(state.params, batch, key, learner=learner, strength=strength, weights=weights)
        state, optim = state.apply(optimizer, grads)
        usage = cfg.usage_decay * state.extra["usage"] + (1 - cfg.usage_decay) * aux.usage
        return state.replace(extra={"usage": usage}), aux.metrics | optim, aux.z

    return jax.jit(update, donate_argnums=0)


def init_params(learner: understanding.TokenizerLearner, seed: int, size: tuple[int, int]) -> Any:
    """Boxed parameters of the tokenizer and its readers, for images of `size` pixels."""
    with unconstrained():
        return learner.init(jax.random.key(seed), jnp.zeros((1, *size, 3)), jnp.zeros((1, 4), jnp.int32))["params"]


def even_usage(vq: siglip_vq.SigLIPVQConfig) -> dict[str, jax.Array]:
    """The running usage of codes before anything is known."""
    return {"usage": jnp.full((vq.codebook_size,), 1.0 / vq.codebook_size)}


def make(config: ConfigDict, run: RunConfig, mesh: jax.sharding.Mesh, stop: StopSignal) -> Stage:
    """The tokenizer stage of a configuration."""
    if run.init_from:
        raise ConfigError(f"config.init_from={run.init_from}: the tokenizer is the first stage and starts from nothing; leave it empty")
    rows = here("config.batch_size", run.batch_size, mesh)
    cfg, data = build(TokenizerConfig, config.tokenizer, "config.tokenizer"), build(RenderedConfig, config.data, "config.data")
    vq = from_preset(config.siglip_vq, siglip_vq.PRESETS, "config.siglip_vq")
    read = dataclasses.replace(from_preset(config.reader, understanding.PRESETS, "config.reader"), dense_classes=N_COLUMN_CLASSES)
    limits = build(ImageLimits, dict(config.preprocess) | {"patch_size": vq.patch}, "config.preprocess")
    learner = understanding.TokenizerLearner(vq, read)
    text = MultimodalTokenizer.load()

    optimizer = make_optimizer(build(OptimizerConfig, config.optimizer, "config.optimizer"), run.steps)
    # The running usage of codes lives beside the parameters' state, so that a resumed run restarts the same codes.
    state = init_state(lambda: init_params(learner, run.seed, data.sizes[0]), optimizer, mesh, lambda: even_usage(vq))

    @jax.jit
    def encode(params, pixels):
        return learner.apply({"params": params}, pixels, method=lambda m, x: m.tokenizer.outputs(x))

    flops = FlopCount()
    update = flops(make_update(learner, optimizer, cfg))

    @jax.jit
    def restart(key, codebook, usage, z):
        codebook, n = restart_dead_codes(key, codebook, usage, z.reshape(-1, z.shape[-1]))
        return codebook, jnp.where(dead_codes(usage), 1.0 / usage.shape[0], usage), n

    def first_codebook(params, number: int) -> jax.Array:
        # Batches of their own, not those that just passed: a run that was resumed here has not seen them.
        seed, n = run.seed + CODEBOOK_SEED, cfg.start_batches
        batches = rendered_dataset(data, seed, run.batch_size, rows=rows, batches=n, transform=to_batch, prefetch=0)
        z = jnp.concatenate([encode(params, to_mesh(batch)["pixels"]).reshape(-1, vq.code_width) for batch in batches])
        return jax.jit(start_codebook, static_argnums=2)(key_for(run.seed, number, 1), z, vq.codebook_size)

    def step(state: TrainState, batch, number: int):
        strength = np.clip((number - cfg.warmup_steps) / max(cfg.ramp_steps, 1), 0.0, 1.0)
        if number == cfg.warmup_steps:
            state = with_codebook(state, first_codebook(state.params, number))
        state, metrics, z = update(state, batch, key_for(run.seed, number, 0), np.float32(strength))
        due = cfg.restart_every and number > cfg.warmup_steps and number % cfg.restart_every == 0
        if due and number < cfg.restart_until * run.steps:
            codebook, usage, moved = restart(key_for(run.seed, number, 2), state.params["tokenizer"]["codebook"], state.extra["usage"], z)
            state = with_codebook(state, codebook).replace(extra={"usage": usage})
            metrics = metrics | {"codes/restarted": moved}
        return state, metrics

    def with_codebook(state: TrainState, codebook: jax.Array) -> TrainState:
        old = state.params["tokenizer"]["codebook"]
        tokenizer = state.params["tokenizer"] | {"codebook": jax.device_put(codebook.astype(old.dtype), old.sharding)}
        return state.replace(params=state.params | {"tokenizer": tokenizer})

    def to_batch(examples):
        ids_BL, mask_BL = answer_batch(examples, text, cfg.text_length)
        return {
            "pixels": examples["image"].astype(np.float32) / 127.5 - 1.0,
            "columns": examples["columns"],
            "ids": ids_BL,
            "loss_mask": mask_BL,
        }

    def to_mesh(batch):
        return spread(mesh, batch, run.batch_size)

    batches = DataIterator(rendered_dataset(data, run.seed, run.batch_size, rows=rows, transform=to_batch), to_mesh)

    def export(state: TrainState, directory, note):
        export_model(directory, {"siglip_vq": (state.params["tokenizer"], vq)}, run.init_from, note, {"preprocess": limits})

    return Stage(state, batches, step, export, items_per_step=run.batch_size, flops=lambda: flops.total)
