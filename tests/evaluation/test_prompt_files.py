"""Prompts of files: drawn as one by one, nothing twice, in shares, and read back as data."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from tests.cli.test_main import refusal, settings  # noqa: F401 - a fixture
from tests.miniature import SIZE
from xomni_jax.core.preemption import Outage, StopRequested
from xomni_jax.data.files import Records
from xomni_jax.data.records import Columns
from xomni_jax.evaluation.prompt_files import PromptFileRun, PromptFiles
from xomni_jax.inference import InferenceConfig
from xomni_jax.pipeline import XOmni
from xomni_jax.rewards import Score

PROMPTS = ['a red sign that says "AB"', "two blue circles", "c", "d", "e"]
GO_ON = SimpleNamespace(reached=lambda: False)


@pytest.fixture(scope="module")
def model(model_dir):
    return XOmni(model_dir)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    rows = [{"prompt": p, "topic": f"t{n}"} for n, p in enumerate(PROMPTS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def a_run(model, file, out, reward=None, **what):
    return PromptFileRun(
        PromptFiles((file,), **{"seed": 3, "samples": 2} | what), model, InferenceConfig(batch=4, decode_batch=4), out, reward
    )


def pixels(folder):
    return {path.name: np.asarray(Image.open(path)) for path in sorted((folder / "images").glob("*.png"))}


@pytest.fixture(scope="module")
def whole(model, file, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out"
    assert a_run(model, file, out).make(GO_ON) == (10, 10)
    return out


def same(one, other):
    assert list(one) == list(other)
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])


def test_samples_are_those_of_the_pipeline(model, whole):
    """Sample S of prompt P is image P of seed + S."""
    for s in range(2):
        for p, image in enumerate(model.generate(PROMPTS, seed=3 + s)):
            np.testing.assert_array_equal(pixels(whole)[f"{p:06d}_{s}.png"], image)
    about = json.loads(Image.open(whole / "images" / "000001_1.png").text["xomni"])
    assert (about["seed"], about["index"], about["size"]) == (4, 1, f"{SIZE[1]}x{SIZE[0]}")
    sheet = (whole / "contact_sheet.html").read_text()
    assert sheet.count("<figure>") == 10 and 'src="images/000001_1.png"' in sheet and "says &#34;AB&#34;" in sheet


def test_data_sources_read_the_folder(whole):
    records = Records(str(whole), Columns(), prompts=False)
    found = [records[n] for n in range(len(records))]
    assert [(r.texts, r.id, r.metadata["topic"]) for r in found][2:4] == [
        ((PROMPTS[1],), "000001_0", "t1"),
        ((PROMPTS[1],), "000001_1", "t1"),
    ]
    assert all(r.images[0].is_file() for r in found) and records.notes == []


def test_a_killed_run_goes_on_and_draws_nothing_twice(model, file, whole, tmp_path, monkeypatch):
    """Killed between batches, and in the middle of a line."""
    drawn = []
    sample_codes = XOmni.sample_codes

    def counted(self, prompts, grid, keys, *rest):
        drawn.append(len(prompts))
        return sample_codes(self, prompts, grid, keys, *rest)

    monkeypatch.setattr(XOmni, "sample_codes", counted)
    with pytest.raises(StopRequested):
        a_run(model, file, tmp_path / "out").make(SimpleNamespace(reached=lambda: True))
    assert not (tmp_path / "out" / "metadata.jsonl").exists()
    with (tmp_path / "out" / "parts" / "1-of-1.jsonl").open("ab") as lines:
        assert len((tmp_path / "out" / "parts" / "1-of-1.jsonl").read_bytes().splitlines()) == 4
        lines.write(b'{"id": "0000')
    drawn.clear()
    assert a_run(model, file, tmp_path / "out").make(GO_ON) == (10, 10)
    assert drawn == [4, 4]  # 6 of 10 were left
    same(pixels(tmp_path / "out"), pixels(whole))
    assert (tmp_path / "out" / "metadata.jsonl").read_text() == (whole / "metadata.jsonl").read_text()
    drawn.clear()
    assert a_run(model, file, tmp_path / "out").make(GO_ON) == (10, 10) and drawn == []


def test_shares_make_the_whole(model, file, whole, tmp_path):
    first, second = (a_run(model, file, tmp_path / "out", share=(k, 2)).make(GO_ON) for k in range(2))
    assert first == (5, 10) and second == (10, 10)
    same(pixels(tmp_path / "out"), pixels(whole))
    assert (tmp_path / "out" / "metadata.jsonl").read_text() == (whole / "metadata.jsonl").read_text()


class Bright:
    """A reward client that likes bright images; it fails once for the first prompt."""

    name, kind = "bright", ""

    def connect(self):
        return SimpleNamespace(scorer="bright", version="1", model_hash="")

    def score(self, images, items):
        assert items[0]["targets"] == ({"text": ["AB"]} if "AB" in items[0]["prompt"] else {})
        bad = lambda i: self.kind or ("AB" in items[0]["prompt"] and i == 0)
        return [Score(None, "lost", kind=self.kind) if bad(i) else Score(float(x.mean())) for i, x in enumerate(images)]


def test_the_best_of_several(model, file, tmp_path):
    assert a_run(model, file, tmp_path / "out", Bright(), samples=1, best_of=3).make(GO_ON) == (5, 5)
    rows = [json.loads(line) for line in (tmp_path / "out" / "metadata.jsonl").read_text().splitlines()]
    for p, row in enumerate(rows):
        candidates = [np.asarray(model.generate(PROMPTS, seed=3 + s)[p]).mean() for s in range(3)]
        candidates[0] = -1 if p == 0 else candidates[0]
        assert row["seed"] == 3 + int(np.argmax(candidates)) and row["reward"] == pytest.approx(max(candidates))
    silent = Bright()
    silent.kind = "unanswered"
    with pytest.raises(Outage, match="bright does not answer"):
        a_run(model, file, tmp_path / "other", silent, samples=1, best_of=3).make(GO_ON)


@pytest.mark.parametrize(
    "arguments, told",
    [
        ([], "give the prompts, or --prompts FILE"),
        (["a", "--prompts", "FILE"], "give the prompts, or --prompts FILE, not both"),
        (["a", "--n", "2"], "are for prompts in files"),
        (["--prompts", "FILE", "--best-of", "2"], "--best-of needs --reward NAME=URL"),
        (["--prompts", "FILE", "--best-of", "2", "--n", "3", "--reward", "a=http://x"], "is less than --n 3"),
        (["--prompts", "FILE", "--seed", "-1"], "seed="),
        (["--prompts", "BAD"], ".txt:2: ('sign sign sign sign sign sign sign sign '...) has "),
        (["--prompts", "FILE", "--height", "20"], ".jsonl:1: 20x32 pixels are not whole 8x8 tokens"),
        (["--prompts", "/nowhere.txt"], "/nowhere.txt"),
    ],
)
def test_what_is_wrong_is_told(arguments, told, model_dir, file, tmp_path, capsys):
    (tmp_path / "bad.txt").write_text("a\n" + "sign " * 40 + "\n")
    arguments = [{"FILE": file, "BAD": str(tmp_path / "bad.txt")}.get(word, word) for word in arguments]
    assert told in refusal(capsys, "generate", *arguments, "--model", str(model_dir), "--out", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_other_settings_are_refused(model, file, whole, model_dir, capsys):
    told = refusal(capsys, "generate", "--prompts", file, "--n", "3", "--seed", "3", "--model", str(model_dir), "--out", str(whole))
    assert "is 2, this command has 3; take another --out" in told or "batch is 4" in told
