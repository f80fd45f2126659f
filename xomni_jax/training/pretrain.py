"""Pre-training in the three published stages, and supervised fine-tuning, of the unified transformer (X-Omni section 3.2)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh

from xomni_jax.core.preemption import StopSignal
from xomni_jax.core.program import Program, Programs
from xomni_jax.data.preprocess import to_pixels
from xomni_jax.data.rendered import SIGNS
from xomni_jax.data.sources import DataSection, batches, first_batch
from xomni_jax.models import transformer, work
from xomni_jax.models.lora import LoRAConfig, join
from xomni_jax.models.section import ModelSection
from xomni_jax.pipeline import XOmni
from xomni_jax.sampling.keys import NOISE, image_keys
from xomni_jax.sampling.logits import SamplingConfig
from xomni_jax.sequence.tokenizer import MultimodalTokenizer
from xomni_jax.sharding import abstract
from xomni_jax.sharding.arrays import local_rows, share, spread, whole
from xomni_jax.training.accumulate import gradient
from xomni_jax.training.adapters import export_trained, frozen_base, learned_params
from xomni_jax.training.components import (
    DataIterator,
    check_codes,
    check_heads,
    check_split,
    check_trainable,
    model_configs,
    open_model,
)
from xomni_jax.training.guard import guarded
from xomni_jax.training.next_token import NextTokenConfig, PackedTargets, build_sequences, next_token_loss, pack_batch
from xomni_jax.training.operations import FlopCount
from xomni_jax.training.optimizer import Optimizer, OptimizerConfig
from xomni_jax.training.stage import GRID_SEED, Grid, RunConfig, RunningStage
from xomni_jax.training.state import TrainState, new_state

GRID_PROMPTS = 8
ANSWER_TOKENS = 32  # of an answer beside an image grid


@dataclasses.dataclass(frozen=True)
class PretrainRun(RunConfig):
    """Next-token pre-training.

    Attributes:
      transformer: the model that learns
      lora: adapters of the transformer, which are then all that learns
      next_token: mixture and shapes of the packed rows
      data: where images, captions and questions come from
    """

    stage: str = "pretrain"
    run_dir: str = "runs/pretrain"
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=2e-3)
    transformer: ModelSection = ModelSection(transformer.PRESETS, "tiny")
    lora: LoRAConfig = LoRAConfig()
    next_token: NextTokenConfig = NextTokenConfig()
    data: DataSection = SIGNS


@dataclasses.dataclass(frozen=True)
class SFTRun(PretrainRun):
    """Supervised fine-tuning on generation and understanding: the same step and data format as pre-training."""

    stage: str = "sft"
    run_dir: str = "runs/sft"
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=3e-4)


def make_update(net: nn.Module, optimizer: Optimizer, cfg: PretrainRun) -> Callable[..., Any]:
    """The jitted step (state, base of the adapters | None, packed batch) -> (state, metrics); the state is donated."""

    def update(state: TrainState, base, batch):
        def loss(params, rows):
            return next_token_loss(net, join(base, params, cfg.lora.scale), rows, batch, cfg.next_token)

        grads, metrics, _ = gradient(loss, state.params, batch, cfg.accumulate)
        state, optim = state.apply(optimizer, grads)
        return state, metrics | optim

    return jax.jit(update, donate_argnums=0)


def sample_grid(
    model: XOmni, ar: transformer.ARConfig, cfg: PretrainRun, whole_params: Callable[[Any], Any], state: TrainState, step: int
) -> Grid:
    """Images of the policy for the first examples of its own data, one row of samples above one of the real images.

    Where the data hold codes, the real images are those that the decoder makes of them. A run that learns to answer also answers the
    question about each real image.
    """
    examples = first_batch(cfg.data, cfg.seed + GRID_SEED, GRID_PROMPTS)
    prompts, real = examples["caption"], examples["codes"] if cfg.data.tokenizer else None
    model.set_params("transformer", whole_params(state.params), ar)
    grid = model.grid(*examples["image"].shape[1:3]) if real is None else real.shape[1:]
    noise = model.noise(image_keys(cfg.seed, len(prompts), NOISE), grid)
    codes = model.sample_codes(prompts, grid, image_keys(cfg.seed, len(prompts))[:, None], SamplingConfig())["codes"][:, 0]
    images = whole(model.decode_images(codes, prompts, noise))
    shown = examples["image"] if real is None else whole(model.decode_images(model.checked(real), prompts, noise))
    texts = {"caption": prompts}
    if cfg.next_token.understanding:
        real = whole(model.encode_pixels(to_pixels(shown))) if real is None else real
        texts |= {"question": examples["question"], "expected": examples["answer"]}
        texts["answer"] = model.answer(real, examples["question"], ANSWER_TOKENS)
    return Grid(np.concatenate([images, shown]), GRID_PROMPTS, texts)


def text_fields(cfg: NextTokenConfig) -> tuple[str, ...]:
    """What the mixture reads of every example, beside its image or codes."""
    return ("id", "caption", *(("question", "answer") if cfg.understanding else ()))


def packed_batch(
    cfg: PretrainRun, model: XOmni, text: MultimodalTokenizer, rows: Sequence[int] | None, examples: dict[str, Any]
) -> tuple[PackedTargets, dict[str, float]]:
    """Examples -> packed rows on the mesh, and counts of what found no room. Images become codes by the frozen tokenizer.

    Packing looks at the whole batch: codes and texts, which are small, go to every process, and each keeps its own packed rows. The random
    choices depend on the batch's own id.

    Args:
      rows: of the batch, those that this process has loaded; None if it has loaded all.
    """
    c, mesh = cfg.next_token, model.mesh
    stored = bool(cfg.data.tokenizer)
    images = examples["codes"] if stored else to_pixels(examples["image"])
    images = images if rows is None else spread(mesh, images, cfg.batch_size)
    codes = np.asarray(whole(jnp.asarray(images) if stored else model.encode_pixels(images)))
    texts = share({name: examples[name] for name in text_fields(c)}, rows, cfg.batch_size)
    rng = np.random.default_rng([cfg.seed, *map(ord, texts["id"][0])])
    packed, counts = pack_batch(build_sequences(texts, codes, text, c, rng), text, c)
    own = local_rows(mesh, c.rows)
    return spread(mesh, jax.tree.map(lambda x: x[own], packed), c.rows), counts


class PretrainStage:
    """Pre-training, registered as a stage."""

    Config: ClassVar[type] = PretrainRun
    components: ClassVar[tuple[str, ...]] = ("transformer",)

    @classmethod
    def programs(cls, cfg: PretrainRun, models: Mapping[str, Any], mesh: Mesh, decoder_mesh: Mesh | None = None) -> Programs:
        """The update on a packed batch."""
        ar, c = models["transformer"], cfg.next_token
        check_heads(ar.n_kv_heads, mesh)
        check_split("config.next_token.rows", c.rows, mesh, cfg.accumulate)
        optimizer, (init, base) = cfg.make_optimizer(), learned_params("transformer", ar, cfg.lora, cfg.seed, mesh)
        create, state = new_state(init, optimizer, mesh)
        language = not base and any(name.startswith("language/") for name in optimizer.trained(state.params))
        B, L, M = c.rows, c.row_length, max(1, int(c.row_length * c.target_share))
        ids, flags = lambda *shape: abstract.rows(mesh, shape, jnp.int32), lambda *shape: abstract.rows(mesh, shape, jnp.bool_)
        targets = (ids(B, M), ids(B, M), flags(B, M))
        update = Program(
            make_update(transformer.ARTransformer(ar), optimizer, cfg),
            (state, base, PackedTargets(ids(B, L), ids(B, L), ids(B, L), *targets, *targets)),
            f"{B} packed rows of {L} tokens, {M} targets of each kind a row",
            work.next_token(ar, B, L, M, language, c.chunk, mesh.shape),
            uses=("state", "base"),
            state=state,
        )
        return Programs(mesh, {f"{cfg.stage}-update": update}, {"state": state} | ({"base": base} if base else {}), create)

    @classmethod
    def make(cls, cfg: PretrainRun, mesh: Mesh, stop: StopSignal) -> RunningStage:
        """A run on the data of the configuration, starting from the transformer of `init_from` where that has one."""
        check_split("config.next_token.rows", cfg.next_token.rows, mesh, cfg.accumulate)  # before anything large is read
        # One process fills the batch of images up until it splits; several have their rows each.
        rows = None
        if jax.process_count() > 1:
            check_split("config.batch_size", cfg.batch_size, mesh)
            rows = local_rows(mesh, cfg.batch_size)
        model = open_model(cfg.init_from, ("siglip_vq",), mesh, cfg.stage)
        check_codes(cfg.data, model)
        models, lora = model_configs(cfg, ("transformer",), model), cfg.lora
        ar = models["transformer"]
        check_trainable(models, ("transformer",) if not lora.rank else ())
        sizes = dict(vocab_size=ar.vocab_size, image_vocab_size=ar.image_vocab_size, mm_vocab_size=ar.mm_vocab_size)
        text = MultimodalTokenizer.load(model.path / "tokenizer", **sizes)
        made = cls.programs(cfg, models, mesh)
        base = frozen_base(model, models, "transformer", lora) if lora.rank else None
        state = made.create()
        if not lora.rank and "transformer" in model.description["components"]:
            state = state.starting_from(model.params("transformer"))
            model.release("transformer")
        flops, whole_params = FlopCount(), functools.partial(join, base, scale=lora.scale)
        update, state = guarded(made[f"{cfg.stage}-update"].fn, state, cfg.guard)
        update = flops(update)

        def step(state: TrainState, batch: tuple[PackedTargets, dict[str, float]], number: int):
            packed, counts = batch
            state, metrics = update(state, base, packed)
            return state, metrics | counts

        kind = "codes" if cfg.data.tokenizer else "image"
        draws = "mmdit" in model.description["components"]
        return RunningStage(
            state,
            DataIterator(
                batches(cfg.data, cfg.seed, cfg.batch_size, rows=rows, fields=(kind, *text_fields(cfg.next_token))),
                functools.partial(packed_batch, cfg, model, text, rows),
            ),
            step,
            lambda state, directory, note: export_trained(directory, {"transformer": (state.params, ar)}, lora, model, note),
            functools.partial(sample_grid, model, ar, cfg, whole_params) if draws else None,
            items_per_step=cfg.batch_size,
            flops=lambda: flops.total,
        )


class SFTStage(PretrainStage):
    """Supervised fine-tuning, registered as a stage."""

    Config: ClassVar[type] = SFTRun
