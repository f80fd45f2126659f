"""Released directories into one model directory: planned whole, streamed component by component, renamed into place at the end.

The work is done in TO.part. An interrupted run leaves it there, and the same command goes on after the last component that is whole;
TO itself appears, or gains components, only when all is written.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax.experimental import multihost_utils

from xomni_jax.checkpoint.assemble import Target, targets_of
from xomni_jax.checkpoint.conversion import ConversionError, problems
from xomni_jax.checkpoint.conversion_report import Hashes, report_of
from xomni_jax.checkpoint.found import Found, NewParts, Release
from xomni_jax.checkpoint.new_tokenizer import extended
from xomni_jax.checkpoint.released import open_release, strangers
from xomni_jax.checkpoint.store import FORMAT, CheckpointError, config_from_json, config_to_json, read_model_json, write_json
from xomni_jax.checkpoint.stream import save_targets
from xomni_jax.models.registry import COMPONENTS

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
DTYPES: dict[str, np.dtype | None] = {"keep": None, "float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
REPORT, PROGRESS = "conversion.json", "progress.json"
Say = Callable[[str], None]


@dataclasses.dataclass
class Plan:
    """All that will be written: {component: its parameters}, in order."""

    release: Release
    targets: dict[str, list[Target]]

    @property
    def nbytes(self) -> int:
        """Bytes of all parameters."""
        return sum(t.nbytes for targets in self.targets.values() for t in targets)


def make_plan(release: Release, dtype: str = "keep", there: Mapping[str, Any] | None = None) -> Plan:
    """Checks every key, shape and dtype of every component before anything is read or written.

    Args:
      dtype: a key of `DTYPES`. there: configs of the components that the target has already.

    Raises:
      ConversionError: listing every problem.
    """
    there, plans = there or {}, {}
    twice = sorted(set(there) & set(release.components))
    found = [f"{name}: is in the target already; choose another --to, or other parts with --only" for name in twice]
    found += strangers({**there, **{name: part.config for name, part in release.components.items()}})
    for name, part in release.components.items():
        wanted = part.wanted()
        wrong = problems(part.sources.infos, part.table, wanted, part.sources.found, part.sources.absent)
        if not wrong:
            plans[name], wrong = targets_of(part.table, wanted, part.sources, DTYPES[dtype], release.parts.seed)
            release.components[name] = cast(part, DTYPES[dtype])
        found += wrong
    if found:
        raise ConversionError.of(found)
    return Plan(release, plans)


def plan_for(
    xomni: str | Path | None,
    flux: str | Path | None,
    to: str | Path | None,
    dtype: str = "keep",
    only: str | None = None,
    parts: NewParts = NewParts(),
) -> Plan:
    """The plan of `convert` with the same arguments; without `to`, of a new directory."""
    there = {} if to is None else _there(Path(to).absolute())
    if "siglip_vq" in there:
        parts = dataclasses.replace(parts, semantic_dim=there["siglip_vq"].width)
    return make_plan(open_release(xomni, flux, only, parts), dtype, there)


def cast(part: Found, dtype: np.dtype | None) -> Found:
    """The component with its config's dtypes changed, where a dtype is asked for: it is stored and computed in it."""
    return part if dtype is None else dataclasses.replace(part, config=dataclasses.replace(part.config, dtype=dtype, param_dtype=dtype))


def convert(
    xomni: str | Path | None,
    flux: str | Path | None,
    to: str | Path,
    dtype: str = "keep",
    only: str | None = None,
    parts: NewParts = NewParts(),
    say: Say = print,
) -> list[str]:
    """Converts; every process of a multi-host run calls this, on a file system that all share.

    Args:
      dtype: a key of `DTYPES`. only: a key of `released.PARTS`. say: takes lines for the user.

    Returns:
      Warnings: tensors with values that are no numbers.

    Raises:
      ConversionError: nothing was written.
    """
    to = Path(to).absolute()
    part, plan = to.with_name(to.name + ".part"), plan_for(xomni, flux, to, dtype, only, parts)
    release = plan.release
    text = _extended_tokenizer(release)
    done = _done(part, plan, dtype)
    _check_space(to, sum(t.nbytes for name, targets in plan.targets.items() if name not in done for t in targets))
    _prepare(part, done)
    for line in release.notes:
        say(line)
    odd = {key: kind for found in done.values() for key, kind in found.items()}
    with Hashes(plan if jax.process_index() == 0 else None) as hashes:
        for name, targets in plan.targets.items():
            if name in done:
                say(f"{name}: already in {part}")
                continue
            began, found = time.perf_counter(), {}
            save_targets(part / name, targets, lambda n, bad: found.update(bad))
            done[name] = found
            odd |= found
            if jax.process_index() == 0:
                write_json(part / PROGRESS, {"identity": _identity(plan, dtype), "done": done})
            size, seconds = sum(t.nbytes for t in targets), time.perf_counter() - began
            say(f"{name}: {len(targets)} arrays, {size / 1e9:.3f} GB in {seconds:.1f} s")
        _barrier("written")
        if jax.process_index() == 0:
            _publish(part, to, plan, report_of(plan, hashes.all(), odd), text, say)
    _barrier("published")
    return [f"{key}: holds values that are {kind}" for key, kind in sorted(odd.items())]


def _barrier(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"xomni convert: {name}")


