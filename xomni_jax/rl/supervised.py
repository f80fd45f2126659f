"""Supervised fine-tuning beside reinforcement learning: a next-token loss on examples of its own, added to the objective of each update."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax

from xomni_jax.core.config import ConfigError, Count, NonNegative
from xomni_jax.data.rendered import SIGNS
from xomni_jax.data.sources import DataSection, batches
from xomni_jax.evaluation.held_out import with_benchmarks
from xomni_jax.models.lora import join
from xomni_jax.pipeline import XOmni
from xomni_jax.rl.update import Policy
from xomni_jax.sharding.arrays import local_rows
from xomni_jax.training.accumulate import gradient
from xomni_jax.training.components import DataIterator, check_codes
from xomni_jax.training.next_token import NextTokenConfig, PackedTargets, next_token_loss
from xomni_jax.training.pretrain import SFTRun, needed_fields, packed_batch


@dataclass(frozen=True)
class SupervisedConfig:
    """The next-token loss of fine-tuning, beside the objective of reinforcement learning.

    Attributes:
      weight: of the loss; 0: there is none, and no data are read
      batch_size: examples per step
      next_token: mixture and shapes of the packed rows
      data: where images, captions and questions come from
    """

    weight: NonNegative = 0.0
    batch_size: Count = 16
    next_token: NextTokenConfig = NextTokenConfig()
    data: DataSection = SIGNS


def supervised_gradient(
    cfg: SupervisedConfig, policy: Policy, params: Any, batch: PackedTargets, parts: int
) -> tuple[Any, dict[str, jax.Array]]:
    """(gradient of the weighted loss, metrics `loss/sft` before its weight) over `parts` micro-batches."""

    def loss(params, rows):
        value, _ = next_token_loss(policy.model, join(policy.base, params, policy.scale), rows, batch, cfg.next_token)
        return cfg.weight * value, value

    grads, value, _ = gradient(loss, params, batch, parts)
    return grads, {"loss/sft": value}


def supervised_batches(cfg: SupervisedConfig, model: XOmni, seed: int) -> DataIterator:
    """Packed rows on the model's mesh, endless.

    Raises:
      ConfigError: the data lack what the loss learns from, or hold codes of another tokenizer.
    """
    rows = local_rows(model.mesh, cfg.batch_size) if jax.process_count() > 1 else None
    try:
        check_codes(cfg.data, model)
        data = with_benchmarks(cfg.data)
        examples = batches(data, seed, cfg.batch_size, rows=rows, fields=needed_fields(cfg.next_token), mixed=True)
    except ConfigError as error:
        raise ConfigError(str(error).replace("config.data", "config.sft.data")) from None
    run = SFTRun(seed=seed, batch_size=cfg.batch_size, next_token=cfg.next_token, data=data)
    order = model.config("transformer").order
    return DataIterator(examples, lambda batch: packed_batch(run, model, model.tokenizer, rows, batch, order)[0])


class SideBySide:
    """Batches of prompts with packed rows beside them, as one iterator whose state is that of both."""

    def __init__(self, prompts: DataIterator, rows: DataIterator):
        self.prompts, self.rows = prompts, rows

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self

    def __next__(self) -> dict[str, Any]:
        return next(self.prompts) | {"packed": next(self.rows)}

    @property
    def ids(self) -> list[str]:
        """Of the prompts."""
        return self.prompts.ids

    @property
    def waited(self) -> float:
        """Seconds that the steps so far have waited for both."""
        return self.prompts.waited + self.rows.waited

    def get_state(self) -> dict[str, Any]:
        """Where both stand."""
        return {"prompts": self.prompts.get_state(), "rows": self.rows.get_state()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes on from a saved place."""
        self.prompts.set_state(state["prompts"])
        self.rows.set_state(state["rows"])
