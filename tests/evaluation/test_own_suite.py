"""A suite of a user's own: a short file, given by its path, that is drawn, judged and scored without touching the package."""

import json
import subprocess
import sys

import jax
import pytest

from xomni_jax.cli.main import main
from xomni_jax.evaluation import outputs
from xomni_jax.evaluation.suites import get_suite
from xomni_jax.sharding.mesh import make_mesh

OWN = '''\
"""Does a sign show its word? The data directory holds words.txt, one word a line."""

from xomni_jax.evaluation.suite import Item, Suite


class Signs(Suite):
    title = "Signs of one word"
    judge = "ocr"
    repeats = 2
    files = "words.txt, one word a line"

    def load(self, data):
        words = (data / "words.txt").read_text().split()
        return [Item(f"{n:03d}", f'a sign that says "{word}"', {"category": "sign", "word": word}) for n, word in enumerate(words)]

    def questions(self, item):
        return ({"instruction": self.instructions["ocr"], "max_tokens": 64},)

    def score(self, item, outputs):
        read = [reply for (reply,) in outputs]
        right = [item.fields["word"] in text for text in read]
        verdicts = ["right" if r else "wrong" for r in right]
        return {"score": sum(right) / len(right), "right": sum(right), "read": read, "verdicts": verdicts, "unparsed": 0}

    def aggregate(self, records):
        share = sum(r["right"] for r in records) / (self.repeats * len(records))
        return {"headline": "words", "scores": {"words": share}, "categories": {}}
'''


@pytest.fixture
def own(tmp_path):
    """The file and its data."""
    (tmp_path / "signs.py").write_text(OWN)
    (tmp_path / "words.txt").write_text("CAT\nDOG\nSUN\n")
    return tmp_path / "signs.py"


def test_it_runs_by_its_path(own, model_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(outputs, "make_mesh", lambda axes: make_mesh({}, jax.devices()[:1]))
    assert OWN.count("\n") < 40
    out, where = tmp_path / "out", ["--model", str(model_dir), "--data", str(tmp_path), "--out", str(tmp_path / "out")]
    command = ["eval", f"{own}:Signs", *where, "--height", "16", "--width", "32", "--batch", "4"]
    assert main([*command, "--phase", "generate"]) == 0
    assert main(command) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"results: {out / 'results.json'}"
    results = json.loads((out / "results.json").read_text())
    assert (results["suite"], results["title"], results["counts"]["outputs"]) == ("Signs", "Signs of one word", 6)
    assert results["judge"]["name"] == "pp-ocr" and 0 <= results["headline"]["value"] <= 1
    assert sorted(p.name for p in (out / "images").iterdir()) == [f"00{n}_{k}.png" for n in range(3) for k in range(2)]
    assert "Signs of one word" in (out / "report.html").read_text()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Nothing", "signs.py defines no 'Nothing'; it defines Signs"),
        ("Item", "signs.py:Item is no subclass of xomni_jax.evaluation.suite.Suite"),
    ],
)
def test_what_is_no_suite_is_one_sentence(own, name, said, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["eval", f"{own}:{name}", "--out=x"])
    assert said in capsys.readouterr().err


def test_a_suite_is_imported_only_when_it_is_used():
    code = "import sys; from xomni_jax.evaluation.suites import get_suite; get_suite('dpg'); "
    code += "print(*sorted(m for m in sys.modules if m.startswith('xomni_jax.evaluation.suites.') or m in ('jax', 'pyarrow', 'rapidfuzz')))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert loaded == [f"xomni_jax.evaluation.suites.{name}" for name in ("downloads", "dpg", "images", "reading", "scoring")]


def test_an_entry_point_is_found_by_name(own, monkeypatch):
    monkeypatch.syspath_prepend(own.parent)
    (own.parent / "own_signs-1.dist-info").mkdir()
    (own.parent / "own_signs-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: own-signs\nVersion: 1\n")
    (own.parent / "own_signs-1.dist-info" / "entry_points.txt").write_text("[xomni_jax.suite]\nsigns = signs:Signs\n")
    assert get_suite("signs").name == "signs" and len(get_suite("signs").load(own.parent)) == 3
