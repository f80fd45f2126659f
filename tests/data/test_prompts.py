"""Prompts in files as a source of reinforcement learning: targets, weights, rewards, sizes, and prompts that must not occur."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json

import numpy as np
import pytest

from tests.data.test_files import examples, section, write_images
from tests.data.test_tables import listed, written
from xomni_jax.core.config import ConfigError
from xomni_jax.data.rendered import SIGNS
from xomni_jax.data.sources import batches
from xomni_jax.evaluation.held_out import with_benchmarks
from xomni_jax.rl.grpo import GRPORun
from xomni_jax.rl.prompts import check_prompts


def prompts(path, **options):
    return section(path, "prompts", **options)


def test_examples_of_prompts(tmp_path):
    lines = [{"prompt": 'a sign "HI"', "tag": "x"}, {"prompt": "a dog", "targets": {"text": ["NO"]}, "rewards": {"ocr": 0.5}}]
    file = written(tmp_path / "p.jsonl", "\n".join(map(json.dumps, lines)))
    first, second = examples(prompts(file, text_targets=True), 2)
    size = {"size": (32, 64)}
    assert first == {"id": "p:0", "caption": 'a sign "HI"', "targets": {"text": ["HI"], "metadata": {"tag": "x"}}} | size
    assert second == {"id": "p:1", "caption": "a dog", "targets": {"text": ["NO"]}, "rewards": {"ocr": 0.5}} | size
    batch = next(iter(batches(prompts(file), 0, 2, fields=("caption", "targets"))))
    assert sorted(batch["caption"]) == ["a dog", 'a sign "HI"']


@pytest.mark.parametrize(
    "mode, share", [("sample_proportional", 5 * 2 / (5 * 2 + 1 * 5)), ("weight_only", 5 / (5 + 1))], ids=["proportional", "weight only"]
)
def test_parts_are_drawn_by_their_weights(tmp_path, mode, share):
    path = listed(tmp_path, f"{{sampling_mode: {mode}, datasets: [{{path: a.txt}}, {{path: b.txt, sample_weight: 5}}]}}")
    source = prompts(path).open(seed=3, batch_size=4)
    drawn = collections.Counter(source[n]["id"].partition(":")[0] for n in range(2000))
    assert abs(drawn["b"] / 2000 - share) < 0.04 and drawn["a"] + drawn["b"] == 2000
    assert [source[n]["id"] for n in range(50)] == [prompts(path).open(3, 4)[n]["id"] for n in range(50)]


def test_a_prompt_may_name_its_size(tmp_path):
    lines = [{"prompt": "wide"}, {"prompt": "tall", "size": [64, 32]}]
    file = written(tmp_path / "p.jsonl", "\n".join(map(json.dumps, lines)))
    source = prompts(file, sizes=((32, 64), (64, 32))).open(0, 1)
    assert sorted(map(str, source.order.members)) == ["(32, 64)", "(64, 32)"]
    with pytest.raises(ConfigError, match=r"p.jsonl:2: the size \(64, 32\) is not among config.data.sizes=\(\(32, 64\),\)"):
        prompts(file).open(0, 1)


def test_prompts_without_a_size_take_the_sizes_by_weight(tmp_path):
    """Batches share one size; a prompt with a size of its own keeps it. The order is one for every run."""
    lines = [{"prompt": f"p{n}"} for n in range(30)] + [{"prompt": "own", "size": [16, 16]}]
    file = written(tmp_path / "p.jsonl", "\n".join(map(json.dumps, lines)))
    data = prompts(file, sizes=((32, 64), (64, 32), (16, 16)), size_weights=(3, 1, 0))
    source, B = data.open(seed=1, batch_size=2), 2
    drawn = [[source[n * B + row] for row in range(B)] for n in range(124)]  # four epochs
    assert all(a["size"] == b["size"] for a, b in drawn)
    counts = collections.Counter(a["size"] for a, _ in drawn)
    assert counts[32, 64] / counts[64, 32] == pytest.approx(3, rel=0.1)
    assert {e["size"] for pair in drawn for e in pair if e["caption"] == "own"} == {(16, 16)}
    assert {e["caption"] for pair in drawn for e in pair if e["size"] == (16, 16)} == {"own"}
    assert drawn[7] == [data.open(1, 2)[14], data.open(1, 2)[15]]
    assert {source[n]["size"] for n in range(64)} != {prompts(file, sizes=((32, 64), (16, 16))).open(1, 2)[n]["size"] for n in range(64)}


def test_cells_of_a_table_may_be_empty(tmp_path):
    rows = ["prompt,size,rewards,targets,weight", "a,,,,", 'b,"[64, 32]","{""ocr"": 2}","{""text"": [""B""]}",3']
    data = prompts(written(tmp_path / "p.csv", "\n".join(rows)), sizes=((32, 64), (64, 32)))
    found = {e["caption"]: e for e in (data.open(0, 1)[n] for n in range(16))}
    assert found == {
        "a": {"id": "p:0", "caption": "a", "size": (32, 64), "targets": {}},
        "b": {"id": "p:1", "caption": "b", "size": (64, 32), "targets": {"text": ["B"]}, "rewards": {"ocr": 2.0}},
    }


@pytest.mark.parametrize("weights", [(1,), (0, 0), (1, 2, 3)])
def test_weights_of_sizes_that_do_not_fit_are_refused(tmp_path, weights):
    with pytest.raises(ConfigError, match=r"size_weights=.* must hold a weight for each of sizes=.*, and not only zeros"):
        prompts(tmp_path / "p.txt", sizes=((32, 64), (64, 32)), size_weights=weights)


def test_a_source_names_the_rewards_of_its_prompts(tmp_path):
    """Those of a prompt come first, then those of its entry in a list, then those of the configuration."""
    lines = [{"prompt": 'a "B"'}, {"prompt": "c", "rewards": {"taste": 2}}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "b.txt").write_text("d\n")
    (tmp_path / "mix.yaml").write_text("datasets: [{path: a.jsonl, name: first}, {path: b.txt, rewards: [{shapes: 3}]}]")
    found = examples(prompts(tmp_path / "mix.yaml", rewards=(("quality", 1), ("shapes", 0.5)), text_targets=False), 3)
    assert [(e["caption"], e["rewards"], e["source"]) for e in found] == [
        ("d", {"shapes": 3.0}, "b"), ('a "B"', {"quality": 1.0, "shapes": 0.5}, "first"), ("c", {"taste": 2.0}, "first")
    ]  # fmt: skip
    assert "source" not in examples(prompts(tmp_path / "b.txt"), 1)[0]
    (told,) = examples(prompts(written(tmp_path / "o.txt", 'say "HI"'), rewards=(("ocr", 1),)), 1)
    assert told["targets"] == {"text": ["HI"]}
    with pytest.raises(ConfigError, match="config.data.rewards=.*: expected"):
        prompts(tmp_path / "b.txt", rewards=(("ocr", 0),))


def test_prompts_of_a_benchmark_are_refused(tmp_path):
    file = written(tmp_path / "p.txt", "a cat\na  Dog\n")
    prompts(file, exclude=(str(written(tmp_path / "other.txt", "a bird")),)).open(0, 1)
    benchmark = written(tmp_path / "bench.jsonl", '{"prompt": "A dog", "tag": "single_object"}')
    with pytest.raises(ConfigError, match=r"p.txt:2: the prompt 'a  Dog' stands in .*bench.jsonl:1, which config.data.exclude names"):
        prompts(file, exclude=(str(benchmark),)).open(0, 1)
    with pytest.raises(ConfigError, match=r"config.data.exclude: no/such.txt: no such file or folder"):
        prompts(file, exclude=("no/such.txt",)).open(0, 1)
    write_images(tmp_path / "images")
    (tmp_path / "images" / "metadata.jsonl").write_text('{"file_name": "red.png", "text": "a DOG"}')
    with pytest.raises(ConfigError, match="metadata.jsonl:1: the prompt 'a DOG' stands in"):
        section(tmp_path / "images", "files", exclude=(str(benchmark),)).open(0, 1)


def test_prompts_of_a_suite_are_refused(tmp_path, monkeypatch):
    """By its name and the folder of its data, in every part of a mixture; a file whose name holds a = is a file."""
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "p.txt", "a cat\nA photo  of a BENCH\n")
    written(tmp_path / "lang=en.txt", "a bird\n")
    (tmp_path / "bench").mkdir()
    rows = [
        {"tag": "single_object", "include": [{"class": name, "count": 1}], "prompt": f"a photo of a {name}"} for name in ("cow", "bench")
    ]
    (tmp_path / "bench" / "evaluation_metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    mine = dict(source="prompts", path="p.txt", sizes=((32, 64),))
    named = {"mine": mine | dict(exclude=("lang=en.txt", "geneval=bench")), "others": mine | dict(path="lang=en.txt")}
    mixed = SIGNS.updated(dict(source="mixture", parts=named), "config.data")
    for data in (prompts("p.txt", exclude=("lang=en.txt", "geneval=bench")), mixed):
        with pytest.raises(ConfigError, match=r"p.txt:2: the prompt 'A photo  of a BENCH' stands in geneval, item 00001, which"):
            with_benchmarks(data).open(0, 1)
        assert with_benchmarks(data).as_dict() == data.as_dict()
    with_benchmarks(prompts("lang=en.txt", exclude=("geneval=bench",))).open(0, 1)
    for entry, words in (("dgp=x", "the suite 'dgp' is unknown"), ("geneval=none", "the data directory none does not exist; it must hold")):
        with pytest.raises(ConfigError, match=f"config.data.exclude: {words}"):
            with_benchmarks(prompts("p.txt", exclude=(entry,)))


@pytest.mark.parametrize("content, words", [("", "holds no prompts; name files that hold some"), ("\n \n", "holds no prompts")])
def test_empty_files_are_refused(tmp_path, content, words):
    with pytest.raises(ConfigError, match=words):
        prompts(written(tmp_path / "p.txt", content)).open(0, 1)


def test_rewards_that_do_not_fit_the_prompts_are_refused(tmp_path):
    file = written(tmp_path / "p.jsonl", '{"prompt": "no text"}')
    cfg = dataclasses.replace(GRPORun(), data=prompts(file))
    with pytest.raises(ConfigError, match="config.rewards.ocr: no prompt of config.data says which text"):
        check_prompts(cfg)
    texts = written(tmp_path / "q.txt", 'the word "YES"')
    named = dict(source="prompts", sizes=((32, 64),), path=str(texts))
    for rewards, words in ((("taste", 1),), "config.data.parts.mine: prompts are to be judged by taste, to which"), ((("ocr", 1),), None):
        parts = dict(mine=named | dict(rewards=rewards), others=named | dict(path=str(file)))
        mixed = dataclasses.replace(cfg, data=SIGNS.updated(dict(source="mixture", parts=parts), "config.data"))
        with pytest.raises(ConfigError, match=words) if words else contextlib.nullcontext():
            check_prompts(mixed)
    check_prompts(dataclasses.replace(cfg, data=prompts(written(tmp_path / "q.txt", 'the word "YES"'), text_targets=True)))
    weights = {"ocr": cfg.rewards["ocr"], "quality": cfg.rewards["ocr"]}
    check_prompts(dataclasses.replace(cfg, data=prompts(file, rewards=(("quality", 1),)), rewards=weights))  # ocr is not asked
    own = written(tmp_path / "r.jsonl", '{"prompt": "p", "rewards": {"beauty": 1}}')
    with pytest.raises(ConfigError, match="prompts are to be judged by beauty, to which config.rewards gives no weight"):
        check_prompts(dataclasses.replace(cfg, data=prompts(own)))


def test_one_of_several_captions_is_drawn_for_a_step(tmp_path):
    write_images(tmp_path)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "red.png", "captions": ["one", "two"]}')
    source = section(tmp_path, "files").open(0, 1)
    drawn = [source[n]["caption"] for n in range(32)]
    assert set(drawn) == {"one", "two"} and drawn == [source[n]["caption"] for n in range(32)]


def test_examples_of_edits_and_conversations(tmp_path):
    write_images(tmp_path)
    turns = [{"from": "human", "value": "<image>\nwhich?"}, {"from": "gpt", "value": "red"}]
    lines = [{"id": 1, "conversations": turns, "image": "red.png"}, {"id": 2, "conversations": [turns[0] | {"value": "hi"}, turns[1]]}]
    file = written(tmp_path / "talk.json", json.dumps(lines))
    (found,) = examples(section(file, "files"), 1)
    assert (found["question"], found["answer"], found["image"].shape) == ("which?", "red", (32, 64, 3))
    assert found["turns"] == (("user", "<image 0>\nwhich?"), ("assistant", "red")) and "images" not in found
    (tmp_path / "edit.jsonl").write_text('{"input": "red.png", "output": "green.png", "text": "make it green"}')
    (edit,) = examples(section(tmp_path / "edit.jsonl", "files"), 1)
    assert edit["roles"] == ("input", "output") and np.array_equal(edit["image"], edit["images"][1])
    assert edit["image"][0, 0].tolist() == [30, 160, 60] and edit["images"][0][0, 0].tolist() == [200, 30, 30]
