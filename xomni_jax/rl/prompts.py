"""The prompts of GRPO: what a batch of them holds, what is refused, and what checkpoints keep of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from xomni_jax.core.config import ConfigError
from xomni_jax.data.files import FilesSource
from xomni_jax.data.records import TEXT_REWARDS
from xomni_jax.rl.rewards import Rewards
from xomni_jax.sharding.arrays import share
from xomni_jax.training.components import DataIterator

Size = tuple[int, int]


class Prompts(DataIterator):
    """The batches of a run, and what its scorers of whole sets remember, which checkpoints keep beside their place."""

    def __init__(self, dataset: Any, map_batch: Callable[[Any], Any], rewards: Rewards):
        super().__init__(dataset, map_batch)
        self._rewards = rewards

    def get_state(self) -> dict[str, Any]:
        """After the last step."""
        memory = self._rewards.memory()
        return super().get_state() | ({"rewards": memory} if memory else {})

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes on from a saved place."""
        super().set_state(state)
        self._rewards.remember(state.get("rewards", {}))


def check_prompts(cfg: Any) -> None:
    """Refuses prompts of files that name a reward without a weight, or none of which has a text for the reward that reads it."""
    names = [f"config.data.parts.{name}" for name in cfg.data.names] or ["config.data"]
    sources = [dataclasses.replace(part, first=0).open(cfg.seed, cfg.batch_size) for part in cfg.data.parts]
    files = {name: source for name, source in zip(names, sources, strict=True) if isinstance(source, FilesSource)}
    weights = {name: reward.weight for name, reward in cfg.rewards.items() if reward.weight is not None}
    for name, source in files.items():
        unknown = sorted({field.removeprefix("rewards.") for field in source.offered if field.startswith("rewards.")} - set(weights))
        if unknown:
            raise ConfigError(
                f"{name}: prompts are to be judged by {', '.join(unknown)}, to which config.rewards gives no weight; give it one"
            )
    texts = any("targets.text" in source.offered for source in files.values())
    asked = any("rewards" not in source.fields for source in files.values())  # not where every prompt names its own rewards
    reader = next((name for name in TEXT_REWARDS if weights.get(name)), None)
    if reader and asked and not texts and len(files) == len(sources):
        raise ConfigError(
            f"config.rewards.{reader}: no prompt of config.data says which text its image is to show; write it in double quotes and set "
            f"text_targets=True where its path is set, or leave the reward out with config.rewards.{reader}.weight=None"
        )


def prompt_size(cfg: Any, examples: Mapping[str, Any]) -> Size:
    """(height, width) of the images that the prompts of a batch ask for: the first configured one where they do not say it."""
    return tuple(examples["size"][0]) if "size" in examples else cfg.data.sizes[0]


def all_prompts(cfg: Any, rows: Sequence[int], examples: dict[str, Any]) -> dict[str, Any]:
    """Prompts of a whole batch, of which this process has loaded `rows`, and the size of their images.

    Those without rewards of their own, or of a source without a name, have None there.
    """
    lacking = [None] * len(rows)  # in every process, whichever rows it has
    columns = {name: examples.get(name, lacking) for name in ("caption", "targets", "rewards", "source")}
    return {**share(columns, rows, cfg.batch_size), "size": prompt_size(cfg, examples)}


def asked(batch: Mapping[str, Any]) -> tuple[Any, ...]:
    """What `Rollouts` takes of a batch of prompts."""
    return batch["caption"], batch["targets"], batch["rewards"], batch["source"]
