"""The plan of a conversion: every key, shape and dtype of every component is checked before anything is read or written."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from xomni_jax.checkpoint.component_source import NewParts, Release
from xomni_jax.checkpoint.conversion import ConversionError
from xomni_jax.checkpoint.param_reader import ParamReader
from xomni_jax.checkpoint.released import check_compatible, open_release
from xomni_jax.checkpoint.store import config_from_json, read_model_json
from xomni_jax.models.registry import COMPONENTS

DTYPES: dict[str, np.dtype | None] = {"keep": None, "float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


@dataclasses.dataclass
class ConversionPlan:
    """All that will be written: `params` maps each component to its parameters, in order."""

    release: Release
    params: dict[str, list[ParamReader]]

    @property
    def nbytes(self) -> int:
        """Bytes of all parameters."""
        return sum(param.nbytes for params in self.params.values() for param in params)

    @property
    def source_files(self) -> list[str]:
        """The files that tensors come from, in the order in which they are converted."""
        parts = self.release.components.values()
        return list(dict.fromkeys(file for part in parts for file in sorted({str(info.file) for info in part.sources.infos.values()})))


def plan_conversion(
    xomni: str | Path | None,
    flux: str | Path | None,
    to: str | Path | None,
    dtype: str = "keep",
    only: str | None = None,
    parts: NewParts = NewParts(),
) -> ConversionPlan:
    """The plan of `convert` with the same arguments; without `to`, of a new directory."""
    existing = {} if to is None else _existing_components(Path(to).resolve())
    if "siglip_vq" in existing:
        parts = dataclasses.replace(parts, semantic_dim=existing["siglip_vq"].width)
    return make_plan(open_release(xomni, flux, only, parts), dtype, existing)


def make_plan(release: Release, dtype: str = "keep", existing: Mapping[str, Any] | None = None) -> ConversionPlan:
    """Plans all components of a release.

    Args:
      dtype: a key of `DTYPES`. existing: configs of the components that the model directory has already.

    Raises:
      ConversionError: listing every problem.
    """
    existing, params = existing or {}, {}
    twice = sorted(set(existing) & set(release.components))
    problems = [f"{name}: is in the target already; choose another --to, or other parts with --only" for name in twice]
    problems += check_compatible({**existing, **{name: part.config for name, part in release.components.items()}})
    for name, part in release.components.items():
        params[name], wrong = part.readers(dtype=DTYPES[dtype], seed=release.parts.seed)
        problems += wrong
    if problems:
        raise ConversionError.of(problems)
    if cast := DTYPES[dtype]:
        for part in release.components.values():
            part.config = dataclasses.replace(part.config, dtype=cast, param_dtype=cast)
    return ConversionPlan(release, params)


def _existing_components(to: Path) -> dict[str, Any]:
    """Configs of the components in the directory, which must be a model directory, empty or new."""
    if not to.exists() or (to.is_dir() and not any(to.iterdir())):
        return {}
    if not (to / "model.json").is_file():
        raise ConversionError(f"{to}: is there and no model directory; choose another --to")
    components = read_model_json(to)["components"]
    return {name: config_from_json(COMPONENTS[name].config, data["config"], f"{to}/model.json") for name, data in components.items()}
