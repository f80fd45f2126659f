"""What stages share: model configs from presets, frozen components from a model directory, trained ones written to the next."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.experimental.multihost_utils import sync_global_devices

from xomni_jax.checkpoint.store import (
    config_from_json,
    config_to_json,
    copy_components,
    fingerprint,
    read_model_json,
    save_component,
    save_settings,
)
from xomni_jax.core.config import ConfigError, Overrides, build
from xomni_jax.data.sources import DataSection
from xomni_jax.models.section import COMPUTATION, STORED, ModelSection
from xomni_jax.pipeline import XOmni
from xomni_jax.sampling.decoder import DecodeConfig
from xomni_jax.sequence.tokenizer import TINY_TOKENIZER
from xomni_jax.sharding.rules import num_data_shards
from xomni_jax.tokenizers.registry import tokenizer_in


@dataclasses.dataclass(frozen=True)
class ImageSize:
    """Pixels of the images a model makes when not told otherwise, and the `others` it was trained on; a setting of model.json."""

    height: int
    width: int
    others: tuple[tuple[int, int], ...] = ()


# ---- what a configuration says of the models ----
def model_configs(cfg: Any, names: Sequence[str], model: XOmni) -> dict[str, Any]:
    """Configs of the components that a stage uses: the sections', which must describe what the model directory holds where it has one.

    Raises:
      ConfigError: a section describes another model than the directory holds, or asks for a component that it lacks.
    """
    held = model.description["components"]
    return {name: _model_config(getattr(cfg, name), model.config(name) if name in held else None, name, str(model.path)) for name in names}


def planned_configs(cfg: Any, names: Sequence[str], directory: str) -> dict[str, Any]:
    """`model_configs` for a plan, which needs no model on this machine: presets are taken as they are, not compared with a directory.

    Raises:
      ConfigError: a section takes the stored config, and there is no such model on this machine.
    """
    held = read_description(directory).get("components", {})
    out = {}
    for name in names:
        section = getattr(cfg, name)
        if section.preset == STORED and name not in held:
            raise ConfigError(
                f"config.{name}.preset=stored, but {directory or 'config.init_from'} holds no {name} on this machine; "
                f"name a preset: {', '.join(section.presets)}"
            )
        stored = config_from_json(section.cls, held[name]["config"], f"{directory}/model.json") if section.preset == STORED else None
        out[name] = section.config(stored, f"config.{name}")
    return out


def read_description(directory: str) -> dict[str, Any]:
    """The model.json of a directory; empty where there is none."""
    try:
        return read_model_json(directory)
    except (OSError, ValueError):
        return {}


def tokenizer_of(directory: str) -> str:
    """Name of the image tokenizer that a model directory holds."""
    return tokenizer_in(read_description(directory).get("components", {}))


def _model_config(section: ModelSection, stored: Any, name: str, path: str) -> Any:
    if stored is None and section.preset == STORED:
        raise ConfigError(f"config.{name}.preset=stored, but {path} has no {name}; name a preset: {', '.join(section.presets)}")
    wanted = section.config(stored, f"config.{name}")
    if stored is None:
        return wanted
    old, new = config_to_json(stored), config_to_json(wanted)
    # A model of one order of codes may go on in another one, but not by an omission.
    free = set(COMPUTATION) - ({"order"} - set(section.fields))
    differs = sorted(k for k in old if k not in free and old[k] != new[k])
    if differs:
        k = differs[0]
        raise ConfigError(f"config.{name}.{k}={new[k]!r}, but the {name} of {path} has {old[k]!r}; give the section the stored sizes")
    return wanted


def decode_settings(decode: Overrides, description: Mapping[str, Any]) -> DecodeConfig:
    """How codes become pixels: the configuration's changes to the settings of a model directory, or to the released ones without one."""
    own = description.get("settings", {}).get("decode", {})
    return decode.over(build(DecodeConfig, own, "config.decode"), "config.decode")


# ---- sizes that must fit the mesh ----
def check_heads(kv_heads: int, mesh: jax.sharding.Mesh) -> None:
    """Refuses a tensor axis that does not divide the number of key and value heads."""
    parts = mesh.shape["tensor"]
    if kv_heads % parts:
        fit = ", ".join(str(n) for n in range(1, kv_heads + 1) if kv_heads % n == 0)
        raise ConfigError(
            f"config.mesh.tensor={parts}: {kv_heads} key and value heads do not split {parts} ways; use {fit}, and fsdp for the rest"
        )


