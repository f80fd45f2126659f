"""A released X-Omni directory without a release: the real layout, keys and widths, few layers, random values."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from xomni_jax.checkpoint import released_configs as configs
from xomni_jax.checkpoint.component_source import wanted_shapes
from xomni_jax.checkpoint.conversion import NameTable
from xomni_jax.checkpoint.names import mmdit, siglip_vq, transformer
from xomni_jax.checkpoint.safetensors_file import write_safetensors
from xomni_jax.checkpoint.store import write_json
from xomni_jax.checkpoint.tensor_file import LazyTensor
from xomni_jax.checkpoint.torch_file import write_torch_file
from xomni_jax.models.mmdit import MMDiTConfig
from xomni_jax.models.siglip_vq import SigLIPVQConfig
from xomni_jax.models.transformer import PRESETS

BF16, F32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)


@dataclasses.dataclass(frozen=True)
class Parts:
    """Configs of the three components."""

    transformer: Any
    siglip_vq: SigLIPVQConfig
    mmdit: MMDiTConfig


def released_widths(nbytes: int) -> Parts:
    """The released widths, with as many language layers as make at least `nbytes` bytes.

    The text vocabulary is cut to 32,768: its tables would be the largest tensors, and peak memory is judged against twice the largest.
    """
    vit = SigLIPVQConfig(width=1536, layers=4, heads=16, mlp=6144)
    decoder = MMDiTConfig(n_double=1, n_single=2)
    full = dataclasses.replace(PRESETS["xomni-7b"], vocab_size=32_768, n_adapter_layers=1, n_head_layers=1, n_language_layers=1)
    fixed = size("siglip_vq", vit, F32) + size("mmdit", decoder, BF16)
    one, two = (size("transformer", dataclasses.replace(full, n_language_layers=n), BF16) for n in (1, 2))
    layers = max(1, 1 + math.ceil((nbytes - fixed - one) / (two - one)))
    return Parts(dataclasses.replace(full, n_language_layers=layers), vit, decoder)


def size(name: str, cfg: Any, dtype: np.dtype) -> int:
    """Bytes of a component's parameters."""
    return sum(map(math.prod, wanted_shapes(name, cfg).values())) * dtype.itemsize


def tensors(name: str, cfg: Any, table: NameTable, dtype: np.dtype) -> Iterator[tuple[str, LazyTensor]]:
    """{released key: random values}, each made when it is written."""
    shapes, rng = wanted_shapes(name, cfg), np.random.default_rng(0)
    block = rng.standard_normal(2**20, np.float32).astype(dtype)
    for rule in table.rules:
        target = np.broadcast_to(np.int8(0), shapes[rule.target])
        shape = rule.transform.to_torch(target[rule.place(target.ndim)]).shape
        n = math.prod(shape)

        def make(shape: tuple[int, ...] = shape, n: int = n, shift: int = int(rng.integers(2**20))) -> np.ndarray:
            return np.resize(np.roll(block, shift), n).reshape(shape)

        yield rule.source, LazyTensor(dtype, shape, make)


def write_released(folder: Path, parts: Parts, shard_bytes: int = 1_000_000_000) -> None:
    """The directory."""
    vision = {
        "dtype": "bfloat16",
        "encoder": {"siglip_name": "siglip2_giant_patch16_384", "siglip_path": "siglip.pth", "projector_path": "projector.pth"},
        "decoder": {"model_path": "mmdit"},
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", configs.write_transformer(parts.transformer) | {"vision_config": vision})
    write_safetensors(folder, dict(tensors("transformer", parts.transformer, transformer.table(parts.transformer), BF16)), shard_bytes)
    write_torch_file(folder / "siglip.pth", dict(tensors("siglip_vq", parts.siglip_vq, siglip_vq.vit_table(parts.siglip_vq), F32)))
    write_torch_file(folder / "projector.pth", dict(tensors("siglip_vq", parts.siglip_vq, siglip_vq.projector_table(parts.siglip_vq), F32)))
    (folder / "mmdit").mkdir(exist_ok=True)
    write_json(folder / "mmdit" / "config.json", configs.write_mmdit(parts.mmdit))
    write_safetensors(
        folder / "mmdit", dict(tensors("mmdit", parts.mmdit, mmdit.table(parts.mmdit), BF16)), shard_bytes, "diffusion_pytorch_model"
    )
