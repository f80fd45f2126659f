"""Lines that survive kills, settings that are not mixed, results replaced as a whole."""

import errno
import json
import os

import pytest

from xomni_jax.evaluation.run_directory import RunDirectory, RunError


def test_lines_of_all_files_and_torn_ends(tmp_path):
    run = RunDirectory(tmp_path / "run")
    with run.writer("parts", "1-of-2") as first, run.writer("parts", "2-of-2") as second:
        first.append({"id": "a", "answer": "ä"})
        second.append({"id": "b", "answer": "2"})
    torn = tmp_path / "run/parts/1-of-2.jsonl"
    torn.write_bytes(torn.read_bytes() + b'{"id": "c", "ans')
    assert {k: v["answer"] for k, v in run.lines("parts").items()} == {"a": "ä", "b": "2"}
    with run.writer("parts", "1-of-2") as again:  # the next writer takes the torn end off, and does not write behind it
        again.append({"id": "c", "answer": "3"})
    assert sorted(run.lines("parts")) == ["a", "b", "c"]
    assert torn.read_text().count("\n") == 2


def test_a_malformed_line_names_file_and_number(tmp_path):
    run = RunDirectory(tmp_path)
    for bad in ("{", "[]", '{"id": 3}', ""):
        (tmp_path / "parts").mkdir(exist_ok=True)
        (tmp_path / "parts/x.jsonl").write_text('{"id": "a"}\n' + bad + "\n")
        with pytest.raises(RunError, match=r"x\.jsonl, line 2: no complete record; delete this line"):
            run.lines("parts")


def test_an_item_twice_is_one_item_unless_the_results_differ(tmp_path):
    run = RunDirectory(tmp_path)
    for worker, answer in (("1-of-1", "x"), ("1-of-2", "x"), ("2-of-2", "y")):
        with run.writer("parts", worker) as lines:
            lines.append({"id": "a", "answer": answer})
        if worker == "1-of-2":
            assert len(run.lines("parts")) == 1  # written at another time, otherwise the same
    with pytest.raises(RunError, match=r"2-of-2\.jsonl and .*1-of-2\.jsonl: item a has different results"):
        run.lines("parts")


def test_one_writer_per_file(tmp_path):
    run = RunDirectory(tmp_path)
    with run.writer("parts", "1-of-1"), pytest.raises(RunError, match="another process writes here; .*--shard"):
        run.writer("parts", "1-of-1")
    run.writer("parts", "1-of-1").__exit__()


def test_settings_are_written_once_and_compared(tmp_path):
    run, value = RunDirectory(tmp_path / "run"), {"seed": 1, "model": {"path": "a", "sha256": "x"}, "sampling": {"top_k": 50}}
    run.claim("settings.json", value, "do that")
    run.claim("settings.json", value | {"model": {"path": "b", "sha256": "x"}}, "do that")  # the same model elsewhere
    assert run.read("settings.json")["model"]["path"] == "a"
    for other, said in (
        ({"sampling": {"top_k": 0}}, "sampling.top_k is 50, this command has 0; do that"),
        ({"model": {"path": "a", "sha256": "y"}}, 'model.sha256 is "x", this command has "y"'),
        ({"steps": 3}, "steps is null, this command has 3"),
    ):
        with pytest.raises(RunError) as refused:
            run.claim("settings.json", value | other, "do that")
        assert said in str(refused.value)
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["settings.json"]  # nothing half-written beside it


def test_a_line_that_does_not_fit_on_the_disk_is_taken_back(tmp_path, monkeypatch):
    run = RunDirectory(tmp_path)
    with run.writer("parts", "1-of-1") as lines:
        lines.append({"id": "a"})
        write = os.write
        with monkeypatch.context() as patched:
            patched.setattr(os, "write", lambda fd, data: write(fd, data[:9]))  # as much as there was room for
            with pytest.raises(OSError) as full:
                lines.append({"id": "b"})
        assert full.value.errno == errno.ENOSPC
        lines.append({"id": "c"})
    assert [json.loads(line)["id"] for line in (tmp_path / "parts/1-of-1.jsonl").read_text().splitlines()] == ["a", "c"]


def test_a_file_in_place_of_the_directory(tmp_path):
    (tmp_path / "x").write_text("")
    with pytest.raises(RunError, match="--out .*x is a file; give another folder"):
        RunDirectory(tmp_path / "x")
    (tmp_path / "results.json").write_text("[")
    with pytest.raises(RunError, match="results.json: not readable as JSON"):
        RunDirectory(tmp_path).read("results.json")
