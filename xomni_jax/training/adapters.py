"""Training of adapters (`models.lora`) on the frozen components of a model directory."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from xomni_jax.checkpoint.adapter import save_adapter
from xomni_jax.core.config import ConfigError
from xomni_jax.models.lora import LoRAConfig, init_adapters, merge
from xomni_jax.models.registry import abstract_params, init_params
from xomni_jax.pipeline import XOmni
from xomni_jax.training.components import export_model


def learned_params(name: str, model_cfg: Any, lora: LoRAConfig, seed: int, mesh: Mesh) -> tuple[Callable[[], Any], Any]:
    """(function that makes the boxed parameters of a component that learn, shapes of the frozen ones under them): with a rank adapters
    and their base, else the component's own and None."""
    if lora.rank:
        return lambda: init_adapters(name, model_cfg, lora, jax.random.key(seed)), abstract_params(name, model_cfg, mesh)
    return lambda: init_params(name, model_cfg, jax.random.key(seed)), None


def frozen_base(model: XOmni, models: Mapping[str, Any], name: str, lora: LoRAConfig) -> Any:
    """The parameters of the component that adapters are trained on, computed as its config of the run says: `param_dtype`, `int8`."""
    if name not in model.description["components"]:
        raise ConfigError(f"config.lora.rank={lora.rank}: {model.path} has no {name} to adapt; set it to 0 to train one from the start")
    model.set_config(name, models[name])
    return model.params(name)


def export_trained(
    directory: Path,
    trained: Mapping[str, tuple[Any, Any]],
    lora: LoRAConfig,
    model: XOmni,
    note: Mapping[str, Any],
    settings: Mapping[str, Any] | None = None,
) -> None:
    """`export_model` of a run that started from `model`. Adapters are saved alone in `adapter` beside the directory, and merged for it.

    They are merged with the component as it is stored, whatever the number format that it was computed in.
    """
    if lora.rank:
        adapters = {name: params for name, (params, _) in trained.items() if params}
        save_adapter(directory.with_name("adapter"), adapters, lora.scale, model.path)
        stored = XOmni(model.path, model.mesh, training=True)
        add = jax.jit(functools.partial(merge, scale=lora.scale), donate_argnums=0)
        trained = {name: (add(stored.params(name), tree), stored.config(name)) for name, tree in adapters.items()}
    export_model(directory, trained, str(model.path), note, settings)
