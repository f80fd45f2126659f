"""Images of published data: inside a parquet file, as base64 in a table, or in files of their own. Each is read when it is asked for."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from xomni_jax.data.images import UnreadableImage, read_image
from xomni_jax.data.tables import Table
from xomni_jax.evaluation.suite import SuiteError


@dataclass(frozen=True)
class ParquetImage:
    """An image inside a parquet file: a struct of bytes and path, or a list of them, of which the first is taken."""

    table: Table
    row: int
    column: str

    def __call__(self) -> Image.Image:
        """The image, RGB. SuiteError when it has no bytes or cannot be decoded."""
        value = self.table[self.row][self.column]
        value = value[0] if isinstance(value, list) and value else value
        if not isinstance(value, dict) or not value.get("bytes"):
            raise SuiteError(f"{self} holds no image; download the file again")
        return decode(value["bytes"], str(self))

    def __str__(self) -> str:
        return f"{self.table.where(self.row)}, {self.column}"


@dataclass(frozen=True)
class FileImage:
    """An image that lies in a file of its own. `remedy` says where to get it."""

    path: Path
    remedy: str

    def exists(self) -> bool:
        """Whether the file is there, without reading it."""
        return self.path.is_file()

    def __call__(self) -> Image.Image:
        """The image, RGB."""
        if not self.exists():
            raise SuiteError(f"the image {self} is missing")
        return decode(self.path.read_bytes(), str(self.path))

    def __str__(self) -> str:
        return f"{self.path} ({self.remedy})"


def decode_base64(text: str, where: str) -> Image.Image:
    """RGB image held as base64 in a table. SuiteError naming `where`."""
    try:
        data = base64.b64decode(text, validate=True)
    except ValueError as error:
        raise SuiteError(f"{where}: the image is not base64; download the file again") from error
    return decode(data, where)


def decode(data: bytes, where: str) -> Image.Image:
    """RGB image of an encoded file. SuiteError naming `where`."""
    try:
        return read_image(data)
    except UnreadableImage as error:
        raise SuiteError(f"{where}: the image cannot be read: {error}; download it again") from error
