"""Files that a YAML file lists, each with its share: the lists of DeepGen-RL (prompts) and of LLaVA-OneVision (conversations)."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from xomni_jax.core.config import ConfigError
from xomni_jax.data.kinds import Part, open_parts
from xomni_jax.data.tables import readable

_STRATEGY = re.compile(r"(all)|(first|end|random):(\d+)(%?)")
_MODES = ("sample_proportional", "weight_only")


def open_listed(path: Path) -> list[Part]:
    """The parts that the list names; paths in it are relative to its folder.

    DeepGen-RL: {sampling_mode, datasets: [{name, path, sample_weight, rewards: [{reward: weight}, ...]}]}; a part's share is in proportion
    to weight times length, or to its weight. LLaVA-OneVision: {datasets: [{json_path, sampling_strategy}]}, where the strategy is all,
    first:N, end:N or random:N, and N a number or a percentage, which is rounded up.

    Raises:
      ConfigError: what the list, one of its entries, or a file that it names has wrong.
    """
    with readable(path):
        text = path.read_text("utf-8-sig")
    try:
        listed = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    entries = listed.get("datasets") if isinstance(listed, Mapping) else None
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, Mapping) for entry in entries):
        raise ConfigError(f"{path} has no list `datasets` of files")
    mode = listed.get("sampling_mode", _MODES[0])
    if mode not in _MODES:
        raise ConfigError(f"{path}: sampling_mode={mode!r} is unknown; use one of {', '.join(_MODES)}")
    return [part for n, entry in enumerate(entries) for part in _entry(entry, path, f"{path}: datasets[{n}]", mode == "weight_only")]


def _entry(entry: Mapping[str, Any], listed: Path, where: str, weight_only: bool) -> list[Part]:
    name = entry.get("path", entry.get("json_path"))
    if not isinstance(name, str):
        raise ConfigError(f"{where} names no file; give its path or json_path")
    weight = entry.get("sample_weight", 1)
    if not isinstance(weight, (int, float)) or not 0 < weight < math.inf:
        raise ConfigError(f"{where}: sample_weight={weight!r} must be a positive number; take the entry out to leave its file out")
    parts = open_parts(str(listed.parent / name))
    total = sum(len(part.rows) for part in parts) if weight_only else 1
    rewards = _rewards(entry.get("rewards") or [], where)
    return [
        dataclasses.replace(
            part,
            name=(called := str(entry.get("name", part.name))),
            source=called,
            rows=_chosen(part.rows, str(entry.get("sampling_strategy", "all")), where),
            weight=weight / max(total, 1),
            rewards=rewards,
        )
        for part in parts
    ]


def _rewards(listed: Any, where: str) -> dict[str, float]:
    maps = listed if isinstance(listed, list) else [listed]
    found = {name: value for entry in maps if isinstance(entry, Mapping) for name, value in entry.items()}
    if len(found) < len(maps) or not all(isinstance(value, (int, float)) for value in found.values()):
        raise ConfigError(f"{where}: rewards must be a list of `name: weight`")
    return {name: float(value) for name, value in found.items()}


def _chosen(rows: Sequence[int], strategy: str, where: str) -> Sequence[int]:
    found = _STRATEGY.fullmatch(strategy)
    if found is None:
        raise ConfigError(f"{where}: sampling_strategy={strategy!r} is unknown; use all, first:N, end:N or random:N, N a number or N%")
    if found[1]:
        return rows
    count = min(len(rows), math.ceil(int(found[3]) * len(rows) / 100) if found[4] else int(found[3]))
    if found[2] == "random":
        return sorted(np.random.default_rng(0).permutation(rows)[:count].tolist())
    return rows[:count] if found[2] == "first" else rows[len(rows) - count :]
