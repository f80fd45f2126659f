"""Directories of published models on this machine: found, named in errors, and identified by their contents."""

from __future__ import annotations

import hashlib
from pathlib import Path

from xomni_jax.rewards.scorer import ServiceError

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")


def model_directory(scorer: str, option: str, path: str | None, published: str) -> Path:
    """The directory that `option` of a scorer names. ServiceError when it was not given or is none; `published` is where to get it."""
    if not path or not Path(path).is_dir():
        given = f"{path} is no directory" if path else "it was not given"
        raise ServiceError(f"scorer {scorer!r} needs {option} DIR, a local copy of {published}; {given}")
    return Path(path)


def weight_files(path: str | Path) -> list[Path]:
    """The weight files of a directory, by name; a file stands for itself. ServiceError when there is none."""
    path = Path(path)
    files = [path] if path.is_file() else sorted(p for p in path.glob("*") if p.suffix in WEIGHTS and p.is_file())
    if not files:
        raise ServiceError(f"{path} holds no weights ({', '.join('*' + suffix for suffix in WEIGHTS)}); download the model again")
    return files


def model_hash(path: str | Path) -> str:
    """sha256 over the names, sizes and contents of the weight files of a directory, or of one file: which model it is."""
    digest = hashlib.sha256()
    for file in weight_files(path):
        digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
        digest.update(bytes.fromhex(file_hash(file)))
    return digest.hexdigest()


def file_hash(file: Path) -> str:
    """sha256 of a file's contents, as the Hugging Face hub shows it."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
