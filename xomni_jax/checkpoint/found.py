"""What was found in the given directories: components with their tensors, settings, tokenizers; nothing is computed."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from flax.linen import meta

from xomni_jax.checkpoint.assemble import FLOATS, Sources, usual_dtype
from xomni_jax.checkpoint.conversion import ConversionError, Table, flatten
from xomni_jax.models.mmdit import MMDiTConfig
from xomni_jax.models.registry import init_params


@dataclasses.dataclass(frozen=True)
class NewParts:
    """Sizes of what a plain model lacks (the released ones by default), and the seed it is drawn from.

    `semantic_dim`, of the decoder's semantic input, is the image tokenizer's width where that is known.
    """

    image_vocab_size: int = 16384
    mm_vocab_size: int = 16448
    adapter_layers: int = 4
    head_layers: int = 4
    code_width: int = 2048
    semantic_dim: int = MMDiTConfig.semantic_dim
    seed: int = 0


@dataclasses.dataclass
class Found:
    """One component: where it is and what it becomes.

    Attributes:
      original: its `config.json`, kept so that an export can give it back.
    """

    name: str
    config: Any
    table: Table
    sources: Sources
    original: dict[str, Any]

    def wanted(self) -> dict[str, tuple[int, ...]]:
        """{path: shape} of the parameters."""
        return wanted_shapes(self.name, self.config)


@dataclasses.dataclass
class Release:
    """Everything found in the given directories.

    Attributes:
      settings: {name: fields} of how the model is run, as model.json keeps them. tokenizers: {folder of the model directory: source folder}.
      extend: whether the text tokenizer must be given image tokens (a plain language model's). notes: lines for the user.
    """

    components: dict[str, Found] = dataclasses.field(default_factory=dict)
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    tokenizers: dict[str, Path] = dataclasses.field(default_factory=dict)
    extend: bool = False
    notes: list[str] = dataclasses.field(default_factory=list)
    parts: NewParts = NewParts()


def wanted_shapes(name: str, config: Any) -> dict[str, tuple[int, ...]]:
    """{path: shape} of a component's parameters; nothing is computed."""
    return dict(_shapes(name, config))


@functools.lru_cache(maxsize=32)  # tracing a model takes seconds
def _shapes(name: str, config: Any) -> dict[str, tuple[int, ...]]:
    tree = meta.unbox(jax.eval_shape(lambda: init_params(name, config, jax.random.key(0))))
    return {path: tuple(leaf.shape) for path, leaf in flatten(tree).items()}


def finish(name: str, config: Any, table: Table, sources: Sources, original: Mapping[str, Any]) -> Found:
    """A component whose config says the dtype that is stored, and that it computes in: bfloat16 if that is stored, else float32."""
    stored = usual_dtype(sources, table)
    stored = stored if stored in FLOATS else np.dtype(np.float32)  # others are refused, or cast
    run = stored if stored == ml_dtypes.bfloat16 else np.dtype(np.float32)
    return Found(name, dataclasses.replace(config, dtype=run, param_dtype=stored), table, sources, dict(original))


def count(sources: Sources, pattern: str) -> int:
    """Layers that the keys number: one more than the highest."""
    return max((int(m[1]) for key in sources.infos if (m := re.match(pattern, key))), default=-1) + 1


def shape_of(sources: Sources, key: str, rank: int) -> tuple[int, ...]:
    """Shape of a tensor that sizes are read from."""
    if key not in sources.infos:
        raise ConversionError(f"{sources.absent(key)}: missing from the checkpoint")
    shape = tuple(sources.infos[key].shape)
    if len(shape) != rank or 0 in shape:
        raise ConversionError(f"{sources.found(key)}: shape {shape}, expected {rank} dimensions")
    return shape
