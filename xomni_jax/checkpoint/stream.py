"""Writes parameters block by block as an ordinary Orbax checkpoint, which any mesh can restore; no parameter is whole in memory."""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from xomni_jax.checkpoint.conversion import unflatten
from xomni_jax.checkpoint.param_reader import ParamReader, blocks_of, chunks_of, not_finite

CHUNK_BYTES = 16 * 2**20  # small enough that a device which restores an eighth of a matrix does not read all of it
BUFFERS = 4  # chunks that are being made or written; OCDBT puts those that wait for it into one file


def chunk_shape(shape: Sequence[int], itemsize: int, stacked: bool, limit: int = CHUNK_BYTES) -> tuple[int, ...]:
    """Shape of the chunks in which an array is stored: a layer, cut evenly along its largest axes until it is below `limit` bytes."""
    chunk = [max(n, 1) for n in shape]
    if stacked and chunk:
        chunk[0] = 1
    while math.prod(chunk) * itemsize > limit:
        axis = max(range(len(chunk)), key=chunk.__getitem__)
        factor = next(p for p in range(2, chunk[axis] + 1) if chunk[axis] % p == 0)
        chunk[axis] //= factor
    if stacked and chunk and chunk[1:] == list(shape[1:]):  # small layers share a chunk
        chunk[0] = min(max(shape[0], 1), max(1, limit // (math.prod(chunk[1:]) * itemsize)))
    return tuple(chunk)


def save_params(
    directory: str | Path, params: Iterable[ParamReader], progress: Callable[[int], None] = lambda nbytes: None
) -> dict[str, str]:
    """Writes one component's parameters; every process of a multi-host run calls this and writes its share of the blocks.

    The directory appears, complete and on disk, when all is written. While one chunk is made, the ones before it are written.

    Args:
      progress: called with the bytes of each block after it, whichever process wrote it.

    Returns:
      {source tensor or parameter: "NaN" | "infinite"}, of values that this process wrote.
    """
    writer = _Writer(progress)
    registry = ocp.type_handlers.create_type_handler_registry(
        (ParamReader, writer),
        (jax.Array, ocp.type_handlers.ArrayHandler()),  # unused, but Orbax warns when it is missing
    )
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=True, type_handler_registry=registry)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(Path(directory).absolute(), args=ocp.args.PyTreeSave(unflatten({p.path: p for p in params})))
    return writer.not_finite


class _Writer(ocp.type_handlers.TypeHandler):
    """Orbax asks it to write `ParamReader` leaves; the result is what Orbax's own array handler would have written."""

    def __init__(self, progress: Callable[[int], None]) -> None:
        self.not_finite: dict[str, str] = {}
        self.progress, self.turn = progress, 0

    def typestr(self) -> str:
        return "jax.Array"  # which handler restores it

    async def serialize(self, values: Sequence[ParamReader], infos: Sequence[Any], args: Any = None) -> list[Any]:
        limits = {"cache_pool": {"total_bytes_limit": 0}, "data_copy_concurrency": {"limit": 2}, "file_io_concurrency": {"limit": 4}}
        # Files are synced once, at the end: TensorStore would wait for the disk at each of them.
        context, buffers = ts.Context(limits | {"file_io_sync": False}), _Buffers()
        # In the order of the files, so that a disk reads forward; layers of one parameter stay together.
        pairs = sorted(zip(values, infos), key=lambda pair: _first_source(pair[0]))
        arrays, base = [], f"{_base(infos[0].parent_dir)}ocdbt.process_{jax.process_index()}/"
        for param, info in pairs:
            await info.await_path_creation()
            arrays.append(_create(base, info.name, param, context))
        for (param, _), array in zip(pairs, arrays):
            self._write(param, array.result(), buffers)
        buffers.drain()
        _sync(base)
        return []

    def _write(self, param: ParamReader, array: ts.TensorStore, buffers: _Buffers) -> None:
        chunk = array.chunk_layout.write_chunk.shape
        for index in blocks_of(param, chunk):
            self.turn += 1  # counted over all parameters alike on every host, so that each takes its share of the small ones too
            if self.turn % jax.process_count() == jax.process_index():
                # A whole chunk in C order is written from where it lies. New parameters are drawn in whole layers.
                for part in [index] if param.init else chunks_of(index, chunk):
                    values = param.read(part, buffers.take([s.stop - s.start for s in part], param.dtype))
                    if not_finite(values):
                        self._note_not_finite(param, part)
                    buffers.give(array[part].write(values, can_reference_source_data_indefinitely=True))
                param.release()
            self.progress(param.dtype.itemsize * math.prod(s.stop - s.start for s in index))

    def _note_not_finite(self, param: ParamReader, index: tuple[slice, ...]) -> None:
        spans = [range(*s.indices(n)) for s, n in zip(index, param.shape)]
        values = {param.sources.describe(rule.source): param.rule_view(rule, spans)[0] for rule in param.rules}
        found = {name: kind for name, value in values.items() if value is not None and (kind := not_finite(value))}
        # Finite in the file, infinite here: the cast did it.
        self.not_finite |= found or {param.path: f"not finite as {param.dtype.name}"}

    async def deserialize(self, infos: Any, args: Any = None) -> list[Any]:
        raise NotImplementedError("parameters are only written; arrays are restored by Orbax's own handler")

    async def metadata(self, infos: Any) -> list[Any]:
        raise NotImplementedError("parameters are only written; metadata is read by Orbax's own handler")


class _Buffers:
    """Memory of the chunks in progress, used again: fresh pages would have to be cleared, and freed ones pile up in the heap."""

    def __init__(self) -> None:
        self.free = [np.empty(CHUNK_BYTES, np.uint8) for _ in range(BUFFERS)]
        self.writes: deque[tuple[Any, np.ndarray]] = deque()

    def take(self, shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
        """An array to be filled and then written; waits for the oldest write if all memory is in use."""
        if not self.free:
            self._finish()
        nbytes = math.prod(shape) * dtype.itemsize
        self.taken = self.free.pop()
        memory = self.taken if nbytes <= CHUNK_BYTES else np.empty(nbytes, np.uint8)
        return memory[:nbytes].view(dtype).reshape(shape)

    def give(self, write: Any) -> None:
        """Takes note of the write of what was taken last."""
        self.writes.append((write, self.taken))

    def drain(self) -> None:
        """Waits for all writes."""
        while self.writes:
            self._finish()

    def _finish(self) -> None:
        write, memory = self.writes.popleft()
        write.result()
        self.free.append(memory)


def _sync(base: str) -> None:
    """Waits until the files of a local directory are on disk."""
    for path in Path(base.removeprefix("file://")).rglob("*") if base.startswith("file://") else ():
        file = os.open(path, os.O_RDONLY)  # a directory too, for the names in it
        try:
            os.fsync(file)
        finally:
            os.close(file)


def _first_source(param: ParamReader) -> tuple[str, str]:
    if not param.rules:
        return "", param.path
    info = param.sources.infos[param.rules[0].source]
    return str(info.file), info.key


def _base(directory: Any) -> str:
    path = str(directory).rstrip("/") + "/"
    return path if "://" in path else f"file://{path}"


def _create(base: str, name: str, param: ParamReader, context: ts.Context) -> Any:
    """A future of the new, empty array."""
    chunk = chunk_shape(param.shape, param.dtype.itemsize, param.stacked)
    config = {"max_inline_value_bytes": 1024, "max_decoded_node_bytes": 10**8}
    kind = "bfloat16" if param.dtype.name == "bfloat16" else param.dtype.str
    spec = {
        "driver": "zarr",
        # Orbax merges the processes' own OCDBT trees when all have written.
        "kvstore": {"driver": "ocdbt", "base": base, "path": name + "/", "config": config},
        # No compression: trained weights hardly shrink, and it would take most of the time.
        "metadata": {"shape": param.shape, "chunks": chunk, "dtype": kind, "compressor": None, "fill_value": None},
        "store_data_equal_to_fill_value": True,
    }  # fmt: skip
    return ts.open(spec, create=True, open=True, context=context)
