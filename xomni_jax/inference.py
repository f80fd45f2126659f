"""A configuration of inference: which model, on which mesh, how its components are computed and how it draws.

`xomni generate`, `xomni chat` and `xomni eval` take one with --config; `xomni plan` compiles its programs for a slice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from jax.sharding import Mesh
from ml_collections import ConfigDict

from xomni_jax.assets import TINY_SFT
from xomni_jax.core.config import ConfigError, build, check_sections, load_config
from xomni_jax.pipeline import XOmni
from xomni_jax.sampling.decoder import DecodeConfig
from xomni_jax.sampling.pixels import DECODER_PARTS
from xomni_jax.training.components import PRESETS, check_heads, stored_or_preset

STAGE = "inference"
PARTS = ("transformer", "siglip_vq", *DECODER_PARTS)
SECTIONS = ("mesh", "decode", *PARTS)


@dataclasses.dataclass(frozen=True)
class InferenceConfig:
    """What the commands of inference share. The defaults are the released ones.

    Attributes:
      model: a model directory, or a released one.
      height, width: pixels of an image; None: the model's own.
      temperature, top_k, top_p, min_p, guidance: of the image codes, see `SamplingConfig`.
      batch: images or answers at a time, decode_batch: images decoded to pixels at a time, of each data-parallel part of the mesh.
      prompt_length, max_tokens: tokens of a prompt with its image prefix, and of an answer, that a plan counts on.
    """

    model: str = TINY_SFT
    height: int | None = None
    width: int | None = None
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    min_p: float = 0.03
    guidance: float = 1.0
    batch: int = 16
    decode_batch: int = 16
    prompt_length: int = 512
    max_tokens: int = 32

    def __post_init__(self):
        for name in ("height", "width", "batch", "decode_batch", "prompt_length", "max_tokens"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"config.{name}={getattr(self, name)} must be at least 1")


def read_config(path: str | Path, overrides: Sequence[str] = ()) -> ConfigDict:
    """A file with get_config(), of stage "inference".

    Raises:
      ConfigError: there is none, it is of another stage, or a key or section is unknown or missing.
    """
    config = load_config(path, overrides)
    if config.get("stage") != STAGE:
        raise ConfigError(f"{path}: is of stage {config.get('stage')!r}; give one of stage {STAGE!r}, such as configs/xomni/generate.py")
    settings(config)
    check_sections(config, SECTIONS, STAGE)
    return config


def settings(config: ConfigDict) -> InferenceConfig:
    """The plain keys of a configuration."""
    return build(InferenceConfig, {k: v for k, v in config.items() if k != "stage" and not isinstance(v, ConfigDict)}, "config")


def open_model(path: str | Path, mesh: Mesh | None = None, config: Mapping | None = None) -> XOmni:
    """A model, its components computed as the configuration says; without one, as they are stored.

    Raises:
      ConfigError: a section describes another model than the directory holds.
    """
    model = XOmni(path, mesh)
    if config is None:
        return model
    for name in (n for n in PARTS if n in model.description["components"]):
        model.set_config(name, stored_or_preset(model, name, config[name], PRESETS[name], f"config.{name}"))
        if name == "transformer":
            check_heads(model.config(name).n_kv_heads, model.mesh)
    chosen = {k: v for k, v in config["decode"].items() if v is not None}
    model.decode_config = build(DecodeConfig, dataclasses.asdict(model.decode_config) | chosen, "config.decode")
    return model
