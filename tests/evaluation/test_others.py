"""Outputs of other programs through the whole command: images in a folder, answers in a file, a chat model that answers."""

import csv
import dataclasses
import json

import pytest
from PIL import Image

from tests.evaluation.judges.fake_endpoint import fake_endpoint
from tests.evaluation.suites.published import png, write_tsv
from xomni_jax.cli.main import main
from xomni_jax.data.images import read_image
from xomni_jax.evaluation.eval_run import command
from xomni_jax.evaluation.outputs import described_model
from xomni_jax.evaluation.suite import tiles
from xomni_jax.evaluation.suite_run import EvalConfig
from xomni_jax.evaluation.suites import get_suite
from xomni_jax.inference import InferenceConfig

TEXTS = {0: "yes", 7: "no way"}


@pytest.fixture
def longtext(tmp_path):
    """Two prompts, with ids 0000 and 0007."""
    row = {"category": "sign", "length": "short"}
    rows = [row | {"prompt": f"a sign: {text}", "text": [text], "prompt_id": n} for n, text in TEXTS.items()]
    (tmp_path / "text_prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def results_of(out):
    return json.loads((out / "results.json").read_text()), [json.loads(line) for line in (out / "items.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", ["{id}_{k}.png", "{id}/{k:02d}.JPG", "{id}/samples/{k:04d}.webp", "{n}_{k}.jpeg", "run/{n:05d}_{k}.png"])
def test_images_are_found_by_id_or_position_and_scored(name, longtext, tmp_path):
    folder, out = tmp_path / "theirs", tmp_path / "out"
    for n, item in enumerate(TEXTS):
        for k in range(2):
            path = folder / name.format(id=f"{item:04d}", n=n, k=k)
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (100 * n, 50 * k, 0)).save(path, quality=100)
    with fake_endpoint("say yes") as endpoint:
        command = ["eval", "longtext-en", "--data", str(longtext), "--images", str(folder), "--out", str(out), "--repeats", "2"]
        assert main([*command, "--judge", f"tiny-vlm@{endpoint.url}"]) == 0
    results, items = results_of(out)
    assert results["settings"]["images"] == {"path": str(folder)} and results["counts"]["outputs"] == 4
    assert results["headline"]["value"] == 1 / 3 and [item["score"] for item in items] == [1.0, 0.0]
    for n, item in enumerate(items):
        for k, file in enumerate(item["images"]):  # in the official layout, with their pixels
            assert max(abs(a - b) for a, b in zip(read_image(out / file).getpixel((4, 4)), (100 * n, 50 * k, 0))) <= 4
    because = results["comparable"]["because"]
    assert results["comparable"]["yes"] is False and "2 of 160 items" in because and "2 images per prompt instead of 4" in because
    assert (out / "report.html").is_file()


def test_missing_images_are_listed_before_anything_is_made(longtext, tmp_path, capsys):
    folder, out = tmp_path / "theirs", tmp_path / "out"
    folder.mkdir()
    for k in range(4):
        Image.new("RGB", (8, 8)).save(folder / f"0000_{k}.png")
    Image.new("RGB", (8, 8)).save(folder / "0007_2.png")
    assert main(["eval", "longtext-en", "--data", str(longtext), "--images", str(folder), "--out", str(out)]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"--images {folder} lacks images of 1 of 2 items: 0007; each needs ID_0.png ID_1.png ID_2.png ID_3.png" in said
    assert not (out / "images").exists() and not (out / "settings.json").exists()


def test_a_grid_of_another_program_is_taken_as_it_is(tmp_path):
    """DPG-Bench: one file per prompt holds its images."""
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "boat.txt").write_text("a boat")
    grid = Image.new("RGB", (16, 8))
    for k in range(4):
        grid.paste((60 * k, 0, 0), (8 * (k % 2), 4 * (k // 2), 8 * (k % 2) + 8, 4 * (k // 2) + 4))
    (tmp_path / "theirs").mkdir()
    grid.save(tmp_path / "theirs" / "boat.png")
    command = ["eval", "dpg", "--data", str(tmp_path), "--images", str(tmp_path / "theirs"), "--out", str(tmp_path / "out")]
    assert main([*command, "--phase", "generate"]) == 0
    stored = tiles(read_image(tmp_path / "out" / "images" / "boat.png"), 4)
    assert [(t.size, t.getpixel((1, 1))) for t in stored] == [((8, 4), (60 * k, 0, 0)) for k in range(4)]


def test_questions_without_their_table_are_refused_before_anything_is_drawn(tmp_path, capsys):
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "boat.txt").write_text("a boat")
    with fake_endpoint("say yes") as endpoint:
        judge = ["--judge", f"tiny-vlm@{endpoint.url}"]
        assert main(["eval", "dpg", "--data", str(tmp_path), "--out", str(tmp_path / "out"), *judge]) == 2
    assert "scoring DPG-Bench needs dpg_bench.csv in the data directory" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# ---- answers ----
OPTIONS = {"question": "What?", "A": "cat", "B": "dog", "C": "", "D": "", "category": "x", "l2-category": "y", "hint": ""}
ANSWERS = {"1": "B", "2": "a furry one, I think", "3": "a furry one, I think"}


@pytest.fixture
def mmbench(tmp_path):
    """Three questions whose answer is B; two of the answers cannot be read by the rules."""
    rows = [{"index": n} | OPTIONS | {"answer": "B", "image": png((80 * n, 0, 0))} for n in (1, 2, 3)]
    write_tsv(tmp_path / "MMBench_DEV_EN.tsv", rows)
    return tmp_path


def answers_file(folder, ending, answers=ANSWERS):
    path = folder / f"answers.{ending}"
    if ending == "jsonl":
        path.write_text("".join(json.dumps({"id": name, "answer": text}) + "\n" for name, text in answers.items()))
    else:
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([("id", "answer"), *answers.items()])
    return path


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_answers_in_a_file_are_scored(ending, mmbench, tmp_path):
    command = ["eval", "mmbench", "--data", str(mmbench), "--answers", str(answers_file(tmp_path, ending)), "--out", str(tmp_path / "out")]
    assert main(command) == 0
    results, items = results_of(tmp_path / "out")
    assert results["headline"]["value"] == 1 / 3 and results["counts"]["unparsed"] == 2
    assert {item["id"]: item["answer"] for item in items} == ANSWERS


@pytest.mark.parametrize(
    "answers, said",
    [({"1": "B"}, "has no answer for 2 of 3 items: 2, 3"), ({}, "answers.jsonl holds no rows")],
)
def test_missing_answers_are_listed(answers, said, mmbench, tmp_path, capsys):
    file = answers_file(tmp_path, "jsonl", answers)
    assert main(["eval", "mmbench", "--data", str(mmbench), "--answers", str(file), "--out", str(tmp_path / "out")]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out" / "settings.json").exists()


def test_a_judge_reads_the_answers_that_rules_leave_open(mmbench, tmp_path):
    command = ["eval", "mmbench", "--data", str(mmbench), "--answers", str(answers_file(tmp_path, "csv")), "--out", str(tmp_path / "out")]
    with fake_endpoint("say <think>A?</think>**B**", "say Z", "say A") as endpoint:
        judged = [*command, "--judge", f"tiny-vlm@{endpoint.url}", "--concurrency", "1"]
        assert main(judged) == 0
        asked = [body["messages"][0]["content"] for body in endpoint.asked]
        assert main(judged) == 0 and len(endpoint.asked) == 2  # nothing is asked twice
    assert all(len(parts) == 1 and "A. cat\nB. dog" in parts[0]["text"] and ANSWERS["2"] in parts[0]["text"] for parts in asked)
    results, items = results_of(tmp_path / "out")
    assert results["headline"]["value"] == 2 / 3 and results["judge"]["name"] == "tiny-vlm"
    assert [item["verdicts"] for item in items] == [["right"], ["right"], ["read as Z, wanted B"]]
    assert [item["answer"] for item in items] == list(ANSWERS.values())  # what the model said stays


def test_answers_are_scored_where_the_images_are_absent(tmp_path):
    for split in ("random", "popular", "adversarial"):
        rows = [{"question_id": n, "image": "a.jpg", "text": "Is there a cat?", "label": label} for n, label in ((1, "yes"), (2, "no"))]
        (tmp_path / f"coco_pope_{split}.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    answers = {f"{split}-{n:05d}": "yes" for split in ("random", "popular", "adversarial") for n in (1, 2)}
    file = answers_file(tmp_path, "csv", answers)
    assert main(["eval", "pope", "--data", str(tmp_path), "--answers", str(file), "--out", str(tmp_path / "out")]) == 0
    results, _ = results_of(tmp_path / "out")
    assert results["scores"]["mean accuracy"] == 0.5 and (tmp_path / "out" / "report.html").is_file()


def test_what_is_not_answered_yet_is_not_judged(mmbench, tmp_path, capsys):
    with fake_endpoint("say B") as endpoint:
        judge = ["--judge", f"tiny-vlm@{endpoint.url}", "--phase", "score"]
        assert main(["eval", "mmbench", "--data", str(mmbench), "--out", str(tmp_path / "out"), *judge]) == 2
        assert "mmbench: 3 of 3 items are not answered" in capsys.readouterr().err and not endpoint.asked


def test_a_chat_model_is_evaluated_as_ours_is(mmbench, tmp_path):
    replies = ("say <think>Is it A?</think>B", "say The answer is B", {"message": {"content": "<think>hm"}, "finish_reason": "length"})
    with fake_endpoint(*replies) as endpoint:
        command = ["eval", "mmbench", "--data", str(mmbench), "--model", f"tiny-vlm@{endpoint.url}", "--out", str(tmp_path / "out")]
        assert main([*command, "--concurrency", "1", "--image-format", "JPEG"]) == 0
    image, text = endpoint.asked[0]["messages"][0]["content"]
    assert image["image_url"]["url"].startswith("data:image/jpeg;base64,") and "Question: What?" in text["text"]
    assert endpoint.asked[0]["max_tokens"] == get_suite("mmbench").max_new_tokens
    results, items = results_of(tmp_path / "out")
    assert [item["answer"] for item in items] == ["B", "The answer is B", ""] and results["counts"]["unanswered"] == 1
    assert results["settings"]["model"] == {"name": "tiny-vlm", "path": f"tiny-vlm@{endpoint.url}"}


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["longtext-en", "--model", "tiny-vlm@URL"], "a chat model draws none; give the images that it made with --images DIR"),
        (["longtext-en", "--model", "tiny-vlm@URL", "--adapter", "a"], "--adapter changes a model directory, and another program makes"),
        (["longtext-en", "--images", "/no/folder", "--adapter", "a"], "the outputs here; leave one of the two out"),
        (["longtext-en", "--images", "/no/folder"], "--images /no/folder is no directory"),
        (["longtext-en", "--limit", "1", "--sample", "1"], "--limit, --sample and --ids each choose items; give one of them"),
        (["dpg", "--repeats", "3"], "dpg tiles the images of a prompt as a square; give --repeats 1, 4 or 9"),
    ],
)
def test_sources_that_do_not_fit_are_one_sentence(arguments, said, longtext, tmp_path, capsys):
    with fake_endpoint("say yes") as endpoint:
        given = [argument.replace("URL", endpoint.url) for argument in arguments]
        phase = [] if "--sample" in given or "dpg" in given else ["--phase", "generate"]
        assert main(["eval", *given, *phase, "--data", str(longtext), "--out", str(tmp_path / "out")]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_model_with_adapters_is_another_model(tmp_path):
    """Settings name the adapters, their bytes decide whether a run may go on, and the command line of the run has them."""
    for name in ("model", "one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text(name)
    config = EvalConfig("longtext-en", str(tmp_path / "out"), inference=InferenceConfig(model=str(tmp_path / "model")))
    made = [described_model(dataclasses.replace(config, adapter=name and str(tmp_path / name))) for name in (None, "one", "two")]
    assert len({each["sha256"] for each in made}) == 3
    assert [each.get("adapter") for each in made] == [None, str(tmp_path / "one"), str(tmp_path / "two")]
    assert f"--adapter {tmp_path / 'one'} " in command("longtext-en", "OUT", {"model": made[1]}) + " "
    assert "--adapter" not in command("longtext-en", "OUT", {"model": made[0]})


# ---- published or not ----
def test_official_refuses_what_cannot_be_had_before_work_starts(longtext, tmp_path, capsys):
    out = ["--data", str(longtext), "--out", str(tmp_path / "out")]
    assert main(["eval", "longtext-en", *out, "--official", "--switch", "clean-replies", "--height", "512"]) == 2
    said = capsys.readouterr().err
    for words in (
        "longtext-en: --official cannot be had: 2 of 160 items",
        "images of 512 x 1152 pixels instead of 1152 x 1152",
        "judge pp-ocr instead of Qwen2.5-VL-7B-Instruct",
        "instruction 'ocr' in other words than the published ones, which --instruction ocr=FILE gives",
        "switch clean-replies, which departs from the official scorer",
    ):
        assert words in said
    assert not (tmp_path / "out").exists()


# ---- the directory of a run ----
@pytest.mark.parametrize(
    "kind, said",
    [("empty", "--out is empty"), ("file", "is a file; give another folder"), ("training", "holds a training run; give another folder")],
)
def test_a_directory_that_cannot_hold_a_run_is_refused_first(kind, said, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "metrics.jsonl").write_text("")
    out = {"empty": "", "file": str(tmp_path / "file" / "below"), "training": str(tmp_path / "training")}[kind]
    before = sorted(tmp_path.rglob("*"))
    assert main(["eval", "rendered-qa", "--out", out, "--limit", "1"]) == 2
    assert said in capsys.readouterr().err and sorted(tmp_path.rglob("*")) == before


def test_a_directory_that_cannot_be_written_is_refused_first(tmp_path, capsys, monkeypatch):
    def read_only(dir):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("tempfile.TemporaryFile", read_only)
    assert main(["eval", "rendered-qa", "--out", str(tmp_path / "out"), "--limit", "1"]) == 2
    assert f"{tmp_path}: nothing can be written there (Read-only file system); give another folder" in capsys.readouterr().err
