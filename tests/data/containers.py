"""Small files of each binary format, written by the libraries that people write them with."""

import io
import json
import tarfile
from pathlib import Path

import msgpack
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from array_record.python import array_record_module
from PIL import Image

ROWS = [{"key": f"k{n}", "caption": f"sign {n}", "image": bytes([255, n]) * (n + 1)} for n in range(7)]


def write_parquet(file, rows=ROWS, group=2, schema=None):
    """Rows as a parquet file of row groups of `group` rows."""
    pq.write_table(pa.Table.from_pylist(rows, schema), file, row_group_size=group)
    return Path(file)


def write_tar(file, members, form=tarfile.PAX_FORMAT):
    """(name, bytes) as a tar, in this order."""
    with tarfile.open(file, "w", format=form) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return Path(file)


def sample(key, *, image=b"\xff\xd8", text="a sign", suffix="jpg"):
    """Members of a sample with an image and a text."""
    return [(f"{key}.{suffix}", image), (f"{key}.txt", text.encode())]


def write_array_record(file, records, options="group_size:1"):
    """Records, bytes or maps, as an ArrayRecord file."""
    writer = array_record_module.ArrayRecordWriter(str(file), options)
    for record in records:
        writer.write(record if isinstance(record, bytes) else msgpack.packb(record))
    writer.close()
    return Path(file)


def example(**features):
    """A tf.Example of lists of bytes, whole numbers or floats; `image__encoded` is named image/encoded."""
    from tensorflow_datasets.proto import tf_example_pb2

    made = tf_example_pb2.Example()
    for name, values in features.items():
        kind = "bytes_list" if isinstance(values[0], bytes) else "int64_list" if isinstance(values[0], int) else "float_list"
        getattr(made.features.feature[name.replace("__", "/")], kind).value.extend(values)
    return made.SerializeToString()


def write_tfds(folder, features, shards, split="train", file_format="array_record"):
    """Examples of each shard as a data set of TensorFlow Datasets, without TensorFlow."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    features.save_config(folder)
    info = {
        "name": "signs",
        "version": "1.0.0",
        "fileFormat": file_format,
        "splits": [{
            "name": split,
            "shardLengths": [str(len(shard)) for shard in shards],
            "numBytes": "1",
            "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
        }],
    }  # fmt: skip
    (folder / "dataset_info.json").write_text(json.dumps(info))
    for n, shard in enumerate(shards):
        name = f"signs-{split}.{file_format}-{n:05d}-of-{len(shards):05d}"
        write_array_record(folder / name, [features.serialize_example(one) for one in shard])
    return folder


def png(color="red", size=(4, 3)):
    """An image of one colour."""
    data = io.BytesIO()
    Image.new("RGB", size, color).save(data, "PNG")
    return data.getvalue()


def same(one, other):
    """Whether two rows are equal, arrays included."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return np.array_equal(one, other)
