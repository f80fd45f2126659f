"""Arguments of a step as shapes with shardings: nothing is allocated, and no weights are needed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from xomni_jax.checkpoint.store import config_from_json, read_model_json
from xomni_jax.core.config import ConfigError, build
from xomni_jax.models.registry import COMPONENTS, init_params
from xomni_jax.sampling.decoder import DecodeConfig
from xomni_jax.sharding.rules import RULES, param_shardings, spec_for
from xomni_jax.training.components import PRESETS, STORED, from_preset
from xomni_jax.training.optimizer import path_name


def array(mesh: Mesh, shape: tuple[int, ...], dtype: Any, *axes: str | None) -> jax.ShapeDtypeStruct:
    """One array; `axes` are logical names of its first dimensions, the others stay whole."""
    axes = axes + (None,) * (len(shape) - len(axes))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec_for("input", shape, axes, mesh)))


def rows(mesh: Mesh, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    """An array whose rows are split as batches are."""
    return array(mesh, shape, dtype, "batch")


def keys(mesh: Mesh, shape: tuple[int, ...], *axes: str | None) -> jax.ShapeDtypeStruct:
    """PRNG keys."""
    return array(mesh, shape, jax.eval_shape(lambda: jax.random.key(0)).dtype, *axes)


def boxed(name: str, cfg: Any) -> Any:
    """Shapes of a component's parameters with their logical axes."""
    return jax.eval_shape(lambda: init_params(name, cfg, jax.random.key(0)))


def params(name: str, cfg: Any, mesh: Mesh, rules: Mapping = RULES) -> Any:
    """Parameters of a component."""
    shapes = boxed(name, cfg)
    return placed(nn.meta.unbox(shapes), param_shardings(shapes, mesh, rules))


def placed(shapes: Any, shardings: Any) -> Any:
    """Shapes with their shardings."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def model_of(config: ConfigDict) -> str:
    """The model directory that a run starts from, or that inference uses."""
    return config.model if "model" in config else config.init_from


def component(config: ConfigDict, name: str) -> Any:
    """Config of a component as a stage would use it, from the preset that the section names or from the model it starts from.

    Raises:
      ConfigError: the section takes what is stored, and there is no such model on this machine.
    """
    section, presets, source = config[name], dict(PRESETS[name]), model_of(config)
    if section.get("preset") == STORED:
        try:
            stored = read_model_json(source)["components"][name]["config"]
        except (OSError, ValueError, KeyError):
            raise ConfigError(
                f"config.{name}.preset=stored, but {source or 'config.init_from'} holds no {name} on this machine; "
                f"name a preset: {', '.join(presets)}"
            ) from None
        presets[STORED] = config_from_json(COMPONENTS[name].config, stored, f"{source}/model.json")
    return from_preset(section, presets, f"config.{name}")


def decode_settings(config: ConfigDict) -> DecodeConfig:
    """How images are decoded: the configuration's choices over those of the model it starts from, or the released ones without it."""
    try:
        own = read_model_json(model_of(config)).get("settings", {}).get("decode", {})
    except (OSError, ValueError):
        own = {}
    return build(DecodeConfig, own | {k: v for k, v in config.decode.items() if v is not None}, "config.decode")


def leaves(tree: Any, name: str = "") -> Iterator[tuple[str, jax.ShapeDtypeStruct]]:
    """(path, array) of every array of a tree."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield "/".join(filter(None, (name, path_name(path)))), leaf


def bytes_per_device(tree: Any) -> int:
    """Bytes a device holds of a tree."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * item_size(x.dtype) for _, x in leaves(tree))


def item_size(dtype: Any) -> int:
    """Bytes of an element; PRNG keys are two words."""
    return 8 if jnp.issubdtype(dtype, jax.dtypes.prng_key) else jnp.dtype(dtype).itemsize


def repeated(tree: Any, at_least: int = 2**20, axes: tuple[str, ...] = ("fsdp", "tensor")) -> list[tuple[str, tuple[int, ...], int, int]]:
    """Large arrays that devices along the mesh axes `axes` hold more than once: (path, shape, copies, bytes on a device), largest first."""
    out = []
    for name, x in leaves(tree):
        mesh = x.sharding.mesh
        used = {a for entry in x.sharding.spec for a in ((entry,) if isinstance(entry, str) else entry or ())}
        copies = math.prod(mesh.shape[a] for a in axes if a not in used)
        size = math.prod(x.sharding.shard_shape(x.shape)) * item_size(x.dtype)
        if copies > 1 and size >= at_least:
            out.append((name, x.shape, copies, size))
    return sorted(out, key=lambda row: -row[3])
