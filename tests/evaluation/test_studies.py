"""Guidance and best-of-N over runs written by hand; best-of-N against all subsets, one by one."""

import csv
import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest

from tests.evaluation.made_runs import write_answer_run, write_generate_run
from xomni_jax.cli.main import main
from xomni_jax.evaluation.reward_scores import reward_scores
from xomni_jax.evaluation.studies import best_of_study, guidance_study, read_runs
from xomni_jax.evaluation.suite import SuiteError

ITEMS, SFT, RL = 7, {"path": "models/sft", "sha256": "aaaa"}, {"path": "models/rl", "sha256": "bbbb"}


def words_right(run):
    """Right words of three, per item and image, counted from the stored replies."""
    lines = [json.loads(line) for line in (run / "items.jsonl").read_text().splitlines()]
    return [[sum(w in reply.split() for w in line["fields"]["text"]) for (reply,) in line["replies"]] for line in lines]


@pytest.fixture
def policies(tmp_path):
    """Two runs of SFT with seeds apart, three images each, and one of RL."""
    make = lambda name, **how: write_generate_run(tmp_path / name, items=ITEMS, repeats=3, **how)  # noqa: E731
    sft = [make(f"sft{i}", right=0.35, seed=i, model=SFT) for i in (0, 1)]
    for i, run in enumerate(sft):
        results = json.loads((run / "results.json").read_text())
        results["settings"]["seed"] = 1234 + i
        (run / "results.json").write_text(json.dumps(results))
    return sft, [make("rl", right=0.6, seed=5, model=RL)]


def study_of(policies, **how):
    """The study of the fixture."""
    sft, rl = policies
    runs = read_runs([*sft, *rl], [{}] * 3)
    return best_of_study(runs[:2], runs[2:], **how)


def test_best_of_n_is_the_mean_over_all_subsets(policies):
    study = study_of(policies)
    table = [a + b for a, b in zip(*map(words_right, policies[0]))]
    rl = np.mean([[n / 3 for n in row] for row in words_right(policies[1][0])])
    assert study["rl"]["score"]["value"] == pytest.approx(rl)
    assert [row["n"] for row in study["rows"]] == [1, 2, 4] and study["left_out"] == [8, 16] and study["sft"]["samples"] == 6
    for row in study["rows"]:
        best = np.mean([np.mean([max(subset) / 3 for subset in itertools.combinations(of_item, row["n"])]) for of_item in table])
        assert row["score"]["value"] == pytest.approx(best) and row["rl_minus"]["value"] == pytest.approx(rl - best)
        assert row["score"]["ci95"][0] <= best <= row["score"]["ci95"][1]
        # LongText's own number over the best of the first n: a ratio of sums of words, three per image.
        assert row["headline_of_first_n"] == pytest.approx(sum(max(of_item[: row["n"]]) for of_item in table) / (3 * ITEMS))
    scores = [row["score"]["value"] for row in study["rows"]]
    assert study["rl_holds_up_to_best_of"] == max([n for n, s in zip((1, 2, 4), scores) if s < rl], default=0)


def test_another_reward_picks(policies):
    """A reward that likes the fewest right words gives the worst of N."""
    table = np.array([a + b for a, b in zip(*map(words_right, policies[0]))], np.float64)
    study = study_of(policies, reward="contrary", selection_PR=-table)
    for row in study["rows"]:
        worst = np.mean([np.mean([min(s) / 3 for s in itertools.combinations(of_item, row["n"])]) for of_item in table])
        assert row["score"]["value"] == pytest.approx(worst)
    assert study["reward"] == "contrary"


class Service:
    """Scores an image by its mean; fails once when told to."""

    name = "brightness"

    def __init__(self, fail_at=-1):
        self.fail_at, self.seen, self.items = fail_at, 0, []

    def score(self, images, items):
        """One value per image."""
        self.items += items
        scores = []
        for image in images:
            failed = self.seen == self.fail_at
            scores.append(SimpleNamespace(value=None if failed else float(image.mean()), error="no answer" if failed else None))
            self.seen += 1
        return scores


def test_a_reward_service_is_asked_once_per_image(policies, tmp_path):
    from PIL import Image

    runs = read_runs(policies[0], [{}] * 2)
    kept = tmp_path / "reward"
    with pytest.raises(SuiteError, match="brightness gave item 000. of .* no value .no answer.; what is scored is kept"):
        reward_scores(runs, Service(fail_at=20), "1", kept)
    again = Service()
    values_PR = reward_scores(runs, again, "1", kept)
    assert again.seen < ITEMS * 6  # what was scored before the failure is not scored again
    expected = [
        [np.asarray(Image.open(run / f"images/{i:04d}_{r}.png")).mean() for run in policies[0] for r in range(3)] for i in range(ITEMS)
    ]
    np.testing.assert_allclose(values_PR, expected)
    assert again.items[0]["targets"]["text"][1:] == ["open", "daily"]
    other = Service()
    reward_scores(runs, other, "2", kept)
    assert other.seen == ITEMS * 6  # another version starts anew


