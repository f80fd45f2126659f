"""Published checkpoints that are one file without a config: what it holds and its sizes are read from names and shapes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from xomni_jax.checkpoint.component_source import ComponentSource, component_source, layer_count, shape_of
from xomni_jax.checkpoint.conversion import ConversionError
from xomni_jax.checkpoint.names import llamagen_vq
from xomni_jax.checkpoint.tensor_file import TensorFile
from xomni_jax.checkpoint.tensors import TensorFiles, open_tensor_file
from xomni_jax.models.llamagen_vq import LlamaGenVQConfig

GROUPS = 32  # of LlamaGen's GroupNorms


def open_file(path: Path) -> dict[str, Callable[..., ComponentSource]]:
    """{component: opens it} of the file. The opener takes fields of the config that no tensor shows, in place of their defaults.

    Raises:
      ConversionError: it is no file of tensors, or of another model.
    """
    file = open_tensor_file(path)
    for component, (known, read) in FILES.items():
        if any(key == known or key.endswith("." + known) for key in file.infos):
            return {component: functools.partial(read, file, known)}
    raise ConversionError(f"{path}: holds none of {', '.join(FILES)}; give such a file, or the directory of a downloaded checkpoint")


def _llamagen_vq(file: TensorFile, known: str, **fields: Any) -> ComponentSource:
    sources = TensorFiles().add(file, known=known)
    codes, code_width = shape_of(sources, "quantize.embedding.weight", 2)
    levels = range(layer_count(sources, r"encoder\.conv_blocks\."))
    cfg = _config(
        file,
        LlamaGenVQConfig,
        codebook_size=codes,
        code_width=code_width,
        z_channels=shape_of(sources, "quant_conv.weight", 4)[1],
        in_features=shape_of(sources, "encoder.conv_in.weight", 4)[0],
        block_channels=tuple(shape_of(sources, f"encoder.conv_blocks.{i}.res.0.conv1.weight", 4)[0] for i in levels),
        layers_per_block=layer_count(sources, r"encoder\.conv_blocks\.0\.res\."),
        groups=GROUPS,
        **fields,
    )
    return component_source("llamagen_vq", cfg, llamagen_vq.table(cfg), sources)


def _config(file: TensorFile, cls: type, **fields: Any) -> Any:
    """A config dataclass; its errors name the file."""
    try:
        return cls(**fields)
    except ValueError as error:
        raise ConversionError(f"{file.path}: {error}") from None


# Component -> a key that tells its files from others, and how they are read.
FILES: dict[str, tuple[str, Callable[..., ComponentSource]]] = {
    "llamagen_vq": ("encoder.conv_blocks.0.res.0.conv1.weight", _llamagen_vq),
}
