"""Every suite of questions through the whole command: hand-made files in each published format, answered by a miniature model."""

import csv
import json
import re

import jax
import pytest

from tests.evaluation.suites.published import png, write_parquet, write_tsv
from xomni_jax.cli.main import main
from xomni_jax.evaluation import outputs
from xomni_jax.evaluation.suites import get_suite
from xomni_jax.sharding.mesh import make_mesh

RED, BLUE = png((250, 0, 0)), png((0, 0, 250), (16, 16))
OPTIONS = {"question": "What?", "A": "cat", "B": "dog", "C": "", "D": "", "answer": "A", "category": "x", "l2-category": "y", "hint": ""}


def pope(folder):
    """Lines of json beside a folder of images, for three splits."""
    (folder / "val2014").mkdir()
    (folder / "val2014" / "a.jpg").write_bytes(RED)
    rows = [{"question_id": n, "image": "a.jpg", "text": "Is there a cat?", "label": label} for n, label in ((1, "yes"), (2, "no"))]
    for split in ("random", "popular", "adversarial"):
        (folder / f"coco_pope_{split}.json").write_text("".join(json.dumps(row) + "\n" for row in rows))


def gqa_parquet(folder):
    """Questions and images in files of their own."""
    images = [{"id": "n1", "image": RED}, {"id": "n2", "image": BLUE}]
    write_parquet(folder / "testdev_balanced_images" / "testdev-00000-of-00001.parquet", images)
    question = {"question": "Which animal?", "answer": "cat", "types": {"structural": "query"}}
    rows = [question | {"id": f"20{n}", "imageId": f"n{n}"} for n in (1, 2)]
    write_parquet(folder / "testdev_balanced_instructions" / "testdev-00000-of-00001.parquet", rows)


def gqa_tsv(folder):
    """The second row shares the image of the first."""
    rows = [{"index": 1, "question": "q", "answer": "a", "image": RED}, {"index": 2, "question": "q", "answer": "b", "image": "1"}]
    write_tsv(folder / "GQA_TestDev_Balanced.tsv", rows)


def mmbench_tsv(folder):
    """Two questions, one of them with its options rotated."""
    turned = {"A": "dog", "B": "cat", "answer": "B"}
    changes = ({"index": 7, "image": RED}, {"index": 1_000_007, "image": "7"} | turned, {"index": 8, "image": BLUE})
    rows = [{"index": 0} | OPTIONS | change for change in changes]
    write_tsv(folder / "MMBench_DEV_EN_V11.tsv", rows)


def mmbench_parquet(folder):
    """Images in every row."""
    write_parquet(folder / "en" / "dev-00000-of-00001.parquet", [{"index": n} | OPTIONS | {"image": RED} for n in (7, 8)])


def seedbench(folder):
    """Two images, and a video that is left out."""
    base = {"question": "What?", "choice_a": "1", "choice_b": "2", "choice_c": "3", "choice_d": "4", "answer": "b", "question_type_id": 3}
    kinds = (("1_0", "image", [RED]), ("2_0", "video", [BLUE, RED]), ("3_0", "image", [BLUE]))
    rows = [base | {"question_id": name, "data_type": kind, "image": images} for name, kind, images in kinds]
    write_parquet(folder / "data" / "test-00000-of-00001.parquet", rows)


def docvqa(folder):
    """Questions with two answers."""
    row = {"question": "Which year?", "answers": ["1987", "87"], "image": RED, "question_types": ["form", "layout"]}
    write_parquet(folder / "DocVQA" / "validation-00000-of-00001.parquet", [{"questionId": name} | row for name in ("11", "12")])


def docvqa_tsv(folder):
    """Answers as a list in a string."""
    rows = [{"index": n, "question": "q", "answer": "['a, b', \"it's\"]", "image": BLUE} for n in (3, 4)]
    write_tsv(folder / "DocVQA_VAL.tsv", rows)


def ocrbench(folder):
    """One json beside a folder of images."""
    (folder / "OCRBench_Images").mkdir()
    (folder / "OCRBench_Images" / "a.png").write_bytes(BLUE)
    kind = {"dataset_name": "svt", "type": "Regular Text Recognition", "image_path": "a.png"}
    kind |= {"question": "what is written?", "answers": "x"}
    (folder / "OCRBench.json").write_text(json.dumps([kind | {"id": n} for n in range(3)]))


@pytest.mark.parametrize(
    ("name", "write", "items", "headline"),
    [
        ("pope", pope, 6, "mean F1"),
        ("gqa", gqa_parquet, 2, "exact match"),
        ("gqa", gqa_tsv, 2, "exact match"),
        ("mmbench", mmbench_tsv, 3, "circular accuracy"),
        ("mmbench", mmbench_parquet, 2, "circular accuracy"),
        ("seedbench", seedbench, 2, "accuracy"),
        ("docvqa", docvqa, 2, "ANLS"),
        ("docvqa", docvqa_tsv, 2, "ANLS"),
        ("ocrbench", ocrbench, 3, "points"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_from_files_to_page(name, write, items, headline, model_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(outputs, "make_mesh", lambda axes: make_mesh({}, jax.devices()[:1]))
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    write(data)
    assert main(["eval", name, "--model", str(model_dir), "--data", str(data), "--out", str(out), "--batch", "2"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"results: {out / 'results.json'}"
    results = json.loads((out / "results.json").read_text())
    lines = [json.loads(line) for line in (out / "items.jsonl").read_bytes().splitlines()]
    assert results["suite"] == name and results["counts"]["items"] == results["counts"]["outputs"] == len(lines) == items
    told = results["headline"]
    assert (told["name"], told["value"]) == (headline, results["scores"][headline]) and told["value"] is not None
    assert all(isinstance(line["answer"], str) and len(line["verdicts"]) == 1 for line in lines)
    assert results["settings"]["max_new_tokens"] > 0 and results["judge"] is None
    page = (out / "report.html").read_text()
    assert results["title"] in page
    published = [item.id for item in get_suite(name).load(data)]  # in this order on the page, sorted by id in items.jsonl
    assert [line["id"] for line in sorted(lines, key=lambda line: line["position"])] == published
    assert re.findall(r"<h3><b .*?</b> <span>(.*?)</span>", page) == published
    with (out / "results.csv").open(newline="", encoding="utf-8") as file:
        assert [(row["id"], row["text"]) for row in csv.DictReader(file)] == [(line["id"], line["answer"]) for line in lines]
