"""A released directory opened as if it were converted: parameters go straight from its files into device shards."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from xomni_jax.checkpoint.assemble import targets_of
from xomni_jax.checkpoint.conversion import ConversionError, flatten, problems, unflatten
from xomni_jax.checkpoint.found import Found
from xomni_jax.checkpoint.kinds import kind_of
from xomni_jax.checkpoint.released import PARTS, NotThere, open_release
from xomni_jax.checkpoint.store import FORMAT, CheckpointError, config_to_json


def is_released(path: str | Path) -> bool:
    """Whether to open a path as a released directory: it is a directory, and not one of ours."""
    path = Path(path)
    return (
        path.is_dir()
        and not (path / "model.json").is_file()
        and any((path / name).is_file() for name in ("config.json", "model_index.json"))
    )


class ReleasedModel:
    """What `XOmni` asks a model directory for.

    Attributes:
      description: as model.json would have it. folders: {"tokenizer": ..., "tokenizer_t5": ..., "tokenizer_clip": ...} where there are such.
    """

    def __init__(self, path: str | Path, flux: str | Path | None = None):
        self.path = Path(path)
        if kind_of(path) == "flux":
            path, flux = None, path
        self.found: dict[str, Found] = {}
        self.errors: dict[str, str] = {}
        self.folders: dict[str, Path] = {}
        settings: dict[str, dict[str, Any]] = {}
        for only, names in PARTS.items():
            try:
                release = open_release(path, flux, only)
            except NotThere:
                continue
            except ConversionError as e:  # said when the part is used
                self.errors |= dict.fromkeys(names, str(e).splitlines()[0])
                continue
            self.found |= release.components
            self.folders |= release.tokenizers
            for name, fields in release.settings.items():
                settings[name] = settings.get(name, {}) | fields
        components = {name: {"config": config_to_json(found.config), "note": {}} for name, found in self.found.items()}
        self.description = {"format": FORMAT, "components": components, "settings": settings}

    def load(self, name: str, wanted: Any, dtype: Any = None) -> Any:
        """One component in the shapes and shardings of `wanted`; every device's part is made from the files on its own.

        Raises:
          CheckpointError: keys, shapes or dtypes do not fit; all problems are counted, the first is told.
        """
        found = self.found[name]
        shapes = {path: tuple(leaf.shape) for path, leaf in flatten(wanted).items()}
        wrong = problems(found.sources.infos, found.table, shapes, found.sources.found, found.sources.absent)
        targets = []
        if not wrong:
            targets, wrong = targets_of(found.table, shapes, found.sources, None if dtype is None else np.dtype(dtype))
        if wrong:
            raise CheckpointError(
                wrong[0] + (f" (and {len(wrong) - 1} more problems; xomni convert --plan lists them)" if len(wrong) > 1 else "")
            )
        leaves: Mapping[str, Any] = flatten(wanted)
        out = {}
        for target in targets:
            out[target.path] = jax.make_array_from_callback(target.shape, leaves[target.path].sharding, target.read, dtype=target.dtype)
            jax.block_until_ready(out[target.path])
            target.release()
        return unflatten(out)
