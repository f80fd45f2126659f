"""Folders for results, checked before the work that fills them."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path


def check_folder(folder: Path, nbytes: int) -> None:
    """Finds out whether about `nbytes` bytes can be written into a folder, which need not exist, and leaves nothing behind.

    Raises:
      ValueError: a file is in its place, it cannot be written to, or the disk is too full.
    """
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise ValueError(f"{there} is a file; give a folder")
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as e:
        raise ValueError(f"{there}: nothing can be written there ({e.strerror}); choose another folder") from None
    free = shutil.disk_usage(there).free
    if free < nbytes:
        raise ValueError(f"{there}: {free / 1e6:.1f} MB are free, about {nbytes / 1e6:.1f} MB are needed; choose another disk or make room")
