"""A component as found in published files: its tensors, its config, and the table that maps one to the other."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from flax.linen import meta

from xomni_jax.checkpoint.conversion import ConversionError, NameTable, flatten, problems
from xomni_jax.checkpoint.param_reader import FLOATS, ParamReader, param_readers, usual_dtype
from xomni_jax.checkpoint.tensors import TensorFiles
from xomni_jax.models.mmdit import MMDiTConfig
from xomni_jax.models.registry import boxed_shapes


@dataclasses.dataclass(frozen=True)
class NewParts:
    """Sizes of the parts that a plain model lacks, by default as released, and the seed of their initial values.

    `semantic_dim` is the width of the decoder's semantic input; where an image tokenizer is converted, its width is used instead.
    `heads` (0: those of the published size) and `columns`, of the grid of codes, are what no tensor of a LlamaGen model shows.
    """

    image_vocab_size: int = 16384
    mm_vocab_size: int = 16448
    adapter_layers: int = 4
    head_layers: int = 4
    code_width: int = 2048
    semantic_dim: int = MMDiTConfig.semantic_dim
    heads: int = 0
    columns: int = 16
    seed: int = 0


@dataclasses.dataclass
class ComponentSource:
    """One component of a published checkpoint, and what it becomes."""

    name: str
    config: Any
    table: NameTable
    sources: TensorFiles

    def readers(
        self, wanted: Mapping[str, tuple[int, ...]] | None = None, dtype: np.dtype | None = None, seed: int = 0
    ) -> tuple[list[ParamReader], list[str]]:
        """(a reader of each parameter, every problem with keys, shapes and dtypes); `wanted` defaults to the shapes of the config."""
        wanted = wanted_shapes(self.name, self.config) if wanted is None else wanted
        wrong = problems(self.sources.infos, self.table, wanted, self.sources.describe, self.sources.describe_missing)
        return ([], wrong) if wrong else param_readers(self.table, wanted, self.sources, dtype, seed)


@dataclasses.dataclass
class Release:
    """Everything found in the given directories.

    Attributes:
      settings, released: as in model.json, see `checkpoint.store`.
      tokenizers: {folder in the model directory: source folder}.
      extend: whether image tokens must be added to the text tokenizer, which is then a plain language model's.
      notes: lines for the user.
    """

    components: dict[str, ComponentSource] = dataclasses.field(default_factory=dict)
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    released: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    tokenizers: dict[str, Path] = dataclasses.field(default_factory=dict)
    extend: bool = False
    notes: list[str] = dataclasses.field(default_factory=list)
    parts: NewParts = NewParts()


@functools.lru_cache(maxsize=32)  # tracing a model takes seconds
def wanted_shapes(name: str, config: Any) -> dict[str, tuple[int, ...]]:
    """{path: shape} of a component's parameters; nothing is computed."""
    return {path: tuple(leaf.shape) for path, leaf in flatten(meta.unbox(boxed_shapes(name, config))).items()}


def component_source(name: str, config: Any, table: NameTable, sources: TensorFiles) -> ComponentSource:
    """The component with the stored dtype in its config. It computes in bfloat16 if that is stored, else in float32."""
    stored = usual_dtype(sources, table)
    stored = stored if stored in FLOATS else np.dtype(np.float32)  # others are refused, or cast
    compute = stored if stored == ml_dtypes.bfloat16 else np.dtype(np.float32)
    return ComponentSource(name, dataclasses.replace(config, dtype=compute, param_dtype=stored), table, sources)


def layer_count(sources: TensorFiles, prefix: str) -> int:
    """Number of layers, from the highest number that follows the pattern `prefix` in the keys."""
    return max((int(m[1]) for key in sources.infos if (m := re.match(prefix + r"(\d+)\.", key))), default=-1) + 1


def shape_of(sources: TensorFiles, key: str, rank: int) -> tuple[int, ...]:
    """Shape of a tensor from which a config's sizes are read."""
    if key not in sources.infos:
        raise ConversionError(f"{sources.describe_missing(key)}: missing from the checkpoint")
    shape = sources.infos[key].shape
    if len(shape) != rank or 0 in shape:
        raise ConversionError(f"{sources.describe(key)}: shape {shape}, expected {rank} dimensions")
    return shape