def test_best_of_n_command_writes_all_files(policies, tmp_path, capsys):
    sft, rl = policies
    out = tmp_path / "out"
    assert main(["eval", "best-of-n", "--sft", *map(str, sft), "--rl", str(rl[0]), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    study = json.loads((out / "best_of_n.json").read_text())
    assert said.strip().splitlines()[-1] == f"report: {out / 'best_of_n.html'}" and "Best of 8, 16 needs more than 6 samples" in said
    rows = list(csv.DictReader((out / "best_of_n.csv").open()))
    assert [(row["policy"], row["best_of"]) for row in rows] == [("sft", "1"), ("sft", "2"), ("sft", "4"), ("rl", "1")]
    assert [float(row["score"]) for row in rows[:3]] == [row["score"]["value"] for row in study["rows"]]
    page = (out / "best_of_n.html").read_text()
    assert "oracle" in page and page.count("<svg") == 1 and f"{study['rl']['score']['value']:.4f}" in page


def test_guidance_by_hand(tmp_path, capsys):
    make = lambda value, **how: write_generate_run(tmp_path / f"g{value}", items=8, repeats=2, guidance=value, **how)  # noqa: E731
    runs = [make(3.0, right=0.8, seed=2), make(1.0, right=0.5), make(1.5, right=0.6, seed=1)]
    study = guidance_study(read_runs(runs, [{}] * 3))
    assert [row["guidance"] for row in study["rows"]] == [1.0, 1.5, 3.0] and study["rows"][0]["minus_off"] is None
    by_hand = [np.array(words_right(run)).mean(1) / 3 for run in (runs[1], runs[2], runs[0])]
    for row, scores in zip(study["rows"], by_hand):
        assert row["score"]["value"] == pytest.approx(scores.mean()) == pytest.approx(row["headline"])
        if row["minus_off"]:
            assert row["minus_off"]["value"] == pytest.approx((scores - by_hand[0]).mean())
    assert main(["eval", "guidance", *map(str, runs), "--out", str(tmp_path / "out")]) == 0
    assert "1.5" in capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "out" / "guidance.csv").open()))
    assert [float(row["guidance"]) for row in rows] == [1.0, 1.5, 3.0] and rows[0]["minus_off"] == ""
    page = (tmp_path / "out" / "guidance.html").read_text()
    assert page.count("<svg") == 1 and "guidance 1 (off)" in page and ">poster</th>" in page


def test_runs_that_are_no_experiment_are_refused(policies, tmp_path):
    (first, second), (rl,) = policies
    read = lambda *runs: read_runs(runs, [{}] * len(runs))  # noqa: E731
    with pytest.raises(SuiteError, match="have the seeds .1234, 1234.; runs of one seed hold the same samples"):
        best_of_study(read(first, first), read(rl))
    with pytest.raises(SuiteError, match="model.sha256 is bbbb, in .*sft0 it is aaaa"):
        best_of_study(read(first, rl), read(rl))
    with pytest.raises(SuiteError, match="are runs of the same model"):
        best_of_study(read(first), read(second))
    with pytest.raises(SuiteError, match="model.sha256 is bbbb"):
        guidance_study(read(first, rl))
    with pytest.raises(SuiteError, match="both have guidance 1; give one run per value"):
        guidance_study(read(first, first))
    with pytest.raises(SuiteError, match="one with guidance on are needed; make the other with\n  xomni eval longtext-en .*--guidance 2.0"):
        guidance_study(read(first))
    guided = write_generate_run(tmp_path / "guided", items=ITEMS, repeats=3, model=RL, guidance=2.0)
    with pytest.raises(SuiteError, match="sampling.guidance is 2.0, in .*sft0 it is 1.0"):
        best_of_study(read(first), read(guided))
    with pytest.raises(SuiteError, match="longtext-en answers questions"):
        read(write_answer_run(tmp_path / "answers", suite="longtext-en"))


def test_missing_runs_are_told_as_commands(policies, tmp_path, capsys):
    (first, _), (rl,) = policies
    x, y, out = (str(tmp_path / name) for name in ("x", "y", "o"))
    assert main(["eval", "best-of-n", "--sft", str(first), x, "--rl", y, "--out", out]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "xomni eval: 2 of 3 runs are not there or not finished; make them with"
    assert said[1].startswith("  xomni eval longtext-en --model SFT ") and "--seed 1235" in said[1] and said[1].endswith(f"--out {x}")
    assert "--model RL " in said[2] and "--seed 1234" in said[2] and not (tmp_path / "o").exists()
    assert main(["eval", "best-of-n", "--sft", "a", "--rl", "b", "--out", "o", "--reward", "ocr=http://127.0.0.1:9"]) == 2
    with pytest.raises(SystemExit):
        main(["eval", "best-of-n", "--sft", "a", "--rl", "b", "--out", "o", "--reward", "ocr"])
    assert "write it like ocr=http://127.0.0.1:8001" in capsys.readouterr().err
