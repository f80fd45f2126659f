"""Every suite's data files with one thing wrong: refused in one sentence with file and line, or read into items that can be stored."""

import csv
import io
import json
import math
import re

import pytest

from tests.evaluation.suites.published import png, write_parquet, write_tsv
from xomni_jax.cli.main import main
from xomni_jax.evaluation.run_directory import json_line
from xomni_jax.evaluation.suite import SuiteError, check_id
from xomni_jax.evaluation.suites import get_suite

IMAGE = png((250, 0, 0))
POPE = {"question_id": 1, "image": "a.jpg", "text": "Is there a cat?", "label": "no"}
MMBENCH = {"index": 7, "question": "What?", "hint": "look", "A": "cat", "B": "dog", "answer": "A", "category": "x", "l2-category": "y"}
ONEIG = {"category": "Text_Rendering", "id": "000", "prompt_en": "a sign", "class": "short", "type": "T", "prompt_length": "9"}
CLAUSES = [{"class": "dog", "count": 1, "color": "red"}, {"class": "cat", "count": 2, "position": ["above", 0]}]
DPG = {"item_id": "demo", "proposition_id": 1, "dependency": "0", "tuple": "entity - whole (cat)", "question_natural_language": "A cat?"}
GQA = {"id": "1", "question": "q", "answer": "a", "imageId": "n1", "types": {"structural": "s"}}
DOCVQA = {"questionId": "1", "question": "q", "answers": ["a"], "question_types": ["form"], "image": IMAGE}
SEED = {"question_id": "1", "question": "q", "choice_a": "1", "choice_b": "2", "choice_c": "3", "choice_d": "4", "answer": "b"}
# suite -> its files, one row each
VALID = {
    "longtext-en": {"text_prompts.jsonl": {"prompt_id": 3, "prompt": "p", "text": ["OPEN", "now"], "category": "sign", "length": "short"}},
    "oneig-text-en": {"OneIG-Bench.csv": ONEIG, "text_content.csv": {"id": "000", "text_content": "['OPEN']"}},
    "geneval": {"evaluation_metadata.jsonl": {"tag": "position", "include": CLAUSES, "exclude": CLAUSES[:1], "prompt": "a cat"}},
    "dpg": {"prompts.jsonl": {"item_id": "demo", "prompt": "a cat"}, "dpg_bench.csv": DPG},
    "pope": {f"coco_pope_{split}.json": POPE for split in ("random", "popular", "adversarial")},
    "gqa": {
        "testdev_balanced_images/a.parquet": {"id": "n1", "image": IMAGE},
        "testdev_balanced_instructions/a.parquet": {
            "id": "1",
            "question": "q",
            "answer": "a",
            "imageId": "n1",
            "types": {"structural": "s"},
        },
    },
    "mmbench": {"MMBench_DEV_EN.tsv": MMBENCH | {"image": IMAGE}},
    "mmbench-cn": {"cn/dev-0.parquet": MMBENCH | {"image": IMAGE}},
    "seedbench": {"test-0.parquet": SEED | {"data_type": "image", "question_type_id": 1, "image": IMAGE}},
    "docvqa": {"validation-0.parquet": DOCVQA},
    "ocrbench": {
        "OCRBench.json": {"dataset_name": "svt", "id": 1, "question": "q", "answers": ["A"], "type": "t", "image_path": "a/1.jpg"}
    },
}
WISE = {"Prompt": "p", "Explanation": "e", "Subcategory": "S", "prompt_id": 1}
VALID["wise"] = {
    f"{name}.json": WISE | {"prompt_id": 1 + 400 * n}
    for n, name in enumerate(("cultural_common_sense", "spatio-temporal_reasoning", "natural_science"))
}
MMMU = {"id": "validation_Art_1", "question": "q", "options": "['a', 'b']", "answer": "A", "question_type": "multiple-choice"}
VALID["mmmu"] = {"Art/validation-0.parquet": MMMU | {"image_1": IMAGE}}
PORTRAIT = {"category": "Portrait", "id": "000", "prompt_en": "a man"}
VALID["oneig-diversity-en"] = {"OneIG-Bench.csv": PORTRAIT}
REASONING = {"OneIG-Bench.csv": PORTRAIT | {"category": "Knowledge_Reasoning"}}
VALID["oneig-reasoning-en"] = REASONING | {"gt_answer.json": {"000": "an answer"}}
NOT_TEXT = ["", " ", "\t", "nan", "-1", "1.5", "9" * 400, "x" * 300, "[", "[[]]", "['a', None]", "{}", "'a'", "['\\ud800']"]
LEADING_OUT = ["../../../evil", "/etc/passwd", "a/../../b", "..", "a\\..\\b", "x\0y", "C:\\x"]
TYPED = [None, True, False, 0, -1, 1.5, math.nan, math.inf, [], [[]], [None], [["a"]], [True], {"a": 1}]
JSON_ONLY = ["\ud800", "a\udfffb", ["\ud800"], {"class": "\ud800"}, [{}], {}, {"a": {}}, [["above", False]]]
MISSING = object()
FIELDS = [(suite, file, field) for suite, files in VALID.items() for file, row in files.items() for field in row]


