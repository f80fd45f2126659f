"""Files that ship with the package, found under their names in the repository wherever a command is run."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).parents[1]
# A wheel holds the folder configs inside the package, a checkout beside it.
CONFIGS = (PACKAGE if (PACKAGE / "configs").is_dir() else PACKAGE.parent) / "configs"


def shipped(path: str) -> str:
    """A path, or where the package has it if there is nothing here and it names a shipped configuration or model, such as
    configs/tiny/sft.py or xomni_jax/assets/tiny_sft."""
    for folder in (CONFIGS, PACKAGE):
        there = folder.parent / path
        if path.startswith(f"{folder.name}/") and not Path(path).exists() and (there.is_file() or (there / "model.json").is_file()):
            return str(there)
    return path
