"""Suites of images through the whole command: a language model with eyes as the judge, silent in the middle; rewritten prompts."""

import csv
import functools
import json

import jax
import pytest

from tests.evaluation.judges.fake_endpoint import fake_endpoint
from xomni_jax import inference
from xomni_jax.cli.main import main
from xomni_jax.evaluation import judges, outputs
from xomni_jax.evaluation.run_directory import RunDirectory
from xomni_jax.pipeline import XOmni
from xomni_jax.rewards.chat.endpoint import ChatEndpoint
from xomni_jax.sharding.mesh import make_mesh

CAT = {"tag": "single_object", "include": [{"class": "cat", "count": 1}], "prompt": "a photo of a cat"}
DOGS = {"tag": "counting", "include": [{"class": "dog", "count": 2}], "exclude": [{"class": "dog", "count": 3}], "prompt": "two dogs"}


@pytest.fixture(scope="module", autouse=True)
def one_model():
    """Opened once for all commands, on one device."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(outputs, "make_mesh", lambda axes: make_mesh({}, jax.devices()[:1]))
        opened = functools.cache(lambda path: XOmni(path, make_mesh({}, jax.devices()[:1])))
        patched.setattr(inference, "XOmni", lambda path, mesh: opened(path))
        yield


def command(name, model, data, out, *more):
    """What a user types, on small images."""
    paths = ["--model", str(model), "--data", str(data), "--out", str(out)]
    return main(["eval", name, *paths, "--height", "16", "--width", "32", "--batch", "4", "--decode-batch", "4", *more])


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def table(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def dpg(folder):
    """Two prompts; the first one's first question is the row that the official reader skips."""
    (folder / "prompts").mkdir()
    asked = [("a", 1, "0", "a sky"), ("a", 2, "0", "a boat"), ("b", 1, "0", "a cat"), ("b", 2, "1", "a black cat")]
    for name in "ab":
        (folder / "prompts" / f"{name}.txt").write_text(f"a boat, {name}\n")
    columns = ("item_id", "proposition_id", "dependency", "tuple", "question_natural_language")
    rows = [(name, n, parents, f"entity - whole ({what})", f"Is there {what}?") for name, n, parents, what in asked]
    table(folder / "dpg_bench.csv", [dict(zip(columns, row)) for row in rows])
    return 8  # questions about the first prompt's images


def longtext(folder):
    """Judges say yes and no, so these are the words."""
    row = {"category": "sign", "length": "short"}
    texts = {0: "yes", 7: "no way"}
    jsonl(folder / "text_prompts.jsonl", [row | {"prompt": f"a sign: {t}", "text": [t], "prompt_id": n} for n, t in texts.items()])
    return 4


def oneig(folder):
    """Prompts and texts lie in two tables."""
    kind = {"category": "Text_Rendering", "class": "poster design"}
    table(folder / "OneIG-Bench.csv", [kind | {"id": name, "prompt_en": f"a poster, {name}"} for name in ("000", "001")])
    table(folder / "text_content.csv", [{"id": "000", "text_content": "['yes']"}, {"id": "001", "text_content": "['no way']"}])
    return 4


