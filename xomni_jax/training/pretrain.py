"""Stages (b) and (c): pre-training in the three published stages, and supervised fine-tuning, of the unified transformer."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from ml_collections import ConfigDict

from xomni_jax.core.config import ConfigError, RunConfig, build
from xomni_jax.core.preemption import StopSignal
from xomni_jax.data.rendered import RenderedConfig
from xomni_jax.data.sources import rendered_dataset
from xomni_jax.models import transformer
from xomni_jax.models.registry import init_params
from xomni_jax.sampling.logits import SamplingConfig
from xomni_jax.sequence.tokenizer import MultimodalTokenizer
from xomni_jax.sharding.arrays import share, spread, whole
from xomni_jax.training.components import DataIterator, check_heads, export_model, here, open_model, stored_or_preset
from xomni_jax.training.loop import Stage, tile
from xomni_jax.training.next_token import NextTokenConfig, build_sequences, next_token_loss, pack_batch
from xomni_jax.training.operations import FlopCount
from xomni_jax.training.optimizer import Optimizer, OptimizerConfig, make_optimizer
from xomni_jax.training.stages import FREEZE
from xomni_jax.training.state import TrainState, init_state

GRID_PROMPTS = 8
SECTIONS = ("optimizer", "transformer", "next_token", "data")


def make_update(net: nn.Module, optimizer: Optimizer, cfg: NextTokenConfig) -> Callable[..., Any]:
    """The jitted step (state, packed batch) -> (state, metrics); the state is donated."""

    def update(state: TrainState, batch):
        (_, metrics), grads = jax.value_and_grad(lambda p: next_token_loss(net, p, batch, cfg), has_aux=True)(state.params)
        state, optim = state.apply(optimizer, grads)
        return state, metrics | optim

    return jax.jit(update, donate_argnums=0)


def make(config: ConfigDict, run: RunConfig, mesh: jax.sharding.Mesh, stop: StopSignal) -> Stage:
    """A next-token stage: `config.next_token.phase` names the row of the freeze table."""
    section = dict(config.next_token)
    phase = section.pop("phase", None)
    if phase not in FREEZE:
        raise ConfigError(f"config.next_token.phase={phase!r} is unknown; use one of {', '.join(FREEZE)}")
    cfg, data = build(NextTokenConfig, section, "config.next_token"), build(RenderedConfig, config.data, "config.data")
    packed_rows = here("config.next_token.rows", cfg.rows, mesh)
    # One process fills the batch of images up until it splits; several have their rows each.
    rows = here("config.batch_size", run.batch_size, mesh) if jax.process_count() > 1 else None
    model = open_model(run.init_from, ("siglip_vq",), mesh, run.stage)
    old = "transformer" in model.description["components"]
    ar = stored_or_preset(model, "transformer", config.transformer, transformer.PRESETS, "config.transformer")
    check_heads(ar.n_kv_heads, mesh)
    sizes = dict(vocab_size=ar.vocab_size, image_vocab_size=ar.image_vocab_size, mm_vocab_size=ar.mm_vocab_size)
    text = MultimodalTokenizer.load(model.path / "tokenizer", **sizes)
    net = transformer.ARTransformer(ar)

    optimizer = make_optimizer(build(OptimizerConfig, config.optimizer, "config.optimizer"), run.steps, train=FREEZE[phase])
    state = init_state(lambda: init_params("transformer", ar, jax.random.key(run.seed)), optimizer, mesh)
    if old:
        state = state.starting_from(model.params("transformer"))
        model.release("transformer")

    flops = FlopCount()
    update = flops(make_update(net, optimizer, cfg))

    def to_batch(examples: dict[str, Any]):
        """Codes by the frozen tokenizer, then packed rows; the mixture's draws depend on the batch's own id.

        Packing looks at the whole batch: codes and texts, which are small, go to every process, and each keeps its own packed rows.
        """
        pixels = examples["image"].astype(np.float32) / 127.5 - 1.0
        codes = whole(model.encode_pixels(pixels if rows is None else spread(mesh, pixels, run.batch_size)))
        texts = share({name: examples[name] for name in ("id", "caption", "question", "answer")}, rows, run.batch_size)
        rng = np.random.default_rng([run.seed, *map(ord, texts["id"][0])])
        packed, counts = pack_batch(build_sequences(texts, codes, text, cfg, rng), text, cfg)
        return spread(mesh, jax.tree.map(lambda x: x[packed_rows], packed), cfg.rows), counts

    batches = DataIterator(rendered_dataset(data, run.seed, run.batch_size, rows=rows), to_batch)

    def step(state: TrainState, batch, number: int):
        packed, counts = batch
        state, metrics = update(state, packed)
        return state, metrics | counts

    def export(state: TrainState, directory, note):
        export_model(directory, {"transformer": (state.params, ar)}, run.init_from, note)

    grid = None
    if "mmdit" in model.description["components"]:
        grid = functools.partial(sample_grid, model, ar, data)
    return Stage(state, batches, step, export, grid, items_per_step=run.batch_size, flops=lambda: flops.total)


def sample_grid(model: Any, ar: transformer.ARConfig, data: RenderedConfig, state: TrainState, step: int, seed: int = 0) -> np.ndarray:
    """Images of the policy for the first examples of its own data, one row of samples above one of the real images."""
    from xomni_jax.data.rendered import render_example
    from xomni_jax.sampling.keys import NOISE, image_keys

    size = data.sizes[0]
    examples = [render_example(seed + 1_000_003, i, data, size) for i in range(GRID_PROMPTS)]
    prompts = [e["caption"] for e in examples]
    model.set_params("transformer", state.params, ar)
    grid = model.grid(*size)
    codes = model.sample_codes(prompts, grid, image_keys(seed, len(prompts))[:, None], SamplingConfig())["codes"][:, 0]
    images = whole(model.decode_images(codes, prompts, model.noise(image_keys(seed, len(prompts), NOISE), grid)))
    return tile(np.concatenate([images, np.stack([e["image"] for e in examples])]), columns=GRID_PROMPTS)
