"""Data sets of TensorFlow Datasets as rows by number."""

import json
import subprocess
import sys

import numpy as np
import pytest
from tensorflow_datasets import builder_from_directory, features

from tests.data.containers import png, same, write_tfds
from tests.miniature import ROOT
from xomni_jax.core.config import ConfigError
from xomni_jax.data.tables import FaultyRecord
from xomni_jax.data.tfds_table import open_tfds

FEATURES = {
    "image": features.Image(),
    "label": features.ClassLabel(names=["no", "yes"]),
    "captions": features.Sequence({"text": features.Text(), "id": np.int64}),
    "pages": features.Sequence(features.Image()),
    "deep": {"mask": features.Image(shape=(None, None, 1)), "score": np.float32},
    "box": features.Tensor(shape=(4,), dtype=np.float32),
}
RED, BLUE = png(), png("blue", (2, 5))


def row(n):
    pages = [RED, BLUE][: n % 3]
    captions = [{"text": f"Zeichen „{n}“", "id": n}] * (n % 2)
    box = np.arange(4, dtype=np.float32) + n
    return {"image": RED, "label": n % 2, "captions": captions, "pages": pages, "deep": {"mask": BLUE, "score": 0.5 * n}, "box": box}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    examples = [row(n) for n in range(5)]
    return write_tfds(tmp_path_factory.mktemp("tfds") / "signs/1.0.0", features.FeaturesDict(FEATURES), [examples[:3], examples[3:]])


def test_rows_hold_images_as_stored_and_text_as_text(folder):
    table = open_tfds([], folder)
    assert len(table) == 5
    for n in (4, 0, 2):
        wanted = {name: value for name, value in row(n).items() if name not in ("captions", "deep")}
        wanted |= {"captions/text": [f"Zeichen „{n}“"] * (n % 2), "captions/id": [n] * (n % 2), "deep/mask": BLUE, "deep/score": 0.5 * n}
        assert same(table[n], wanted)
    assert table.where(3) == f"{folder}/signs-train.array_record-00001-of-00002 record 0"


def test_rows_are_those_of_the_library(folder):
    theirs = builder_from_directory(folder).as_data_source(split="train")
    for ours, other in zip(open_tfds([], folder), theirs, strict=True):
        assert ours["label"] == other["label"]
        assert [text.encode() for text in ours["captions/text"]] == list(other["captions"]["text"])
        assert np.array_equal(ours["box"], other["box"])
        assert ours["deep/score"] == other["deep"]["score"]


def test_tensorflow_is_not_imported(folder):
    program = "import sys; from pathlib import Path; from xomni_jax.data.tfds_table import open_tfds; t = open_tfds([], Path(sys.argv[1]))"
    code = f"{program}; t[0]; print('tensorflow' in sys.modules, 'jax' in sys.modules, t.digest)"
    told = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, cwd=ROOT, check=True).stdout.split()
    assert told == ["False", "False", open_tfds([], folder).digest]


def test_faults_of_a_data_set(tmp_path):
    made = features.FeaturesDict({"n": np.int64})
    with pytest.raises(ConfigError, match=f"{tmp_path} is no data set of TensorFlow Datasets: "):
        open_tfds([], tmp_path)
    other = write_tfds(tmp_path / "a", made, [[]], file_format="tfrecord")
    with pytest.raises(ConfigError, match="was written as tfrecord, which allows no random access; convert it with: tfds convert_format"):
        open_tfds([], other)
    folder = write_tfds(tmp_path / "b", made, [[{"n": 1}], [{"n": 2}]], split="test")
    assert [one["n"] for one in open_tfds([], folder)] == [1, 2]  # its only split
    info = json.loads((folder / "dataset_info.json").read_text())
    split = info["splits"][0]
    (folder / "dataset_info.json").write_text(json.dumps(info | {"splits": [split, split | {"name": "validation"}]}))
    assert len(open_tfds([], folder, "validation")) == 2
    with pytest.raises(ConfigError, match="no split tran; config.data.split names one of those that it has: test, validation"):
        open_tfds([], folder, "tran")
    with pytest.raises(ConfigError, match="has no split train; config.data.split names one of those that it has: test, validation"):
        open_tfds([], folder)
    (folder / "dataset_info.json").write_text(json.dumps(info | {"splits": [split | {"shardLengths": ["1", "4"]}]}))
    with pytest.raises(ConfigError, match=r"dataset_info.json tells of 5 examples, the files hold 2; get it again"):
        open_tfds([], folder)


def test_a_record_that_does_not_fit_is_a_fault(tmp_path):
    folder = write_tfds(tmp_path, features.FeaturesDict({"n": features.Text()}), [[{"n": "one"}]])
    features.FeaturesDict({"n": np.int64}).save_config(folder)
    with pytest.raises(FaultyRecord, match="record 0: it does not fit features.json"):
        open_tfds([], folder)[0]


def test_a_missing_shard_is_a_fault_of_one_row(tmp_path):
    folder = write_tfds(tmp_path, features.FeaturesDict({"n": np.int64}), [[{"n": 1}], [{"n": 2}]])
    gone = folder / "signs-train.array_record-00000-of-00002"
    gone.unlink()
    table = open_tfds([], folder)
    with pytest.raises(FaultyRecord, match=f"^{gone} cannot be read: No such file or directory"):
        table[0]
    assert table[1] == {"n": 2}