@pytest.mark.parametrize(
    ("name", "write", "official"),
    [("dpg", dpg, "mPLUG"), ("longtext-en", longtext, "Qwen2.5-VL"), ("oneig-text-en", oneig, "Qwen2.5-VL")],
)
def test_a_judge_that_goes_away(name, write, official, model_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(ChatEndpoint.__init__.__kwdefaults__, "pause", 0.01)
    first, whole, out = write(tmp_path), tmp_path / "whole", tmp_path / "out"
    with fake_endpoint("by content") as endpoint:
        judge = ("--judge", f"tiny-vlm@{endpoint.url}", "--concurrency", "1")
        assert command(name, model_dir, tmp_path, whole, *judge) == 0
        endpoint.script[:] = ["by content"] * (len(endpoint.asked) + first) + ["drop"]
        capsys.readouterr()
        assert command(name, model_dir, tmp_path, out, *judge) == 2
        said = capsys.readouterr().err.splitlines()[-1]
        assert said.startswith(f"xomni eval: tiny-vlm at {endpoint.url} gives no usable reply (")
        assert said.endswith("what is judged is kept, run the command again")
        assert len(RunDirectory(out).lines("judged")) == 1 and not (out / "results.json").exists()
        endpoint.script[:], before = ["by content"], len(endpoint.asked)
        assert command(name, model_dir, tmp_path, out, *judge) == 0
        assert len(endpoint.asked) - before == first  # of the second item, as many
    for file in ("results.json", "items.jsonl"):
        assert (out / file).read_bytes() == (whole / file).read_bytes()
    results = json.loads((out / "results.json").read_text())
    assert results["judge"]["name"] == results["judge"]["settings"]["model"] == "tiny-vlm"
    assert official in results["judge"]["settings"]["official judge"]
    replies = [reply for line in (out / "items.jsonl").read_text().splitlines() for tile in json.loads(line)["replies"] for reply in tile]
    assert set(replies) <= {"yes", "no"} and len(replies) == 2 * first and results["counts"]["items"] == 2
    assert (out / "report.html").is_file()


class Blind:
    """A detector that sees nothing."""

    name, settings = "blind", {}

    def ask(self, images, questions):
        """No boxes."""
        return [[{name: [] for name in q["classes"]} for q in asked] for asked in questions]

    def close(self):
        """Nothing to free."""


def test_rewritten_prompts_are_drawn_and_the_row_is_scored(model_dir, tmp_path, monkeypatch, capsys):
    jsonl(tmp_path / "evaluation_metadata.jsonl", [CAT, DOGS])
    rewritten = {"00000": "a cat on a chair", "00001": "two big dogs"}
    spec = jsonl(tmp_path / "rewritten.jsonl", [{"id": name, "rewritten": text} for name, text in rewritten.items()])
    other = jsonl(tmp_path / "other.jsonl", [{"id": name, "rewritten": text + "!"} for name, text in rewritten.items()])
    plain, out = tmp_path / "plain", tmp_path / "out"
    rest = "the other shares of --shard hold the rest"
    judge = "judge them with the same command and --phase score --judge http://127.0.0.1:8003"
    for share, done in (("1/2", f"1 of 2 items are drawn in {plain}; {rest}"), ("2/2", f"2 of 2 items are drawn in {plain}; {judge}")):
        assert command("geneval", model_dir, tmp_path, plain, "--phase", "generate", "--shard", share) == 0
        assert capsys.readouterr().out.splitlines()[-1] == f"geneval: {done}"
    assert command("geneval", model_dir, tmp_path, out, "--phase", "generate", "--rewrite", str(spec)) == 0
    drawn, before = RunDirectory(out).lines("parts"), RunDirectory(plain).lines("parts")
    assert all(drawn[name]["pixels"] != before[name]["pixels"] for name in rewritten)
    for name, row in zip(rewritten, (CAT, DOGS)):
        assert json.loads((out / "images" / name / "metadata.jsonl").read_text()) == row
    monkeypatch.setattr(judges, "open_judge", lambda *how: Blind())
    for what in ((), ("--rewrite", str(other))):
        capsys.readouterr()
        assert command("geneval", model_dir, tmp_path, out, "--phase", "score", *what) == 2
        assert "or the data, switches, repeats and rewritten prompts that it was begun with" in capsys.readouterr().err
    assert command("geneval", model_dir, tmp_path, plain, "--phase", "score", "--rewrite", str(spec)) == 2
    assert not (out / "results.json").exists() and not (out / "judged").exists()
    assert command("geneval", model_dir, tmp_path, out, "--phase", "score", "--rewrite", str(spec)) == 0
    items = [json.loads(line) for line in (out / "items.jsonl").read_text().splitlines()]
    assert {item["id"]: item["prompt"] for item in items} == rewritten
    assert [item["fields"]["metadata"] for item in items] == [CAT, DOGS]
    assert json.loads((out / "results.json").read_text())["settings"]["data"]["rewritten"] is True
