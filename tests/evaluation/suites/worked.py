"""The worked examples: inputs written for this project, numbers computed once with the official scorers' functions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from xomni_jax.evaluation.suite import Item, Record

EXAMPLES: dict[str, Any] = json.loads(Path(__file__).with_name("examples.json").read_text(encoding="utf-8"))
# The published files, where they are: scoring is tested without them.
PUBLISHED = Path(__file__).resolve().parents[4] / "shared" / "data"
needs_published = pytest.mark.skipif(not PUBLISHED.is_dir(), reason=f"the published files are not in {PUBLISHED}")


def as_records(suite, items: list[Item], outputs: list[list[Any]]) -> list[Record]:
    """Scored items as `aggregate` gets them: sorted by id, with id and fields."""
    scored = [suite.score(item, out) | {"id": item.id, "fields": item.fields} for item, out in zip(items, outputs, strict=True)]
    return sorted(scored, key=lambda record: record["id"])
