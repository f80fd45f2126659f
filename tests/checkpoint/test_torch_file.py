"""Weights are read from .pth files as torch would give them, and written for it; what is wrong with a file is one sentence."""

import re
import struct
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest

from tests.checkpoint.fuzzing import fuzz
from tests.checkpoint.pickles import FLOATS, HERE, Raw, W, archive, call, code, name, program, refused, storage, tensor, two_storages
from tests.checkpoint.writing import write_torch_file
from xomni_jax.checkpoint import torch_file
from xomni_jax.checkpoint.tensor_file import LazyTensor
from xomni_jax.checkpoint.torch_file import ALIGNMENT, TorchFile
from xomni_jax.checkpoint.torch_pickle import DTYPES, STORAGES


def opened(value, **kwargs) -> TorchFile:
    return TorchFile(HERE, archive(program(value), **kwargs))


# ---- what is read ----
def test_options_of_a_run_are_left():
    """Lightning keeps them beside the weights, as an argparse.Namespace."""
    options = Raw(name("argparse.Namespace") + b")\x81" + code({"patch_size": 8, "lr": 1e-4}) + b"b")
    file = opened({"state_dict": {"w": W}, "hyper_parameters": {"args": options}})
    assert list(file.infos) == ["state_dict.w"] and file.others == {"hyper_parameters"}


@pytest.mark.parametrize(
    "shape, strides, offset, expected",
    [
        ((3, 4), (4, 1), 0, FLOATS.reshape(3, 4)),
        ((4, 3), (1, 4), 0, FLOATS.reshape(3, 4).T),
        ((2, 4), (4, 1), 4, FLOATS.reshape(3, 4)[1:]),
        ((3, 2), (4, 2), 1, FLOATS.reshape(3, 4)[:, 1::2]),
        ((), (), 11, np.float32(11)),
        ((2, 3), (0, 1), 5, np.array([[5, 6, 7], [5, 6, 7]])),  # expanded
        ((1, 2, 1), (2**59, 6, 7), 0, np.array([[[0], [6]]])),  # strides of single rows mean nothing
        ((0, 3), (3, 1), 12, np.zeros((0, 3))),
        ((3, 0), (2**59, 1), 99, np.zeros((3, 0))),
    ],
)
def test_strides_and_offsets(shape, strides, offset, expected):
    got = opened({"w": tensor(shape, strides, offset)}).read("w")
    assert got.dtype == np.float32 and got.shape == shape and not got.flags.writeable
    np.testing.assert_array_equal(got, expected)


def test_strides_of_single_rows_mean_nothing():
    """torch leaves any number there, which in bytes may be more than numpy takes."""
    file = opened({"w": tensor((1, 3), (2**59, 1), 0, storage(kind="torch.ComplexDoubleStorage", count=3))})
    assert file.read("w").tobytes() == FLOATS.tobytes()


def bits(dtype: np.dtype, n: int = 6) -> np.ndarray:
    """n values whose every byte differs (bools: True and False)."""
    raw = np.arange(1, n * dtype.itemsize + 1, dtype=np.uint8)
    return (raw % 2).astype(np.bool_) if dtype == np.bool_ else raw.view(dtype)


@pytest.mark.parametrize("kind", STORAGES)
def test_every_storage_type(kind):
    values = bits(STORAGES[kind])
    file = opened({"w": tensor((2, 3), (3, 1), of=storage("7", f"torch.{kind}", 6))}, storages={"7": values.tobytes()})
    assert file.infos["w"].dtype == values.dtype and file.infos["w"].nbytes == values.nbytes
    assert file.read("w").tobytes() == values.tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("untyped", ["torch.UntypedStorage", "torch.storage.UntypedStorage"])
def test_every_dtype_over_untyped_bytes(dtype, untyped):
    values = bits(DTYPES[dtype])
    file = opened({"w": tensor((2,), (2,), 1, storage("0", untyped, values.nbytes), f"torch.{dtype}")}, storages={"0": values.tobytes()})
    assert file.infos["w"].dtype == values.dtype
    assert file.read("w").tobytes() == values[1:4:2].tobytes()


