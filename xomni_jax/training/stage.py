"""What a stage is: its configuration, the programs that a trainer runs and a planner compiles, and how a run of it is made."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from xomni_jax.core.config import BelowOne, Changes, ConfigError, Count, Natural, NonNegative, load_changes, updated
from xomni_jax.core.preemption import StopSignal
from xomni_jax.core.program import Programs
from xomni_jax.core.registry import Registry
from xomni_jax.sharding.mesh import MeshConfig, make_mesh, split_devices
from xomni_jax.training.guard import GuardConfig
from xomni_jax.training.optimizer import Optimizer, OptimizerConfig
from xomni_jax.training.state import TrainState
from xomni_jax.training.validation import Validation

GRID_SEED = 1_000_003  # added to a run's seed for the examples of its image grids, which no step trains on


@dataclasses.dataclass(frozen=True)
class EMAConfig:
    """A running average of the trained parameters, which image grids are drawn with.

    Attributes:
      decay: share of the average that stays when it changes; 0: no average, or with `every` a copy of the parameters
      every: updates from one change of the average to the next
      export: the final model has the averages rather than the last parameters
    """

    decay: BelowOne = 0.0
    every: Count = 1
    export: bool = True


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """What every training stage shares.

    Attributes:
      stage: tokenizer, vq, pretrain, sft, decoder or grpo, or a stage of your own as path/to/file.py:Class
      run_dir: folder of the resolved config, metrics, image grids, checkpoints and the final model
      init_from: model directory that supplies the frozen and the starting parameters; empty: random ones
      seed: all randomness of a run derives from it, the step and the purpose
      steps: optimizer updates; grpo: batches of rollouts
      batch_size: examples per step over all devices; grpo: prompts per step
      log_every: steps between two lines of metrics
      save_every: steps between two checkpoints
      grid_every: steps between two image grids in RUN/images; 0: none
      save_minutes: also save after so many minutes, at the next logged step; 0: by steps alone
      wandb: project of Weights & Biases that gets the metrics and image grids, too (extra [wandb]); empty: none
      keep: the newest resumable checkpoints that stay on disk
      keep_every: checkpoints of steps that this divides stay for good; 0: no others
      mesh: how the devices are divided
      optimizer: AdamW or Muon, its schedule and its clipping
      train: which parameters learn: all, vision (of the transformer, what is new beside the language model), or path patterns
      freeze: path patterns of parameters that do not learn all the same
      accumulate: micro-batches per update, one after the other; the result is that of the whole batch
      ema: a running average of the parameters
      guard: which steps are skipped
    """

    stage: str = ""
    run_dir: str = ""
    init_from: str = ""
    seed: Natural = 0
    steps: Count = 1000
    batch_size: Count = 64
    log_every: Count = 10
    save_every: Count = 200
    grid_every: Natural = 200
    save_minutes: NonNegative = 0.0
    wandb: str = ""
    keep: Count = 2
    keep_every: Natural = 0
    mesh: MeshConfig = MeshConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: tuple[str, ...] = ("all",)
    freeze: tuple[str, ...] = ()
    accumulate: Count = 1
    ema: EMAConfig = EMAConfig()
    guard: GuardConfig = GuardConfig()

    def __post_init__(self):
        if not self.run_dir:
            raise ConfigError("config.run_dir is empty; name a folder for the run's output")

    def make_optimizer(self, freeze: Sequence[str] = (), updates_per_step: int = 1) -> Optimizer:
        """The optimizer of the run; `freeze`: patterns of what the stage never trains."""
        steps = self.steps * updates_per_step
        return Optimizer(self.optimizer, steps, self.train, (*self.freeze, *freeze), self.ema.decay, self.ema.every)


@dataclasses.dataclass(frozen=True)
class Grid:
    """Images that a stage draws at intervals, and what belongs to them in words.

    Attributes:
      images: uint8 [N, H, W, 3], row by row.
      columns: images in a row.
      texts: what is told of every column (or row), such as {"caption": [one text each]}.
      by: whether `texts` tell of columns or of rows.
    """

    images: np.ndarray
    columns: int
    texts: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    by: str = "column"

    def image(self, margin: int = 2) -> np.ndarray:
        """One uint8 image [H, W, 3] of all, on a white background."""
        n, height, width, _ = self.images.shape
        rows = -(-n // self.columns)
        out = np.full((rows * (height + margin) + margin, self.columns * (width + margin) + margin, 3), 255, np.uint8)
        for i, image in enumerate(self.images):
            y, x = divmod(i, self.columns)
            y, x = margin + y * (height + margin), margin + x * (width + margin)
            out[y : y + height, x : x + width] = image
        return out

    def notes(self) -> list[dict[str, Any]]:
        """The texts of each column (or row), numbered from 1: {"column": 1, "caption": ...}."""
        each = zip(*self.texts.values(), strict=True)
        return [{self.by: i + 1} | dict(zip(self.texts, texts)) for i, texts in enumerate(each)]


@dataclasses.dataclass
class RunningStage:
    """What the training loop needs of a stage.

    Attributes:
      state: the starting state, on its devices.
      batches: endless iterator with `get_state() -> dict` (JSON-able), `set_state(dict)`, `ids` of the last batch's examples, and `waited`,
        the seconds that it waited for data so far.
      step: (state, batch, step number) -> (state, scalar metrics). It may raise StopRequested or StepRefused before it changes the state.
      export: (state, model directory, provenance) -> writes everything `xomni_jax.load` needs.
      grid: (state, step number) -> images for the run folder, or None. It may raise StopRequested.
      validation: the loss on other examples, or None.
      items_per_step: examples or samples one step handles, for the rate.
      close: frees what the stage holds (connections), however the run ends.
      flops: matrix products of all steps so far, see `operations.FlopCount`.
      record: what the run depends on beside its configuration; each part is kept as RUN/NAME.json.
    """

    state: TrainState
    batches: Iterator[Any]
    step: Callable[[TrainState, Any, int], tuple[TrainState, Mapping[str, Any]]]
    export: Callable[[TrainState, Path, dict[str, Any]], None]
    grid: Callable[[TrainState, int], Grid] | None = None
    validation: Validation | None = None
    items_per_step: int = 1
    close: Callable[[], None] = lambda: None
    flops: Callable[[], float] = lambda: 0.0
    record: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Stage(Protocol):
    """A use of the models that can be planned. Registered in `STAGES`.

    Attributes:
      Config: frozen dataclass; `Config()` holds every default.
      components: the components whose configs `programs` reads; the sections of `Config` bear the same names.
    """

    Config: ClassVar[type]
    components: ClassVar[tuple[str, ...]]

    @classmethod
    def programs(cls, cfg: Any, models: Mapping[str, Any], mesh: Mesh, decoder_mesh: Mesh | None = None) -> Programs:
        """The jitted functions with abstract arguments; nothing is allocated. `models`: {component: its config}."""
        ...


class TrainingStage(Stage, Protocol):
    """A stage that `xomni train` runs; its `Config` derives from `RunConfig`."""

    @classmethod
    def make(cls, cfg: Any, mesh: Mesh, stop: StopSignal) -> RunningStage:
        """A run of the stage, ready for its first step."""
        ...


STAGES = Registry(
    "stage",
    {
        "tokenizer": "xomni_jax.training.tokenizer:TokenizerStage",
        "vq": "xomni_jax.training.vq:VQStage",
        "pretrain": "xomni_jax.training.pretrain:PretrainStage",
        "sft": "xomni_jax.training.pretrain:SFTStage",
        "decoder": "xomni_jax.training.decoder:DecoderStage",
        "grpo": "xomni_jax.rl.grpo:GRPOStage",
        "unigrpo": "xomni_jax.rl.methods.unigrpo:UniGRPOStage",
        "loo_fid": "xomni_jax.rl.methods.loo_fid:LooFIDStage",
        "janus_pro_r1": "xomni_jax.rl.methods.janus_pro_r1:JanusProR1Stage",
        "twig": "xomni_jax.rl.methods.twig:TwigStage",
        "corl": "xomni_jax.rl.methods.corl:CoRLStage",
        "inference": "xomni_jax.inference:InferenceStage",
    },
)


def resolve(changes: Changes) -> Any:
    """The typed configuration that a file and the command line describe; its `stage` names the class.

    Raises:
      ConfigError: the stage, a key or a value is wrong.
    """
    name = changes.values.get("stage")
    if not name:
        raise ConfigError(f"config.stage is missing; name one of {', '.join(STAGES.names())}")
    try:
        stage = STAGES.get(str(name))
    except ValueError as e:
        raise ConfigError(f"config.stage: {e}") from None
    if not hasattr(stage, "Config") or not hasattr(stage, "programs"):
        raise ConfigError(f"config.stage={name}: is no stage: it has no Config or no programs; derive it from one, such as GRPOStage")
    values = {key: value for key, value in changes.values.items() if key != "stage"}
    return dataclasses.replace(updated(stage.Config(), values), stage=str(name))


def resolve_run(changes: Changes) -> RunConfig:
    """`resolve` for a stage that trains. ConfigError for one that does not."""
    config = resolve(changes)
    if not isinstance(config, RunConfig):
        raise ConfigError(f"config.stage={config.stage!r} trains nothing; give this file to xomni generate, chat, eval or plan")
    return config


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Any:
    """The typed configuration of a file and `section.key=value` overrides; errors as of `load_changes` and `resolve`."""
    return resolve(load_changes(path, overrides))


def meshes(cfg: Any, devices: Sequence[jax.Device]) -> tuple[list[jax.Device], list[jax.Device]]:
    """(devices of what is trained, devices of the image decoder alone, if its `decoder_mesh` asks for some)."""
    size = math.prod(cfg.decoder_mesh.sizes().values()) if hasattr(cfg, "decoder_mesh") else 0
    return split_devices(devices, size) if size else (list(devices), [])


def policy_mesh(cfg: Any, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of what is trained: `mesh` over all devices, without those of `decoder_mesh` where a stage has one."""
    return make_mesh(cfg.mesh.sizes(), meshes(cfg, jax.devices() if devices is None else devices)[0])