def check_trainable(models: Mapping[str, Any], names: Sequence[str]) -> None:
    """Refuses components in 8 bits among those that learn."""
    for name in names:
        if getattr(models[name], "int8", False):
            raise ConfigError(
                f"config.{name}.int8=True: kernels in 8 bits cannot learn; leave it False here and set it where the model is frozen"
            )


def check_split(key: str, size: int, mesh: jax.sharding.Mesh, accumulate: int = 1) -> None:
    """Refuses a batch whose micro-batches do not split evenly over the mesh; `key` is where its size is configured."""
    if size % accumulate:
        raise ConfigError(f"config.accumulate={accumulate} does not divide {key}={size}; use a divisor")
    shards, key, size = num_data_shards(mesh), key + " / config.accumulate" * (accumulate > 1), size // accumulate
    if size % shards:
        raise ConfigError(
            f"{key}={size} does not split over the {shards} ways of config.mesh (replica x data x fsdp); use a multiple of {shards}, "
            "or lower those axes"
        )


def open_model(init_from: str, needed: tuple[str, ...], mesh: jax.sharding.Mesh, stage: str) -> XOmni:
    """The model directory a stage starts from; refuses one that lacks what the stage needs."""
    if not init_from:
        raise ConfigError(f"config.init_from is empty; stage {stage} needs a model directory with {', '.join(needed)}")
    have = read_model_json(init_from)["components"]
    missing = [name for name in needed if name not in have]
    if missing:
        raise ConfigError(f"config.init_from={init_from}: this model has no {missing[0]}; stage {stage} needs {', '.join(needed)}")
    return XOmni(init_from, mesh, training=True)


def check_codes(data: DataSection, model: XOmni) -> None:
    """Refuses codes that another tokenizer made than that of the model; frees the tokenizer where all data are codes."""
    stored = [part for part in data.parts if part.tokenizer]
    if stored:
        name = model.image_tokenizer.component
        own = fingerprint(name, model.params(name), model.config(name))
        if len(stored) == len(data.parts):
            model.release(name)
    for part in stored:
        if own != part.tokenizer:
            raise ConfigError(
                f"config.data: the codes of {part.options.path} are those of tokenizer {part.tokenizer}, but config.init_from={model.path} "
                f"has tokenizer {own}; start from the model that made the codes, or tokenize the images again"
            )


def export_model(
    directory: Path,
    trained: Mapping[str, tuple[Any, Any]],
    init_from: str,
    note: Mapping[str, Any],
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Writes a complete model directory: what was trained, and a copy of every other component of `init_from`.

    Args:
      trained: {component: (params, config)}.
      settings: {name: dataclass} of defaults for running the model.
    """
    part = directory.with_name(directory.name + ".part")
    first = jax.process_index() == 0  # it alone copies files; every process writes its shards of the parameters
    if first:
        shutil.rmtree(part, ignore_errors=True)
        if init_from:
            others = tuple(name for name in read_model_json(init_from)["components"] if name not in trained)
            copy_components(init_from, part, others)
    sync_global_devices("copied")
    for name, (params, config) in trained.items():
        save_component(part, name, params, config, note)
    if first:
        if settings:
            save_settings(part, **settings)
        if not (part / "tokenizer").is_dir():
            shutil.copytree(TINY_TOKENIZER, part / "tokenizer")
        # The old model is replaced only by a whole new one.
        shutil.rmtree(directory, ignore_errors=True)
        part.rename(directory)
    sync_global_devices("exported")


class DataIterator:
    """A grain iterator whose state is JSON-able text, as the checkpoint's data item wants it.

    Attributes:
      ids: of the last batch's examples.
      waited: seconds that the steps so far have waited for the loader, which works ahead of them.
    """

    def __init__(self, dataset: Any, map_batch: Callable[[Any], Any] = lambda batch: batch):
        self._iterator = iter(dataset)
        self._map, self.ids, self.waited = map_batch, list[str](), 0.0

    def __iter__(self) -> DataIterator:
        return self

    def __next__(self) -> Any:
        began = time.perf_counter()
        examples = next(self._iterator)
        self.waited += time.perf_counter() - began
        self.ids = examples["id"]
        return self._map(examples)

    def get_state(self) -> dict[str, Any]:
        """Where the data stands after the last batch that was taken."""
        return {"grain": self._iterator.get_state()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes on from a saved place."""
        self._iterator.set_state(dict(state["grain"]))
