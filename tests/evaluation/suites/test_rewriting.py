"""Rewritten prompts from a file and from a model, kept once written."""

import json

import pytest

from tests.evaluation.judges.fake_endpoint import fake_endpoint
from xomni_jax.evaluation.suite import JudgeUnavailable, SuiteError
from xomni_jax.evaluation.suites import get_suite
from xomni_jax.evaluation.suites.rewriting import with_rewrites


@pytest.fixture
def geneval(tmp_path):
    """GenEval with two prompts."""
    row = {"tag": "colors", "include": [{"class": "cat", "count": 1}]}
    rows = [row | {"prompt": "a photo of a cat"}, row | {"prompt": "a photo of a dog"}]
    (tmp_path / "evaluation_metadata.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return get_suite("geneval")


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def test_from_a_file_by_id_or_prompt(geneval, tmp_path):
    rows = [{"id": "00001", "rewritten": "a dog at dawn"}, {"prompt": "a photo of a cat", "rewritten": "a cat"}]
    spec = write(tmp_path / "r.jsonl", rows)
    items = with_rewrites(geneval, spec, tmp_path / "cache.jsonl").load(tmp_path)
    assert [i.prompt for i in items] == ["a cat", "a dog at dawn"] and not (tmp_path / "cache.jsonl").exists()
    assert items[0].fields["metadata"]["prompt"] == "a photo of a cat"  # what is scored and saved stays the row


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"id": "00001", "rewritten": "x"}], "no rewritten prompt for 1 of 2 items; the first is '00000'"),
        ([{"id": "00001", "rewritten": "x"}] * 2, "r.jsonl:2: the id '00001' has a rewritten prompt already"),
        ([{"id": "00001"}], "r.jsonl:1: the field 'rewritten' is missing"),
    ],
)
def test_bad_files(geneval, tmp_path, rows, message):
    with pytest.raises(SuiteError, match=message):
        with_rewrites(geneval, write(tmp_path / "r.jsonl", rows), tmp_path / "c").load(tmp_path)
    with pytest.raises(SuiteError, match="'nowhere' is not a source of rewritten prompts; it can be a jsonl file"):
        with_rewrites(geneval, "nowhere", tmp_path / "c").load(tmp_path)
    with pytest.raises(SuiteError, match="pope draws nothing"):
        with_rewrites(get_suite("pope"), "nowhere", tmp_path / "c")


@pytest.mark.parametrize(
    "choice",
    [
        {"message": {"content": "<think>A cat? With wings!</think>\n\nA cat."}},
        {"message": {"content": "A cat with wings?</think>A cat."}},
        {"message": {"content": "A cat.", "reasoning_content": "wings"}},
        {"message": {"content": [{"type": "thinking", "thinking": "wings"}, {"type": "text", "text": "A cat."}]}},
    ],
)
def test_thinking_is_no_part_of_a_prompt(choice, geneval, tmp_path):
    with fake_endpoint(choice) as endpoint:
        suite = with_rewrites(geneval, f"tiny-vlm@{endpoint.url}", tmp_path / "cache.jsonl")
        assert [i.prompt for i in suite.load(tmp_path)] == ["A cat."] * 2
    assert "wings" not in (tmp_path / "cache.jsonl").read_text()


def test_a_model_that_only_thinks_rewrites_nothing(geneval, tmp_path):
    with fake_endpoint({"message": {"content": "<think>A cat"}, "finish_reason": "length"}) as endpoint:
        suite = with_rewrites(geneval, f"tiny-vlm@{endpoint.url}", tmp_path / "cache.jsonl")
        with pytest.raises(SuiteError, match="tiny-vlm did not rewrite 'a photo of a .*' .no answer: .* used up by thinking"):
            suite.load(tmp_path)
    assert (tmp_path / "cache.jsonl").read_text() == ""


def test_a_model_is_asked_once(geneval, tmp_path):
    cache = tmp_path / "run" / "rewrites.jsonl"
    with fake_endpoint('say "a fine\n animal"') as endpoint:
        suite = with_rewrites(get_suite("geneval", (), {"rewrite": "Rewrite: {prompt}"}), f"tiny-vlm@{endpoint.url}", cache)
        assert [i.prompt for i in suite.load(tmp_path)] == ["a fine animal"] * 2
        assert {b["messages"][0]["content"][0]["text"] for b in endpoint.asked} == {
            "Rewrite: a photo of a cat",
            "Rewrite: a photo of a dog",
        }
        cache.write_text(cache.read_text().splitlines()[0] + "\n" + '{"prompt": "a photo of a d')  # killed while writing
        suite.load(tmp_path)
        assert len(endpoint.asked) == 3 and len(cache.read_text().splitlines()) == 2
    assert [i.prompt for i in suite.load(tmp_path)] == ["a fine animal"] * 2  # nobody is asked any more


def test_a_silent_model_loses_nothing(geneval, tmp_path):
    cache = tmp_path / "rewrites.jsonl"
    with fake_endpoint("say a cat", "400") as endpoint, pytest.raises(JudgeUnavailable, match="refuses"):
        with_rewrites(geneval, f"tiny-vlm@{endpoint.url}", cache).load(tmp_path)
    with fake_endpoint("say again") as endpoint:
        with_rewrites(geneval, f"tiny-vlm@{endpoint.url}", cache).load(tmp_path)
        assert len(endpoint.asked) == 1 and len(cache.read_text().splitlines()) == 2
    with fake_endpoint("say  ") as endpoint, pytest.raises(SuiteError, match="as nothing"):
        with_rewrites(geneval, f"tiny-vlm@{endpoint.url}", tmp_path / "other").load(tmp_path)


def test_after_a_failure_the_rest_is_not_asked(tmp_path):
    row = {"tag": "colors", "include": [{"class": "cat", "count": 1}]}
    write(tmp_path / "evaluation_metadata.jsonl", [row | {"prompt": f"cat {n}"} for n in range(40)])
    with fake_endpoint("400") as endpoint, pytest.raises(JudgeUnavailable, match="refuses"):
        with_rewrites(get_suite("geneval"), f"tiny-vlm@{endpoint.url}", tmp_path / "c").load(tmp_path)
    assert len(endpoint.asked) < 40
