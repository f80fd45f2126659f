"""xomni data: what can be read, what is wrong with files, and what to download for each suite."""

import hashlib
import json
import re

import pytest
from PIL import Image

from xomni_jax.cli.main import main
from xomni_jax.data.kinds import KINDS
from xomni_jax.evaluation.suite import SuiteError
from xomni_jax.evaluation.suites import FURTHER, PUBLISHED, get_suite
from xomni_jax.evaluation.suites.downloads import Download, check


@pytest.mark.parametrize("name", [*PUBLISHED, *FURTHER])
def test_every_suite_says_what_to_download(name, capsys):
    assert main(["data", "fetch", name]) == 0
    told = capsys.readouterr().out
    suite = get_suite(name)
    for download in (d for needed in suite.downloads for d in needed):
        assert f"from the {download.origin}" in told and "/" in download.origin or "COCO" in download.origin
        for file, known in download.files.items():
            assert file in told
            for word in known.split():
                algorithm, colon, digest = word.partition(":")
                assert word.isdigit() or (colon and len(digest) == {"sha256": 64, "md5": 32, "git": 40}[algorithm])
                assert digest in told
    assert "http" not in told and ".com" not in told


def row(text):
    return f'{{"prompt_id": 1, "prompt": "p", "text": ["{text}"], "category": "sign", "length": "short"}}\n'


