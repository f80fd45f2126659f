"""Folders that commands write: one kind of content each, and one writer at a time."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from pathlib import Path
from typing import IO

# Kind of folder -> the file that tells it.
MARKERS = {
    "training run": "metrics.jsonl",
    "evaluation": "settings.json",
    "model directory": "model.json",
    "data set of codes": "source.json",
    "set of images": "set.json",
    "set of drawn images": "drawn.json",
}


def why_taken(folder: Path, kind: str) -> str | None:
    """Why a command that writes folders of one kind must not write here: "holds a model directory". None if it may."""
    if folder.exists() and not folder.is_dir():
        return "is a file"
    other = next((name for name, file in MARKERS.items() if name != kind and (folder / file).is_file()), None)
    return other and f"holds {'an' if other[0] in 'aeiou' else 'a'} {other}"


def why_not_writable(folder: Path) -> str | None:
    """Why files cannot be made in a folder, which need not exist: "/proc: nothing can be written there (...)". None if they can."""
    there = _existing(folder)
    if not there.is_dir():
        return f"{there} is a file"
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as e:
        return f"{there}: nothing can be written there ({e.strerror})"
    return None


def check_folder(folder: Path, nbytes: int) -> None:
    """Raises ValueError unless about `nbytes` bytes can be written into a folder, which need not exist. Leaves nothing behind."""
    if reason := why_not_writable(folder):
        raise ValueError(f"{reason}; give another folder")
    there = _existing(folder)
    free = shutil.disk_usage(there).free
    if free < nbytes:
        raise ValueError(f"{there}: {free / 1e6:.1f} MB are free, about {nbytes / 1e6:.1f} MB are needed; choose another disk or make room")


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above that exists."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


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


def write_text(path: Path, text: str) -> Path:
    """Replaces a text file as a whole, also when several processes write it at the same time. Returns its path."""
    os.replace(write_part(path, text), path)
    return path


def write_part(path: Path, text: str) -> Path:
    """Writes a temporary file beside `path`, named for this process, and returns its path. OSError, and no file, where that fails."""
    part = part_of(path)
    try:
        with part.open("w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        part.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error  # a full disk names no file
    return part


def part_of(path: Path) -> Path:
    """Name of the temporary file that this process writes before it takes the place of `path`."""
    return path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}")
