"""The values that a reward service gives to the images of runs, kept on disk so that an interruption loses little."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from xomni_jax.evaluation.eval_run import EvalRun, outputs, shots
from xomni_jax.evaluation.suite import SuiteError

ITEMS_AT_ONCE = 4


class Client(Protocol):
    """The part of `rewards.client.RewardClient` that is used here."""

    name: str

    def score(self, images: Sequence[Any], items: Sequence[dict[str, Any]]) -> Sequence[Any]:
        """One score per image."""
        ...


def reward_scores(runs: Sequence[EvalRun], client: Client, version: str, kept: Path) -> np.ndarray:
    """Values [P, R] of all images, the runs' side by side. A service is told an item's fields as its targets.

    Args:
      version: of the service; values of another version are not mixed in.
      kept: a file of finished items, one JSON line each.

    Raises:
      SuiteError: an image is gone, or the service could not score one or says that it does not apply to the item.
    """
    done = read_kept(kept, client.name, version)
    places = [(run, i) for i in range(len(runs[0].items)) for run in runs]
    key = lambda run, i: f"{run.path.resolve()}#{run.items[i]['id']}"  # noqa: E731
    left = [place for place in places if key(*place) not in done]
    kept.parent.mkdir(parents=True, exist_ok=True)
    with kept.open("a", encoding="utf-8") as file, tqdm(total=len(left), desc=f"scored by {client.name}", unit="item") as bar:
        for start in range(0, len(left), ITEMS_AT_ONCE):
            group = left[start : start + ITEMS_AT_ONCE]
            values = ask(client, group)
            for (run, i), row in zip(group, values):
                line = {"key": key(run, i), "scorer": client.name, "version": version, "values": row}
                file.write(json.dumps(line) + "\n")
                done[line["key"]] = row
            file.flush()
            bar.update(len(group))
    return np.array([[v for run in runs for v in done[key(run, i)]] for i in range(len(runs[0].items))], np.float64)


def ask(client: Client, group: Sequence[tuple[EvalRun, int]]) -> list[list[float]]:
    """Values of the images of some items."""
    for run, i in group:
        if len(shots(run, run.items[i])) != outputs(run.items[i]):
            raise SuiteError(f"{run.path}: item {run.items[i]['id']} lists no images, another program drew them; draw with xomni eval")
    wanted = [(run, run.items[i], shot) for run, i in group for shot in shots(run, run.items[i])]
    for run, item, shot in wanted:
        if not shot.path.is_file():
            raise SuiteError(f"{shot.path} of item {item['id']} is gone, so {client.name} cannot score it; draw it again")
    images = [np.asarray(shot.open()) for _, _, shot in wanted]
    scores = iter(client.score(images, [{"prompt": item["prompt"], "targets": dict(item["fields"])} for _, item, _ in wanted]))
    rows = []
    for run, i in group:
        item = run.items[i]
        row = [next(scores) for _ in shots(run, item)]
        bad = next((s for s in row if s.value is None), None)
        if bad is not None:
            reason = bad.error or "it says that it does not apply"
            raise SuiteError(f"{client.name} gave item {item['id']} of {run.path} no value ({reason}); what is scored is kept")
        rows.append([float(s.value) for s in row])
    return rows


def read_kept(path: Path, scorer: str, version: str) -> dict[str, list[float]]:
    """Key -> values of finished items; lines of another service or cut off are passed over."""
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if (record["scorer"], record["version"]) == (scorer, version):
            found[record["key"]] = record["values"]
    return found
