"""A configuration of inference: which model, on which mesh, how its components are computed and how it draws.

`xomni generate`, `xomni chat` and `xomni eval` take one with --config; `xomni plan` compiles its programs for a slice.
Training, which knows configurations of every stage, is imported where one is read: an image is drawn sooner without it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from jax.sharding import Mesh

from xomni_jax.assets import TINY_SFT
from xomni_jax.core.config import ConfigError, Overrides, load_changes
from xomni_jax.core.program import Program, Programs
from xomni_jax.models import autoencoder, mmdit, siglip_vq, text_encoders, transformer, work
from xomni_jax.models.registry import abstract_params
from xomni_jax.models.section import ModelSection
from xomni_jax.pipeline import XOmni
from xomni_jax.sampling.decoder import DECODER_COMPONENTS, DecodeConfig
from xomni_jax.sampling.generate import make_answerer
from xomni_jax.sampling.logits import SamplingConfig
from xomni_jax.sampling.programs import RolloutShape, decoder_programs, sampler_programs
from xomni_jax.sampling.sampler import SEGMENT, Sampler
from xomni_jax.sharding import abstract
from xomni_jax.sharding.mesh import MeshConfig
from xomni_jax.sharding.rules import ROLLOUT_RULES, num_data_shards
from xomni_jax.tokenizers.registry import IMAGE_TOKENIZERS

MODELS = ("transformer", "siglip_vq", *DECODER_COMPONENTS)
SIZE = 1152  # pixels of a side, of the released model


@dataclasses.dataclass(frozen=True)
class InferenceConfig:
    """Drawing and answering: what `xomni generate`, `chat` and `eval` take with --config. The defaults are the released ones.

    Attributes:
      stage: inference
      model: a model directory, or a released one
      height, width: pixels of an image; None: the model's own
      temperature: of the image codes; 0 takes the likeliest
      top_k: keep the so many likeliest codes; 0: off
      top_p: keep the likeliest codes that hold this probability; 1: off
      min_p: drop codes below this share of the likeliest one's probability; 0: off
      guidance: classifier-free guidance of the codes; 1: off
      window: codes that a pass of the transformer runs: the same images in fewer passes
      batch: images or answers at a time in each data shard
      decode_batch: images decoded to pixels at a time in each data shard
      prompt_length: tokens of a prompt with its image prefix; for plans only
      max_tokens: tokens of an answer; for plans only
      mesh: how the devices are divided
      decode: changes to the model's own settings of decoding; None: the model's
      transformer, siglip_vq, mmdit, t5, clip, autoencoder: the model's components, and how they are computed
    """

    stage: str = "inference"
    model: str = TINY_SFT
    height: int | None = None
    width: int | None = None
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    min_p: float = 0.03
    guidance: float = 1.0
    window: int = 1
    batch: int = 16
    decode_batch: int = 16
    prompt_length: int = 512
    max_tokens: int = 32
    mesh: MeshConfig = MeshConfig()
    decode: Overrides = Overrides(DecodeConfig)
    transformer: ModelSection = ModelSection(transformer.PRESETS)
    siglip_vq: ModelSection = ModelSection(siglip_vq.PRESETS)
    mmdit: ModelSection = ModelSection(mmdit.PRESETS)
    t5: ModelSection = ModelSection(text_encoders.T5_PRESETS)
    clip: ModelSection = ModelSection(text_encoders.CLIP_PRESETS)
    autoencoder: ModelSection = ModelSection(autoencoder.PRESETS)

    def __post_init__(self):
        for name in ("height", "width", "batch", "decode_batch", "prompt_length", "max_tokens"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"config.{name}={getattr(self, name)} must be at least 1")

    @property
    def sampling(self) -> SamplingConfig:
        """How codes are drawn."""
        return SamplingConfig(self.temperature, self.top_k, self.top_p, self.min_p, self.guidance, self.window)


def read_config(path: str | Path, overrides: Sequence[str] = ()) -> InferenceConfig:
    """The configuration of a file with get_config(), of stage "inference". ConfigError where it is none."""
    from xomni_jax.training.stage import resolve

    changes = load_changes(path, overrides)
    if changes.values.get("stage") != "inference":
        stage = changes.values.get("stage")
        raise ConfigError(f"{path}: is of stage {stage!r}; give one of stage 'inference', such as configs/xomni/generate.py")
    return resolve(changes)


def open_model(path: str | Path, mesh: Mesh | None = None, config: InferenceConfig | None = None) -> XOmni:
    """A model, its components computed as the configuration says; without one, as they are stored.

    Raises:
      ConfigError: a section describes another model than the directory holds.
    """
    model = XOmni(path, mesh)
    if config is None:
        return model
    from xomni_jax.training.components import check_heads, decode_settings, model_configs

    for name, chosen in model_configs(config, [n for n in MODELS if n in model.description["components"]], model).items():
        model.set_config(name, chosen)
        if name == "transformer":
            check_heads(chosen.n_kv_heads, model.mesh)
    model.decode_config = decode_settings(config.decode, model.description)
    return model


class InferenceStage:
    """A batch of images, from prompts to pixels, and answers to a batch of questions about images. It is planned, not run as a stage."""

    Config: ClassVar[type] = InferenceConfig
    components: ClassVar[tuple[str, ...]] = MODELS

    @classmethod
    def programs(cls, cfg: InferenceConfig, models: Mapping[str, Any], mesh: Mesh, decoder_mesh: Mesh | None = None) -> Programs:
        """A batch takes the place of a training step.

        Raises:
          ConfigError: what the commands would refuse as well.
        """
        from xomni_jax.training.components import check_heads, decode_settings, read_description

        ar = models["transformer"]
        check_heads(ar.n_kv_heads, mesh)
        height, width = cfg.height or SIZE, cfg.width or SIZE
        try:
            layout = IMAGE_TOKENIZERS["siglip_vq"](models["siglip_vq"]).layout(height, width)
        except ValueError as error:
            raise ConfigError(f"config.height={height}, config.width={width}: {error}") from None
        sampling, net = cfg.sampling, transformer.ARTransformer(ar)
        weights = abstract_params("transformer", ar, mesh, ROLLOUT_RULES)
        rows, T = cfg.batch * num_data_shards(mesh), layout.length
        sampler = Sampler.make(net, layout.shape, sampling, SEGMENT)
        drawing = sampler_programs(sampler, ar, weights, RolloutShape(rows, 1, cfg.prompt_length, T), sampling.guided, 1, mesh)
        decoded = min(cfg.decode_batch, cfg.batch)
        decode, calls = decode_settings(cfg.decode, read_description(cfg.model)), -(-cfg.batch // decoded)
        frozen, decoding = decoder_programs(models, layout.shape, decode, decoded * num_data_shards(mesh), calls, mesh)
        asked = cfg.prompt_length + T
        answer = Program(
            make_answerer(net, cfg.max_tokens, 0, 0),
            (weights, abstract.rows(mesh, (rows, asked), "int32"), abstract.rows(mesh, (rows,), "int32")),
            f"up to {cfg.max_tokens} tokens to each of {rows} questions of {asked} tokens with their images",
            work.answer(ar, rows, asked),
            uses=("sampler",),
            per_step=0,
        )
        return Programs(mesh, drawing | decoding | {"answer": answer}, {"sampler": weights} | frozen)
