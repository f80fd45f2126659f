"""A tokenizer of pixels with its own decoder, trained on images alone (LlamaGen's VQ, arXiv 2406.06525 section 3.1)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from xomni_jax.core.config import NonNegative, Overrides
from xomni_jax.core.preemption import StopSignal
from xomni_jax.core.program import Program, Programs, Work
from xomni_jax.data.preprocess import ImageLimits, to_pixels, trained_limits
from xomni_jax.data.rendered import SIGNS
from xomni_jax.data.sources import DataSection, batches, first_batch
from xomni_jax.models import llamagen_vq
from xomni_jax.models.llamagen_vq import LlamaGenVQ, LlamaGenVQConfig
from xomni_jax.models.quantizer import usage_metrics
from xomni_jax.models.registry import init_params
from xomni_jax.models.section import ModelSection
from xomni_jax.sampling.decoder import to_uint8
from xomni_jax.sharding import abstract
from xomni_jax.sharding.arrays import local_rows, spread, whole
from xomni_jax.tokenizers.registry import IMAGE_TOKENIZERS
from xomni_jax.training.accumulate import gradient
from xomni_jax.training.codebook import CODEBOOK_SEED, CodebookConfig, codebook_of, even_usage, skipped_images, train_step, with_usage
from xomni_jax.training.components import DataIterator, ImageSize, check_split, export_model, model_configs, open_model
from xomni_jax.training.guard import guarded
from xomni_jax.training.operations import FlopCount
from xomni_jax.training.optimizer import Optimizer, OptimizerConfig
from xomni_jax.training.stage import GRID_SEED, Grid, RunConfig, RunningStage
from xomni_jax.training.state import TrainState, new_state
from xomni_jax.training.validation import Validation, ValidationConfig

GRID_IMAGES = 16


@dataclasses.dataclass(frozen=True)
class VQConfig(CodebookConfig):
    """Schedule of the codebook and weights of the loss.

    Attributes:
      l2_weight: weight of the mean squared error of pixels in [-1, 1]
      l1_weight: weight of their mean absolute error
      quantizer_weight: weight of the quantiser's own losses
    """

    l2_weight: NonNegative = 1.0
    l1_weight: NonNegative = 0.0
    quantizer_weight: NonNegative = 1.0


@dataclasses.dataclass(frozen=True)
class VQRun(RunConfig):
    """Training of a tokenizer of pixels.

    Attributes:
      llamagen_vq: the tokenizer that learns; "stored" takes up that of init_from
      tokenizer: schedule of the codebook and weights of the loss
      preprocess: limits of input images, stored in the model; what is not set follows from the patch and from data.sizes
      data: where images come from
      validation: the loss on images that no step trains on
    """

    stage: str = "vq"
    run_dir: str = "runs/vq"
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-3)
    llamagen_vq: ModelSection = ModelSection(llamagen_vq.PRESETS, "tiny")
    tokenizer: VQConfig = VQConfig()
    preprocess: Overrides = Overrides(ImageLimits)
    data: DataSection = SIGNS
    validation: ValidationConfig = ValidationConfig()


def vq_loss(params: Any, rows: dict[str, jax.Array], images: int, vq: LlamaGenVQ, cfg: VQConfig) -> tuple[jax.Array, Any]:
    """(loss, (metrics, usage [V], encoder outputs)) of rows of a batch of `images`; all but the outputs add up to those of the batch."""
    pixels, out = rows["pixels"], vq.apply({"params": params["tokenizer"]}, rows["pixels"], rows["skip"])
    error, share = out["pixels"] - pixels, len(pixels) / images
    terms = {"l2": jnp.mean(error**2), "l1": jnp.mean(jnp.abs(error)), **out["losses"]}
    total = cfg.l2_weight * terms["l2"] + cfg.l1_weight * terms["l1"] + cfg.quantizer_weight * terms["quantizer"]
    metrics = {f"loss/{name}": share * value for name, value in (terms | {"total": total}).items()}
    return share * total, (metrics, share * out["usage"], out["z"])


def make_update(vq: LlamaGenVQ, optimizer: Optimizer, cfg: VQConfig, accumulate: int = 1) -> Callable[..., Any]:
    """The jitted step (state, batch, key, strength of quantisation) -> (state, metrics, encoder outputs); the state is donated."""

    def update(state: TrainState, batch, key, strength):
        images = len(batch["pixels"])
        rows = batch | {"skip": skipped_images(key, images, 0.0, strength)}
        loss = functools.partial(vq_loss, images=images, vq=vq, cfg=cfg)
        grads, (metrics, usage, z), _ = gradient(loss, state.params, rows, accumulate, join_parts)
        state, optim = state.apply(optimizer, grads)
        codes = {f"codes/{name}": value for name, value in usage_metrics(usage).items()}
        return with_usage(state, usage, cfg.usage_decay), metrics | codes | optim, z

    return jax.jit(update, donate_argnums=0)


def join_parts(stacked: Any) -> Any:
    """Metrics, usage and encoder outputs of micro-batches as those of the batch."""
    metrics, usage, z = stacked
    return *jax.tree.map(lambda x: jnp.sum(x, axis=0), (metrics, usage)), z.reshape(-1, *z.shape[2:])


def make_validation(vq: LlamaGenVQ, cfg: VQConfig) -> Callable[..., Any]:
    """The jitted (params, batch) -> metrics of a batch whose images are all quantised."""

    def validate(params, batch):
        rows = batch | {"skip": jnp.zeros(len(batch["pixels"]), bool)}
        _, (metrics, usage, _) = vq_loss(params, rows, len(batch["pixels"]), vq, cfg)
        return metrics | {f"codes/{name}": value for name, value in usage_metrics(usage).items()}

    return jax.jit(validate)


class VQStage:
    """Training of a tokenizer of pixels, registered as a stage."""

    Config: ClassVar[type] = VQRun
    components: ClassVar[tuple[str, ...]] = ("llamagen_vq",)

    @classmethod
    def programs(cls, cfg: VQRun, models: Mapping[str, Any], mesh: Mesh, decoder_mesh: Mesh | None = None) -> Programs:
        """The update on a batch of images of the data's main size."""
        check_split("config.batch_size", cfg.batch_size, mesh, cfg.accumulate)
        config, optimizer, (height, width) = models["llamagen_vq"], cfg.make_optimizer(), cfg.data.sizes[0]
        vq, codes = LlamaGenVQ(config), IMAGE_TOKENIZERS["llamagen_vq"](config).layout(height, width).length
        init = lambda: {"tokenizer": init_params("llamagen_vq", config, jax.random.key(cfg.seed))}
        create, state = new_state(init, optimizer, mesh, cfg.guard, lambda: even_usage(config.codebook_size))
        batch = {"pixels": abstract.rows(mesh, (cfg.batch_size, height, width, 3), jnp.float32)}
        about, work = f"{cfg.batch_size} images of {height}x{width}", Work(tokens=cfg.batch_size * codes, images=cfg.batch_size)
        update = Program(
            guarded(make_update(vq, optimizer, cfg.tokenizer, cfg.accumulate), cfg.guard),
            (state, batch, abstract.keys(mesh, ()), abstract.array(mesh, (), jnp.float32)),
            about,
            work,
            uses=("state",),
            state=state,
        )
        programs = {"vq-update": update}
        if cfg.validation.every:
            programs["vq-validation"] = Program(
                make_validation(vq, cfg.tokenizer), (state.params, batch), about, work, uses=("state",), per_step=0
            )
        return Programs(mesh, programs, {"state": state}, create)

    @classmethod
    def make(cls, cfg: VQRun, mesh: Mesh, stop: StopSignal) -> RunningStage:
        """A run on the images of the configuration, from random parameters or from the tokenizer of `init_from`."""
        model = open_model(cfg.init_from, cls.components, mesh, cfg.stage) if cfg.init_from else None
        if model:
            models = model_configs(cfg, cls.components, model)
        else:
            models = {"llamagen_vq": cfg.llamagen_vq.config(where="config.llamagen_vq")}
        config: LlamaGenVQConfig = models["llamagen_vq"]
        limits = cfg.preprocess.over(trained_limits(cfg.data.sizes, config.patch), "config.preprocess")
        made, vq = cls.programs(cfg, models, mesh), LlamaGenVQ(config)
        state = made.create()
        if model:
            state = state.starting_from({"tokenizer": model.params("llamagen_vq")})
            model.release("llamagen_vq")
        rows = local_rows(mesh, cfg.batch_size)
        load = functools.partial(batches, batch_size=cfg.batch_size, rows=rows, transform=pixels_of, fields=("image",))

        def to_mesh(batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
            return spread(mesh, {"pixels": batch["pixels"]}, cfg.batch_size)

        outputs = jax.jit(lambda params, pixels: vq.apply({"params": params["tokenizer"]}, pixels, method="outputs"))
        reconstructed = jax.jit(lambda params, pixels: to_uint8(vq.apply({"params": params["tokenizer"]}, pixels)["pixels"]))

        def first_codebook(params: Any, key: jax.Array) -> jax.Array:
            if model:
                return params["tokenizer"]["codebook"]
            # Batches of their own, not those that just passed: a run that was resumed here has not seen them.
            examples = load(cfg.data, cfg.seed + CODEBOOK_SEED, count=cfg.tokenizer.start_batches, prefetch=0)
            return codebook_of((outputs(params, to_mesh(batch)["pixels"]) for batch in examples), key, config.codebook_size)

        def grid(state: TrainState, step: int) -> Grid:
            shown = first_batch(cfg.data, cfg.seed + GRID_SEED, GRID_IMAGES)["image"]
            return Grid(np.concatenate([whole(reconstructed(state.params, to_pixels(shown))), shown]), GRID_IMAGES)

        def export(state: TrainState, directory: Path, note: dict[str, Any]) -> None:
            settings = {"preprocess": limits, "size": ImageSize(*cfg.data.sizes[0], cfg.data.sizes[1:])}
            export_model(directory, {"llamagen_vq": (state.params["tokenizer"], config)}, cfg.init_from, note, settings)

        validation = None
        if cfg.validation.every:
            held = cfg.validation.open(cfg.data)
            examples = cfg.validation.examples(load, held, cfg.seed)
            loss = made["vq-validation"].fn
            validation = Validation(cfg.validation, lambda: map(to_mesh, examples), lambda state, batch: loss(state.params, batch))
        flops = FlopCount()
        return RunningStage(
            state,
            DataIterator(load(cfg.data, cfg.seed), to_mesh),
            functools.partial(train_step, cfg, flops(made["vq-update"].fn), first_codebook),
            export,
            grid,
            validation,
            items_per_step=cfg.batch_size,
            flops=lambda: flops.total,
        )


def pixels_of(examples: dict[str, Any]) -> dict[str, Any]:
    """The batch of `vq_loss` from examples of a source."""
    return {"pixels": to_pixels(examples["image"])}
