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
from xomni_jax.data.sources import DataSection, batches, fields_of, first_batch
from xomni_jax.models import transformer, work
from xomni_jax.models.lora import LoRAConfig, join
from xomni_jax.models.section import ModelSection
from xomni_jax.pipeline import XOmni
from xomni_jax.sampling.keys import NOISE, image_keys
from xomni_jax.sampling.logits import SamplingConfig
from xomni_jax.sequence.tokenizer import MultimodalTokenizer
from xomni_jax.sharding import abstract
from xomni_jax.sharding.arrays import local_rows, rows_of, share, spread, whole
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
    tokenizer_of,
)
from xomni_jax.training.guard import guarded
from xomni_jax.training.next_token import NextTokenConfig, PackedTargets, build_sequences, next_token_loss, pack_batch
from xomni_jax.training.operations import FlopCount
from xomni_jax.training.optimizer import Optimizer, OptimizerConfig
from xomni_jax.training.stage import GRID_SEED, Grid, RunConfig, RunningStage
from xomni_jax.training.state import TrainState, new_state
from xomni_jax.training.validation import Validation, ValidationConfig

GRID_PROMPTS = 8
ANSWER_TOKENS = 32  # of an answer beside an image grid
# What sequences are made of, beside images; `source` and `epoch` are there in a mixture.
TEXT_FIELDS = ("id", "caption", "question", "answer", "turns", "system", "source", "epoch")


@dataclasses.dataclass(frozen=True)
class PretrainRun(RunConfig):
    """Next-token pre-training.

    Attributes:
      transformer: the model that learns
      lora: adapters of the transformer, which are then all that learns
      next_token: mixture and shapes of the packed rows
      data: where images, captions and questions come from
      validation: the loss on examples that no step trains on
    """

    stage: str = "pretrain"
    run_dir: str = "runs/pretrain"
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=2e-3)
    transformer: ModelSection = ModelSection(transformer.PRESETS, "tiny")
    lora: LoRAConfig = LoRAConfig()
    next_token: NextTokenConfig = NextTokenConfig()
    data: DataSection = SIGNS
    validation: ValidationConfig = ValidationConfig()


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
            return next_token_loss(net, join(base, params, cfg.lora.scale), rows, batch, cfg.next_token, cfg.data.names)

        grads, metrics, _ = gradient(loss, state.params, batch, cfg.accumulate)
        state, optim = state.apply(optimizer, grads)
        return state, metrics | optim

    return jax.jit(update, donate_argnums=0)


def make_validation(net: nn.Module, cfg: PretrainRun) -> Callable[..., Any]:
    """The jitted (parameters, base of the adapters | None, packed batch) -> metrics of the loss."""

    def metrics(params, base, batch):
        return next_token_loss(net, join(base, params, cfg.lora.scale), batch, batch, cfg.next_token)[1]

    return jax.jit(metrics)


def grid_data(data: DataSection, seed: int) -> DataSection | None:
    """The data for whose captions images are drawn: of a mixture the first part whose examples all have a caption and an image."""
    held = ((part, fields_of(part.open(seed, GRID_PROMPTS), "fields")) for part in data.parts)
    return next((part for part, fields in held if "caption" in fields and {"image", "codes"} & fields), None)


def sample_grid(
    model: XOmni,
    ar: transformer.ARConfig,
    data: DataSection,
    cfg: PretrainRun,
    whole_params: Callable[[Any], Any],
    state: TrainState,
    step: int,
) -> Grid:
    """Images of the policy for the first examples of its own data, one row of samples above one of the real images.

    Where the data hold codes, the real images are those that the decoder makes of them. A run that learns to answer also answers the
    question about each real image.
    """
    examples = first_batch(data, cfg.seed + GRID_SEED, GRID_PROMPTS)
    prompts, real = examples["caption"], examples["codes"] if data.tokenizer else None
    model.set_params("transformer", whole_params(state.params), ar)
    grid = model.grid(*examples["image"].shape[1:3]) if real is None else real.shape[1:]
    noise = model.noise(image_keys(cfg.seed, len(prompts), NOISE), grid)
    codes = model.sample_codes(prompts, grid, image_keys(cfg.seed, len(prompts))[:, None], SamplingConfig())["codes"][:, 0]
    images = whole(model.decode_images(codes, prompts, noise))
    shown = examples["image"] if real is None else whole(model.decode_images(model.checked(real), prompts, noise))
    texts = {"caption": prompts}
    if cfg.next_token.understanding and all(examples.get("question", [None])):
        real = whole(model.encode_pixels(to_pixels(shown))) if real is None else real
        texts |= {"question": examples["question"], "expected": examples["answer"]}
        texts["answer"] = model.answer(real, examples["question"], ANSWER_TOKENS)
    return Grid(np.concatenate([images, shown]), GRID_PROMPTS, texts)