def write(folder, files):
    """The files, by the ending of their names; a value is a row or the bytes of the file."""
    for name, row in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(row, bytes):
            path.write_bytes(row)
        elif name.endswith(".parquet"):
            write_parquet(path, [row])
        elif name.endswith(".tsv"):
            write_tsv(path, [row])
        elif name.endswith(".csv"):
            text = io.StringIO()
            csv.writer(text).writerows([list(row), list(row.values())])
            path.write_text(text.getvalue(), encoding="utf-8")
        else:
            path.write_text(json.dumps([row] if "OCRBench" in name or "prompt_id" in row and name.endswith("json") else row) + "\n")


def refused_or_storable(suite, folder):
    """The message with which the data are refused; "" when they are read."""
    try:
        items = get_suite(suite, ["keep-first-row"] if suite == "dpg" else []).load(folder)
    except SuiteError as error:
        assert "\n" not in str(error) and str(folder) in str(error), error
        return str(error)
    for item in items:
        json_line({"id": item.id, "prompt": item.prompt, "fields": dict(item.fields)}).encode()
        json_line({"questions": list(get_suite(suite).questions(item))} if getattr(item, "asked", True) else {}).encode()
        check_id(item.id, "here")
        file = getattr(item.image, "path", folder)
        assert folder.resolve() in (file.resolve(), *file.resolve().parents)
    return ""


@pytest.mark.parametrize("suite", VALID)
def test_the_sound_files_are_read(suite, tmp_path):
    write(tmp_path, VALID[suite])
    assert refused_or_storable(suite, tmp_path) == ""


@pytest.mark.parametrize(("suite", "file", "field"), FIELDS, ids=lambda v: v)
def test_one_wrong_field(suite, file, field, tmp_path):
    table, parquet = file.endswith(("csv", "tsv")), file.endswith("parquet")
    typed = [] if table else TYPED if parquet else TYPED + JSON_ONLY
    for bad in [MISSING, *NOT_TEXT, *LEADING_OUT, *typed]:
        if table and "\0" in str(bad):
            continue
        row = {k: v for k, v in (VALID[suite][file] | {field: bad}).items() if v is not MISSING}
        write(tmp_path, VALID[suite] | {file: row})
        message = refused_or_storable(suite, tmp_path)
        assert not message or re.search(r":\d+: |\[\d+\]: |line |entry |row |has no questions for", message), (bad, message)


WRONG = {  # what must be refused, with words of the message
    ("longtext-en", "text"): [([None, ["x"]], "'text' holds None"), ([["x"]], "holds ['x']"), (True, "is bool")],
    ("longtext-en", "prompt_id"): [("x", "not a whole number"), (1.5, "not a whole number"), (True, "is bool"), ([3], "is list")],
    ("longtext-en", "prompt"): [("\ud83d", "cannot be written"), (None, "is missing"), ([], "is list"), (" ", "is empty")],
    ("ocrbench", "answers"): [
        ([["a"]], "holds ['a']"),
        ([None], "holds None"),
        ([], "empty list"),
        ([" "], "empty answer"),
        ({"a": 1}, "is dict"),
    ],
    ("ocrbench", "image_path"): [("../../etc/passwd", "not a path inside"), ("/etc/passwd", "not a path"), ("a/../b", "not a path")],
    ("ocrbench", "dataset_name"): [("../x", "cannot be part of a file name"), ("a/b", "file name"), ("x" * 300, "file name")],
    ("pope", "image"): [
        ("../../../../../../etc/passwd", "not a path inside"),
        ("..", "not a path"),
        ("a\\b", "not a path"),
        (1.0, "float"),
    ],
    ("pope", "label"): [("Yes", "not yes or no"), (1, "not yes or no"), (True, "is bool")],
    ("geneval", "exclude"): [([{"class": "cat"}], "count None"), ("cat", "is str"), ([None], "class None"), ([[]], "class []")],
    ("dpg", "item_id"): [("../../../evil", "cannot be part of a file name"), ("a/b", "file name"), ("", "is empty")],
    ("docvqa", "answers"): [([["a"]], "holds ['a']"), (None, "no answers"), ([], "no answers")],
    ("docvqa", "question_types"): [([["a"]], "holds ['a']"), ({"a": 1}, "is dict")],
    ("docvqa", "questionId"): [("../x", "cannot be part of a file name"), ([1], "is list")],
    ("gqa", "types"): [("query", "is str"), ([1], "is list")],
    ("mmbench", "answer"): [("E", "is no option"), ("nan", "is no option")],
    ("mmbench", "index"): [("1e400", "not a whole number"), ("seven", "not a whole number")],
    ("seedbench", "data_type"): [(1, "is int"), (["image"], "is list")],
}


