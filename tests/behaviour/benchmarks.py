"""Small files in the published formats of the benchmarks; some of the wanted answers are what the shipped tiny model says."""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

Row = dict[str, Any]


def png(colour: str) -> bytes:
    """An encoded image of one colour."""
    out = io.BytesIO()
    Image.new("RGB", (64, 32), colour).save(out, "PNG")
    return out.getvalue()


def jsonl(path: Path, rows: Sequence[Row]) -> None:
    """One object per line."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def table(path: Path, rows: Sequence[Row], delimiter: str = ",") -> None:
    """CSV or TSV; bytes become base64."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows([{k: base64.b64encode(v).decode() if isinstance(v, bytes) else v for k, v in row.items()} for row in rows])


def parquet(path: Path, rows: Sequence[Row]) -> None:
    """Bytes become the struct in which Hugging Face stores an image."""
    import pyarrow
    from pyarrow.parquet import write_table

    path.parent.mkdir(parents=True)
    stored = [{k: {"bytes": v, "path": "x.png"} if isinstance(v, bytes) else v for k, v in row.items()} for row in rows]
    write_table(pyarrow.Table.from_pylist(stored), path)


def write(folder: Path) -> None:
    """The files of every published suite, a folder for each benchmark."""
    folder.mkdir()
    for make in (longtext, oneig, geneval, dpg, pope, gqa, mmbench, seedbench, docvqa, ocrbench):
        make(folder)


def longtext(folder: Path) -> None:
    """LongText-Bench in both languages."""
    (folder / "longtext_bench").mkdir()
    prompt = {"category": "sign", "length": "short", "prompt": 'a red sign that says "OPEN"', "text_length": 3, "prompt_id": 3}
    for name, texts in (("text_prompts", (["OPEN", "fresh bread"], ["SALE"])), ("text_prompts_zh", (["欢迎光临"], ["好好学习"]))):
        rows = [prompt | {"text": texts[0]}, prompt | {"text": texts[1], "prompt_id": 7, "category": "label"}]
        jsonl(folder / "longtext_bench" / f"{name}.jsonl", rows)


def oneig(folder: Path) -> None:
    """OneIG-Bench's text prompts in both languages."""
    (folder / "oneig_bench").mkdir()
    for prompts, wanted, language, texts in (
        ("OneIG-Bench", "text_content", "en", ("['Hot Tea']", "['OPEN', \"it's\"]")),
        ("OneIG-Bench-ZH", "text_content_zh", "cn", ("['欢迎光临']", "['好好学习']")),
    ):
        rows: list[Row] = [{"category": "Text_Rendering", "id": f"{n:03d}", f"prompt_{language}": f'a "sign" {n}'} for n in range(2)]
        rows = [row | {"type": "NP", "prompt_length": "short", "class": "poster design"} for row in rows]
        table(folder / "oneig_bench" / f"{prompts}.csv", rows)
        table(folder / "oneig_bench" / f"{wanted}.csv", [row | {"text_content": text} for row, text in zip(rows, texts)])


def geneval(folder: Path) -> None:
    """GenEval: presence, colour, position and absence."""
    (folder / "geneval").mkdir()
    cat = {"class": "cat", "count": 1}
    rows = [
        {"tag": "single_object", "include": [cat], "prompt": "a photo of a cat"},
        {"tag": "colors", "include": [{"class": "bus", "count": 1, "color": "red"}], "prompt": "a photo of a red bus"},
        {"tag": "position", "include": [{"class": "dog", "count": 1}, cat | {"position": ["left of", 0]}], "prompt": "a cat left of a dog"},
        {"tag": "counting", "include": [cat | {"count": 2}], "exclude": [cat | {"count": 3}], "prompt": "a photo of two cats"},
    ]
    jsonl(folder / "geneval" / "evaluation_metadata.jsonl", rows)


