"""safetensors: bytes made by hand are read, our files equal the package's byte for byte, and damage is one sentence."""

import json
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from tests.checkpoint.fuzzing import NUMBERS, fuzz
from tests.checkpoint.writing import write_safetensors
from xomni_jax.checkpoint.safetensors_file import DTYPES, SafetensorsFile
from xomni_jax.checkpoint.tensor_file import LazyTensor, TensorFileError
from xomni_jax.checkpoint.tensors import open_sharded

HERE = Path("model.safetensors")


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    """`HERE` is relative."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def opened(data: bytes) -> SafetensorsFile:
    """A file of these bytes."""
    HERE.unlink(missing_ok=True)
    HERE.write_bytes(data)
    return SafetensorsFile(HERE)


def raw(header, data: bytes = b"", length: int | None = None) -> bytes:
    """A file from its parts; `header` may be text that is no JSON."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def bits(dtype: np.dtype, n: int = 6) -> np.ndarray:
    raw_ = np.arange(1, n * dtype.itemsize + 1, dtype=np.uint8)
    return (raw_ % 2).astype(np.bool_) if dtype == np.bool_ else raw_.view(dtype)


# ---- reading ----
def test_a_file_by_hand():
    data = np.array([1, 2, 3], np.float32).tobytes() + struct.pack("<h", -5)
    file = opened(raw({"b": entry("I16", (), (12, 14)), "__metadata__": {"format": "pt"}, "a": entry("F32", (3, 1), (0, 12))}, data))
    assert list(file.infos) == ["a", "b"]
    info = file.infos["a"]
    assert (info.file, info.key, info.dtype, info.shape, info.nbytes) == (HERE, "a", np.float32, (3, 1), 12)
    np.testing.assert_array_equal(file.read("a"), [[1], [2], [3]])
    assert file.read("b").shape == () and file.read("b") == -5 and not file.read("b").flags.writeable
    with pytest.raises(KeyError, match="c"):
        file.read("c")


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype(name):
    values = bits(DTYPES[name])
    file = opened(raw({"w": entry(name, (3, 2), (0, values.nbytes))}, values.tobytes()))
    assert file.infos["w"].dtype == DTYPES[name] and file.read("w").shape == (3, 2)
    assert file.read("w").tobytes() == values.tobytes()


def test_bfloat16_and_float8_are_the_numbers_they_should_be():
    header = {"a": entry("BF16", (2,), (0, 4)), "b": entry("F8_E4M3", (2,), (4, 6)), "c": entry("F8_E5M2", (1,), (6, 7))}
    file = opened(raw(header, struct.pack("<2H", 0x3F80, 0xC020) + b"\x38\x7e" + b"\x3e"))
    assert file.read("a").astype(np.float32).tolist() == [1.0, -2.5]
    assert file.read("b").astype(np.float32).tolist() == [1.0, 448.0] and file.read("c").astype(np.float32).tolist() == [1.5]


def test_unaligned_and_empty_tensors():
    header = {
        "a": entry("U8", (1,), (0, 1)),
        "b": entry("F32", (2,), (1, 9)),
        "c": entry("F64", (0, 5), (9, 9)),
        "d": entry("U8", (0,), (0, 0)),
    }
    file = opened(raw(header, b"\x07" + np.array([1, 2], np.float32).tobytes()))
    assert file.read("b").tolist() == [1, 2] and file.read("c").shape == (0, 5) and file.read("d").size == 0


def test_a_file_without_tensors():
    assert opened(raw(b"{}      ")).infos == {}


