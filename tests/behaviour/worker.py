"""Runs `xomni` command lines one after another in one process, then hashes the parameters of model directories.

Usage: python tests/behaviour/worker.py '{"commands": [[argument, ...], ...], "models": [directory, ...]}'. The last line of the output
is JSON: {"printed": [text per command], "models": {directory: {component: {parameter: [sha256, norm, projection]}}}}.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np


def run(argv: list[str]) -> str:
    """What one command line prints."""
    from xomni_jax.cli.main import main

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = main(argv)
    if code:
        sys.exit(f"exit code {code}: xomni {' '.join(argv)}\n{printed.getvalue()}")
    return printed.getvalue()


def fingerprint(value: Any) -> list[Any]:
    """[sha256 of the bytes, dtype and shape, Euclidean norm, projection on a fixed direction as a share of the norm]."""
    array = np.asarray(value)
    digest = hashlib.sha256(f"{array.dtype}{array.shape}".encode() + np.ascontiguousarray(array).tobytes()).hexdigest()
    flat = array.astype(np.float64).ravel()
    norm = float(np.linalg.norm(flat))
    direction = np.cos(np.arange(flat.size, dtype=np.float64))
    return [digest, norm, float(flat @ direction / np.linalg.norm(direction) / norm) if norm else 0.0]


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries -> {"a/b/c": leaf}."""
    if not hasattr(tree, "items"):
        return {prefix: tree}
    return {path: leaf for key, node in tree.items() for path, leaf in flatten(node, f"{prefix}/{key}".strip("/")).items()}


def parameters(directory: str) -> dict[str, dict[str, list[Any]]]:
    """The fingerprint of every parameter of a model directory, by component."""
    import xomni_jax

    model = xomni_jax.load(directory)
    names = sorted(json.loads((Path(directory) / "model.json").read_text())["components"])
    return {name: {path: fingerprint(leaf) for path, leaf in sorted(flatten(model.params(name)).items())} for name in names}


if __name__ == "__main__":
    task = json.loads(sys.argv[1])
    sys.argv[1:] = []
    printed = [run(argv) for argv in task["commands"]]
    print(json.dumps({"printed": printed, "models": {directory: parameters(directory) for directory in task["models"]}}))
