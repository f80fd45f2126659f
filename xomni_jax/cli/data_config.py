"""The configuration of a training whose data a command of xomni data reads."""

from __future__ import annotations

import dataclasses
from typing import Any

from xomni_jax.core.config import ConfigError, read_overrides


def with_data(path: str, rest: list[str]) -> Any:
    """The configuration of a file and the command line, with the prompts of the benchmarks that its data exclude.

    Raises:
      ConfigError: it cannot be read, or its stage has no data.
    """
    from xomni_jax.evaluation.held_out import with_benchmarks
    from xomni_jax.training.stage import load_config

    cfg = load_config(path, read_overrides(rest))
    if not hasattr(cfg, "data"):
        raise ConfigError(f"{path}: stage {cfg.stage} has no data; give a configuration of training")
    return dataclasses.replace(cfg, data=with_benchmarks(cfg.data))
