"""What rows of every layout become: texts, images with roles, turns with marks, targets, rewards; and why a row is refused."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import numpy as np
import pytest

from xomni_jax.data.conversations import of_messages
from xomni_jax.data.records import Columns, make_record
from xomni_jax.data.tables import FaultyRecord

ROOT = Path("/data/set")
PNG = b"\x89PNG, or so"
URI = "data:image/png;base64," + base64.b64encode(PNG).decode()
IMAGE = {"image": PNG}


def record(row, prompt=False, rewards=None, **how):
    return make_record(row, "set:0", "f:1", ROOT, Columns(**how), prompt=prompt, rewards=rewards or {})


def said(*turns):
    return [{"from": who, "value": what} for who, what in turns]


def messages(*turns):
    return [{"role": who, "content": what} for who, what in turns]


# ---- texts ----
@pytest.mark.parametrize(
    "row, texts",
    [
        ({"caption": "  e\u0301t\u00e9 \n"}, ["\u00e9t\u00e9"]),
        ({"text": "two\n lines", "prompt": "other"}, ["two\n lines"]),
        ({"text": None, "prompt": "the next name"}, ["the next name"]),
        ({"txt": b"of a tar"}, ["of a tar"]),
        ({"captions": ["one", " two "]}, ["one", "two"]),
        ({"captions": '{"short": "one", "long": "two"}'}, ["one", "two"]),
        ({"captions": [{"id": 1, "text": "one"}, {"id": 2, "text": "two"}]}, ["one", "two"]),
        ({"captions": {"text": ["one"], "id": [1]}}, ["one"]),
        ({"prompt": '["quoted", "brackets"] are text'}, ['["quoted", "brackets"] are text']),
        ({"edited_prompt_list": ["make it red", "redden it"]}, ["make it red", "redden it"]),
    ],
)
def test_texts(row, texts):
    assert record(IMAGE | row).texts == tuple(texts)


def test_columns_of_a_configuration_take_the_place_of_the_usual_names():
    row = {"pic": PNG, "image": b"other", "text": "other", "a": {"b": "nested"}}
    found = record(row, image="pic", caption="a.c, a.b")
    assert found.texts == ("nested",) and found.images == (PNG,) and found.metadata["text"] == "other"


# ---- images ----
@pytest.mark.parametrize(
    "row, images, roles",
    [
        ({"image": "a/b.png"}, ["a/b.png"], []),
        ({"image": {"path": "x/../b.png", "bytes": None}}, ["b.png"], []),
        ({"image": {"path": "ignored.png", "bytes": PNG}}, [PNG], []),
        ({"image": URI}, [PNG], []),
        ({"images": ["a.png", PNG]}, ["a.png", PNG], []),
        ({"file_names": ["a.png", "b.png"]}, ["a.png", "b.png"], []),
        ({"anything": PNG}, [PNG], []),
        ({"1": PNG, "2": {"bytes": b"two", "path": None}}, [PNG, b"two"], []),
        ({"output_file_name": "o.png", "input_file_name": "i.png"}, ["o.png", "i.png"], ["output", "input"]),
        ({"output": "o.png", "input": "i.png"}, ["i.png", "o.png"], ["input", "output"]),
        ({"edited_image": PNG, "original_image": "i.png"}, ["i.png", PNG], ["input", "output"]),
        ({"media": [{"modality": "image", "role": "condition", "uri": "m.png"}]}, ["m.png"], ["condition"]),
    ],
)
def test_images(row, images, roles):
    found = record(row | {"text": "t"})
    assert list(found.images) == [ROOT / image if isinstance(image, str) else image for image in images]
    assert list(found.roles) == roles


def test_marks_of_x2i_order_the_inputs():
    row = {
        "instruction": "put <img><|image_2|></img> on <img><|image_1|></img>",
        "input_images": ["a.png", "b.png"],
        "output_image": "o.png",
    }
    found = record(row)
    assert found.texts == ("put <image 0> on <image 1>",) and [image.name for image in found.images] == ["b.png", "a.png", "o.png"]
    assert found.roles == ("input", "input", "output")
    assert record({"instruction": "no inputs", "input_images": [], "output_image": "o.png"}).roles == ("output",)


def test_candidates_that_exist_are_kept_with_their_labels(tmp_path):
    (tmp_path / "b.png").write_bytes(PNG)
    labels = [{"img_path": "a.png", "prob": 0.1, "state": 0}, {"img_path": "b.png", "prob": 0.9, "state": 4}]
    found = make_record({"prompt": "p", "data": labels}, "set:0", "f:1", tmp_path, Columns())
    assert found.images == (tmp_path / "b.png",) and found.metadata == {"prob": [0.9], "state": [4]}
    assert found.notes == ("data[0] is left out: missing image file a.png",)


# ---- conversations ----
@pytest.mark.parametrize(
    "row, turns, images",
    [
        (
            {"conversations": said(("human", "what?\n<image>"), ("gpt", "a cat")), "image": PNG},
            [("user", "what?\n<image 0>"), ("assistant", "a cat")],
            [PNG],
        ),
        (
            {"conversations": said(("human", "what?"), ("gpt", "a cat")), "image": ["a.png", "b.png"]},
            [("user", "<image 0>\n<image 1>\nwhat?"), ("assistant", "a cat")],
            ["a.png", "b.png"],
        ),
        (
            {"conversations": json.dumps(said(("gpt", "hello"), ("user", "hi"), ("gpt", "what?")))},
            [("user", "hi"), ("assistant", "what?")],
            [],
        ),
        (
            {"messages": messages(("user", [{"type": "image"}, {"type": "text", "text": "?"}]), ("assistant", "!")), "images": [PNG]},
            [("user", "<image 0>?"), ("assistant", "!")],
            [PNG],
        ),
        (
            {
                "messages": messages(
                    ("user", [{"type": "image", "index": 1, "text": None}, "and", {"type": "image", "index": 0, "text": None}]),
                    ("assistant", [{"type": "text", "text": "yes", "index": None}]),
                ),
                "images": [b"0", b"1"],
            },
            [("user", "<image 0>and<image 1>"), ("assistant", "yes")],
            [b"1", b"0"],
        ),
        (
            {
                "messages": messages(
                    ("user", [{"type": "image_url", "image_url": {"url": URI}}, {"type": "input_image", "image_url": "a.png"}]),
                    ("assistant", "two"),
                )
            },
            [("user", "<image 0><image 1>"), ("assistant", "two")],
            [PNG, "a.png"],
        ),
        (
            {
                "messages": messages(
                    ("user", [{"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": URI.split(",")[1]}}]),
                    ("assistant", "one"),
                )
            },
            [("user", "<image 0>"), ("assistant", "one")],
            [PNG],
        ),
        (
            {
                "messages": messages(
                    ("plain", ["a cat", {"type": "image", "image": "a.png", "learn": False}]),
                    ("user", "is it?"),
                    ("assistant", "no"),
                    ("plain", [{"type": "image", "image": "b.png"}]),
                )
            },
            [("plain", "a cat<image 0 context>"), ("user", "is it?"), ("assistant", "no"), ("plain", "<image 1>")],
            ["a.png", "b.png"],
        ),
        (
            {"texts": [{"user": "a?", "assistant": "b"}, {"user": "c?", "assistant": "d"}], "images": [PNG]},
            [("user", "<image 0>a?"), ("assistant", "b"), ("user", "c?"), ("assistant", "d")],
            [PNG],
        ),
        ({"question": "how many?", "answer": "2"} | IMAGE, [("user", "<image 0>how many?"), ("assistant", "2")], [PNG]),
    ],
)
def test_conversations(row, turns, images):
    found = record(row)
    assert list(found.turns) == turns
    assert list(found.images) == [ROOT / image if isinstance(image, str) else image for image in images]


def test_what_a_conversation_tells_beside_its_turns():
    drawn = messages(("system", "Draw."), ("user", "a cat like <image>"), ("assistant", "here: <image>"))
    found = of_messages(drawn, ["in.png", "out.png"])
    assert found.system == "Draw." and found.roles == ["input", "output"]
    assert record({"conversations": said(("gpt", "x"), ("human", "a"), ("gpt", "b"))}).notes == ("a leading answer is left out",)


# ---- prompts ----
@pytest.mark.parametrize(
    "text, targets",
    [
        ('a sign "OPEN" by a door', ["OPEN"]),
        ("a sign “OPEN” by a door", ["OPEN"]),
        ('"ONE" above " TWO "', ["ONE", "TWO"]),
        ('it says "“HI” there"', ["“HI” there"]),
    ],
)
def test_text_in_double_quotes_is_a_target_where_it_is_asked_for(text, targets):
    assert record({"text": text}, prompt=True).targets == {}
    assert record({"text": text}, prompt=True, text_targets=True).targets == {"text": targets}
    for reader in ("ocr", "paddle_ocr", "got_ocr", "tesseract"):
        assert record({"text": text}, prompt=True, rewards={"clip": 1.0, reader: 0.5}).targets == {"text": targets}
    assert record({"text": text}, prompt=True, rewards={"clip": 1.0}).targets == {}


def test_prompts_with_everything():
    row = {"prompt": "p", "targets": '{"text": ["A"]}', "size": [32, 64], "rewards": [{"ocr": 0.7}, {"clip": "0.3"}], "weight": 2}
    found = record(row | {"id": 7, "clue": 1, "gone": None, "empty": [], "box": np.zeros((2, 4))}, prompt=True)
    assert (found.targets, found.size, found.weight, found.id) == ({"text": ["A"]}, (32, 64), 2.0, "7")
    assert found.rewards == {"ocr": 0.7, "clip": 0.3} and set(found.metadata) == {"clue", "box"}


def test_metadata_of_the_layouts_of_reinforcement_learning():
    geneval = {"tag": "position", "include": [{"class": "cow", "count": 1, "color": None, "position": ["left of", 0]}], "exclude": None}
    assert record(geneval | {"prompt": "p"}, prompt=True).metadata == {
        "tag": "position",
        "include": [{"class": "cow", "count": 1, "position": ["left of", 0]}],
    }
    verl = {"prompt": messages(("system", "s"), ("user", "<image>which?")), "images": [PNG], "reward_model": {"ground_truth": "left"}}
    found = record(verl, prompt=True)
    assert (found.texts, found.system, found.metadata) == (("<image 0>which?",), "s", {"ground_truth": "left"})
    cells = {"index": "3", "prompt_en": "p", "sub_dims_en": '{"Testpoints": ["Text"]}'}
    assert record(cells, prompt=True).metadata == {"Testpoints": ["Text"]}
    broken = record(cells | {"sub_dims_en": '{"Testpoints": ["Text" "x"]}'}, prompt=True)
    assert broken.metadata == {} and broken.notes == ("sub_dims_en is not JSON; kept without it",)


# ---- faults ----
@pytest.mark.parametrize(
    "row, words",
    [
        ({"text": "t"}, "no image: none of file_name, image, .* is a column; there are text; config.data.image=COLUMN chooses one"),
        ({"text": "t", "image": ""}, "no image: the column 'image' is empty"),
        (IMAGE, "no caption: none of text, .* is a column; there are image; config.data.caption=COLUMN chooses one"),
        (IMAGE | {"captions": ["a", " "]}, "the column 'captions' holds no text"),
        (IMAGE | {"captions": "{}"}, "no caption: the column 'captions' is empty"),
        (IMAGE | {"text": "a\ud800"}, "is not Unicode"),
        (IMAGE | {"text": b"\xff"}, "is not Unicode"),
        ({"text": "t", "image": 5}, "an image is int, neither a path nor"),
        ({"text": "t", "image": "data:image/png;base64,?"}, "an image in a data: URI is not base64"),
        ({"text": "t", "image": "gs://b/a.png"}, "the image gs://b/a.png is a web address"),
        ({"text": "t", "image": "/etc/a.png"}, "the image /etc/a.png lies outside /data/set; config.data.images names"),
        ({"text": "t", "image": "a/../../a.png"}, "lies outside"),
        ({"text": "t", "input": "a.png", "output": None}, "no output image: .*the column 'output' is empty"),
        ({"instruction": "t", "input_images": ["a.png"], "output_image": "b.png"}, "1 input image but marks for none of them"),
        ({"prompt": "t", "file_path": ["a.png", "b.png"], "human_preference": [1]}, "2 images but 1 preference"),
        ({"prompt": "t", "data": []}, "no candidates"),
        ({"prompt": "t", "media": [{"modality": "image", "uri": "a.png"}]}, r"media\[0\] lacks 'role'"),
        ({"prompt": "t", "media": [{"modality": "video", "uri": "a", "role": "r"}]}, "modality 'video'; only images"),
        ({"conversations": []}, "no text: the column 'conversations' holds no turns"),
        ({"conversations": ["a"]}, "holds no turns"),
        ({"conversations": said(("human", "a"), ("gpt", " "))}, "empty answer"),
        ({"conversations": said(("human", ""), ("gpt", "a"))}, "empty question"),
        ({"conversations": said(("tool", "a"))}, "a turn is said by 'tool'"),
        ({"conversations": said(("human", "<image><image>"), ("gpt", "a"))} | IMAGE, "2 image marks but 1 image$"),
        ({"messages": messages(("user", [{"type": "text", "text": "a"}]), ("assistant", "b"))} | IMAGE, "0 image marks but 1 image$"),
        ({"messages": messages(("user", [{"type": "audio"}]))}, "a part of a turn is of type 'audio'"),
        ({"messages": messages(("user", 3))}, "the content of a turn is int"),
        ({"messages": messages(("user", "a"))}, "no answer of an assistant"),
        (IMAGE | {"text": "t", "targets": [1]}, "'targets' is no object"),
        (IMAGE | {"text": "t", "weight": 0}, "weight is 0; give a positive number"),
        (IMAGE | {"text": "t", "rewards": "ocr"}, "rewards is no object"),
        (IMAGE | {"text": "t", "rewards": {"ocr": -1}}, "the weight of the reward 'ocr' is -1"),
        (IMAGE | {"text": "t", "size": [32]}, r"size is \[32\]; give \[height, width\]"),
    ],
)
def test_faults(row, words):
    with pytest.raises(FaultyRecord, match=rf"^f:1: .*{words}"):
        record(row)


def test_a_prompt_without_the_text_that_its_reward_reads_is_refused():
    for how in ({"text_targets": True}, {"rewards": {"ocr": 1.0}}):
        with pytest.raises(FaultyRecord, match="f:1: no text in double quotes"):
            record({"text": 'a garden with 12" pots'}, prompt=True, **how)
