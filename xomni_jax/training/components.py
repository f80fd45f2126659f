"""What stages share: model configs from presets, frozen components from a model directory, trained ones written to the next."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from xomni_jax.checkpoint.store import config_to_json, copy_components, read_model_json, save_component, save_settings
from xomni_jax.core.config import ConfigError, check_types
from xomni_jax.core.distributed import barrier
from xomni_jax.models import autoencoder, mmdit, siglip_vq, text_encoders, transformer
from xomni_jax.pipeline import XOmni
from xomni_jax.sequence.tokenizer import TINY_TOKENIZER
from xomni_jax.sharding.arrays import local_rows
from xomni_jax.sharding.rules import row_ways

T = TypeVar("T")

STORED = "stored"  # the preset of a component as `init_from` holds it

# How a stored model is computed, which a run may choose; everything else of a config says what the model is.
COMPUTATION = ("dtype", "param_dtype", "int8", "remat", "attention", "attention_chunk", "query_chunk", "at_once", "chunk", "unroll")


PRESETS: dict[str, Mapping[str, Any]] = {
    "transformer": transformer.PRESETS,
    "siglip_vq": siglip_vq.PRESETS,
    "mmdit": mmdit.PRESETS,
    "t5": text_encoders.T5_PRESETS,
    "clip": text_encoders.CLIP_PRESETS,
    "autoencoder": autoencoder.PRESETS,
}


@dataclasses.dataclass(frozen=True)
class ImageSize:
    """Pixels of the images a model makes when not told otherwise; a setting of model.json."""

    height: int
    width: int


def from_preset(section: Mapping[str, Any], presets: Mapping[str, T], where: str) -> T:
    """`preset` names a model config; the other keys of the section replace its fields."""
    fields = dict(section)
    name = fields.pop("preset", None)
    if name not in presets:
        raise ConfigError(f"{where}.preset={name!r} is unknown; use one of {', '.join(presets)}")
    known = {f.name for f in dataclasses.fields(presets[name]) if f.init}
    unknown = sorted(set(fields) - known)
    if unknown:
        raise ConfigError(f"{where}.{unknown[0]}: unknown key; {type(presets[name]).__name__} has {', '.join(sorted(known))}")

    check_types(type(presets[name]), fields, where)

    def typed(key, value):
        if key.endswith("dtype"):
            try:
                return jnp.dtype(value)
            except TypeError:
                raise ConfigError(f"{where}.{key}={value!r} is no number format; use float32 or bfloat16") from None
        return tuple(value) if isinstance(value, (list, tuple)) else value

    try:
        return dataclasses.replace(presets[name], **{k: typed(k, v) for k, v in fields.items()})
    except ConfigError:
        raise
    except ValueError as e:
        raise ConfigError(f"{where}: {e}") from None


def stored_or_preset(model: XOmni, name: str, section: Mapping[str, Any], presets: Mapping[str, T], where: str) -> T:
    """Config of a component: the section's, which must describe the same model where `model` already has the component."""
    has = name in model.description["components"]
    wanted = from_preset(section, dict(presets) | ({STORED: model.config(name)} if has else {}), where)
    if not has:
        return wanted
    stored = model.config(name)
    old, new = config_to_json(stored), config_to_json(wanted)
    differs = sorted(k for k in old if k not in COMPUTATION and old[k] != new[k])
    if differs:
        k = differs[0]
        raise ConfigError(f"{where}.{k}={new[k]!r}, but the {name} of {model.path} has {old[k]!r}; give the section the stored sizes")
    return wanted


def check_heads(kv_heads: int, mesh: jax.sharding.Mesh) -> None:
    """Refuses a tensor axis over which the heads of the transformer's keys and values do not split."""
    ways = mesh.shape["tensor"]
    if kv_heads % ways:
        fit = ", ".join(str(n) for n in range(1, kv_heads + 1) if kv_heads % n == 0)
        raise ConfigError(
            f"config.mesh.tensor={ways}: {kv_heads} key and value heads do not split {ways} ways; use {fit}, and fsdp for the rest"
        )


def check_split(key: str, size: int, mesh: jax.sharding.Mesh) -> None:
    """Refuses a batch that does not split evenly over the mesh; `key` is where its size is configured."""
    ways = row_ways(mesh)
    if size % ways:
        raise ConfigError(
            f"{key}={size} does not split over the {ways} ways of config.mesh (replica x data x fsdp); use a multiple of {ways}, "
            "or lower those axes"
        )


def here(key: str, size: int, mesh: jax.sharding.Mesh) -> list[int]:
    """The rows of a batch whose data this process loads; `key` is where its size is configured. Refuses what does not split evenly."""
    check_split(key, size, mesh)
    return local_rows(mesh, size)


def open_model(init_from: str, needed: tuple[str, ...], mesh: jax.sharding.Mesh, stage: str) -> XOmni:
    """The model directory a stage starts from; refuses one that lacks what the stage needs."""
    if not init_from:
        raise ConfigError(f"config.init_from is empty; stage {stage} needs a model directory with {', '.join(needed)}")
    have = read_model_json(init_from)["components"]
    missing = [name for name in needed if name not in have]
    if missing:
        raise ConfigError(f"config.init_from={init_from}: this model has no {missing[0]}; stage {stage} needs {', '.join(needed)}")
    return XOmni(init_from, mesh, training=True)


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
    barrier("copied")
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
    barrier("exported")


class DataIterator:
    """A grain iterator whose state is JSON-able text, as the checkpoint's data item wants it."""

    def __init__(self, dataset: Any, map_batch: Callable[[Any], Any] = lambda batch: batch):
        self._iterator = iter(dataset)
        self._map = map_batch

    def __iter__(self) -> DataIterator:
        return self

    def __next__(self) -> Any:
        return self._map(next(self._iterator))

    def get_state(self) -> dict[str, Any]:
        """Where the data stands after the last batch that was taken."""
        return {"grain": self._iterator.get_state()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes on from a saved place."""
        self._iterator.set_state(dict(state["grain"]))
