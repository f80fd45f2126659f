"""Small files in the published formats of the benchmarks, written for this test."""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

RED, BLUE = (250, 0, 0), (0, 0, 250)


def png(colour: tuple[int, int, int], size: tuple[int, int] = (32, 24)) -> bytes:
    """An encoded image with a gradient in one colour."""
    image, out = Image.new("RGB", size), io.BytesIO()
    image.putdata([tuple((c + 7 * n) % 256 for c in colour) for n in range(size[0] * size[1])])
    image.save(out, "PNG")
    return out.getvalue()


def lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """JSON lines."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def table(path: Path, rows: Sequence[dict[str, Any]], delimiter: str = ",") -> None:
    """CSV or TSV; bytes become base64."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows([{k: base64.b64encode(v).decode() if isinstance(v, bytes) else v for k, v in row.items()} for row in rows])


def parquet(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Parquet; bytes become the struct in which Hugging Face stores an image."""
    import pyarrow
    from pyarrow.parquet import write_table

    path.parent.mkdir(parents=True, exist_ok=True)
    stored = [{k: {"bytes": v, "path": "x.png"} if isinstance(v, bytes) else v for k, v in row.items()} for row in rows]
    write_table(pyarrow.Table.from_pylist(stored), path)


def write(folder: Path) -> None:
    """FOLDER/SUITE for every published suite."""
    for name in ("longtext_bench", "oneig_bench", "geneval", "dpg_bench", "pope", "GQA", "mmbench", "seedbench", "DocVQA", "ocrbench"):
        (folder / name).mkdir(parents=True)
    sign = {"category": "sign", "length": "short", "prompt": 'a red sign that says "OPEN"', "text": ["OPEN", "fresh bread"], "text_length": 3, "prompt_id": 3}
    lines(folder / "longtext_bench/text_prompts.jsonl", [sign, sign | {"prompt_id": 7, "category": "label", "text": ["SALE"]}])
    lines(folder / "longtext_bench/text_prompts_zh.jsonl", [sign | {"text": ["欢迎光临"]}, sign | {"prompt_id": 7, "text": ["好好学习"]}])
    prompt = {"category": "Text_Rendering", "type": "NP", "prompt_length": "short", "class": "poster design"}
    for suffix, texts_suffix, language, texts in (("", "", "en", ("['Hot Tea']", "['OPEN', \"it's\"]")), ("-ZH", "_zh", "cn", ("['欢迎光临']", "['好好学习']"))):
        rows = [prompt | {"id": f"{n:03d}", f"prompt_{language}": f'a "sign" {n}'} for n in range(2)]
        table(folder / f"oneig_bench/OneIG-Bench{suffix}.csv", rows)
        table(folder / f"oneig_bench/text_content{texts_suffix}.csv", [row | {"text_content": text} for row, text in zip(rows, texts)])
    left = {"class": "cat", "count": 1, "position": ["left of", 0]}
    objects = [
        {"tag": "single_object", "include": [{"class": "cat", "count": 1}], "prompt": "a photo of a cat"},
        {"tag": "colors", "include": [{"class": "bus", "count": 1, "color": "red"}], "prompt": "a photo of a red bus"},
        {"tag": "position", "include": [{"class": "dog", "count": 1}, left], "exclude": [{"class": "bus", "count": 1}], "prompt": "a cat left of a dog"},
    ]
    lines(folder / "geneval/evaluation_metadata.jsonl", objects)
    (folder / "dpg_bench/prompts").mkdir()
    asked = []
    for item in ("0", "partiprompts1", "vrd2"):
        (folder / f"dpg_bench/prompts/{item}.txt").write_text(f"a boat, {item}\n")
        for number, parent, kind in ((1, 0, "entity - whole (boat)"), (2, 1, "attribute - color (boat, red)"), (3, 1, "relation - spatial (on)")):
            question = {"item_id": item, "text": "t", "keywords": "", "proposition_id": number, "dependency": str(parent), "category_broad": ""}
            asked.append(question | {"category_detailed": "", "tuple": kind, "question_natural_language": f"Is proposition {number} true?"})
    table(folder / "dpg_bench/dpg_bench.csv", asked)
    for n, split in enumerate(("random", "popular", "adversarial")):
        yes_no = [{"question_id": k, "image": "a.jpg", "text": f"Is there a {what} in the image?", "label": label} for k, (what, label) in enumerate((("cat", "no"), ("sign", "yes")))]
        lines(folder / f"pope/coco_pope_{split}.json", yes_no[: 2 - n % 2])
    (folder / "pope/val2014").mkdir()
    (folder / "pope/val2014/a.jpg").write_bytes(png(RED))
    gqa = {"question": "what colour is the sign?", "types": {"structural": "query"}}
    parquet(folder / "GQA/testdev_balanced_images/testdev-00000-of-00001.parquet", [{"id": "n1", "image": png(RED)}, {"id": "n2", "image": png(BLUE)}])
    questions = [gqa | {"id": "1", "imageId": "n1", "answer": "red"}, gqa | {"id": "2", "imageId": "n2", "answer": "blue", "types": {"structural": "verify"}}]
    parquet(folder / "GQA/testdev_balanced_instructions/testdev-00000-of-00001.parquet", questions)
    choice = {"question": "what colour is the sign?", "hint": "nan", "A": "red", "B": "blue", "C": "", "D": "", "answer": "A", "category": "x", "l2-category": "y"}
    turned = choice | {"A": "blue", "B": "red", "answer": "B"}
    table(folder / "mmbench/MMBench_DEV_EN_V11.tsv", [{"index": 7} | choice | {"image": png(RED)}, {"index": 1_000_007} | turned | {"image": "7"}], "\t")
    seed = {"question": "what is there?", "choice_a": "1", "choice_b": "2", "choice_c": "3", "choice_d": "4", "question_type_id": 3, "data_type": "image"}
    pair = [seed | {"question_id": f"{n}_0", "answer": answer, "image": png(colour)} for n, (answer, colour) in enumerate((("b", RED), ("A", BLUE)))]
    parquet(folder / "seedbench/data/test-00000-of-00001.parquet", pair)
    page = {"question": "what does the sign say?", "answers": ["OPEN", "open"], "image": png(RED), "question_types": ["form", "layout"]}
    parquet(folder / "DocVQA/validation-00000-of-00001.parquet", [page | {"questionId": "11"}, page | {"questionId": "12", "image": png(BLUE)}])
    entry = {"dataset_name": "svt", "id": 5, "image_path": "svt/1.png", "question": "what does the sign say?", "answers": "HOTEL", "type": "Regular"}
    (folder / "ocrbench/OCRBench.json").write_text(json.dumps([entry, entry | {"id": 6, "answers": ["a", "b"]}]))
    (folder / "ocrbench/svt").mkdir()
    (folder / "ocrbench/svt/1.png").write_bytes(png(BLUE))