def dpg(folder: Path) -> None:
    """DPG-Bench: three questions about each prompt, the last two of which depend on the first."""
    (folder / "dpg_bench" / "prompts").mkdir(parents=True)
    tuples = ("entity - whole (boat)", "attribute - color (boat, red)", "relation - spatial (boat, sea)")
    rows = []
    for item in ("0", "partiprompts1", "vrd2"):
        (folder / "dpg_bench" / "prompts" / f"{item}.txt").write_text(f"a boat, {item}\n")
        for number, kind in enumerate(tuples, 1):
            question = {"proposition_id": number, "dependency": str(int(number > 1)), "tuple": kind}
            rows.append({"item_id": item, "text": "t"} | question | {"question_natural_language": f"Is proposition {number} true?"})
    table(folder / "dpg_bench" / "dpg_bench.csv", rows)


def pope(folder: Path) -> None:
    """POPE in its three splits."""
    (folder / "pope" / "val2014").mkdir(parents=True)
    (folder / "pope" / "val2014" / "a.jpg").write_bytes(png("red"))
    asked = [("cat", "no"), ("sign", "yes")]
    rows = [
        {"question_id": n, "image": "a.jpg", "text": f"Is there a {what} in the image?", "label": label}
        for n, (what, label) in enumerate(asked)
    ]
    for split in ("random", "popular", "adversarial"):
        jsonl(folder / "pope" / f"coco_pope_{split}.json", rows)


def gqa(folder: Path) -> None:
    """GQA as parquet, questions and images apart."""
    question = "what colour is the sign?"
    rows = [{"id": "1", "imageId": "n1", "answer": "purple", "types": {"structural": "query"}}]
    rows += [{"id": "2", "imageId": "n2", "answer": "red", "types": {"structural": "verify"}}]
    parquet(
        folder / "GQA" / "testdev_balanced_images" / "testdev-00000-of-00001.parquet",
        [{"id": "n1", "image": png("red")}, {"id": "n2", "image": png("blue")}],
    )
    parquet(
        folder / "GQA" / "testdev_balanced_instructions" / "testdev-00000-of-00001.parquet", [row | {"question": question} for row in rows]
    )


def mmbench(folder: Path) -> None:
    """MMBench as TSV: a question with its options in two rotations."""
    (folder / "mmbench").mkdir()
    row = {"index": 7, "question": "what colour is the sign?", "hint": "nan", "A": "red", "B": "blue", "C": "", "D": "", "answer": "A"}
    row |= {"category": "x", "l2-category": "y", "image": png("red")}
    turned = {"index": 1_000_007, "A": "blue", "B": "red", "answer": "B", "image": "7"}
    table(folder / "mmbench" / "MMBench_DEV_EN_V11.tsv", [row, row | turned], "\t")


def seedbench(folder: Path) -> None:
    """SEED-Bench as parquet."""
    row = {"question": "what is there?", "choice_a": "1", "choice_b": "2", "choice_c": "3", "choice_d": "4"}
    row |= {"question_id": "101_0", "question_type_id": 3, "data_type": "image", "answer": "b", "image": png("red")}
    parquet(folder / "seedbench" / "data" / "test-00000-of-00001.parquet", [row, row | {"question_id": "102_0", "answer": "A"}])


def docvqa(folder: Path) -> None:
    """DocVQA as parquet."""
    row = {
        "questionId": "11",
        "question": "what colour is the sign?",
        "question_types": ["form", "layout"],
        "answers": ["violet", "purples"],
    }
    rows = [row | {"image": png("red")}, row | {"questionId": "12", "answers": ["OPEN"], "image": png("blue")}]
    parquet(folder / "DocVQA" / "validation-00000-of-00001.parquet", rows)


def ocrbench(folder: Path) -> None:
    """OCRBench."""
    (folder / "ocrbench" / "svt").mkdir(parents=True)
    (folder / "ocrbench" / "svt" / "1.png").write_bytes(png("blue"))
    row = {
        "dataset_name": "svt",
        "id": 5,
        "image_path": "svt/1.png",
        "question": "what does the sign say?",
        "answers": "HOTEL",
        "type": "Regular",
    }
    (folder / "ocrbench" / "OCRBench.json").write_text(json.dumps([row, row | {"id": 6, "answers": ["n", "b"]}]))
