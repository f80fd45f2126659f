"""Adapters (`models.lora`) on disk: DIR/adapter.safetensors, DIR/adapter.json with the fingerprint of the model that they belong to."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from xomni_jax.checkpoint.store import CheckpointError, checkpoint_hash, write_json
from xomni_jax.sharding.arrays import whole

FORMAT = "xomni_jax adapter 1"


def save_adapter(directory: Path, adapters: Mapping[str, Any], scale: float, base: str | Path) -> None:
    """Writes adapters {component: tree} of the model directory `base`, replacing older ones; every process calls it."""
    arrays = {"/".join(path): whole(x) for path, x in flatten_dict(adapters).items()}
    if jax.process_index() != 0:
        return
    part = directory.with_name(directory.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    save_file(arrays, part / "adapter.safetensors")
    fingerprint = {name: checkpoint_hash(Path(base) / name) for name in adapters}
    write_json(part / "adapter.json", {"format": FORMAT, "scale": scale, "base": fingerprint})
    shutil.rmtree(directory, ignore_errors=True)
    part.rename(directory)


def load_adapter(directory: str | Path, base: str | Path) -> tuple[dict[str, Any], float]:
    """(adapters {component: tree of numpy arrays}, scale of their products).

    Raises:
      CheckpointError: `directory` holds no adapter, a damaged one, or one of another model than `base`.
    """
    directory = Path(directory)
    if not (directory / "adapter.json").is_file():
        raise CheckpointError(f"{directory}: holds no adapter.json; name the folder RUN/adapter of a training with config.lora.rank")
    try:
        about = json.loads((directory / "adapter.json").read_text())
        arrays = load_file(directory / "adapter.safetensors")
        known, scale, fingerprint = about["format"], float(about["scale"]), dict(about["base"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as e:
        raise CheckpointError(f"{directory}: cannot be read ({e}); copy it again from the run that wrote it") from None
    if known != FORMAT:
        raise CheckpointError(f"{directory}: is a {known!r}, this version reads {FORMAT!r}")
    for name, digest in fingerprint.items():
        if checkpoint_hash(Path(base) / name) != digest:
            raise CheckpointError(f"{directory}: was trained on another {name} than that of {base}; give the model of its run's init_from")
    return unflatten_dict({tuple(path.split("/")): x for path, x in arrays.items()}), scale
