"""A published directory opened as if it were converted: parameters go straight from its files into device shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np

from xomni_jax.checkpoint.component_source import ComponentSource
from xomni_jax.checkpoint.conversion import ConversionError, flatten, unflatten
from xomni_jax.checkpoint.formats import detect_format
from xomni_jax.checkpoint.released import FILE_ONLY, PARTS, MissingPart, open_release
from xomni_jax.checkpoint.store import FORMAT, CheckpointError, config_to_json


class ReleasedModel:
    """A published directory, with what `XOmni` needs of a model directory.

    Attributes:
      description: as in model.json.
      errors: {component: why it cannot be read}, to be raised when it is used.
      folders: {"tokenizer", "tokenizer_t5", "tokenizer_clip": directory}, as far as they exist.
    """

    def __init__(self, path: str | Path, flux: str | Path | None = None):
        self.path = Path(path)
        if detect_format(path) == "flux":
            path, flux = None, path
        self.components: dict[str, ComponentSource] = {}
        self.errors: dict[str, str] = {}
        self.folders: dict[str, Path] = {}
        settings: dict[str, dict[str, Any]] = {}
        for only, names in PARTS.items():
            try:
                release = open_release(path, flux, only)
            except MissingPart:
                continue
            except ConversionError as e:
                self.errors |= dict.fromkeys((part for part in names if part not in FILE_ONLY), str(e))
                continue
            self.components |= release.components
            self.folders |= release.tokenizers
            for name, fields in release.settings.items():
                settings[name] = settings.get(name, {}) | fields
        components = {name: {"config": config_to_json(part.config), "note": {}} for name, part in self.components.items()}
        self.description = {"format": FORMAT, "components": components, "settings": settings}

    def load(self, name: str, wanted: Any, dtype: Any = None) -> Any:
        """One component in the shapes and shardings of `wanted`; each device's shard is read from the files on its own.

        Raises:
          CheckpointError: keys, shapes or dtypes do not fit; the message has the first problem and their number.
        """
        leaves = flatten(wanted)
        shapes = {path: tuple(leaf.shape) for path, leaf in leaves.items()}
        readers, wrong = self.components[name].readers(shapes, None if dtype is None else np.dtype(dtype))
        if wrong:
            more = f" (and {len(wrong) - 1} more problems; xomni convert --plan lists them)" if len(wrong) > 1 else ""
            raise CheckpointError(wrong[0] + more)
        out = {}
        for reader in readers:
            out[reader.path] = jax.make_array_from_callback(reader.shape, leaves[reader.path].sharding, reader.read, dtype=reader.dtype)
            jax.block_until_ready(out[reader.path])
            reader.release()
        return unflatten(out)