def needed_fields(cfg: NextTokenConfig) -> tuple[str, ...]:
    """What the data must offer, beside images or codes."""
    return ("id", "caption|turns", *(("question", "answer") if cfg.understanding else ()))


def abstract_rows(cfg: NextTokenConfig, names: Sequence[str], mesh: Mesh) -> PackedTargets:
    """Shapes of packed rows on the mesh; `names` of a mixture's sources."""
    B, L, M = cfg.rows, cfg.row_length, max(1, int(cfg.row_length * cfg.target_share))
    ids, flags = lambda *shape: abstract.rows(mesh, shape, jnp.int32), lambda *shape: abstract.rows(mesh, shape, jnp.bool_)
    targets, sources = (ids(B, M), ids(B, M), flags(B, M)), [ids(B, M)] * 2 if names else []
    return PackedTargets(ids(B, L), ids(B, L), ids(B, L), *targets, *targets, *sources)


def packed_batch(
    cfg: PretrainRun,
    model: XOmni,
    text: MultimodalTokenizer,
    rows: Sequence[int] | None,
    examples: dict[str, Any],
    order: str = "raster",
) -> tuple[PackedTargets, dict[str, float]]:
    """Examples -> packed rows on the mesh, and counts of what found no room. Images become codes by the frozen tokenizer.

    Packing looks at the whole batch: codes and texts, which are small, go to every process, and each keeps its own packed rows. The random
    choices depend on the batch's own id.

    Args:
      rows: of the batch, those that this process has loaded; None if it has loaded all.
      order: see `build_sequences`.
    """
    c, mesh, sources = cfg.next_token, model.mesh, cfg.data.names
    codes = encode_images(model, [images_of(examples, i) for i in range(len(examples["id"]))], rows, cfg.batch_size)
    lacking = [None] * len(examples["id"])  # what no example of this process has, those of another may have
    texts = share({name: examples.get(name, lacking) for name in TEXT_FIELDS}, rows, cfg.batch_size)
    rng = np.random.default_rng([cfg.seed, *map(ord, texts["id"][0])])
    source_of = [sources.index(name) for name in texts["source"]] if sources else []
    packed, counts = pack_batch(build_sequences(texts, codes, text, c, rng, order), text, c, sources, source_of)
    counts |= {f"data/epoch/{name}": epoch for name, epoch in zip(texts["source"], texts["epoch"], strict=True) if epoch is not None}
    own = local_rows(mesh, c.rows)
    return spread(mesh, jax.tree.map(lambda x: x[own], packed), c.rows), counts


def images_of(examples: dict[str, Any], i: int) -> list[np.ndarray]:
    """The images (uint8 [H, W, 3], or codes [Y, X]) that an example's sequence shows: all of a conversation, otherwise the main one."""
    names = ("images", "image", "codes", "turns")
    every, image, codes, turns = (examples[name][i] if name in examples else None for name in names)
    return every if turns and every else [x for x in (image, codes) if x is not None][:1]