def test_two_tensors_on_one_storage():
    file = opened({"tied": W, "again": W, "column": tensor((3,), (4,), 2)})
    tied, again, column = (file.read(k) for k in ("tied", "again", "column"))
    assert np.shares_memory(tied, again) and np.shares_memory(tied, column)
    np.testing.assert_array_equal(column, tied[:, 2])


def test_a_file_is_mapped_not_read(tmp_path):
    """Opening a file of 64 MB and looking at one row of it takes far less memory than that."""
    n = 2**24
    (tmp_path / "big.pth").write_bytes(archive(program({"w": tensor((n,), (1,), of=storage(count=n))}), {"0": bytes(4 * n)}))
    tracemalloc.start()
    file = TorchFile(tmp_path / "big.pth")
    assert file.read("w")[-1] == 0 and file.infos["w"].nbytes == 4 * n
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def resident_file_kb() -> int:
    return int(re.search(r"RssFile:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def test_release_gives_the_pages_back_and_views_stay_valid(tmp_path):
    values = np.arange(2**23, dtype=np.float32)  # 32 MB
    write_torch_file(tmp_path / "a.pth", {"w": values})
    file = TorchFile(tmp_path / "a.pth")
    view, before = file.read("w"), resident_file_kb()
    total = float(view.sum(dtype=np.float64))
    filled = resident_file_kb()
    file.release("w")
    assert filled - before > 30_000 and resident_file_kb() - before < 2_000
    assert float(view.sum(dtype=np.float64)) == total == values.sum(dtype=np.float64)


def test_names_are_joined_and_what_is_no_tensor_is_left_out():
    value = {
        "state_dict": {"a.b": W, "c": {"d": W}},
        "ema": [W, (W, 3)],
        "optimizer": {"state": {0: {"exp_avg": W}}, "betas": (0.9, 0.999), (1, 2): "x", None: 1.5},
        "epoch": 3,
        "name": "x",
        "done": True,
        "none": None,
        "options": {"a", 1},
        "seed": 2**70,
        "size": call("torch.Size", (1, 2)),
        "dtype": name("torch.float16"),
        "device": call("torch.device", "cuda", 0),
        "old set": call("__builtin__.set", [1]),
        "bytes": Raw(b"C\x02ab"),
        "parameter": call("torch._utils._rebuild_parameter", W, True, None),
    }
    file = opened(value)
    assert list(file.infos) == ["state_dict.a.b", "state_dict.c.d", "ema.0", "ema.1.0", "optimizer.state.0.exp_avg", "parameter"]


def test_a_list_of_tensors_is_counted():
    assert list(opened([W, W]).infos) == ["0", "1"]


def test_ordered_dicts_of_both_pythons_and_their_metadata():
    """As Module.state_dict() is saved: an OrderedDict with `_metadata` set by BUILD; Python 2 wrote its pairs as an argument."""
    new = Raw(call("collections.OrderedDict") + b"(" + code("a") + W + b"u" + code({"_metadata": call("collections.OrderedDict")}) + b"b")
    assert list(opened(new).infos) == ["a"]
    assert list(opened(call("collections.OrderedDict", [["a", W], ("b", W)])).infos) == ["a", "b"]


def test_other_protocols():
    """Protocol 4: frames, short strings, memo by count, STACK_GLOBAL."""
    short = lambda s: Raw(b"\x8c" + bytes([len(s)]) + s.encode() + b"\x94")  # noqa: E731
    stacked = Raw(
        short("torch._utils") + short("_rebuild_tensor_v2") + b"\x93\x94" + code((storage(), 0, (3, 4), (4, 1), False, None)) + b"R"
    )
    body = b"}\x94(" + short("w") + stacked + short("v") + b"h\x04" + code((storage(), 0, (2,), (1,), False, None)) + b"Ru."
    file = TorchFile(HERE, archive(b"\x80\x04\x95" + struct.pack("<Q", len(body)) + body))
    assert {k: i.shape for k, i in file.infos.items()} == {"w": (3, 4), "v": (2,)}


def test_files_without_a_byte_order_are_little():
    np.testing.assert_array_equal(opened({"w": W}, order=None).read("w"), FLOATS.reshape(3, 4))


# ---- what is refused ----
CONTENTS = {
    "no tensor": ({"epoch": 3}, r"holds no tensor under a name \(dict\); give a file of a state_dict"),
    "a tensor alone": (W, r"holds no tensor under a name \(Tensor\)"),
    "same name": ({"a": {"b": W}, "a.b": W}, "two tensors are called 'a.b'; rename one"),
    "no such storage": ({"w": tensor((1,), (1,), of=storage("9"))}, "'w' lies in 'archive/data/9', which is not in the file"),
    "storage of another size": (
        {"w": tensor((1,), (1,), of=storage(count=11))},
        "'w' lies in 'archive/data/0' of 48 bytes, its pickle says 44",
    ),
    "expanded beyond the file": (
        {"w": tensor((10_000,), (0,))},
        r"'w' is an expanded view, float32\[10000\] of 48 stored bytes; save it again after",
    ),
    "empty but too large": ({"w": tensor((0, 2**59, 2**59), (1, 1, 1))}, "'w' has shape .*, too large for any machine"),
    "set": ({"s": {W}}, "'s' is a set, whose tensors have no names; save a plain state_dict"),
    "key": ({(1, 2): W}, "has a key that is a tuple; save"),
    "float key": ({"a": {1.5: [W]}}, "'a' has a key that is a float"),
}


@pytest.mark.parametrize("what", CONTENTS)
def test_contents_without_sense(what):
    value, words = CONTENTS[what]
    refused(archive(program(value)), words)


# ---- archives ----
GOOD = archive(program({"w": W}))


def patched(data: bytes, old: bytes, new: bytes, count: int = -1) -> bytes:
    assert old in data and len(old) == len(new)
    return data.replace(old, new, count)


def eocd(data: bytes, at: int, value: bytes) -> bytes:
    start = data.rfind(b"PK\5\6") + at
    return data[:start] + value + data[start + len(value) :]


ARCHIVES = {
    "cut in the middle": (
        GOOD[: len(GOOD) // 2],
        r"cannot be read \(File is not a zip file\); the file is damaged or cut off; download it again",
    ),
    "cut by one byte": (GOOD[:-1], "File is not a zip file"),
    "one byte more": (GOOD + b"x", "does not end with a zip directory"),
    "compressed": (archive(program({"w": W}), method=zipfile.ZIP_DEFLATED), "is compressed; save it again with torch.save"),
    "big-endian": (archive(program({"w": W}), order=b"big"), "its byte order is b'big', only little is read; save it again on"),
    "no pickle": (archive(b"", more={"data.pkl": None}), "with 0 data.pkl, torch.save writes one; give a file"),
    "npz": (archive(b"", more={"data.pkl": None, "a.npy": b""}), "it is a numpy .npz"),
    "TorchScript": (
        archive(program({"w": W}), more={"code/__torch__.py": b"", "constants.pkl": b""}),
        "is a TorchScript program; save the module's state",
    ),
    "directory elsewhere": (eocd(GOOD, 16, b"\1\0\0\0"), "Bad magic number for file header"),
    "directory outside": (eocd(GOOD, 12, b"\0\0\0\x70"), "Bad offset for central directory"),
    "64-bit directory missing": (eocd(GOOD, 16, b"\xff" * 4), "cannot be read"),
    "names differ": (
        patched(GOOD, b"archive/data/0", b"archive/data/1", 1),
        "File name in directory 'archive/data/0' and header b'archive/data/1' differ",
    ),
    "encrypted": (patched(GOOD, b"PK\1\2\x14\3\x14\0\0\0", b"PK\1\2\x14\3\x14\0\1\0"), "is encrypted, password required"),
}


@pytest.mark.parametrize("what", ARCHIVES)
def test_archives(what):
    refused(*ARCHIVES[what])


def directory_entry(name_: bytes, size: int, header: int) -> bytes:
    return b"PK\1\2" + struct.pack("<6H3I5H2I", 20, 20, 0, 0, 0, 0, 0, size, size, len(name_), 0, 0, 0, 0, 0, header) + name_


def local_entry(name_: bytes, data: bytes) -> bytes:
    return b"PK\3\4" + struct.pack("<5H3I2H", 20, 0, 0, 0, 0, 0, len(data), len(data), len(name_), 0) + name_ + data


def by_hand(locals_: list[bytes], directory: list[bytes]) -> bytes:
    body, table = b"".join(locals_), b"".join(directory)
    return body + table + b"PK\5\6" + struct.pack("<4H2IH", 0, 0, len(directory), len(directory), len(table), len(body), 0)


def test_entries_that_share_bytes_or_names():
    pickle_, data = program({"w": W}), FLOATS.tobytes()
    first, second = local_entry(b"a/data.pkl", pickle_), local_entry(b"a/data/0", data)
    lines = [directory_entry(b"a/data.pkl", len(pickle_), 0), directory_entry(b"a/data/0", 48, len(first))]
    assert list(TorchFile(HERE, by_hand([first, second], lines)).infos) == ["w"]
    refused(by_hand([first, second], [*lines, lines[1]]), "entry 'a/data/0' overlaps another|Overlapped entries")
    inside = local_entry(b"a/data/1", local_entry(b"a/data/0", data))
    both = [lines[0], directory_entry(b"a/data/1", 38 + 48, len(first)), directory_entry(b"a/data/0", 48, len(first) + 38)]
    refused(by_hand([first, inside], both), "entry 'a/data/0' overlaps another|Overlapped entries")  # which Python 3.13 finds itself
    refused(
        by_hand([first, second], [lines[0], directory_entry(b"a/data/0", 49, len(first))]),
        "'a/data/0' reaches beyond the data|Overlapped entries",
    )


@pytest.mark.parametrize("wide", [False, True])
def test_sizes_of_64_bits(wide, tmp_path, monkeypatch):
    """What a file above 4 GB looks like, at the size of a small one: zip64 fields in every entry."""
    if wide:
        monkeypatch.setattr(torch_file, "ZIP64_BYTES", -1)
        monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 100)
        monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 1)
    write_torch_file(tmp_path / "a.pth", {"w": FLOATS.reshape(3, 4)})
    data = (tmp_path / "a.pth").read_bytes()
    assert (b"PK\6\6" in data) == wide
    file = TorchFile(tmp_path / "a.pth")
    np.testing.assert_array_equal(file.read("w"), FLOATS.reshape(3, 4))
    assert file.extents["w"].offset % ALIGNMENT == 0
    if wide:
        cut = data.replace(struct.pack("<2H", 1, 16), struct.pack("<2H", 9, 16))
        refused(cut, "reaches beyond the data|Bad magic number|Overlapped entries")


def test_a_file_above_4_gb(tmp_path):
    """A hole of 5 GB (no blocks on disk) between the pickle and the weights, as large files are laid out: offsets in zip64 fields."""
    gap, data = 5 * 2**30, FLOATS.tobytes()
    pickle_ = program({"hole": tensor((gap // 4,), (1,), of=storage("hole", count=gap // 4)), "w": W})
    names = [b"a/data.pkl", b"a/data/hole", b"a/data/0"]
    with open(tmp_path / "a.pth", "wb") as file:
        offsets = []
        for name_, size in zip(names, (len(pickle_), gap, len(data)), strict=True):
            offsets.append(file.tell())
            wide = struct.pack("<2H2Q", 1, 16, size, size)
            file.write(b"PK\3\4" + struct.pack("<5H3I2H", 45, 0, 0, 0, 0, 0, 2**32 - 1, 2**32 - 1, len(name_), len(wide)) + name_ + wide)
            file.seek(size, 1) if size == gap else file.write(pickle_ if size == len(pickle_) else data)
        start = file.tell()
        for name_, size, offset in zip(names, (len(pickle_), gap, len(data)), offsets, strict=True):
            wide = struct.pack("<2H3Q", 1, 24, size, size, offset)
            full = 2**32 - 1
            file.write(
                b"PK\1\2"
                + struct.pack("<6H3I5H2I", 45, 45, 0, 0, 0, 0, 0, full, full, len(name_), len(wide), 0, 0, 0, 0, full)
                + name_
                + wide
            )
        end = file.tell()
        file.write(b"PK\6\6" + struct.pack("<Q2H2I4Q", 44, 45, 45, 0, 0, 3, 3, end - start, start))
        file.write(b"PK\6\7" + struct.pack("<IQI", 0, end, 1) + b"PK\5\6" + struct.pack("<4H2IH", 0, 0, 3, 3, end - start, 2**32 - 1, 0))
    opened_ = TorchFile(tmp_path / "a.pth")
    assert opened_.infos["hole"].nbytes == gap and opened_.extents["w"].offset > gap
    np.testing.assert_array_equal(opened_.read("w"), FLOATS.reshape(3, 4))
    assert opened_.read("hole")[-1] == 0
    opened_.release("hole")


# ---- writing ----
def everything() -> dict[str, np.ndarray]:
    out = {f"values.{name_}": bits(dtype).reshape(2, 3) for name_, dtype in DTYPES.items()}
    strided = np.arange(60, dtype=np.float32).reshape(3, 4, 5).transpose(2, 0, 1)[::2]
    out |= {"strided": strided, "scalar": np.array(7, np.float32), "empty": np.zeros((0, 3), np.int64)}
    return out | {"é": FLOATS}


def test_what_is_written_comes_back(tmp_path):
    tensors = everything()
    write_torch_file(tmp_path / "a.pth", tensors)
    file = TorchFile(tmp_path / "a.pth")
    assert list(file.infos) == list(tensors)
    for key, value in tensors.items():
        read = file.read(key)
        assert read.shape == value.shape and read.dtype == value.dtype and read.tobytes() == value.tobytes(), key
    assert all(extent.offset % ALIGNMENT == 0 for extent in file.extents.values())
    assert [p.name for p in tmp_path.iterdir()] == ["a.pth"]
    with zipfile.ZipFile(tmp_path / "a.pth") as archive_:
        assert archive_.testzip() is None  # the checksums, which torch looks at
    write_torch_file(tmp_path / "b.pth", tensors)
    assert (tmp_path / "a.pth").read_bytes() == (tmp_path / "b.pth").read_bytes()


def test_tensors_are_made_one_at_a_time(tmp_path):
    n, made = 2**20, []

    def make(i):
        made.append(i)
        return np.full((n, 2), i, np.float32)[:, ::-1].T  # 8 MB, strided

    tracemalloc.start()
    write_torch_file(tmp_path / "a.pth", {str(i): LazyTensor(np.float32, (2, n), lambda i=i: make(i)) for i in range(6)})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert made == list(range(6)) and peak < 18 * 2**20, peak  # the tensor and one ordered copy
    assert TorchFile(tmp_path / "a.pth").read("4")[1, 5] == 4


# ---- fuzz ----
def test_mutated_archives():
    """10,000 files with damage anywhere."""
    seeds = [archive(program(two_storages()), {"0": FLOATS.tobytes(), "1": bytes(16)}), GOOD]
    fuzz(lambda data: TorchFile(HERE, data), seeds, runs=10_000, kinds=20, survivors=500)
