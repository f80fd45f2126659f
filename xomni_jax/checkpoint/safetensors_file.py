"""safetensors: a reader of memory-mapped tensors, and a writer that streams tensors into shards.

The format: 8 bytes (u64, header length), a JSON object {key: {dtype, shape, data_offsets}}, then the tensors' bytes, gapless.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from xomni_jax.checkpoint.tensor_file import LazyTensor, TensorFile, TensorFileError, reason, show, synced_file, write_tensor

# In the order in which the safetensors package lays tensors out (largest alignment first), so that our files equal its files.
_DTYPES = """
    U64 uint64, I64 int64, F64 float64, C64 complex64, F32 float32, U32 uint32, I32 int32, BF16 bfloat16, F16 float16, U16 uint16,
    I16 int16, F8_E5M2FNUZ float8_e5m2fnuz, F8_E4M3FNUZ float8_e4m3fnuz, F8_E8M0 float8_e8m0fnu, F8_E4M3 float8_e4m3fn, F8_E5M2 float8_e5m2,
    I8 int8, U8 uint8, BOOL bool
"""
DTYPES = {name: np.dtype(getattr(ml_dtypes, ours, ours)) for name, ours in (pair.split() for pair in _DTYPES.split(","))}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
ORDER = {name: i for i, name in enumerate(DTYPES)}
DAMAGED = "the file is damaged or cut off; download it again"


class SafetensorsFile(TensorFile):
    """A readable .safetensors file. The safetensors package reads and checks the header; the values stay in our memory map.

    The package's own tensors would be copies, and its numpy has no bfloat16. As it admits only gapless files, where each tensor lies
    follows from the sizes of those before it.

    Raises:
      TensorFileError: at construction: damaged, or of a dtype that numpy and ml_dtypes lack.
    """

    def __init__(self, path: str | Path, data: mmap.mmap | bytes | None = None):
        super().__init__(path, data)
        offset = 8 + int.from_bytes(self.data[:8], "little")
        try:
            with safe_open(self.path, "numpy") as file:
                slices = {key: file.get_slice(key) for key in file.offset_keys()}
                self.tied = file.metadata() or {}  # save_model writes {name that was left out: key}
        except SafetensorError as e:
            what = reason(e).removeprefix("Error while deserializing header: ")
            raise TensorFileError(f"{self.path}: its header cannot be read ({what}); {DAMAGED}") from None
        for key, part in slices.items():
            dtype, shape = part.get_dtype(), tuple(part.get_shape())
            if dtype not in DTYPES:
                raise TensorFileError(
                    f"{self.path}: {show(key)} has dtype {dtype}, this reader knows {', '.join(DTYPES)}; store it in one of them"
                )
            self.place(key, DTYPES[dtype], shape, offset)
            offset += self.infos[key].nbytes


# ---- writing ----
def write_safetensors(
    folder: str | Path, tensors: Mapping[str, LazyTensor], shard_bytes: int = 5_000_000_000, name: str = "model"
) -> list[Path]:
    """Writes tensors as Hugging Face libraries do: one `name`.safetensors, or numbered shards and `name`.safetensors.index.json.

    One tensor at a time is made and written. The folder must hold no earlier result of that name, and is incomplete after an error.

    Args:
      folder: made if needed.
      tensors: of the dtypes in `DTYPES`.
      shard_bytes: the most tensor bytes in one shard; a tensor larger than this gets its own shard.
      name: the stem of the files, such as "model" or "diffusion_pytorch_model".

    Returns:
      The files with tensors, in order.

    """
    folder = Path(folder)
    shards = shards_of(tensors, shard_bytes)
    files = [folder / f"{name}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        files = [folder / f"{name}.safetensors"]
    for path, keys in zip(files, shards, strict=True):
        write_file(path, {key: tensors[key] for key in keys})
    if len(shards) > 1:
        weight_map = {key: path.name for path, keys in zip(files, shards, strict=True) for key in keys}
        index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": dict(sorted(weight_map.items()))}
        with synced_file(folder / f"{name}.safetensors.index.json") as file:
            file.write((json.dumps(index, indent=2) + "\n").encode())
    return files


def shards_of(tensors: Mapping[str, LazyTensor], shard_bytes: int) -> list[list[str]]:
    """Keys in the given order, cut into groups of at most `shard_bytes`."""
    groups: list[list[str]] = [[]]
    room = shard_bytes
    for key, tensor in tensors.items():
        if groups[-1] and tensor.nbytes > room:
            groups.append([])
            room = shard_bytes
        groups[-1].append(key)
        room -= tensor.nbytes
    return groups


def write_file(path: Path, tensors: Mapping[str, LazyTensor]) -> None:
    """Writes one file, byte for byte as the safetensors package would with the metadata {"format": "pt"}, which transformers requires."""
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key in sorted(tensors, key=lambda key: (ORDER[NAMES[tensors[key].dtype]], key)):
        begin, end = end, end + tensors[key].nbytes
        table[key] = {"dtype": NAMES[tensors[key].dtype], "shape": list(tensors[key].shape), "data_offsets": [begin, end]}
    header = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with synced_file(path) as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for key in list(table)[1:]:
            write_tensor(file, tensors[key])


def lora_only(keys: Sequence[str]) -> bool:
    """Whether a file holds nothing but low-rank updates (PEFT, diffusers and kohya names)."""
    words = "lora_A lora_B lora_up lora_down lora.up lora.down lora_embedding lora_magnitude .alpha hada_w lokr_w".split()
    return bool(keys) and any("lora" in k or "hada_" in k or "lokr_" in k for k in keys) and all(any(w in k for w in words) for k in keys)