def test_a_directory_is_compared_and_read(tmp_path, capsys, monkeypatch):
    assert main(["data", "fetch", "longtext-en", "--check", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"xomni data: {tmp_path}: 1 of 1 files do not fit: text_prompts.jsonl is missing\n"
    file = tmp_path / "longtext_bench" / "text_prompts.jsonl"
    file.parent.mkdir()
    file.write_text(row("OPEN"))
    assert main(["data", "fetch", "longtext-en", "--check", str(tmp_path)]) == 2
    assert f"{file} has {file.stat().st_size} bytes, the published file 203,974" in capsys.readouterr().err
    known = {"text_prompts.jsonl": f"{file.stat().st_size} sha256:{hashlib.sha256(file.read_bytes()).hexdigest()}"}
    monkeypatch.setattr("xomni_jax.evaluation.suites.longtext._FILES", {"en": known})
    assert main(["data", "fetch", "longtext-en", "--check", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "text_prompts.jsonl: ok",
        f"LongText-Bench EN: 1 of 160 items can be read in {tmp_path}",
    ]
    file.write_text(row("SHUT"))  # as long, but another text
    assert main(["data", "fetch", "longtext-en", "--check", str(tmp_path)]) == 2
    assert f"{file} has another sha256 checksum than the published file" in capsys.readouterr().err
    assert main(["data", "fetch", "longtext-en", "--check", str(tmp_path / "none")]) == 2


def test_checksums_and_alternatives(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"hello\n")
    git = Download("x", {"a.txt": "git:ce013625030ba8dba906f756967f9e9ca394464a"})  # as `git hash-object` prints it
    md5 = Download("x", {"a.txt": "6 md5:b1946ac92492d2347c6235b4d2611184"})
    other = Download("x", {"b.txt": "", "c.txt": ""})
    assert check(((other,), (git, md5)), tmp_path, ()) == ["a.txt: ok", "a.txt: ok"]
    assert check(((Download("x", {"*.txt": ""}),),), tmp_path, ()) == ["*.txt: ok"]
    with pytest.raises(SuiteError, match="2 of 2 files do not fit: b.txt is missing; c.txt is missing"):
        check(((other,),), tmp_path, ())


# ---- files of your own ----
def test_kinds_are_listed_with_a_line_of_configuration(capsys):
    assert main(["data", "kinds"]) == 0
    told = capsys.readouterr().out
    for name, kind in KINDS.items():
        assert f"{name}: {kind.files}\n" in told and f"--config.data.path={kind.example}\n" in told


def lines(path, *rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return str(path)


def test_a_check_tells_everything(tmp_path, capsys):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    good = {"id": 1, "image": "a.png", "text": "cafe\u0301"}
    missing = [good | {"image": f"{n}.png"} for n in range(5)]
    talk = {"image": "a.png", "conversations": [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "x"}]}
    path = lines(tmp_path / "t.jsonl", good, good | {"text": "caf\u00e9"}, *missing, "{", good | {"text": " "}, talk)
    empty = lines(tmp_path / "e.jsonl")
    out = tmp_path / "found.jsonl"
    assert main(["data", "check", path, empty, f"--out={out}"]) == 1
    told = capsys.readouterr().out
    assert told.startswith("10 records, 3 good, 7 cannot be used\n")
    assert "cannot be used, 5: an image cannot be read: No such file or directory\n" in told
    assert told.count(".png cannot be read: No such file or directory") == 3  # examples, the others are in the file
    assert f"{path}:8: it is not JSON" in told and f"{path}:9: the column 'text' holds no text" in told
    assert f"{path}:2 repeats {path}:1" in told and f"{path}:10: no image mark: put in front" in told
    assert "1 have the id of an earlier record" in told and f"{empty}: holds no records" in told
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["where"] for row in rows if "skipped" in row] == [f"{path}:{n}" for n in (3, 4, 5, 6, 7, 8, 9)]
    assert {"where": f"{path}:2", "repeats": f"{path}:1"} in rows and {"note": f"{empty}: holds no records"} in rows


def test_a_check_of_prompts_and_of_a_configuration(tmp_path, capsys):
    path = lines(tmp_path / "p.txt", 'a sign "HI"', "a dog")
    assert main(["data", "check", "--prompts", path]) == 0
    assert main(["data", "check", "--prompts", path, "--config.data.text_targets=True"]) == 1
    assert f"{path}:2: no text in double quotes" in capsys.readouterr().out
    benchmark = lines(tmp_path / "b.txt", "A Dog")
    data = ["--config.data.source=prompts", f"--config.data.path={path}", "--config.data.sizes=((32,64),)"]
    assert main(["data", "check", "--config=configs/tiny/grpo.py", *data]) == 0
    assert main(["data", "check", "--config=configs/tiny/grpo.py", *data, f"--config.data.exclude=('{benchmark}',)"]) == 1
    assert f"{path}:2: the prompt 'a dog' stands in {benchmark}:1" in capsys.readouterr().out
    size = dict(sizes=((32, 64),))
    files = dict(other=dict(source="prompts", path=benchmark) | size, mine=dict(source="prompts", path=path, exclude=(benchmark,)) | size)
    parts = files | dict(signs=dict(source="rendered", weights=(1.0,), text_lengths=((3, 6),)) | size)
    config = lines(tmp_path / "mix.py", "from ml_collections import ConfigDict", "def get_config():", f"    parts = {parts}",
                   "    return ConfigDict(dict(stage='grpo', data=dict(source='mixture', parts=parts)))")  # fmt: skip
    assert main(["data", "check", f"--config={config}", f"--out={tmp_path / 'found.jsonl'}"]) == 1
    assert re.search(rf"path={path}:\n2 records, 1 good, 1 cannot(.*\n)+.*path={benchmark}:\n1 record, 1 good", capsys.readouterr().out)
    assert [json.loads(line)["where"] for line in (tmp_path / "found.jsonl").read_text().splitlines()] == [f"{path}:2"]


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "give one or more PATHs, or --config=FILE"),
        (["--config=configs/tiny/sft.py"], "config.data.source=rendered: its examples are not read from files"),
        (["none.jsonl"], "config.data.path=none.jsonl: no such file or folder"),
        (["x.jsonl", "--out=/proc/none/x.jsonl"], "give another folder"),
        (["x.jsonl", "--config.data.captoin=a"], "config.data.captoin: unknown key; did you mean caption"),
    ],
)
def test_checks_that_are_refused(arguments, words, capsys):
    assert main(["data", "check", *arguments]) == 2
    told = capsys.readouterr()
    assert words in told.err and told.err.count("\n") == 1 and not told.out
