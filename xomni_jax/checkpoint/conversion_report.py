"""What a conversion says of itself: the table of its plan, and the report kept beside the checkpoint."""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xomni_jax.checkpoint.conversion import drop_of

if TYPE_CHECKING:
    from xomni_jax.checkpoint.convert import Plan


def plan_lines(plan: Plan) -> Iterator[str]:
    """The plan as a table: every source key, what is done to it, and where it goes."""
    for name, targets in plan.targets.items():
        part = plan.release.components[name]
        count, size = sum(math.prod(t.shape) for t in targets), sum(t.nbytes for t in targets)
        yield f"{name}: {count:,} parameters in {len(targets)} arrays, {size / 1e9:.3f} GB"
        for target in targets:
            for rule in target.rules:
                info = part.sources.infos[rule.source]
                kind = info.dtype.name if info.dtype == target.dtype else f"{info.dtype.name} -> {target.dtype.name}"
                yield f"  {info.key}  {kind} {list(info.shape)}  {rule.fit.name}  {target.path}{place_text(rule)}"
            if target.make:
                yield f"  (new)  {target.dtype.name} {list(target.shape)}  {target.make.how}  {target.path}"
        for key in part.sources.infos:
            if drop := drop_of(key, part.table):
                yield f"  {part.sources.infos[key].key}  dropped: {drop.reason}"


def place_text(rule: Any) -> str:
    """Where in a stacked or joined parameter a tensor goes: "[3]", "[3][q of 0]"."""
    return ("" if rule.layer is None else f"[{rule.layer}]") + ("" if rule.part is None else f" part {rule.part[1]}")


def report_of(plan: Plan, hashes: dict[str, str], odd: dict[str, str]) -> dict[str, Any]:
    """The report: files with their sha256, and for every source key what became of it."""
    components: dict[str, Any] = {}
    for name, targets in plan.targets.items():
        part = plan.release.components[name]
        taken, made = [], []
        for target in targets:
            for rule in target.rules:
                info = part.sources.infos[rule.source]
                taken.append(
                    {"file": str(info.file), "key": info.key, "dtype": info.dtype.name, "shape": list(info.shape), "target": target.path}
                    | {
                        "layer": rule.layer,
                        "part": rule.part and rule.part[1],
                        "transform": rule.fit.name,
                        "stored_dtype": target.dtype.name,
                    }
                )
            if target.make:
                how = {"how": target.make.how, "seed": target.seed, "stored_dtype": target.dtype.name}
                made.append({"target": target.path, "shape": list(target.shape), **how})
        drops = {key: drop_of(key, part.table) for key in part.sources.infos}
        dropped = [
            {"file": str(part.sources.infos[k].file), "key": part.sources.infos[k].key, "reason": d.reason} for k, d in drops.items() if d
        ]
        components[name] = {"taken": taken, "new": made, "dropped": dropped}
    return {"files": hashes, "components": components, "not_finite": odd}


class Hashes:
    """sha256 of the plan's source files, computed beside the conversion; leaving the block without `all` gives up."""

    def __init__(self, plan: Plan | None):
        parts = plan.release.components.values() if plan else ()
        self.files = sorted({str(info.file) for part in parts for info in part.sources.infos.values()})
        self.found: dict[str, str] = {}
        self.error: OSError | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Hashes:
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        self._thread.join()

    def all(self) -> dict[str, str]:
        """{file: sha256} of all files, when they are done."""
        self._thread.join()
        if self.error:
            raise self.error
        return self.found

    def _run(self) -> None:
        try:
            for file in self.files:
                self.found[file] = self._one(Path(file))
        except OSError as e:
            self.error = e

    def _one(self, file: Path) -> str:
        digest, block = hashlib.sha256(), memoryview(bytearray(4 * 2**20))
        with open(file, "rb", buffering=0) as source:
            while (n := source.readinto(block)) and not self._stop.is_set():
                digest.update(block[:n])
        return digest.hexdigest()
