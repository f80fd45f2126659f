"""xomni data fetch: what is printed for each suite, and what a directory lacks."""

import hashlib

import pytest

from xomni_jax.cli.main import main
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
