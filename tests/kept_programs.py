"""Programs of equal configurations are built, traced and compiled once in a test process, however many runs use them."""

from __future__ import annotations

import dataclasses
from typing import Any

from xomni_jax.training.stage import STAGES

# Fields of a run that no program depends on.
BESIDE = {"run_dir", "save_every", "grid_every", "log_every", "rewards"}

_kept: dict[tuple, Any] = {}


def forget() -> None:
    """Every program is built again when it is next asked for."""
    _kept.clear()


def install() -> None:
    """The shipped stages give the same programs for the same arguments from now on."""
    for name in STAGES.shipped:
        stage = STAGES.get(name)
        if "programs" in vars(stage):
            stage.programs = classmethod(_keeping(stage.programs.__func__))


def _keeping(build):
    def programs(cls, cfg, models, mesh, decoder_mesh=None):
        settings = {field.name: getattr(cfg, field.name) for field in dataclasses.fields(cfg) if field.name not in BESIDE}
        key = (cls, repr(settings), repr(sorted(models.items())), mesh, decoder_mesh)
        if key not in _kept:
            _kept[key] = build(cls, cfg, models, mesh, decoder_mesh)
        return _kept[key]

    return programs
