"""Question tables as VLMEvalKit (tsv, images in base64) and lmms-lab on Hugging Face (parquet, images as bytes) publish them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from xomni_jax.evaluation.suite import SuiteError
from xomni_jax.evaluation.suites.reading import Row, read_rows
from xomni_jax.evaluation.suites.stored import ParquetImage, base64_image

_REFERENCE = 64  # a base64 field no longer than this is the index of the row that holds the image


def rows_with_images(paths: Sequence[Path]) -> Iterator[tuple[Row, Callable[[], Any]]]:
    """(row, image) of a table whose column `image` holds the images, or names the row that does."""
    rows, tables = list(read_rows(paths)), {}
    if not isinstance(rows[0].values.get("image") if rows else None, ParquetImage):
        tables = {row.text("index"): row for row in rows}
    for row in rows:
        image = row.values.get("image")
        if image is None:
            raise SuiteError(f"{row.where}: the field 'image' is missing")
        yield row, image if isinstance(image, ParquetImage) else _base64(row, tables)


def _base64(row: Row, tables: dict[str, Row]) -> Callable[[], Any]:
    text = row.text("image")
    if len(text) > _REFERENCE:
        return base64_image(text, row.where)
    source = tables.get(text)
    if source is None or len(source.text("image")) <= _REFERENCE:
        raise SuiteError(f"{row.where}: the image is neither base64 nor the index of a row that holds one: {text!r}")
    return base64_image(source.text("image"), source.where)
