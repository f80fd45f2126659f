"""The engine on a miniature model: shares, stops and resumption leave the results as they are, to the byte; what is wrong is said."""

import errno
import json
import math
import os
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from xomni_jax.core.preemption import StopRequested, StopSignal
from xomni_jax.evaluation import outputs
from xomni_jax.evaluation.outputs import model_opener
from xomni_jax.evaluation.run import EvalConfig, evaluate, open_run, write_results
from xomni_jax.evaluation.run_directory import RunError
from xomni_jax.evaluation.suite import JudgeUnavailable, SuiteError
from xomni_jax.inference import InferenceConfig
from xomni_jax.sharding.mesh import make_mesh

WORDS = ("CAT", "DOG", "SUN", "SKY", "TREE", "MILK", "OPEN")
FILES = {"settings.json", "images", "parts", "judged", "items.jsonl", "results.json", "results.csv", "report.html"}
LONG = " on a wall of grey stone beside a road"


class PixelJudge:
    """Reads the wanted word where the image is dark in its first corner."""

    name, settings = "pixels", {"version": 1}

    def __init__(self, answers=10**9):
        self.answers = answers

    def ask(self, images, questions):
        """Goes silent after `answers` calls."""
        self.answers -= 1
        if self.answers < 0:
            raise JudgeUnavailable("the judge at http://x does not answer; start it, and run the same command again")
        return [[" ".join(w for w in WORDS if (np.asarray(p).sum() + len(w)) % 2) for _ in asked] for p, asked in zip(images, questions)]


