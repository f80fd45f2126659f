"""What a reward service says about the images of finished runs, kept so that an interruption loses one item."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from xomni_jax.evaluation.eval_run import EvalRun, Item, image_refs, outputs
from xomni_jax.evaluation.run_directory import RunDirectory
from xomni_jax.evaluation.suite import SuiteError

if TYPE_CHECKING:
    from xomni_jax.rewards.client import RewardClient


def reward_scores(runs: Sequence[EvalRun], client: RewardClient, version: str, stored: Path) -> np.ndarray:
    """Values [P, R] of all images, the runs' side by side. An item's fields are told to the service as its targets.

    Args:
      version: of the service; values of another version are not mixed in.
      stored: directory in which finished items are kept.

    Raises:
      SuiteError: an image is gone, or the service could not score one or says that it does not apply to the item.
    """
    directory, kind = RunDirectory(stored), hashlib.sha256(f"{client.name} {version}".encode()).hexdigest()[:16]
    done = {name: record["values"] for name, record in directory.lines(kind).items()}
    name_of = lambda run, item: f"{run.path.resolve()}#{item['id']}"
    left = [(run, item) for items in zip(*(run.items for run in runs)) for run, item in zip(runs, items) if name_of(run, item) not in done]
    with directory.writer(kind, "values") as lines:
        for run, item in tqdm(left, desc=f"scored by {client.name}", unit="item"):
            done[name_of(run, item)] = values = _item_values(client, run, item)
            lines.append({"id": name_of(run, item), "values": values})
    return np.array([[v for run in runs for v in done[name_of(run, run.items[i])]] for i in range(len(runs[0].items))], np.float64)


def _item_values(client: RewardClient, run: EvalRun, item: Item) -> list[float]:
    refs = image_refs(run, item)
    if len(refs) != outputs(item):
        raise SuiteError(f"{run.path}: item {item['id']} lists no images, another program drew them; draw with xomni eval")
    if gone := [ref.path for ref in refs if not ref.path.is_file()]:
        raise SuiteError(f"{gone[0]} of item {item['id']} is gone, so {client.name} cannot score it; draw it again")
    told = {"prompt": item["prompt"], "targets": dict(item["fields"])}
    scores = client.score([np.asarray(ref.open()) for ref in refs], [told] * len(refs))
    if bad := next((score for score in scores if score.value is None), None):
        reason = bad.error or "it says that it does not apply"
        raise SuiteError(f"{client.name} gave item {item['id']} of {run.path} no value ({reason}); what is scored is kept")
    return [float(score.value) for score in scores]
