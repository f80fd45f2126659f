"""Conversations about a model's own drawings that a reward service has judged: the tasks of `judged_signs`.

The folder is one of `xomni generate`. `judged.jsonl` beside its metadata.jsonl has, for every prompt with good and bad images, as many
pairs as there are of the rarer: a good one with the verdict yes, and a bad one with no and the good one drawn after it. What is good is a
caption's image, too.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from xomni_jax.core.config import ConfigError
from xomni_jax.core.folders import write_text

FILE = "judged.jsonl"


def write_judged(folder: Path, question: str, good: float, bad: float) -> dict[str, int]:
    """Writes the folder's judged.jsonl -> number of records of each kind.

    Args:
      good, bad: an image whose reward is at least `good` shows what was asked for, one below `bad` does not; those between are left out.

    Raises:
      ConfigError: the folder holds no judged drawings, or none of a prompt with both kinds.
    """
    if good < bad:
        raise ConfigError(f"--good {good:g} is less than --bad {bad:g}; raise it")
    try:
        rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text("utf-8").splitlines()]
    except (OSError, ValueError):
        rows = []
    if not any("reward" in row for row in rows):
        raise ConfigError(
            f"{folder} holds no drawings with rewards; make some: xomni generate --prompts FILE --best-of 8 --n 8 --reward NAME=URL "
            f"--out {folder}"
        )
    records = list(judged_records(rows, question, good, bad))
    counts = {kind: sum(found == kind for found, _ in records) for kind in ("captions", "yes", "no")}
    if not counts["no"]:
        raise ConfigError(
            f"{folder}: no prompt has an image of a reward of at least {good:g} and one below {bad:g}; draw more of each, or change "
            "--good, --bad"
        )
    write_text(folder / FILE, "".join(json.dumps(record, ensure_ascii=False) + "\n" for _, record in records))
    return counts


def judged_records(rows: Sequence[Mapping[str, Any]], question: str, good: float, bad: float) -> Iterator[tuple[str, dict[str, Any]]]:
    """(kind, record) of drawings: file_name, text, index of the prompt, reward (None where it is unknown), perhaps reason."""
    drawn: dict[int, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        if row.get("reward") is not None:
            drawn[row["index"]].append(row)
    for images in drawn.values():
        right, wrong = [row for row in images if row["reward"] >= good], [row for row in images if row["reward"] < bad]
        for row in right:
            yield "captions", {"image": row["file_name"], "text": row["text"]}
        for one, other in zip(right, wrong):
            yield "yes", {"messages": _verdict(one, question, "Yes")}
            redrawn = {"role": "plain", "content": [{"type": "image", "image": one["file_name"]}]}
            yield "no", {"messages": [*_verdict(other, question, "No"), redrawn]}


def _verdict(row: Mapping[str, Any], question: str, word: str) -> list[dict[str, Any]]:
    image = {"type": "image", "image": row["file_name"], "learn": False}
    answer = f"{word}, {row['reason']}" if row.get("reason") else f"{word}."
    return [
        {"role": "plain", "content": [row["text"], image]},
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
    ]