class StopAfter(StopSignal):
    """Asks for a stop at the n-th poll."""

    def __init__(self, polls=10**9):
        super().__init__()
        self.polls = polls

    def reached(self):
        """Counts."""
        self.polls -= 1
        return self.polls < 0


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Prompts in two length buckets, and questions about images of several shapes, two of which the model's limits refuse."""
    folder = tmp_path_factory.mktemp("data")
    prompts = [f'a sign that says "{w}"' + LONG * (i % 3 == 0) for i, w in enumerate(WORDS)]
    rows = [
        {"category": "sign", "length": "short", "prompt": prompt, "text": [w], "prompt_id": 3 * i}
        for i, (w, prompt) in enumerate(zip(WORDS, prompts))
    ]
    (folder / "text_prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sizes = [(32, 16), (16, 16), (90, 8), (32, 16), (5, 5)]
    entries = []
    for i, size in enumerate(sizes):
        Image.new("RGB", size, (40 * i, 0, 200)).save(folder / f"{i}.png")
        kind = {"dataset_name": "svt", "type": "Regular Text Recognition"}
        entries.append({**kind, "id": i, "image_path": f"{i}.png", "question": "what?", "answers": "x"})
    (folder / "OCRBench.json").write_text(json.dumps(entries))
    return folder


@pytest.fixture(scope="module", autouse=True)
def few_devices():
    """Meshes are of as many devices as their axes say, among the eight that tests simulate."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(outputs, "make_mesh", lambda axes: make_mesh(axes, jax.devices()[: math.prod(axes.values())]))
        yield


@pytest.fixture(scope="module")
def make(model_dir, data):
    """Evaluates with one model for all runs, so that its programs are compiled once; the bytes of the results, or None."""
    settings = {"inference": InferenceConfig(model=str(model_dir), batch=8, decode_batch=3), "mesh": {"fsdp": 1}}
    model = model_opener(EvalConfig("", "", **settings))

    def run(out, name="longtext-en", *, judge=None, stop=None, opened=model, **how):
        config = EvalConfig(name, out, **({"data": data} | settings | how))
        done = evaluate(config, opened, judge or PixelJudge(), stop or StopAfter())
        return done.values and tuple((config.out / file).read_bytes() for file in ("results.json", "items.jsonl"))

    return run


@pytest.fixture(scope="module")
def whole(few_devices, make, tmp_path_factory):
    """Results of one undisturbed process, by suite."""
    root = tmp_path_factory.mktemp("whole")
    return {name: (root / name, make(root / name, name)) for name in ("longtext-en", "ocrbench")}


def test_a_whole_run(whole, data):
    path, (results, items) = whole["longtext-en"]
    results, items = json.loads(results), [json.loads(line) for line in items.splitlines()]
    expected = {"items": 7, "published": 160, "outputs": 28, "overlong prompts": 3}
    assert {name: n for name, n in results["counts"].items() if n} == expected
    assert [item["id"] for item in items] == sorted(f"{3 * i:04d}" for i in range(7))
    assert results["headline"]["value"] == sum(i["record"]["match"] for i in items) / sum(i["record"]["gt"] for i in items)
    assert results["settings"]["sampling"] == {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": 0.03, "guidance": 1.0, "window": 1}
    assert (results["settings"]["seed"], results["settings"]["height"], results["settings"]["width"]) == (1234, 16, 32)
    for item in items:
        assert item["images"] == [f"images/{item['id']}_{k}.png" for k in range(4)]
        assert len(item["replies"]) == len(item["verdicts"]) == 4
        assert len({Image.open(path / name).tobytes() for name in item["images"]}) == 4  # repeats differ
    assert {p.name for p in path.iterdir()} == FILES


def test_answers_of_images_that_the_limits_refuse(whole):
    results, items = map(bytes.decode, whole["ocrbench"][1])
    assert json.loads(results)["counts"]["fitted images"] == 2
    assert [type(json.loads(line)["answer"]) for line in items.splitlines()] == [str] * 5


@pytest.mark.parametrize(
    "name, shares, stops", [("longtext-en", 2, (1, 0, 2)), ("longtext-en", 3, (0,)), ("ocrbench", 2, (0,)), ("ocrbench", 3, ())]
)
def test_any_cut_gives_the_same_bytes(whole, make, data, tmp_path, name, shares, stops):
    """Workers in reverse order, stopped at polls and gone on with, and a torn line in between."""
    found = None
    for k in reversed(range(shares)):
        for polls in (*stops, 10**9):
            try:
                found = make(tmp_path, name, stop=StopAfter(polls), shard=(k, shares))
            except StopRequested:
                with (tmp_path / "parts" / f"{k + 1}-of-{shares}.jsonl").open("a") as torn:
                    torn.write('{"id": "00')
    assert found == whole[name][1]
    lines = [line for file in (tmp_path / "parts").glob("*.jsonl") for line in file.read_text().splitlines()]
    items = open_run(EvalConfig(name, tmp_path, data)).items
    assert len(lines) == len({json.loads(line)["id"] for line in lines}) == len(items)


def test_an_item_alone_equals_the_item_in_its_batch(whole, make, tmp_path):
    path, _ = whole["longtext-en"]
    for name in ("0003", "0009"):  # one of each length bucket
        make(tmp_path / name, ids=[name], phase="generate")
        for k in range(4):
            assert (tmp_path / name / f"images/{name}_{k}.png").read_bytes() == (path / f"images/{name}_{k}.png").read_bytes()
        assert len(list((tmp_path / name / "images").iterdir())) == 4


def test_data_parallel_devices_draw_the_same(whole, make, tmp_path):
    """The batch is counted per data-parallel part, so every part computes in the shapes of one device."""
    for name in ("longtext-en", "ocrbench"):
        assert make(tmp_path / name, name, mesh={"data": 2}, opened=None) == whole[name][1]


def test_a_part_first_and_the_rest_later(whole, make, tmp_path):
    part = make(tmp_path, limit=3)
    assert json.loads(part[0])["counts"]["items"] == 3
    assert make(tmp_path) == whole["longtext-en"][1]


def test_other_settings_are_refused_by_name(make, data, whole, tmp_path):
    path = whole["longtext-en"][0]
    with pytest.raises(RunError, match="settings.json: seed is 1234, this command has 3; take another --out"):
        make(path, seed=3)
    (tmp_path / "text_prompts.jsonl").write_text((data / "text_prompts.jsonl").read_text().replace("CAT", "COW"))
    with pytest.raises(RunError, match="settings.json: data.sha256 is "):
        make(path, data=tmp_path)
    judge = PixelJudge()
    judge.settings = {"version": 2}
    with pytest.raises(RunError, match="judge.json: settings.version is 1, this command has 2; .*delete .*judged"):
        make(path, judge=judge)
    with pytest.raises(RunError, match="judged: item 0000 was judged by other questions; give the data and --instruction of then"):
        make(path, instructions={"ocr": "What do you read?"})


def test_a_silent_judge_leaves_nothing_scored(whole, make, data, tmp_path):
    with pytest.raises(JudgeUnavailable, match="does not answer"):
        make(tmp_path, judge=PixelJudge(answers=1))
    missing = open_run(EvalConfig("longtext-en", tmp_path, data)).missing()
    assert missing == 6 and not (tmp_path / "results.json").exists()  # one was judged
    assert make(tmp_path) == whole["longtext-en"][1]


def test_missing_images_are_counted_and_named(whole, make, tmp_path):
    make(tmp_path, phase="generate")
    (tmp_path / "images/0006_1.png").unlink()
    with pytest.raises(SuiteError, match=r"1 of 7 items have no images, the first is 0006 \(the image .*0006_1\.png is missing"):
        make(tmp_path, phase="score")
    assert not (tmp_path / "judged").exists()
    assert make(tmp_path) == whole["longtext-en"][1]  # drawn again, and the same


def test_images_of_another_program_are_scored(whole, make, tmp_path):
    source, (results, _) = whole["longtext-en"]
    os.makedirs(tmp_path / "images")
    for image in (source / "images").iterdir():
        os.link(image, tmp_path / "images" / image.name)
    found = json.loads(make(tmp_path, phase="score")[0])
    assert found["settings"] is None and found["headline"] == json.loads(results)["headline"]


def test_a_full_disk_is_one_sentence_and_loses_nothing(whole, make, data, tmp_path, monkeypatch):
    replace = os.replace
    room = iter(range(14))

    def until_full(source, target):
        if str(target).startswith(str(tmp_path / "images")) and next(room, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", until_full)
        with pytest.raises(RunError, match="No space left on device; what is finished is kept: make room"):
            make(tmp_path)
    assert 0 < len(open_run(EvalConfig("longtext-en", tmp_path, data)).outputs()) < 7
    assert make(tmp_path) == whole["longtext-en"][1]


def test_unreadable_replies_are_counted_and_listed(data, whole, tmp_path):
    """A suite whose score cannot read some replies says which items they are of."""
    out = shutil.copytree(whole["longtext-en"][0], tmp_path / "out")
    run = open_run(EvalConfig("longtext-en", out, data))
    assert write_results(run)["unparsed"] == []
    score = run.suite.score
    run.suite.score = lambda item, outputs: score(item, outputs) | {"unparsed": 2 * (item.id == "0006")}
    results = write_results(run)
    assert results["counts"]["unparsed"] == 2 and results["unparsed"] == ["0006"]


def test_ids_that_do_not_fit(make, data, tmp_path):
    with pytest.raises(SuiteError, match="longtext-en has no item '99'; ids are such as '0000'"):
        make(tmp_path, ids=["99"])
    rows = (data / "text_prompts.jsonl").read_text().splitlines()
    (tmp_path / "text_prompts.jsonl").write_text("\n".join([*rows, rows[2]]))
    with pytest.raises(SuiteError, match=r"text_prompts.jsonl:8: the id '0006' was used before, .*jsonl:3"):
        make(tmp_path / "out", data=tmp_path)


def test_prompts_that_cannot_be_drawn_are_named(make, data, tmp_path):
    rows = [json.loads(line) for line in (data / "text_prompts.jsonl").read_text().splitlines()]
    rows[1]["prompt"] = "a <SOM>"
    (tmp_path / "text_prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(SuiteError, match="item 0003: The text 'a <SOM>' contains the multimodal token <SOM>"):
        make(tmp_path / "out", data=tmp_path)