def encode_images(
    model: XOmni, images: Sequence[Sequence[np.ndarray]], rows: Sequence[int] | None, batch_size: int
) -> list[list[np.ndarray]]:
    """The codes [Y, X] of every image of a batch, on every process; what is codes already only travels.

    Images of one size are encoded in batches of one shape, filled up with black: `batch_size`, halved while that suffices.

    Args:
      images: of the examples that this process has loaded, those in `rows` of the batch; None if it has loaded all.
    """
    mesh, loaded = model.mesh, range(batch_size) if rows is None else rows
    shapes = share({"shapes": [[image.shape for image in own] for own in images]}, loaded, batch_size)["shapes"]
    codes: list[list[Any]] = [[None] * len(own) for own in shapes]
    for size in dict.fromkeys(tuple(shape) for own in shapes for shape in own):
        # Of every process the places of its images of this size; all know them, so that all make the same calls.
        held = {
            process: [(row, n) for row in own for n, shape in enumerate(shapes[row]) if tuple(shape) == size]
            for process, own in rows_of(mesh, batch_size).items()
        }
        most, call = max(map(len, held.values())), batch_size
        while call % (2 * model.num_data_shards) == 0 and call // 2 >= most * len(held):
            call //= 2
        own, slots = [image for example in images for image in example if image.shape == size], rows_of(mesh, call)
        room = len(slots[jax.process_index()])
        for start in range(0, most, room):
            batch = np.zeros((room, *size), np.uint8 if len(size) == 3 else np.int32)
            for n, image in enumerate(own[start : start + room]):  # none, where only other processes have images of this size
                batch[n] = image
            batch = to_pixels(batch) if len(size) == 3 else batch
            batch = batch if rows is None else spread(mesh, batch, call)
            found = whole(model.encode_pixels(batch) if len(size) == 3 else jnp.asarray(batch))
            for process, places in held.items():
                for (row, n), slot in zip(places[start : start + room], slots[process], strict=False):
                    codes[row][n] = found[slot]
    return codes


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
        create, state = new_state(init, optimizer, mesh, cfg.guard)
        language = not base and any(name.startswith("language/") for name in optimizer.trained(state.params))
        packed = abstract_rows(c, cfg.data.names, mesh)
        (B, L), M = packed.ids_BL.shape, packed.text_at_BM.shape[1]
        net, about = transformer.ARTransformer(ar), f"{B} packed rows of {L} tokens, {M} targets of each kind a row"
        update = Program(
            guarded(make_update(net, optimizer, cfg), cfg.guard),
            (state, base, packed),
            about,
            work.next_token(ar, B, L, M, language, c.chunk, mesh.shape),
            uses=("state", "base"),
            state=state,
        )
        programs = {f"{cfg.stage}-update": update}
        if cfg.validation.every:
            programs[f"{cfg.stage}-validation"] = Program(
                make_validation(net, cfg),
                (state.params, base, packed.without_sources()),
                about,
                work.next_token_forward(ar, B, L, M, c.chunk, mesh.shape),
                uses=("state", "base"),
                per_step=0,
            )
        return Programs(mesh, programs, {"state": state} | ({"base": base} if base else {}), create)

    @classmethod
    def make(cls, cfg: PretrainRun, mesh: Mesh, stop: StopSignal) -> RunningStage:
        """A run on the data of the configuration, starting from the transformer of `init_from` where that has one."""
        check_split("config.next_token.rows", cfg.next_token.rows, mesh, cfg.accumulate)  # before anything large is read
        # One process fills the batch of images up until it splits; several have their rows each.
        rows = None
        if jax.process_count() > 1:
            check_split("config.batch_size", cfg.batch_size, mesh)
            rows = local_rows(mesh, cfg.batch_size)
        model = open_model(cfg.init_from, (tokenizer_of(cfg.init_from),), mesh, cfg.stage)
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
        update = flops(made[f"{cfg.stage}-update"].fn)
        load = functools.partial(batches, batch_size=cfg.batch_size, rows=rows, fields=needed_fields(cfg.next_token), mixed=True)
        validation = None
        if cfg.validation.every:
            held = dataclasses.replace(cfg, data=cfg.validation.open(cfg.data))
            check_codes(held.data, model)
            examples = cfg.validation.examples(load, held.data, cfg.seed)
            loss = made[f"{cfg.stage}-validation"].fn
            validation = Validation(
                cfg.validation,
                lambda: (packed_batch(held, model, text, rows, batch, ar.order)[0].without_sources() for batch in examples),
                lambda state, batch: loss(state.params, base, batch),
            )

        def step(state: TrainState, batch: tuple[PackedTargets, dict[str, float]], number: int):
            packed, counts = batch
            state, metrics = update(state, base, packed)
            absent = {f"loss/source/{name}" for name in cfg.data.names if not counts[f"data/targets/{name}"]}
            return state, {name: value for name, value in metrics.items() if name not in absent} | counts

        shown = grid_data(cfg.data, cfg.seed) if "mmdit" in model.description["components"] else None
        return RunningStage(
            state,
            DataIterator(load(cfg.data, cfg.seed), functools.partial(packed_batch, cfg, model, text, rows, order=ar.order)),
            step,
            lambda state, directory, note: export_trained(directory, {"transformer": (state.params, ar)}, lora, model, note),
            functools.partial(sample_grid, model, ar, shown, cfg, whole_params) if shown else None,
            validation,
            items_per_step=cfg.batch_size,
            flops=lambda: flops.total,
        )


class SFTStage(PretrainStage):
    """Supervised fine-tuning, registered as a stage."""

    Config: ClassVar[type] = SFTRun
