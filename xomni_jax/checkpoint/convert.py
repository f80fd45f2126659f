"""Converts published directories into one model directory, component by component.

The work is done in TO.part. An interrupted run leaves it there, and the same command resumes after the last complete component. TO itself
appears, or gains components, only when everything is written.
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
from jax.experimental.multihost_utils import sync_global_devices

from xomni_jax.checkpoint.component_source import NewParts
from xomni_jax.checkpoint.conversion_plan import ConversionPlan, plan_conversion
from xomni_jax.checkpoint.conversion_report import what_becomes
from xomni_jax.checkpoint.digests import Digests
from xomni_jax.checkpoint.store import config_to_json, model_json_or_new, write_json
from xomni_jax.checkpoint.stream import save_params
from xomni_jax.checkpoint.tensor_file import check_space, read_json
from xomni_jax.checkpoint.tokenizer_files import copy_tokenizer, with_image_tokens
from xomni_jax.core.tables import bytes_text

REPORT, PROGRESS = "conversion.json", "progress.json"
Say = Callable[[str], None]


def convert(
    xomni: str | Path | None,
    flux: str | Path | None,
    to: str | Path,
    dtype: str = "keep",
    only: str | None = None,
    parts: NewParts = NewParts(),
    say: Say = print,
) -> list[str]:
    """Converts; every process of a multi-host run calls this, on a shared file system.

    Args:
      dtype: a key of `conversion_plan.DTYPES`. only: a key of `released.PARTS`. say: takes lines for the user.

    Returns:
      Warnings: tensors with values that are NaN or infinite.

    Raises:
      ConversionError: nothing was written.
    """
    to = Path(to).resolve()
    part, plan = to.with_name(to.name + ".part"), plan_conversion(xomni, flux, to, dtype, only, parts)
    tokenizer = with_image_tokens(plan.release)
    identity = _identity(plan, dtype)
    done = _done(part, identity)
    needed = sum(p.nbytes for name, params in plan.params.items() if name not in done for p in params)
    check_space(to, int(needed * 1.01) + 2**20)
    _prepare(part, done)
    for line in plan.release.notes:
        say(line)
    with Digests(plan.source_files if jax.process_index() == 0 else []) as hashes:
        _write(part, plan, done, identity, say, hashes)
        not_finite = {key: kind for found in done.values() for key, kind in found.items()}
        sync_global_devices("written")
        if jax.process_index() == 0:
            report = {"files": hashes.result(), "components": what_becomes(plan), "not_finite": not_finite}
            _publish(part, to, plan, report, tokenizer, say)
    sync_global_devices("published")
    return [f"{key}: holds values that are {kind}" for key, kind in sorted(not_finite.items())]


def _identity(plan: ConversionPlan, dtype: str) -> dict[str, Any]:
    """What an interrupted run must have in common with this one to be resumed."""
    stats = {str(Path(f).absolute()): [os.stat(f).st_size, os.stat(f).st_mtime_ns] for f in plan.source_files}
    configs = {name: config_to_json(part.config) for name, part in plan.release.components.items()}
    return {"files": stats, "configs": configs, "dtype": dtype, "parts": dataclasses.asdict(plan.release.parts)}


def _done(part: Path, identity: dict[str, Any]) -> dict[str, dict[str, str]]:
    """{component that an interrupted run of the same conversion completed in TO.part: its tensors that are not finite}."""
    try:
        progress = json.loads((part / PROGRESS).read_text())
        if progress["identity"] == identity:
            return {name: not_finite for name, not_finite in progress["done"].items() if (part / name).is_dir()}
    except (OSError, ValueError, KeyError):
        pass
    return {}


def _prepare(part: Path, done: Mapping[str, Any]) -> None:
    """Makes TO.part and leaves in it only what is done."""
    sync_global_devices("looked")
    if jax.process_index() == 0:
        part.mkdir(parents=True, exist_ok=True)
        for path in part.iterdir():
            if path.name not in (*done, PROGRESS):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    sync_global_devices("prepared")


def _write(part: Path, plan: ConversionPlan, done: dict[str, dict[str, str]], identity: dict[str, Any], say: Say, hashes: Digests) -> None:
    """Writes the components that are not done, one after the other."""

    def progress(nbytes: int) -> None:
        hashes.advance(nbytes / plan.nbytes)

    for name, params in plan.params.items():
        size = sum(p.nbytes for p in params)
        if name in done:
            say(f"{name}: already in {part}")
            progress(size)
            continue
        began = time.perf_counter()
        done[name] = save_params(part / name, params, progress) if params else {}
        if jax.process_index() == 0:
            write_json(part / PROGRESS, {"identity": identity, "done": done})
        say(f"{name}: {len(params)} arrays, {bytes_text(size)} in {time.perf_counter() - began:.1f} s")


def _publish(part: Path, to: Path, plan: ConversionPlan, report: dict[str, Any], tokenizer: str | None, say: Say) -> None:
    release = plan.release
    for name, folder in release.tokenizers.items():
        copy_tokenizer(folder, part / name, say)
        if name == "tokenizer" and tokenizer is not None:
            (part / name / "tokenizer.json").write_text(tokenizer)
    new, data = not (to / "model.json").is_file(), model_json_or_new(to)
    if not new and (to / REPORT).is_file():
        old = read_json(to / REPORT)
        report = {key: {**old.get(key, {}), **value} for key, value in report.items()}
    for name, source in release.components.items():
        note = {"converted_from": str(next(iter(source.sources.paths.values()), ""))}
        data["components"][name] = {"config": config_to_json(source.config), "note": note}
    settings = data.setdefault("settings", {})
    for name, fields in release.settings.items():
        settings[name] = settings.get(name, {}) | fields
    data["released"] = data.get("released", {}) | release.released
    (part / PROGRESS).unlink(missing_ok=True)
    if new:
        write_json(part / REPORT, report)
        write_json(part / "model.json", data)
        if to.is_dir():
            to.rmdir()
        os.replace(part, to)
        return
    # The new components are moved in first and listed last: until then the directory is the old model.
    for path in part.iterdir():
        if (to / path.name).exists():
            shutil.rmtree(to / path.name)
        os.replace(path, to / path.name)
    write_json(to / REPORT, report)
    write_json(to / "model.json", data)
    part.rmdir()
