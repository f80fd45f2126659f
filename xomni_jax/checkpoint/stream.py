"""Streaming into Orbax: parameters that are never whole in memory, written as an ordinary checkpoint that Orbax restores on any mesh."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from xomni_jax.checkpoint.assemble import Target, blocks_of, not_finite
from xomni_jax.checkpoint.conversion import unflatten

CHUNK_BYTES = 16 * 2**20  # small enough that a device which restores an eighth of a matrix does not read all of it
PENDING_BYTES = 32 * 2**20  # what may still be written while the next block is made

# Told after every block: its bytes, and {source or parameter: "NaN" | "infinite"} of values that are no numbers.
Progress = Callable[[int, dict[str, str]], None]


def chunk_shape(shape: Sequence[int], itemsize: int, stacked: bool, limit: int = CHUNK_BYTES) -> tuple[int, ...]:
    """Shape of what is stored as one piece: one layer at most, cut evenly along its largest axes until it is below `limit` bytes."""
    chunk = [max(n, 1) for n in shape]
    if stacked and chunk:
        chunk[0] = 1
    while math.prod(chunk) * itemsize > limit:
        axis = max(range(len(chunk)), key=chunk.__getitem__)
        factor = next(p for p in range(2, chunk[axis] + 1) if chunk[axis] % p == 0)
        chunk[axis] //= factor
    if stacked and chunk:  # small layers share a piece
        chunk[0] = min(max(shape[0], 1), max(1, limit // (math.prod(chunk[1:]) * itemsize))) if chunk[1:] == list(shape[1:]) else 1
    return tuple(chunk)


def save_targets(directory: str | Path, targets: Iterable[Target], progress: Progress | None = None) -> None:
    """Writes one component's parameters; every process of a multi-host run calls this and writes its share of the blocks.

    The directory appears, whole, when all is written. While one block is made, the one before it is written, or many small ones are.
    """
    registry = ocp.type_handlers.create_type_handler_registry(
        (Target, _Writer(progress or (lambda n, odd: None))),
        (jax.Array, ocp.type_handlers.ArrayHandler()),  # unused, but Orbax warns when it is missing
    )
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=True, type_handler_registry=registry)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(Path(directory).absolute(), args=ocp.args.PyTreeSave(unflatten({t.path: t for t in targets})))


class _Writer(ocp.type_handlers.TypeHandler):
    """Orbax asks it to write `Target` leaves; the result is what Orbax's own array handler would have written."""

    def __init__(self, progress: Progress):
        self.progress, self.turn = progress, 0

    def typestr(self) -> str:
        return "jax.Array"  # which handler restores it

    async def serialize(self, values: Sequence[Target], infos: Sequence[Any], args: Any = None) -> list[Any]:
        context, pending = _context(), _Pending()
        # In the order of the files, so that a disk reads forward; layers of one parameter stay together.
        pairs = sorted(zip(values, infos), key=lambda pair: _first_source(pair[0]))
        made = []
        for target, info in pairs:
            await info.await_path_creation()
            made.append(_create(f"{_base(info.parent_dir)}ocdbt.process_{jax.process_index()}/", info.name, target, context))
        for (target, _), array in zip(pairs, made):
            self._write(target, array.result(), pending)
        pending.drain(0)
        return []

    def _write(self, target: Target, array: ts.TensorStore, pending: _Pending) -> None:
        for index in blocks_of(target, array.chunk_layout.write_chunk.shape):
            self.turn += 1  # counted over all parameters alike on every host, so that each takes its share of the small ones too
            if self.turn % jax.process_count() != jax.process_index():
                continue
            block = target.read(index)
            odd = self._odd(target, index, block)
            target.release()
            pending.add(array[index].write(block, can_reference_source_data_indefinitely=True), block.nbytes)
            self.progress(block.nbytes, odd)

    def _odd(self, target: Target, index: tuple[slice, ...], block: np.ndarray) -> dict[str, str]:
        kind = not_finite(block)
        if kind is None:
            return {}
        spans = [range(*s.indices(n)) for s, n in zip(index, target.shape)]
        found = {}
        for rule in target.rules:
            value, _ = target.rule_view(rule, spans)
            kind = None if value is None else not_finite(value)
            if kind:
                found[target.sources.found(rule.source)] = kind
        # Finite in the file, infinite here: the cast did it.
        return found or {target.path: f"not finite as {target.dtype.name}"}

    async def deserialize(self, infos: Any, args: Any = None) -> list[Any]:
        raise NotImplementedError("targets are only written; arrays are restored by Orbax's own handler")

    async def metadata(self, infos: Any) -> list[Any]:
        raise NotImplementedError("targets are only written; metadata is read by Orbax's own handler")


class _Pending:
    """Writes under way: many small ones, or one that is large."""

    def __init__(self) -> None:
        self.writes: deque[tuple[Any, int]] = deque()
        self.nbytes = 0

    def add(self, write: Any, nbytes: int) -> None:
        """Takes one more; waits for the oldest until little but this one is under way."""
        self.drain(PENDING_BYTES)
        self.writes.append((write, nbytes))
        self.nbytes += nbytes

    def drain(self, limit: int) -> None:
        """Waits until at most `limit` bytes are under way."""
        while self.writes and (self.nbytes > limit or not limit):
            write, nbytes = self.writes.popleft()
            write.result()
            self.nbytes -= nbytes


def _first_source(target: Target) -> tuple[str, str]:
    if not target.rules:
        return "", target.path
    info = target.sources.infos[target.rules[0].source]
    return str(info.file), info.key


def _base(directory: Any) -> str:
    path = str(directory).rstrip("/") + "/"
    return path if "://" in path else f"file://{path}"


def _context() -> ts.Context:
    return ts.Context({"cache_pool": {"total_bytes_limit": 0}, "data_copy_concurrency": {"limit": 2}, "file_io_concurrency": {"limit": 4}})


def _create(base: str, name: str, target: Target, context: ts.Context) -> Any:
    """A future of the new, empty array."""
    chunk = chunk_shape(target.shape, target.dtype.itemsize, target.stacked)
    kind = "bfloat16" if target.dtype.name == "bfloat16" else target.dtype.str
    spec = {
        "driver": "zarr",
        # Orbax merges the processes' own OCDBT trees when all have written.
        "kvstore": {"driver": "ocdbt", "base": base, "path": name + "/", "config": {"max_inline_value_bytes": 1024, "max_decoded_node_bytes": 10**8}},
        # No compression: trained weights hardly shrink, and it would take most of the time.
        "metadata": {"shape": target.shape, "chunks": chunk, "dtype": kind, "compressor": None, "fill_value": None},
        "store_data_equal_to_fill_value": True,
    }  # fmt: skip
    return ts.open(spec, create=True, open=True, context=context)
