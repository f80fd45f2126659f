"""Images where the published files keep them: in files, inside parquet, as base64 in a table. Read when they are asked for."""

from __future__ import annotations

import base64
import binascii
import functools
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from xomni_jax.evaluation.suite import SuiteError


@dataclass(frozen=True)
class ParquetImage:
    """An image inside a parquet file (a struct of bytes and path, or a list of them); read with its row group, once."""

    path: Path
    group: int
    row: int
    column: str

    def __call__(self) -> Image.Image:
        """The image, RGB. SuiteError when it has no bytes or cannot be decoded."""
        value = _row_group(self.path, self.group, self.column)[self.row].as_py()
        value = value[0] if isinstance(value, list) and value else value
        if not isinstance(value, dict) or not value.get("bytes"):
            raise SuiteError(f"{self} holds no image; download the file again")
        return decode(value["bytes"], str(self))

    def __str__(self) -> str:
        return f"{self.path} row group {self.group} row {self.row + 1}, {self.column}"


@functools.lru_cache(maxsize=2)
def _row_group(path: Path, group: int, column: str) -> Any:
    return pyarrow().parquet.ParquetFile(path).read_row_group(group, columns=[column]).column(0)


def pyarrow() -> Any:
    """The package, with its parquet reader. SuiteError when it is not installed."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise SuiteError("reading parquet needs the package pyarrow: pip install 'xomni_jax[eval]'") from error
    return pyarrow


@dataclass(frozen=True)
class FileImage:
    """An image that lies in a file of its own. `mend` says where a user gets it."""

    path: Path
    mend: str

    def exists(self) -> bool:
        """Whether the file is there, without reading it."""
        return self.path.is_file()

    def __call__(self) -> Image.Image:
        """The image, RGB."""
        if not self.exists():
            raise SuiteError(f"the image {self} is missing")
        return decode(self.path.read_bytes(), str(self.path))

    def __str__(self) -> str:
        return f"{self.path} ({self.mend})"


def base64_image(text: str, where: str) -> Callable[[], Image.Image]:
    """An image held as base64 in a table."""

    def open_image() -> Image.Image:
        try:
            data = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError) as error:
            raise SuiteError(f"{where}: the image is not base64; download the file again") from error
        return decode(data, where)

    return open_image


def decode(data: bytes, where: str) -> Image.Image:
    """RGB image of an encoded file. SuiteError naming `where`."""
    try:
        return Image.open(io.BytesIO(data)).convert("RGB")
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise SuiteError(f"{where}: the image cannot be read ({type(error).__name__}); download it again") from error
