"""Writes tests/goldens/*.npz from the torch references: python -m tests.parity.make_goldens [NAME ...]. Needs the extra [parity]."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
GOLDENS = HERE.parent / "goldens"


def main(names: list[str]) -> None:
    """Every reference_NAME.py that exports `outputs()` becomes goldens/NAME.npz."""
    for path in sorted(HERE.glob("reference_*.py")):
        name = path.stem.removeprefix("reference_")
        if names and name not in names:
            continue
        arrays = importlib.import_module(f"tests.parity.{path.stem}").outputs()
        np.savez_compressed(GOLDENS / f"{name}.npz", **arrays)
        print(f"{GOLDENS / (name + '.npz')}: {len(arrays)} arrays, {(GOLDENS / (name + '.npz')).stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main(sys.argv[1:])
