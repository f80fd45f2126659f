"""Folders that commands write: one kind of content each, and one writer at a time."""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import IO

# Kind of folder -> the file that tells it.
MARKERS = {"training run": "metrics.jsonl", "evaluation": "settings.json", "model directory": "model.json"}


def why_taken(folder: Path, kind: str) -> str | None:
    """Why a command that writes folders of one kind must not write here: "holds a model directory". None if it may."""
    if folder.exists() and not folder.is_dir():
        return "is a file"
    other = next((name for name, file in MARKERS.items() if name != kind and (folder / file).is_file()), None)
    return other and f"holds {'an' if other[0] in 'aeiou' else 'a'} {other}"


def lock(file: IO) -> bool:
    """Locks an open file until it is closed or this process ends, in whatever way; False if another process holds it.

    A file system without locks, such as a mounted bucket, refuses nobody.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True
