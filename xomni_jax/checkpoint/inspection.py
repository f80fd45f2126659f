"""Describes a checkpoint and compares two, in our parameters' names; takes model directories and published ones."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from xomni_jax.checkpoint.conversion import ConversionError
from xomni_jax.checkpoint.formats import detect_format, is_released
from xomni_jax.checkpoint.orbax_reader import OrbaxReader
from xomni_jax.checkpoint.released import ALL
from xomni_jax.checkpoint.released_model import ReleasedModel
from xomni_jax.checkpoint.store import TOKENIZERS, CheckpointError, config_to_json, read_model_json
from xomni_jax.core.tables import bytes_text
from xomni_jax.tokenizers.registry import IMAGE_TOKENIZERS, tokenizer_in

TITLES = {"xomni": "released X-Omni", "qwen2": "plain Qwen2.5", "siglip2": "plain SigLIP2", "flux": "FLUX.1-dev"}
BLOCK = 64 * 2**20  # bytes compared at a time


@dataclasses.dataclass
class StoredArray:
    """One parameter; `read` takes the index of a rectangle."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[Any], np.ndarray]
    release: Callable[[], None] = lambda: None


@dataclasses.dataclass
class CheckpointView:
    """The contents of a checkpoint.

    Attributes:
      kind: a model directory, or which published format.
      configs: {component: JSON of its config}. arrays: {component: {path: StoredArray}}. faults: {component: why it cannot be read}.
    """

    path: Path
    kind: str
    configs: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    arrays: dict[str, dict[str, StoredArray]] = dataclasses.field(default_factory=dict)
    faults: dict[str, str] = dataclasses.field(default_factory=dict)
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    tokenizers: list[str] = dataclasses.field(default_factory=list)


def open_view(path: str | Path) -> CheckpointView:
    """Opens a model directory or a published one; a component that cannot be read is listed in `faults`.

    Raises:
      CheckpointError, ConversionError: it is neither.
    """
    path = Path(path)
    if not is_released(path) and (path / "model.json").is_file():
        return _of_model(path)
    model = ReleasedModel(path)
    view = CheckpointView(path, TITLES[detect_format(path)], faults=model.errors, settings=model.description["settings"])
    view.tokenizers = list(model.folders)
    for name, part in model.components.items():
        params, wrong = part.readers()
        if wrong:
            view.faults[name] = str(ConversionError.of(wrong))
            continue
        view.configs[name] = config_to_json(part.config)
        view.arrays[name] = {p.path: StoredArray(p.shape, p.dtype, p.read, p.release) for p in params}
    return view


def _of_model(path: Path) -> CheckpointView:
    data = read_model_json(path)
    view = CheckpointView(path, "model directory", settings=data.get("settings", {}))
    view.tokenizers = [name for name in TOKENIZERS if (path / name).is_dir()]
    for name, described in data["components"].items():
        view.configs[name] = described["config"]
        if described["config"].get("kind") == "identity":
            view.arrays[name] = {}
            continue
        try:
            stored = OrbaxReader(path / name)
            stored.check()
        except CheckpointError as e:
            view.faults[name] = str(e)
            continue
        view.arrays[name] = {
            key: StoredArray(tuple(a.shape), np.dtype(a.dtype), lambda index, stored=stored, key=key: stored.read(key, index))
            for key, a in stored.arrays.items()
        }
    return view