def _there(to: Path) -> dict[str, Any]:
    """Configs of the components that the target has already; refuses what is no model directory."""
    if not to.exists() or (to.is_dir() and not any(to.iterdir())):
        return {}
    if not (to / "model.json").is_file():
        raise ConversionError(f"{to}: is there and no model directory; choose another --to")
    components = read_model_json(to)["components"]
    return {name: config_from_json(COMPONENTS[name].config, data["config"], f"{to}/model.json") for name, data in components.items()}


def _check_space(to: Path, needed: int) -> None:
    folder = next(p for p in to.parents if p.is_dir())
    free, needed = shutil.disk_usage(folder).free, int(needed * 1.01) + 2**20
    if needed > free:
        raise ConversionError(
            f"{to}: {needed / 1e9:.2f} GB are to be written, {free / 1e9:.2f} GB are free; free some space or choose another disk"
        )


def _identity(plan: Plan, dtype: str) -> dict[str, Any]:
    """What an interrupted run must have in common with this one to be gone on with."""
    files = sorted({info.file for part in plan.release.components.values() for info in part.sources.infos.values()})
    stats = {str(Path(f).absolute()): [os.stat(f).st_size, os.stat(f).st_mtime_ns] for f in files}
    configs = {name: config_to_json(part.config) for name, part in plan.release.components.items()}
    return {"files": stats, "configs": configs, "dtype": dtype, "parts": dataclasses.asdict(plan.release.parts)}


def _done(part: Path, plan: Plan, dtype: str) -> dict[str, dict[str, str]]:
    """{component that an interrupted run of the same conversion left whole in TO.part: its odd tensors}."""
    try:
        progress = read_progress(part)
        if progress["identity"] == _identity(plan, dtype):
            return {name: odd for name, odd in progress["done"].items() if (part / name).is_dir()}
    except (OSError, ValueError, KeyError):
        pass
    return {}


def _prepare(part: Path, done: Mapping[str, Any]) -> None:
    """TO.part with nothing in it but what is done."""
    _barrier("looked")
    if jax.process_index() == 0:
        part.mkdir(parents=True, exist_ok=True)
        for path in part.iterdir():
            if path.name not in (*done, PROGRESS):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    _barrier("prepared")


def read_progress(part: Path) -> dict[str, Any]:
    """The progress file of an interrupted conversion."""
    return json.loads((part / PROGRESS).read_text())


def _publish(part: Path, to: Path, plan: Plan, report: dict[str, Any], text: str | None, say: Say) -> None:
    release = plan.release
    for name, folder in release.tokenizers.items():
        copy_tokenizer(folder, part / name, say)
        if name == "tokenizer" and text is not None:
            (part / name / "tokenizer.json").write_text(text)
    data: dict[str, Any] = {"format": FORMAT, "components": {}, "settings": {}}
    if (to / "model.json").is_file():
        data = read_model_json(to) | {"settings": read_model_json(to).get("settings", {})}
        if (to / REPORT).is_file():
            report = merged(read_report(to), report)
    for name, found in release.components.items():
        note = {"converted_from": str(next(iter(found.sources.places.values())))} | (
            {"released_config": found.original} if found.original else {}
        )
        data["components"][name] = {"config": config_to_json(found.config), "note": note}
    for name, fields in release.settings.items():
        data["settings"][name] = data["settings"].get(name, {}) | fields
    (part / PROGRESS).unlink(missing_ok=True)
    if not (to / "model.json").is_file():
        write_json(part / REPORT, report)
        write_json(part / "model.json", data)
        if to.is_dir():
            to.rmdir()
        os.replace(part, to)
        return
    # New parts are moved in first, and named last: until then the directory is the old model.
    for path in part.iterdir():
        if (to / path.name).exists():
            shutil.rmtree(to / path.name)
        os.replace(path, to / path.name)
    write_json(to / REPORT, report)
    write_json(to / "model.json", data)
    part.rmdir()


def read_report(folder: Path) -> dict[str, Any]:
    """The report beside a converted checkpoint."""
    try:
        return json.loads((folder / REPORT).read_text())
    except ValueError as e:
        raise CheckpointError(f"{folder / REPORT}: not readable as JSON ({e}); move it away") from None


def merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Reports of two conversions into one directory."""
    return {key: {**old.get(key, {}), **value} if isinstance(value, dict) else value for key, value in new.items()}


def copy_tokenizer(folder: Path, target: Path, say: Say) -> None:
    """A tokenizer's files."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    names = tokenizer_files(folder) if target.name == "tokenizer" else [p.name for p in folder.iterdir() if p.is_file()]
    for name in names:
        shutil.copyfile(folder / name, target / name)
    if not names:
        target.rmdir()
        say(f"{folder}: holds no tokenizer files; put them into {target.name}/ of the model directory before you generate")


def tokenizer_files(folder: Path) -> list[str]:
    """Names of the text tokenizer's files in a directory that holds weights too."""
    return [name for name in TOKENIZER_FILES if (folder / name).is_file()]


def _extended_tokenizer(release: Release) -> str | None:
    """tokenizer.json of a plain language model with image tokens; None where there is nothing to extend."""
    folder = release.tokenizers.get("tokenizer")
    if not release.extend or folder is None or not tokenizer_files(folder):
        return None
    c = release.components["transformer"].config
    return json.dumps(extended(folder / "tokenizer.json", c.vocab_size, c.image_vocab_size, c.mm_vocab_size), ensure_ascii=False) + "\n"
