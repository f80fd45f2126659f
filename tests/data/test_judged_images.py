"""Judged drawings become records that training reads."""

import json

import numpy as np
import pytest
from PIL import Image

from xomni_jax.cli.main import main
from xomni_jax.core.config import ConfigError
from xomni_jax.data.files import Records
from xomni_jax.data.judged_images import judged_records, write_judged
from xomni_jax.data.records import Columns


def row(index, sample, reward, **more):
    return {"file_name": f"images/{index}_{sample}.png", "text": f"prompt {index}", "index": index, "reward": reward, **more}


ROWS = [
    row(0, 0, 0.9),
    row(0, 1, 0.8, reason="it is red."),
    row(0, 2, 0.1),
    row(0, 3, 0.6),
    row(1, 0, 0.95),
    row(2, 0, 0.2),
    row(2, 1, None),
]


def test_pairs_of_good_and_bad_drawings_of_a_prompt():
    found = list(judged_records(ROWS, "is it?", 0.8, 0.5))
    assert [kind for kind, _ in found] == ["captions", "captions", "yes", "no", "captions"]
    assert found[0][1] == {"image": "images/0_0.png", "text": "prompt 0"}
    shown = lambda n: {"type": "image", "image": f"images/0_{n}.png", "learn": False}  # noqa: E731
    asked = {"role": "user", "content": "is it?"}
    yes, no = found[2][1]["messages"], found[3][1]["messages"]
    assert yes == [{"role": "plain", "content": ["prompt 0", shown(0)]}, asked, {"role": "assistant", "content": "Yes."}]
    assert no == [
        {"role": "plain", "content": ["prompt 0", shown(2)]},
        asked,
        {"role": "assistant", "content": "No."},
        {"role": "plain", "content": [{"type": "image", "image": "images/0_0.png"}]},
    ]
    ((_, reasoned),) = [pair for pair in judged_records([ROWS[1], ROWS[2]], "is it?", 0.8, 0.5) if pair[0] == "yes"]
    assert reasoned["messages"][-1]["content"] == "Yes, it is red."


def test_training_reads_what_the_command_writes(tmp_path, capsys):
    (tmp_path / "images").mkdir()
    for one in ROWS:
        Image.fromarray(np.zeros((8, 16, 3), np.uint8)).save(tmp_path / one["file_name"])
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(one) + "\n" for one in ROWS))
    assert main(["data", "make", "judged-images", "--out", str(tmp_path), "--question", "is it?"]) == 0
    assert "judged.jsonl: 3 captions, 1 yes, 1 no" in capsys.readouterr().out
    records = Records(str(tmp_path / "judged.jsonl"), Columns(), False)
    no = [record for record in (records[n] for n in range(len(records))) if len(record.images) == 2]
    assert [record.turns for record in no] == [
        (("plain", "prompt 0<image 0 context>"), ("user", "is it?"), ("assistant", "No."), ("plain", "<image 1>"))
    ]


@pytest.mark.parametrize(
    "rows, bounds, message",
    [
        ([], (0.8, 0.5), "holds no drawings with rewards; make some: xomni generate"),
        (ROWS[4:], (0.8, 0.5), r"no prompt has an image of a reward of at least 0\.8 and one below 0\.5"),
        (ROWS, (0.2, 0.5), r"--good 0\.2 is less than --bad 0\.5"),
    ],
)
def test_what_cannot_be_made(rows, bounds, message, tmp_path):
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    with pytest.raises(ConfigError, match=message):
        write_judged(tmp_path, "is it?", *bounds)
    assert not (tmp_path / "judged.jsonl").exists()
