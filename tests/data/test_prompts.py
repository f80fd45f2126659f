"""Prompts in files as a source of reinforcement learning: targets, weights, rewards, sizes, and prompts that must not occur."""

from __future__ import annotations

import collections
import dataclasses
import json

import numpy as np
import pytest

from tests.data.test_files import examples, section, write_images
from tests.data.test_tables import listed, written
from xomni_jax.core.config import ConfigError
from xomni_jax.data.sources import batches
from xomni_jax.rl.grpo import GRPORun, check_prompts


def prompts(path, **options):
    return section(path, "prompts", **options)


def test_examples_of_prompts(tmp_path):
    lines = [{"prompt": 'a sign "HI"', "tag": "x"}, {"prompt": "a dog", "targets": {"text": ["NO"]}, "rewards": {"ocr": 0.5}}]
    file = written(tmp_path / "p.jsonl", "\n".join(map(json.dumps, lines)))
    first, second = examples(prompts(file, text_targets=True), 2)
    assert first == {"id": "p:0", "caption": 'a sign "HI"', "targets": {"text": ["HI"], "metadata": {"tag": "x"}}, "rewards": {}}
    assert second == {"id": "p:1", "caption": "a dog", "targets": {"text": ["NO"]}, "rewards": {"ocr": 0.5}}
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


def test_prompts_of_a_benchmark_are_refused(tmp_path):
    file = written(tmp_path / "p.txt", "a cat\na  Dog\n")
    prompts(file, exclude=(str(written(tmp_path / "other.txt", "a bird")),)).open(0, 1)
    benchmark = written(tmp_path / "bench.jsonl", '{"prompt": "A dog", "tag": "single_object"}')
    with pytest.raises(ConfigError, match=r"p.txt:2: the prompt 'a  Dog' stands in .*bench.jsonl:1, which config.data.exclude names"):
        prompts(file, exclude=(str(benchmark),)).open(0, 1)
    write_images(tmp_path / "images")
    (tmp_path / "images" / "metadata.jsonl").write_text('{"file_name": "red.png", "text": "a DOG"}')
    with pytest.raises(ConfigError, match="metadata.jsonl:1: the prompt 'a DOG' stands in"):
        section(tmp_path / "images", "files", exclude=(str(benchmark),)).open(0, 1)


@pytest.mark.parametrize("content, words", [("", "holds no prompts; name files that hold some"), ("\n \n", "holds no prompts")])
def test_empty_files_are_refused(tmp_path, content, words):
    with pytest.raises(ConfigError, match=words):
        prompts(written(tmp_path / "p.txt", content)).open(0, 1)


def test_rewards_that_do_not_fit_the_prompts_are_refused(tmp_path):
    file = written(tmp_path / "p.jsonl", '{"prompt": "no text"}')
    cfg = dataclasses.replace(GRPORun(), data=prompts(file))
    with pytest.raises(ConfigError, match="config.rewards.ocr: no prompt of config.data says which text"):
        check_prompts(cfg)
    check_prompts(dataclasses.replace(cfg, data=prompts(written(tmp_path / "q.txt", 'the word "YES"'), text_targets=True)))
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