GOOD = {"a": entry(), "b": entry("I16", (2, 1), (8, 12))}
DATA = bytes(12)
DAMAGED = "the file is damaged or cut off; download it again"
WRONG = {
    "nothing": (b"", "header too small"),
    "seven bytes": (b"\1\0\0\0\0\0\0", "header too small"),
    "cut in the header": (raw(GOOD, DATA)[:60], "invalid header length"),
    "cut in the data": (raw(GOOD, DATA)[:-1], "incomplete metadata, file not fully covered"),
    "more data": (raw(GOOD, DATA + b"x"), "incomplete metadata, file not fully covered"),
    "endless header": (raw(GOOD, DATA, 2**63), "header too large"),
    "no object": (raw(b"[]"), "invalid JSON in header: invalid type: sequence"),
    "no JSON": (raw(b'{"a": }'), "invalid JSON in header: expected value"),
    "two objects": (raw(b"{}{}"), "invalid JSON in header: trailing characters"),
    "not UTF-8": (raw(b'{"\xff": 1}'), "invalid UTF-8 in header"),
    "deep": (raw(b'{"a":' + b"[" * 900), "invalid JSON in header: recursion limit exceeded"),
    "deeper than Python recurses": (raw(b'{"a":' + b"[" * 1000 + b"]" * 1000 + b"}"), "invalid JSON in header: recursion limit exceeded"),
    "too many digits": (raw(b'{"a":' + b"9" * 5000 + b"}"), "invalid JSON in header: number out of range"),
    "field twice": (
        raw(b'{"a":{"dtype":"F32","dtype":"I32","shape":[],"data_offsets":[0,4]}}', bytes(4)),
        "invalid JSON in header: duplicate field `dtype`",
    ),
    "half a surrogate pair": (
        raw(b'{"\\ud800":' + json.dumps(entry()).encode() + b"}", bytes(8)),
        "invalid JSON in header: unexpected end of hex escape",
    ),
    "metadata of numbers": (raw({"__metadata__": {"a": 1}}), "invalid JSON in header: invalid type: integer `1`"),
    "metadata in a list": (raw({"__metadata__": []}), "invalid JSON in header: invalid type: sequence"),
    "entry in a list": (raw({"a": []}), "invalid JSON in header: invalid length 0"),
    "field missing": (raw({"a": {"dtype": "F32", "shape": []}}), "invalid JSON in header: missing field `data_offsets`"),
    "shape of text": (raw({"a": entry(shape="2")}, bytes(8)), "invalid JSON in header: invalid type: string"),
    "negative size": (raw({"a": entry(shape=[-2])}, bytes(8)), "invalid JSON in header: invalid value: integer `-2`"),
    "fraction": (raw({"a": entry(shape=[2.0])}, bytes(8)), "invalid JSON in header: invalid type: floating point"),
    "true": (raw({"a": entry(shape=[True], offsets=[0, 4])}, bytes(4)), "invalid JSON in header: invalid type: boolean `true`"),
    "three offsets": (raw({"a": entry(offsets=[0, 4, 8])}, bytes(8)), "invalid JSON in header: "),
    "negative offset": (raw({"a": entry(offsets=[-8, 0])}, bytes(8)), "invalid JSON in header: invalid value: integer `-8`"),
    "backwards": (raw({"a": entry(offsets=[8, 0])}, bytes(8)), "invalid offset for tensor `a`"),
    "too short": (raw({"a": entry(shape=[3])}, bytes(8)), "invalid shape, data type, or offset for tensor"),
    "overflow": (raw({"a": entry(shape=[2**32, 2**32], offsets=[0, 0])}), "overflow computing buffer size"),
    "gap": (raw({"a": entry(), "b": entry(offsets=(9, 17))}, bytes(17)), "invalid offset for tensor `b`"),
    "gap at the start": (raw({"a": entry(offsets=(1, 9))}, bytes(9)), "invalid offset for tensor `a`"),
    "overlap": (raw({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12)), "invalid offset for tensor `b`"),
    "same place": (raw({"a": entry(), "b": entry()}, bytes(8)), "invalid offset for tensor"),
    "lists of lists": (raw(b'{"a":[' + b"[]," * 5000 + b"[]]}"), "invalid JSON in header: "),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_headers(what):
    data, words = WRONG[what]
    with pytest.raises(TensorFileError, match=words) as error:
        opened(data)
    text = str(error.value)
    assert text.startswith("model.safetensors: ") and text.endswith(DAMAGED) and "\n" not in text and len(text) < 400


@pytest.mark.parametrize(
    "data, words",
    [
        (raw({"a": entry("F4", (16,))}, bytes(8)), "'a' has dtype F4, this reader knows U64, .*BOOL; store it in one of them"),
        (raw({"a": entry("F32x" * 100)}, bytes(8)), "unknown variant `F32xF32x.*; the file is damaged"),
        (raw({"a": entry(None)}, bytes(8)), "invalid type: null.*; the file is damaged"),
        (raw({"a": entry(shape=[2**63, 0], offsets=[0, 0])}), "'a' has shape .*, too large for any machine"),
        (raw({"a": entry(shape=[1] * 33, offsets=[0, 4])}, bytes(4)), "'a' has shape .*, too large for any machine"),
        (raw({"a": entry(shape=[0, 2**62, 2**62], offsets=[0, 0])}), "'a' has shape .*, too large for any machine"),
    ],
)
def test_what_this_reader_does_not_know(data, words):
    with pytest.raises(TensorFileError, match=words):
        opened(data)


VALUE = np.array([1, 2], np.float32).tobytes()
ODD = {
    "space first": raw(b" " + json.dumps({"a": entry()}).encode(), VALUE),
    "key twice": raw(b'{"a":' + json.dumps(entry()).encode() + b',"a":' + json.dumps(entry()).encode() + b"}", VALUE),
    "field too many": raw({"a": entry() | {"note": "x"}}, VALUE),
    "no metadata": raw({"__metadata__": None, "a": entry()}, VALUE),
}


@pytest.mark.parametrize("what", ODD)
def test_odd_headers_that_the_package_reads(what):
    file = opened(ODD[what])
    assert file.read("a").tolist() == [1, 2]


def test_a_header_has_a_limit(tmp_path):
    """The file is 100 MB of hole: nothing of it may be read before the length is refused."""
    with open(tmp_path / "a.safetensors", "wb") as file:
        file.write(struct.pack("<Q", 100_000_001) + b"{")
        file.truncate(100_000_100)
    tracemalloc.start()
    with pytest.raises(TensorFileError, match="header too large"):
        SafetensorsFile(tmp_path / "a.safetensors")
    assert tracemalloc.get_traced_memory()[1] < 100_000
    tracemalloc.stop()


@pytest.mark.parametrize("item", [b"[],", b"{},", b"9999,", b'"x",', b"null,", b"1.5,", b'"' + b"\xc3\xa9" * 20 + b'",'])
def test_header_bombs(item):
    """Parsed JSON is larger than its text; by how much is bounded."""
    text = b'{"a":[' + item * (300_000 // len(item)) + b"0]}"
    tracemalloc.start()
    with pytest.raises(TensorFileError):
        opened(raw(text))
    assert tracemalloc.get_traced_memory()[1] < 16 * len(text)
    tracemalloc.stop()


# ---- writing ----
def everything() -> dict[str, np.ndarray]:
    """One array of every dtype in an order that is not the file's, and awkward names."""
    out = {f"w{i % 5}.{name}": bits(dtype).reshape(2, 3) for i, (name, dtype) in enumerate(reversed(DTYPES.items()))}
    return out | {'é "quoted"\n\x01/\u2028': np.array(7, np.float32), "empty": np.zeros((0, 3), np.int64), "B": bits(DTYPES["F32"])}


def test_files_equal_the_package_s_byte_for_byte(tmp_path):
    tensors = everything()
    (path,) = write_safetensors(tmp_path, tensors)
    theirs = safetensors.numpy.save(tensors, metadata={"format": "pt"})
    assert path == tmp_path / "model.safetensors" and path.read_bytes() == theirs
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["model.safetensors"]


def test_the_package_s_files_are_read_and_ours_by_it(tmp_path):
    tensors = {k: v for k, v in everything().items() if "F8" not in k}  # its numpy side cannot load these
    (path,) = write_safetensors(tmp_path, tensors)
    file = opened(safetensors.numpy.save(tensors))
    theirs = safetensors.numpy.load_file(path)
    assert set(file.infos) == set(theirs) == set(tensors)
    for key, value in tensors.items():
        for got in (file.read(key), theirs[key]):
            assert (got.dtype, got.shape, got.tobytes()) == (value.dtype, value.shape, value.tobytes()), key


def test_arrays_in_other_orders(tmp_path):
    """Elements are written in C order."""
    base = np.arange(2 * 3 * 40, dtype=np.float32).reshape(2, 3, 40)
    tensors = {"t": base.T, "r": base[:, ::-1], "row": base[0, 0, ::3], "one": np.asfortranarray(base[:1])}
    write_safetensors(tmp_path, tensors)
    for key, value in safetensors.numpy.load_file(tmp_path / "model.safetensors").items():
        np.testing.assert_array_equal(value, tensors[key])


def shards(tmp_path) -> dict[str, list[str]]:
    return {p.name: list(SafetensorsFile(p).infos) for p in sorted(tmp_path.glob("*.safetensors"))}


def test_shards_and_index(tmp_path):
    """10-byte tensors, 25 to a shard: two each; the large one stands alone; the index is the one Hugging Face writes."""
    tensors = {k: np.full(n, i, np.uint8) for i, (k, n) in enumerate({"a": 10, "b": 10, "c": 10, "large": 30, "d": 10, "e": 10}.items())}
    paths = write_safetensors(tmp_path, tensors, shard_bytes=25, name="diffusion_pytorch_model")
    stem = "diffusion_pytorch_model-0000{}-of-00004.safetensors".format
    assert [p.name for p in paths] == [stem(i) for i in (1, 2, 3, 4)]
    assert shards(tmp_path) == {stem(1): ["a", "b"], stem(2): ["c"], stem(3): ["large"], stem(4): ["d", "e"]}
    index = json.loads((tmp_path / "diffusion_pytorch_model.safetensors.index.json").read_text())
    expected = {"a": stem(1), "b": stem(1), "c": stem(2), "large": stem(3), "d": stem(4), "e": stem(4)}
    assert index == {"metadata": {"total_size": 80}, "weight_map": expected}
    opened = open_sharded(tmp_path)
    assert all(opened.read(k).tobytes() == v.tobytes() and opened.infos[k].file == tmp_path / expected[k] for k, v in tensors.items())


def test_tensors_are_made_one_at_a_time(tmp_path):
    n, made = 2**20, []

    def make(i):
        made.append(i)
        return np.full((n, 2), i, np.float32)  # 8 MB

    tracemalloc.start()
    write_safetensors(tmp_path, {str(i): LazyTensor(np.float32, (n, 2), lambda i=i: make(i)) for i in range(6)}, shard_bytes=2**24)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert made == list(range(6)) and peak < 9 * 2**20, peak
    assert len(list(tmp_path.glob("*.safetensors"))) == 3 and open_sharded(tmp_path).read("4")[-1, 1] == 4


# ---- fuzz ----
HEADER = {
    "__metadata__": {"format": "pt"},
    "a.weight": entry("F32", (2, 3), (0, 24)),
    "b": entry("BF16", (5,), (24, 34)),
    "c": entry("U8", (0, 7), (34, 34)),
}
SEEDS = [raw(HEADER, bytes(34)), safetensors.numpy.save({"x": np.zeros((3, 0)), "y": np.arange(4, dtype=np.int8), "z": np.ones(2)})]


def test_mutated_files():
    """10,000 files with damage anywhere, most of it in the header."""
    fuzz(opened, SEEDS, runs=10_000, kinds=12, survivors=300)


def test_mutated_headers():
    """10,000 headers that are sound JSON: values replaced by others of the header or by strange ones."""
    strange = [*NUMBERS, -1, 1.5, True, None, "", "F64", "F8_E4M3", "F4", [], {}, [2, 3], [0, 2**62], [[]], [1] * 40, {"dtype": 1}]

    def mutate(rng, data, seeds):
        header = json.loads(json.dumps(HEADER))
        nodes = lambda v: [v] + [n for x in (v.values() if isinstance(v, dict) else v) if isinstance(x, (dict, list)) for n in nodes(x)]  # noqa: E731
        for _ in range(rng.choice((1, 1, 2, 3))):
            every = nodes(header)
            node = rng.choice(every)
            key = rng.choice(list(node) if isinstance(node, dict) else range(len(node))) if node else None
            value = json.loads(json.dumps(rng.choice([*strange, *every])))
            if isinstance(node, list):
                node[:] = [*node, value] if key is None or rng.random() < 0.2 else node[:key] + [value] * rng.randrange(3) + node[key + 1 :]
            elif key is not None and rng.random() < 0.7:
                node[key] = value
            else:
                node[rng.choice(("a.weight", "x", "dtype", "shape", "__metadata__"))] = value
        return raw(header, bytes(rng.choice((34, 34, 34, 0, 24, 35, 100))))

    fuzz(opened, SEEDS, runs=10_000, kinds=12, survivors=100, mutate=mutate)