@pytest.mark.parametrize(("suite", "field"), WRONG, ids=lambda v: v)
def test_what_must_be_refused(suite, field, tmp_path):
    file = next(name for name, row in VALID[suite].items() if field in row)
    for bad, words in WRONG[suite, field]:
        write(tmp_path, VALID[suite] | {file: VALID[suite][file] | {field: bad}})
        message = refused_or_storable(suite, tmp_path)
        assert words in message and str(tmp_path / file) in message, (bad, message)


@pytest.mark.parametrize(
    ("clause", "words"),
    [
        ({"count": True}, "count True"),
        ({"count": 1.0}, "count 1.0"),
        ({"class": "unicorn"}, "the class 'unicorn'"),
        ({"class": ["cat"]}, "the class ['cat']"),
        ({"color": ["red"]}, "the colour ['red']"),
        ({"position": ["above", False]}, "the position ['above', False]"),
        ({"position": ["above", 0.0]}, "the position ['above', 0.0]"),
        ({"position": ["above", 1]}, "the position ['above', 1]"),
        ({"position": None}, "the position None"),
        ({"position": ["near", 0]}, "the position ['near', 0]"),
    ],
)
def test_clauses_of_geneval(clause, words, tmp_path):
    row = VALID["geneval"]["evaluation_metadata.jsonl"]
    write(tmp_path, {"evaluation_metadata.jsonl": row | {"include": [CLAUSES[0], {"class": "cat", "count": 1} | clause]}})
    with pytest.raises(SuiteError) as refusal:
        get_suite("geneval").load(tmp_path)
    assert words in str(refusal.value) and "jsonl:1: include clause 1" in str(refusal.value)


BYTES = [b"", b"\n\n", b"\xff\xfe\x00", b"ok\n\xc3(", b"null", b"[]", b"[3]", b'"x"', b"{", b"[" * 100_000, b'[{"a": ' * 30_000, b"PAR1"]


@pytest.mark.parametrize(("suite", "file"), [(suite, file) for suite, files in VALID.items() for file in files], ids=lambda v: v)
def test_files_that_hold_something_else(suite, file, tmp_path):
    for content in BYTES:
        write(tmp_path, VALID[suite] | {file: content})
        message = refused_or_storable(suite, tmp_path)
        assert str(tmp_path / file) in message, (content[:20], message)
    (tmp_path / file).unlink()
    (tmp_path / file).mkdir()
    message = refused_or_storable(suite, tmp_path)
    assert "it must hold" in message or file == "dpg_bench.csv", message  # prompts can be drawn without their questions


def test_bytes_that_are_no_text_are_named_by_their_line(tmp_path):
    (tmp_path / "text_prompts.jsonl").write_bytes(b"\n" * 70_000 + b'{"prompt": "\xff"}\n')
    with pytest.raises(SuiteError, match=r"text_prompts.jsonl:70001: it is not UTF-8 text"):
        get_suite("longtext-en").load(tmp_path)


@pytest.mark.parametrize("suite", ["longtext-zh", "mmbench-cn"])
def test_a_file_is_no_directory(suite, tmp_path, capsys):
    file, out = tmp_path / "data.jsonl", tmp_path / "out"
    file.write_text("{}\n")
    assert main(["eval", suite, "--data", str(file), "--out", str(out)]) == 2
    assert capsys.readouterr().err == f"xomni eval: the data directory {file} is a file; give the directory that it lies in\n"
    assert not out.exists()


def test_the_command_refuses_before_anything_is_written(tmp_path, capsys):
    write(tmp_path, {"prompts.jsonl": {"item_id": "../../../evil", "prompt": "p"}})
    assert main(["eval", "dpg", "--data", str(tmp_path), "--out", str(tmp_path / "out"), "--phase", "generate"]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and f"{tmp_path / 'prompts.jsonl'}:1: the id '../../../evil' cannot be part of a file name" in told
    assert not (tmp_path / "out").exists()
