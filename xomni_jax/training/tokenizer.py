"""The SigLIP-VQ tokenizer, trained through visual understanding (X-Omni section 3.1)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from einops import reduce
from jax.sharding import Mesh

from xomni_jax.core.config import ConfigError, Count, NonNegative, Overrides
from xomni_jax.core.preemption import StopSignal
from xomni_jax.core.program import Program, Programs, Work
from xomni_jax.data.preprocess import ImageLimits, to_pixels, trained_limits
from xomni_jax.data.rendered import N_COLUMN_CLASSES, SIGNS
from xomni_jax.data.sources import DataSection, batches
from xomni_jax.models import siglip_vq
from xomni_jax.models.section import ModelSection
from xomni_jax.models.work import dense
from xomni_jax.sequence.tokenizer import MultimodalTokenizer
from xomni_jax.sharding import abstract
from xomni_jax.sharding.arrays import local_rows, spread
from xomni_jax.sharding.rules import unconstrained
from xomni_jax.training import understanding
from xomni_jax.training.accumulate import gradient
from xomni_jax.training.codebook import CODEBOOK_SEED, CodebookConfig, codebook_of, even_usage, skipped_images, train_step, with_usage
from xomni_jax.training.components import DataIterator, check_heads, check_split, export_model
from xomni_jax.training.guard import guarded
from xomni_jax.training.operations import FlopCount
from xomni_jax.training.optimizer import Optimizer, OptimizerConfig
from xomni_jax.training.stage import RunConfig, RunningStage
from xomni_jax.training.state import TrainState, new_state


@dataclasses.dataclass(frozen=True)
class TokenizerConfig(CodebookConfig):
    """Schedule of the codebook and weights of the loss.

    Attributes:
      text_length: tokens of question and answer
      answer_weight: weight of the loss of the answers
      dense_weight: weight of the loss of the label of every token; of images without labels, its colour
      quantizer_weight: weight of the quantiser's own losses
    """

    text_length: Count = 48
    answer_weight: NonNegative = 1.0
    dense_weight: NonNegative = 1.0
    quantizer_weight: NonNegative = 1.0


@dataclasses.dataclass(frozen=True)
class TokenizerRun(RunConfig):
    """Training of the tokenizer.

    Attributes:
      siglip_vq: the tokenizer that learns
      reader: the language model that reads its quantised features
      tokenizer: schedule of the codebook and weights of the loss
      preprocess: limits of input images, stored in the model; what is not set follows from the patch and from data.sizes
      data: where images, questions and answers come from
    """

    stage: str = "tokenizer"
    run_dir: str = "runs/tokenizer"
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=2e-3)
    siglip_vq: ModelSection = ModelSection(siglip_vq.PRESETS, "tiny")
    reader: ModelSection = ModelSection(understanding.PRESETS, "tiny")
    tokenizer: TokenizerConfig = TokenizerConfig()
    preprocess: Overrides = Overrides(ImageLimits)
    data: DataSection = SIGNS


def learning_batch(text: MultimodalTokenizer, length: int, patch: int, examples: dict[str, Any]) -> dict[str, np.ndarray]:
    """The batch of `understanding.tokenizer_loss`: question, newline, answer, end of turn as ids, cut at `length`, the answer masked in.

    Where the data have no labels for the dense task, the label of a token is the mean colour of its patch, see `colour_labels`.
    """
    n = len(examples["question"])
    ids_BL, mask_BL = np.full((n, length), text.pad, np.int32), np.zeros((n, length), bool)
    for i, (question, answer) in enumerate(zip(examples["question"], examples["answer"], strict=True)):
        asked = text.encode_text(question + "\n")
        ids = np.concatenate([asked, text.encode_text(answer), [text.end_of_turn]])[:length]
        ids_BL[i, : len(ids)], mask_BL[i, len(asked) : len(ids)] = ids, True
    pixels = to_pixels(examples["image"])
    columns = examples["columns"] if "columns" in examples else colour_labels(pixels, patch)
    return {"pixels": pixels, "columns": columns, "ids": ids_BL, "loss_mask": mask_BL}


def colour_labels(pixels_BHWC: np.ndarray, patch: int) -> np.ndarray:
    """Images in [-1, 1] -> the mean colour of every patch as one of 5 x 5 x 5, counted from 1: int32 [B, Y, X]."""
    mean_BYXC = reduce(pixels_BHWC, "b (y p) (x q) c -> b y x c", "mean", p=patch, q=patch)
    levels_BYXC = np.clip(np.floor((mean_BYXC + 1) * 2.5), 0, 4).astype(np.int32)
    return levels_BYXC @ np.array([25, 5, 1], np.int32) + 1


def make_update(
    learner: understanding.TokenizerLearner, optimizer: Optimizer, cfg: TokenizerConfig, accumulate: int = 1
) -> Callable[..., Any]:
    """The jitted step (state, batch, key, strength of quantisation) -> (state, metrics, encoder outputs); the state is donated."""
    weights = understanding.Weights(cfg.answer_weight, cfg.dense_weight, cfg.quantizer_weight)

    def update(state: TrainState, batch, key, strength):
        skip_B = skipped_images(key, len(batch["ids"]), learner.vq.skip_probability, strength)
        rows = batch | {"skip": skip_B}
        loss = functools.partial(understanding.tokenizer_loss, whole=rows, learner=learner, strength=strength, weights=weights)
        grads, aux, _ = gradient(loss, state.params, rows, accumulate, understanding.join_aux)
        state, optim = state.apply(optimizer, grads)
        return with_usage(state, aux.usage, cfg.usage_decay), aux.metrics | optim, aux.z

    return jax.jit(update, donate_argnums=0)


def init_params(learner: understanding.TokenizerLearner, seed: int, size: tuple[int, int]) -> Any:
    """Boxed parameters of the tokenizer and its readers, for images of `size` pixels."""
    with unconstrained():
        return learner.init(jax.random.key(seed), jnp.zeros((1, *size, 3)), jnp.zeros((1, 4), jnp.int32))["params"]


def make_learner(models: Mapping[str, Any]) -> understanding.TokenizerLearner:
    """The tokenizer with the reader that teaches it; the reader's dense task has the labels of the data."""
    return understanding.TokenizerLearner(models["siglip_vq"], dataclasses.replace(models["reader"], dense_classes=N_COLUMN_CLASSES))


