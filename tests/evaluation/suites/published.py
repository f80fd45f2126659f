"""Small files in the published formats: parquet with image bytes, tsv with base64, jsonl beside image files."""

from __future__ import annotations

import base64
import csv
import io
from pathlib import Path
from typing import Any

from PIL import Image


def png(colour: tuple[int, int, int], size: tuple[int, int] = (24, 16)) -> bytes:
    """An encoded image of one colour; noisy enough that its base64 is longer than an index."""
    image = Image.new("RGB", size, colour)
    image.putdata([tuple((c + 7 * n) % 256 for c in colour) if n else colour for n in range(size[0] * size[1])])
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def write_parquet(path: Path, rows: list[dict[str, Any]], rows_per_group: int = 2) -> None:
    """Rows whose value of an image is bytes, or a list of bytes, as Hugging Face stores them."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    def stored(value: Any) -> Any:
        if isinstance(value, bytes):
            return {"bytes": value, "path": "x.png"}
        return [stored(v) for v in value] if isinstance(value, list) else value

    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist([{k: stored(v) for k, v in row.items()} for row in rows])
    parquet.write_table(table, path, row_group_size=rows_per_group)


def write_tsv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Rows whose value of an image is bytes, written as base64."""
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, list(rows[0]), delimiter="\t")
        table.writeheader()
        for row in rows:
            table.writerow({k: base64.b64encode(v).decode() if isinstance(v, bytes) else v for k, v in row.items()})