def describe(view: CheckpointView) -> Iterator[str]:
    """Lines: components with their parameter counts, dtypes and configs, settings, and what is missing for text to image and chat."""
    yield f"{view.path}: {view.kind}"
    for name in (n for n in ALL if n in view.arrays):
        arrays = view.arrays[name].values()
        dtypes = ", ".join(sorted({a.dtype.name for a in arrays})) or "no parameters"
        count, size = sum(math.prod(a.shape) for a in arrays), sum(math.prod(a.shape) * a.dtype.itemsize for a in arrays)
        yield f"{name}: {count:,} parameters in {len(arrays)} arrays, {bytes_text(size)}, {dtypes}"
        yield "  " + ", ".join(f"{k}={v}" for k, v in view.configs[name].items())
    yield f"total: {sum(math.prod(a.shape) for arrays in view.arrays.values() for a in arrays.values()):,} parameters"
    for name, fields in view.settings.items():
        yield f"settings.{name}: " + ", ".join(f"{k}={v}" for k, v in fields.items())
    found = {*view.arrays, *view.faults}
    other_tokenizers = set(IMAGE_TOKENIZERS) - {tokenizer_in(found)}
    missing = [name for name in ALL if name not in found | other_tokenizers]
    missing += ["tokenizer"] * ("tokenizer" not in view.tokenizers)
    yield f"missing: {', '.join(missing) or 'nothing'}" + (f"; damaged: {', '.join(view.faults)}" if view.faults else "")


@dataclasses.dataclass(frozen=True)
class Difference:
    """How two arrays differ.

    Attributes:
      absolute: the largest |a - b|; NaN where there is nothing to compare.
      relative: that over the largest |a|.
      count: the number of values that differ.
      parameters: how many arrays differ in this way: all of a component that one side lacks, otherwise 1.
    """

    name: str
    absolute: float
    relative: float
    count: int
    note: str = ""
    parameters: int = 1


def compare(a: CheckpointView, b: CheckpointView) -> Iterator[Difference]:
    """Every parameter that differs in value, dtype or shape, or is in one checkpoint only; read in blocks."""
    for component in (n for n in ALL if n in a.arrays or n in b.arrays):
        left, right = a.arrays.get(component, {}), b.arrays.get(component, {})
        if not left or not right:
            if left or right:
                yield Difference(component, math.nan, math.nan, 0, f"only in {(a if left else b).path}", len(left or right))
            continue
        for key in sorted(set(left) | set(right)):
            name = f"{component}/{key}"
            if key not in left or key not in right:
                yield Difference(name, math.nan, math.nan, 0, f"only in {(a if key in left else b).path}")
            elif left[key].shape != right[key].shape:
                yield Difference(name, math.nan, math.nan, 0, f"shapes {left[key].shape} and {right[key].shape}")
            else:
                found = _compare(name, left[key], right[key])
                if found.count or found.note:
                    yield found


def _blocks(a: StoredArray, b: StoredArray) -> Iterator[list[np.ndarray]]:
    """The values of both sides, some rows at a time."""
    rows = a.shape[0] if a.shape else 1
    step = max(1, int(BLOCK // max(1, math.prod(a.shape) * 4 // max(rows, 1))))
    for start in range(0, rows, step):
        index = (slice(start, min(start + step, rows)), *(slice(0, n) for n in a.shape[1:])) if a.shape else ()
        yield [np.ascontiguousarray(side.read(index)).reshape(-1) for side in (a, b)]
        a.release(), b.release()


def _compare(name: str, a: StoredArray, b: StoredArray) -> Difference:
    # Equal bits are the usual case, and are found several times faster than the sizes of differences.
    if a.dtype == b.dtype and all(np.array_equal(x.view(f"u{x.itemsize}"), y.view(f"u{y.itemsize}")) for x, y in _blocks(a, b)):
        return Difference(name, 0.0, 0.0, 0)
    absolute, largest, count = 0.0, 0.0, 0
    for block in _blocks(a, b):
        x, y = (np.asarray(side, np.float32) for side in block)
        both_nan = np.isnan(x) & np.isnan(y)
        gap = np.where((x == y) | both_nan, 0, np.abs(x - y))
        gap[np.isnan(gap)] = np.inf  # a number against a NaN
        count += int(np.count_nonzero(~((x == y) | both_nan)))
        absolute = max(absolute, float(np.max(gap, initial=0)))
        largest = max(largest, float(np.max(np.abs(np.where(np.isnan(x), 0, x)), initial=0)))
    note = "" if a.dtype == b.dtype else f"{a.dtype.name} and {b.dtype.name}"
    return Difference(name, absolute, absolute / largest if largest else (math.inf if absolute else 0.0), count, note)
