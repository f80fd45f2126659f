"""Judged signs: what is right says so, what is not is drawn again, and only what is to be learned is learned."""

import dataclasses
import re

import numpy as np
import pytest

from xomni_jax.core.config import ConfigError
from xomni_jax.data.judged_signs import JudgedConfig, JudgedSource
from xomni_jax.data.rendered import render_sign
from xomni_jax.sequence.tokenizer import MultimodalTokenizer
from xomni_jax.training.next_token import NextTokenConfig, build_sequences
from xomni_jax.training.stage import load_config

CONFIG = JudgedConfig(sizes=((32, 64),), weights=(1.0,), text_lengths=((3, 6),), other_faces=0.0, centred=1.0, question="is it?")


@pytest.fixture(scope="module")
def examples():
    source = JudgedSource(CONFIG, 0, 8)
    return [source[n] for n in range(400)]


def test_verdicts_tell_what_the_judged_images_show(examples):
    judged = [e for e in examples if "turns" in e]
    wrong = [e for e in judged if len(e["images"]) == 2]
    # Shares of 0.6 and 0.5, within four standard deviations.
    assert abs(len(judged) / 400 - 0.6) < 4 * (0.24 / 400) ** 0.5 and abs(len(wrong) / len(judged) - 0.5) < 4 * (0.25 / len(judged)) ** 0.5
    for e in judged:
        prompt, question, (_, verdict), *again = e["turns"]
        word, text, ground = re.fullmatch(r"(Yes|No), it says (.+) on (\w+)\.", verdict).groups()
        assert prompt == ("plain", e["caption"] + "<image 0 context>") and question == ("user", "is it?")
        assert word == ("No" if again else "Yes") and again == [("plain", "<image 1>")] * (len(e["images"]) - 1)
        asked = (e["targets"]["text"][0], e["targets"]["background"])
        assert ((text, ground) == asked) == (word == "Yes") and np.array_equal(e["images"][-1], e["image"])
        if again:
            assert np.array_equal(e["images"][0], render_sign(text, ground, (32, 64))[0])
    assert {f" says {e['targets']['text'][0]} on " in e["turns"][2][1] for e in wrong} == {True, False}, "text or colour"


def test_the_judged_image_is_no_target(examples):
    text, some = MultimodalTokenizer.load(), [e for e in examples if "turns" in e][:20]
    codes = [[np.full((4, 8), 7), np.full((4, 8), 9)][: len(e["images"])] for e in some]
    columns = {name: [e.get(name) for e in some] for name in ("id", "caption", "question", "answer", "turns")}
    for e, (ids_L, loss_L, _) in zip(some, build_sequences(columns, codes, text, NextTokenConfig(), np.random.default_rng(0)), strict=True):
        said = [*text.encode_text(e["turns"][2][1]), text.end_of_turn]
        assert ids_L[loss_L].tolist() == [*said, *[text.vocab_size + 9] * 32 * (len(e["images"]) - 1)]


def test_the_question_is_that_of_the_run_that_follows():
    before, after = (load_config(f"configs/methods/janus_pro_r1{name}.py") for name in ("_sft", ""))
    assert before.data.options.question == after.verdict.question and JudgedConfig().question == type(after.verdict)().question
    assert after.init_from == f"{before.run_dir}/model"


def test_shapes_are_not_judged():
    with pytest.raises(ValueError, match=r"shapes=0\.2: only signs are judged"):
        dataclasses.replace(CONFIG, shapes=0.2)
    with pytest.raises(ConfigError, match="wrong"):
        load_config("configs/methods/janus_pro_r1_sft.py", ["data.wrong=2"])
