"""The loss on examples that no step trains on, at intervals, and the model that had the smallest one."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from xomni_jax.core.config import ConfigError, Count, Natural
from xomni_jax.core.distributed import gather_json
from xomni_jax.data.sources import SOURCES, DataSection
from xomni_jax.training.state import TrainState

VALIDATION_SEED = 2_000_003  # added to a run's seed, as that of the image grids is
LOSS = "validation/loss/total"
WHERE = "config.validation.data"


@dataclasses.dataclass(frozen=True)
class OtherData:
    """Changes to the data section of a run, by which examples of their own are named.

    Attributes:
      values: the keys that differ; none: examples that are made up from another seed.
    """

    values: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def updated(self, changes: Mapping[str, Any], where: str) -> OtherData:
        """With more changes. They are checked by `over`, which knows the section."""
        return OtherData({**self.values, **changes})

    def as_dict(self) -> dict[str, Any]:
        """The keys that differ."""
        return dict(self.values)

    def defaults(self) -> dict[str, Any]:
        """None: whatever differs is set."""
        return {}

    def explained(self) -> dict[str, str]:
        """Nothing: the keys are those of `data`."""
        return {}

    def over(self, data: DataSection, where: str) -> DataSection:
        """The data section with the changes.

        Raises:
          ConfigError: a key or a value does not fit, or nothing is changed although the run's examples are a finite set.
        """
        if not self.values and any(hasattr(SOURCES.get(part.source), "epoch") for part in data.parts):
            key = "parts.NAME.path" if data.names else "path"
            raise ConfigError(f"{where} is empty, so the examples would be those that are trained on; name others, as {where}.{key}=FILES")
        return dataclasses.replace(data, first=0).updated(self.values, where)


@dataclasses.dataclass(frozen=True)
class ValidationConfig:
    """The loss on examples that no step trains on.

    Attributes:
      every: steps between two validations; there is also one after the last step. 0: none
      batches: how many batches of config.batch_size examples are looked at, the same ones each time
      best: also keep the model of the smallest validation loss, in RUN/best
      data: what differs from config.data, such as path or split; where examples are made up, they have another seed even if nothing does
    """

    every: Natural = 0
    batches: Count = 8
    best: bool = False
    data: OtherData = OtherData()

    def open(self, data: DataSection) -> DataSection:
        """Where the examples come from; errors as of `OtherData.over`."""
        return self.data.over(data, WHERE)

    def examples(self, load: Callable[..., Any], data: DataSection, seed: int) -> Any:
        """The batches of the opened `data`. `load`: (data, seed, count, prefetch) -> batches, such as `data.sources.batches`.

        Raises:
          ConfigError: the examples cannot be read; the message names the section of the validation.
        """
        try:
            return load(data, seed + VALIDATION_SEED, count=self.batches, prefetch=0)
        except ConfigError as error:
            raise ConfigError(str(error).replace("config.data", WHERE)) from None


class Validation:
    """The validation of one run.

    Attributes:
      every: see `ValidationConfig`; best: whether the best model is kept.
    """

    def __init__(
        self, cfg: ValidationConfig, batches: Callable[[], Iterator[Any]], loss: Callable[[TrainState, Any], Mapping[str, jax.Array]]
    ):
        """`batches()` makes the batches, once; `loss` gives the metrics of one of them."""
        self.every, self.best, self._loss = cfg.every, cfg.best, loss
        self._batches = functools.cache(lambda: list(batches()))

    def __call__(self, state: TrainState) -> dict[str, float]:
        """{validation/NAME: mean over the batches}."""
        found = jax.device_get([self._loss(state, batch) for batch in self._batches()])
        return {f"validation/{name}": float(np.mean([metrics[name] for metrics in found])) for name in found[0]}


def smallest_loss(run_dir: Path) -> float:
    """The smallest validation loss that a run has logged; infinite where there is none. Every process gets that of process 0."""
    path = run_dir / "metrics.jsonl"
    lines = map(json.loads, path.read_text().splitlines()) if path.is_file() else ()
    return gather_json(min((line[LOSS] for line in lines if line.get(LOSS) is not None), default=float("inf")))[0]