class TokenizerStage:
    """Training of the tokenizer, registered as a stage."""

    Config: ClassVar[type] = TokenizerRun
    components: ClassVar[tuple[str, ...]] = ("siglip_vq", "reader")

    @classmethod
    def programs(cls, cfg: TokenizerRun, models: Mapping[str, Any], mesh: Mesh, decoder_mesh: Mesh | None = None) -> Programs:
        """The update on a batch of images of the data's main size."""
        check_split("config.batch_size", cfg.batch_size, mesh, cfg.accumulate)
        vq, reader, c = models["siglip_vq"], models["reader"], cfg.tokenizer
        check_heads(reader.n_kv_heads, mesh)
        learner = make_learner(models)
        optimizer = cfg.make_optimizer()
        (height, width), B, L = cfg.data.sizes[0], cfg.batch_size, c.text_length
        # The running usage of codes lives beside the parameters' state, so that a resumed run restarts the same codes.
        init = lambda: init_params(learner, cfg.seed, (height, width))
        create, state = new_state(init, optimizer, mesh, cfg.guard, lambda: even_usage(vq.codebook_size))
        grid = height // vq.patch, width // vq.patch
        batch = {
            "pixels": abstract.rows(mesh, (B, height, width, 3), jnp.float32),
            "columns": abstract.rows(mesh, (B, *grid), jnp.int32),
            "ids": abstract.rows(mesh, (B, L), jnp.int32),
            "loss_mask": abstract.rows(mesh, (B, L), jnp.bool_),
        }
        T = grid[0] * grid[1]
        each = {"tokenizer/": T, "reader/head": L, "reader/layers": T + L, "reader/projector": T, "dense/": T}
        searched = 2.0 * T * vq.code_width * vq.codebook_size * (3 + 3)  # distances and assigned rows, forward and backward
        update = Program(
            guarded(make_update(learner, optimizer, c, cfg.accumulate), cfg.guard),
            (state, batch, abstract.keys(mesh, ()), abstract.array(mesh, (), jnp.float32)),
            f"{B} images of {height}x{width} with {L} tokens of text",
            Work(learned=3 * dense(state.params, each) * B + searched * B, tokens=B * (T + L), images=B),
            uses=("state",),
            state=state,
        )
        return Programs(mesh, {"tokenizer-update": update}, {"state": state}, create)

    @classmethod
    def make(cls, cfg: TokenizerRun, mesh: Mesh, stop: StopSignal) -> RunningStage:
        """A run from random parameters on the data of the configuration."""
        if cfg.init_from:
            raise ConfigError(f"config.init_from={cfg.init_from}: the tokenizer is the first stage and starts from nothing; leave it empty")
        models = {name: getattr(cfg, name).config(where=f"config.{name}") for name in ("siglip_vq", "reader")}
        vq, c = models["siglip_vq"], cfg.tokenizer
        limits = cfg.preprocess.over(trained_limits(cfg.data.sizes, vq.patch), "config.preprocess")
        if limits.patch_size != vq.patch:
            raise ConfigError(
                f"config.preprocess.patch_size={limits.patch_size}: the tokenizer's patch has {vq.patch} pixels; leave it out"
            )
        learner = make_learner(models)
        made = cls.programs(cfg, models, mesh)
        load = functools.partial(
            batches, cfg.data, batch_size=cfg.batch_size, rows=local_rows(mesh, cfg.batch_size),
            transform=functools.partial(learning_batch, MultimodalTokenizer.load(), c.text_length, vq.patch),
            fields=("image", "question", "answer"),
        )  # fmt: skip

        def to_mesh(batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
            return spread(mesh, {name: x for name, x in batch.items() if name != "id"}, cfg.batch_size)

        @jax.jit
        def encode(params, pixels):
            return learner.apply({"params": params}, pixels, method=lambda m, x: m.tokenizer.outputs(x))

        def first_codebook(params: Any, key: jax.Array) -> jax.Array:
            # Batches of their own, not those that just passed: a run that was resumed here has not seen them.
            examples = load(seed=cfg.seed + CODEBOOK_SEED, count=c.start_batches, prefetch=0)
            return codebook_of((encode(params, to_mesh(batch)["pixels"]) for batch in examples), key, vq.codebook_size)

        def export(state: TrainState, directory: Path, note: dict[str, Any]) -> None:
            export_model(directory, {"siglip_vq": (state.params["tokenizer"], vq)}, "", note, {"preprocess": limits})

        flops = FlopCount()
        return RunningStage(
            made.create(),
            DataIterator(load(seed=cfg.seed), to_mesh),
            functools.partial(train_step, cfg, flops(made["tokenizer-update"].fn), first_codebook),
            export,
            items_per_step=cfg.batch_size,
            flops=lambda: flops.total,
        )
