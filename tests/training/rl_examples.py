"""Worked reinforcement-learning numbers at full precision: `rl_examples.json`, by id or by section."""

import json
from pathlib import Path

EXAMPLES = {e["id"]: e for e in json.loads(Path(__file__).with_name("rl_examples.json").read_text())}


def section(name: str) -> list[str]:
    """Ids of one section, in order."""
    return [i for i in EXAMPLES if i.rsplit("-", 1)[0] == name]
