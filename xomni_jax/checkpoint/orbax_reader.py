"""Reads an Orbax checkpoint piece by piece: one array, or one layer of a stacked array, at a time."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from xomni_jax.checkpoint.store import DAMAGED, CheckpointError, array_metadata, reading

SMALL = 4 * 2**20  # bytes; smaller arrays are read whole and kept


class OrbaxReader:
    """The arrays of one component's directory, written by a conversion or by a training run alike.

    Attributes:
      arrays: {path: object with shape and dtype}.
      spill: a folder for large arrays whose chunks hold several layers; each is copied there once, and its layers are read from the copy.
    """

    def __init__(self, directory: str | Path, spill: str | Path | None = None):
        self.directory, self.spill = Path(directory).absolute(), spill
        if not self.directory.is_dir():
            raise CheckpointError(f"{self.directory}: this model directory has no {self.directory.name}; train or convert it first")
        with ocp.StandardCheckpointer() as checkpointer:
            self.arrays = reading(lambda: array_metadata(checkpointer, self.directory), f"{self.directory}: {DAMAGED}")
        self._open: dict[str, ts.TensorStore] = {}
        self._context = ts.Context({"cache_pool": {"total_bytes_limit": 16 * 2**20}})  # for the directory of arrays, which all share
        self._kept: dict[str, np.ndarray] = {}

    def _array(self, path: str) -> ts.TensorStore:
        if path not in self._open:
            name, base = path.replace("/", "."), f"file://{self.directory}/"
            kvstore: dict[str, Any] = {"driver": "file", "path": f"{self.directory}/{name}/"}
            if (self.directory / "manifest.ocdbt").exists():
                kvstore = {"driver": "ocdbt", "base": base, "path": name + "/"}
            spec = {"driver": "zarr", "kvstore": kvstore, "fill_missing_data_reads": False}
            self._open[path] = ts.open(spec, open=True, context=self._context).result()
        return self._open[path]

    def check(self) -> None:
        """Raises CheckpointError where a file of values is missing or cut off; reads the list of their places, not the values."""
        reading(self._check, f"{self.directory}: {DAMAGED}")

    def _check(self) -> None:
        if not (self.directory / "manifest.ocdbt").exists():
            return
        base = ts.KvStore.open(f"file://{self.directory}/").result()
        nodes = [ts.ocdbt.dump(base).result()["versions"][-1]["root"]["location"]]
        while nodes:
            for entry in ts.ocdbt.dump(base, nodes.pop()).result()["entries"]:
                nodes += [entry["location"]] if "location" in entry else []
                if "indirect_value" in entry:
                    _, folder, name, offset, length = entry["indirect_value"].split(":")
                    file = self.directory / (folder + name)
                    if not file.is_file() or file.stat().st_size < int(offset) + int(length):
                        raise ValueError(f"{folder}{name} is {'cut off' if file.is_file() else 'missing'}")

    def read(self, path: str, index: Any = ...) -> np.ndarray:
        """A rectangle of one array, or one layer of it by its number.

        Raises:
          CheckpointError: damaged.
        """
        return reading(lambda: self._read(path, index), f"{self.directory}: {path} {DAMAGED}")

    def _read(self, path: str, index: Any) -> np.ndarray:
        if path in self._kept:
            return self._kept[path][index]
        store = self._array(path)
        nbytes = math.prod(store.shape) * store.dtype.numpy_dtype.itemsize
        if nbytes <= SMALL:
            self._kept[path] = store.read().result()
            return self._kept[path][index]
        if isinstance(index, int) and self.spill is not None and store.chunk_layout.read_chunk.shape[0] > 1:
            self._kept[path] = self._spilled(store)
            return self._kept[path][index]
        return store[index].read().result()

    def _spilled(self, store: ts.TensorStore) -> np.ndarray:
        file = tempfile.TemporaryFile(dir=self.spill)
        whole = store.read().result()
        file.write(np.ascontiguousarray(whole).reshape(-1).view(np.uint8).data)
        file.flush()
        return np.memmap(file, whole.dtype, "r", shape=whole.shape)
