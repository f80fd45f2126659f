"""What a conversion reports: the table of its plan, and conversion.json beside the checkpoint."""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from xomni_jax.checkpoint.conversion import Rule, ignored_rule
from xomni_jax.checkpoint.conversion_plan import ConversionPlan
from xomni_jax.core.tables import bytes_text


def plan_lines(plan: ConversionPlan) -> Iterator[str]:
    """The plan as a table: every source key, its transformation, and the parameter it becomes."""
    for name, params in plan.params.items():
        part = plan.release.components[name]
        count, size = sum(math.prod(p.shape) for p in params), sum(p.nbytes for p in params)
        yield f"{name}: {count:,} parameters in {len(params)} arrays, {bytes_text(size)}"
        for param in params:
            for rule in param.rules:
                info = part.sources.infos[rule.source]
                dtype = info.dtype.name if info.dtype == param.dtype else f"{info.dtype.name} -> {param.dtype.name}"
                yield f"  {info.key}  {dtype} {list(info.shape)}  {rule.transform.name}  {param.path}{_index_text(rule)}"
            if param.init:
                yield f"  (new)  {param.dtype.name} {list(param.shape)}  {param.init.initializer.description}  {param.path}"
        for key, info in part.sources.infos.items():
            if ignored := ignored_rule(key, part.table):
                yield f"  {info.key}  dropped: {ignored.reason}"


def _index_text(rule: Rule) -> str:
    """The place of a tensor in a parameter that several tensors fill: "[3]" or "[3] part 0"."""
    return ("" if rule.layer is None else f"[{rule.layer}]") + ("" if rule.part is None else f" part {rule.part[1]}")


def report_of(plan: ConversionPlan, hashes: dict[str, str], not_finite: dict[str, str]) -> dict[str, Any]:
    """The report: files with their sha256, and for every source key what became of it."""
    components: dict[str, Any] = {}
    for name, params in plan.params.items():
        part = plan.release.components[name]
        infos, taken, new, dropped = part.sources.infos, [], [], []
        for param in params:
            for rule in param.rules:
                info = infos[rule.source]
                source = {"file": str(info.file), "key": info.key, "dtype": info.dtype.name, "shape": list(info.shape)}
                target = {"target": param.path, "layer": rule.layer, "part": rule.part and rule.part[1]}
                taken.append(source | target | {"transform": rule.transform.name, "stored_dtype": param.dtype.name})
            if param.init:
                how = {"how": param.init.initializer.description, "seed": param.seed, "stored_dtype": param.dtype.name}
                new.append({"target": param.path, "shape": list(param.shape), **how})
        for key, info in infos.items():
            if ignored := ignored_rule(key, part.table):
                dropped.append({"file": str(info.file), "key": info.key, "reason": ignored.reason})
        components[name] = {"taken": taken, "new": new, "dropped": dropped}
    return {"files": hashes, "components": components, "not_finite": not_finite}


class Hashes:
    """sha256 of files, computed by a thread during the conversion; leaving the block without `result` stops it."""

    def __init__(self, files: list[str]):
        self.files, self._stop, self._pool = files, threading.Event(), ThreadPoolExecutor(1)

    def __enter__(self) -> Hashes:
        self._future = self._pool.submit(lambda: {file: self._one(file) for file in self.files})
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        self._pool.shutdown()

    def result(self) -> dict[str, str]:
        """{file: sha256}, once all are done."""
        return self._future.result()

    def _one(self, file: str) -> str:
        digest, block = hashlib.sha256(), memoryview(bytearray(4 * 2**20))
        with open(file, "rb", buffering=0) as source:
            while not self._stop.is_set() and (n := source.readinto(block)):
                digest.update(block[:n])
        return digest.hexdigest()
