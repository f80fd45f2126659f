"""Weights come out of .pth files as torch would give them; nothing else comes out, and nothing in them is ever run."""

import copyreg
import gc
import io
import os
import pickle
import re
import struct
import tracemalloc
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from tests.checkpoint.fuzzing import fuzz
from tests.checkpoint.pickles import FLOATS, Raw, archive, call, code, name, program, storage, tensor
from xomni_jax.checkpoint import torch_file, torch_pickle
from xomni_jax.checkpoint.tensor_file import LazyTensor, TensorFileError
from xomni_jax.checkpoint.torch_file import ALIGNMENT, TorchFile, write_torch_file
from xomni_jax.checkpoint.torch_names import DTYPES, STORAGES
from xomni_jax.checkpoint.torch_pickle import BYTES_PER_INSTRUCTION, FREE_INSTRUCTIONS, instruction_limit

HERE = Path("weights.pth")
W = tensor((3, 4), (4, 1))


def opened(value, **kwargs) -> TorchFile:
    return TorchFile(HERE, archive(program(value), **kwargs))


def refused(data: bytes, words: str) -> str:
    with pytest.raises(TensorFileError, match=words) as error:
        TorchFile(HERE, data)
    text = str(error.value)
    assert text.startswith("weights.pth: ") and "\n" not in text and len(text) < 500, text
    return text


# ---- what is read ----
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
        "epoch": 3, "name": "x", "done": True, "none": None, "options": {"a", 1}, "seed": 2**70,
        "size": call("torch.Size", (1, 2)), "dtype": name("torch.float16"), "device": call("torch.device", "cuda", 0),
        "old set": call("__builtin__.set", [1]), "bytes": Raw(b"C\x02ab"), "parameter": call("torch._utils._rebuild_parameter", W, True, None),
    }  # fmt: skip
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
    stacked = Raw(short("torch._utils") + short("_rebuild_tensor_v2") + b"\x93\x94" + code((storage(), 0, (3, 4), (4, 1), False, None)) + b"R")
    body = b"}\x94(" + short("w") + stacked + short("v") + b"h\x04" + code((storage(), 0, (2,), (1,), False, None)) + b"Ru."
    file = TorchFile(HERE, archive(b"\x80\x04\x95" + struct.pack("<Q", len(body)) + body))
    assert {k: i.shape for k, i in file.infos.items()} == {"w": (3, 4), "v": (2,)}


def test_files_without_a_byte_order_are_little():
    np.testing.assert_array_equal(opened({"w": W}, order=None).read("w"), FLOATS.reshape(3, 4))


# ---- what is refused ----
class Evil:
    """Pickles as a call of `function(*args)`."""

    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


def python(path) -> str:
    return f"open({str(path)!r}, 'w').close()"


def then_touch(pickle_code: bytes, path) -> bytes:
    """A pickle whose last step makes the file, so that the control sees that the first step was passed."""
    return b"\x80\x04" + pickle_code + b"0" + call("os.system", f"touch {path}") + b"."


EXTENSIONS = {240: b"\x82\xf0", 0xF0F0: b"\x83\xf0\xf0", 0x70F0F0F0: b"\x84\xf0\xf0\xf0\x70"}
# Each makes the file `path` when Python's pickle loads it, and is refused here by the name in front.
LIVE = {
    **{f"posix.system (protocol {p})": lambda path, p=p: pickle.dumps(Evil(os.system, f"touch {path}"), protocol=p) for p in range(6)},
    "builtins.eval": lambda path: pickle.dumps(Evil(eval, python(path)), protocol=4),
    "builtins.exec": lambda path: program(call("builtins.exec", python(path))),
    "__builtin__.eval": lambda path: program(call("__builtin__.eval", python(path))),
    "os.system": lambda path: program({"w": W, "x": call("os.system", f"touch {path}")}),
    "subprocess.call": lambda path: program(call("subprocess.call", ["touch", str(path)])),
    "posix.system (INST)": lambda path: b"(" + code(f"touch {path}") + b"iposix\nsystem\n.",
    "posix.system (OBJ)": lambda path: b"(" + name("posix.system") + code(f"touch {path}") + b"o.",
    "posix.mknod": lambda path: b"\x80\x02" + call("posix.mknod", str(path)) + b".",
    "operator.methodcaller": lambda path: b"\x80\x02" + call("operator.methodcaller", "touch") + b"(" + call("pathlib.Path", str(path)) + b"tR.",
    "collections._sys.modules": lambda path: then_touch(code("collections") + code("_sys.modules") + b"\x93", path),
    "collections.OrderedDict.__init__": lambda path: then_touch(code("collections") + code("OrderedDict.__init__") + b"\x93", path),
    "copyreg.__newobj__": lambda path: then_touch(call("copyreg.__newobj__", name("decimal.Decimal")), path),
    "copyreg._reconstructor": lambda path: then_touch(call("copyreg._reconstructor", name("argparse.Namespace"), name("builtins.object"), None), path),
    "copyreg.add_extension": lambda path: then_touch(call("copyreg.add_extension", "posix", "getpid", 77), path),
    "decimal.Decimal (NEWOBJ)": lambda path: then_touch(name("decimal.Decimal") + b")\x81", path),
    "argparse.Namespace (BUILD)": lambda path: then_touch(name("argparse.Namespace") + b")\x81" + code({"a": 1}) + b"b", path),
    **{f"the copyreg extension {n}": lambda path, op=op: b"\x80\x02" + op + code((f"touch {path}",)) + b"R." for n, op in EXTENSIONS.items()},
}


class Loader(pickle.Unpickler):
    """Python's unpickler, with tensors left out."""

    def find_class(self, module, name):
        return (lambda *args: None) if module.startswith("torch") else super().find_class(module, name)

    def persistent_load(self, pid):
        return None


@pytest.fixture
def registered(what):
    """copyreg knows the extension of this case, as in a program that registered one."""
    number = next((n for n in EXTENSIONS if what.endswith(f" {n}")), None)
    if number:
        copyreg.add_extension("posix", "system", number)
    yield
    if number:
        copyreg.remove_extension("posix", "system", number)
    if ("posix", "getpid") in copyreg._extension_registry:  # the control of the case copyreg.add_extension
        copyreg.remove_extension("posix", "getpid", 77)


@pytest.mark.parametrize("what", LIVE)
def test_nothing_is_run(what, registered, tmp_path):
    """The canary proves both: the pickle is dangerous to Python's loader, and harmless here."""
    data = LIVE[what](tmp_path / "canary")
    named = what.split(" (")[0]
    text = refused(archive(data), re.escape(named if "extension" in named else repr(named)))
    assert "nothing of it was run" in text and not (tmp_path / "canary").exists()
    try:
        Loader(io.BytesIO(data)).load()
    except Exception:  # noqa: BLE001 - some fail after the call
        pass
    assert (tmp_path / "canary").exists(), "the control did not run: this case tests nothing"


ODD = {  # (pickle code of one object, words of the refusal)
    "attribute chain on an allowed module": (Raw(code("torch") + code("_utils._rebuild_tensor_v2.__globals__") + b"\x93"), "__globals__'"),
    "unlisted torch function": (call("torch.load", "x"), "'torch.load'"),
    "hub": (call("torch.hub.load", "x"), "'torch.hub.load'"),
    "sparse tensor": (call("torch._utils._rebuild_sparse_tensor", 1), "'torch._utils._rebuild_sparse_tensor'"),
    "quantised storage": (storage(kind="torch.QInt8Storage"), "'torch.QInt8Storage'"),
    "numpy array": (call("numpy.core.multiarray._reconstruct", 1), "'numpy.core.multiarray._reconstruct'"),
    "a whole module": (call("torch.nn.modules.linear.Linear"), "'torch.nn.modules.linear.Linear'"),
    "line feed in a name": (Raw(code("os\n\x1b[31m") + code("system") + b"\x93"), r"'os\\n\\x1b\[31m.system'"),
    "a very long name": (Raw(code("os") + code("x" * 10_000) + b"\x93"), "'os.xxx"),
    "dtype called": (call("torch.float16", 1), "a call of torch.float16"),
    "storage type called": (call("torch.FloatStorage", 1), "a call of torch.FloatStorage"),
    "text called": (Raw(code("os.system") + code(("x",)) + b"R"), "a call of str"),
    "tensor called": (Raw(W + code(()) + b"R"), "a call of Tensor"),
    "newobj with keywords": (Raw(name("torch.Size") + code(()) + code({"a": 1}) + b"\x92"), "a call of torch.Size with keywords"),
    "state of a function": (Raw(name("torch.Size") + code({"__code__": 1}) + b"b"), "setting the state of a torch.Size"),
    "state of a tensor": (Raw(W + code({"storage": 1}) + b"b"), "setting the state of a Tensor"),
    "append to a global": (Raw(name("torch.Size") + b"Na"), "adding items to a torch.Size"),
    "set an item of a list": (Raw(b"]NNs"), "adding items to a list"),
    "set an item of a tuple": (Raw(b")NNs"), "adding items to a tuple"),
    "add to a dict": (Raw(b"}(N\x90"), "adding items to a dict"),
    "instance of an allowed name": (Raw(b"(icollections\nOrderedDict\n"), "an instance of collections.OrderedDict by INST"),
    "object of an allowed name": (Raw(b"(" + name("collections.OrderedDict") + b"o"), "an instance of collections.OrderedDict by OBJ"),
    "object of nothing": (Raw(b"(o"), "an instance of NoneType by OBJ"),
    "text persistent id": (Raw(b"Pposix.system\n"), "the outside object 'posix.system'"),
    "string persistent id": (Raw(code("posix.system") + b"Q"), "the outside object 'posix.system'"),
    "module persistent id": (Raw(code(("module", "a", "b", "c", 1)) + b"Q"), "the outside object 'module'"),
    "list persistent id": (Raw(code(["storage"]) + b"Q"), "the outside object list"),
    "storage of a function": (storage(kind="torch.Size"), "a storage of type torch.Size"),
    "storage of a dtype": (storage(kind="torch.float32"), "a storage of type torch.float32"),
    "storage of text": (Raw(code(("storage", "FloatStorage", "0", "cpu", 1)) + b"Q"), "a storage of type str"),
    "bytearray": (Raw(b"\x96" + struct.pack("<Q", 1) + b"a"), "the pickle instruction BYTEARRAY8"),
    "protocol 0": (Raw(b"I1\n"), "the pickle instruction INT"),
    "conjugated view": (tensor((3,), (1,), more=({"conj": True},)), "a tensor with metadata, such as a conjugated view"),
    "an integer of 1 MB": (Raw(b"\x8b" + struct.pack("<i", 2**20) + bytes(2**20)), "an integer of 1048576 bytes"),
    "a negative length": (Raw(b"\x8b" + struct.pack("<i", -1)), "an integer of -1 bytes"),
}


@pytest.mark.parametrize("what", ODD)
def test_requests_are_refused_by_name(what):
    value, words = ODD[what]
    assert "nothing of it was run" in refused(archive(program({"w": W, "x": value})), f"asks for .*{words}.* which weights do not need")


EMPTY = call("collections.OrderedDict")
BROKEN = {
    "text cut off": (b"\x80\x02X\xff\xff\xff\xff", "is cut off"),
    "bytes longer than memory": (b"\x80\x04\x8e" + b"\xff" * 8, "is cut off"),
    "no end": (b"\x80\x02}", "is cut off"),
    "empty": (b"", "is cut off"),
    "global without its line feed": (b"ctorch", "is cut off"),
    "two objects": (b"\x80\x02NN.", "does not end with one object"),
    "a mark left": (b"\x80\x02(N.", "does not end with one object"),
    "underflow": (b"\x80\x02\x86.", "takes more from its stack"),
    "below the mark": (b"\x80\x02N(\x85.", "takes more from its stack"),
    "no mark": (b"\x80\x02t.", "lacks a MARK"),
    "nothing to drop": (b"\x80\x020.", "lacks a MARK"),
    "memo": (b"\x80\x02h\x07.", "recalls object 7"),
    "odd dict": (b"\x80\x02}(Nu.", "sets a key without a value"),
    "unknown instruction": (b"\x80\x02\xff.", "has no instruction 255"),
    "not UTF-8": (b"\x80\x02U\x01\xff.", "text that is not UTF-8"),
    "half a surrogate pair": (b"\x80\x02X\x03\0\0\0\xed\xa0\x80.", "text that is not UTF-8"),
    "global of numbers": (b"\x80\x04NN\x93.", "something that is no text"),
    "arguments": (b"\x80\x02" + name("torch.Size") + b"NR.", "without a tuple of arguments"),
    "dict of a number": (program(call("collections.OrderedDict", 3)), "no list of pairs"),
    "set of a number": (program(call("builtins.set", 3)), "no list"),
    "size of a number": (program(call("torch.Size", 3)), "no tuple"),
    "parameter of a number": (program(call("torch._utils._rebuild_parameter", 1, True, None)), "no tensor"),
    "storage count": (program(storage(count=-1)), "without a name or size"),
    "storage name": (program(storage(key=3)), "without a name or size"),
    "no storage": (program(tensor((1,), (1,), of=code(None))), "without a storage or offset"),
    "negative offset": (program(tensor((1,), (1,), -1)), "without a storage or offset"),
    "true as an offset": (program(tensor((1,), (1,), True)), "without a storage or offset"),
    "negative size": (program(tensor((-1,), (1,))), "a size or stride that is none"),
    "negative stride": (program(tensor((3,), (-1,), 2)), "a size or stride that is none"),
    "huge size": (program(tensor((2**62,), (0,))), "a size or stride that is none"),
    "ranks": (program(tensor((3, 4), (1,))), "not two tuples of at most 32 sizes"),
    "33 axes": (program(tensor((1,) * 33, (1,) * 33)), "not two tuples of at most 32 sizes"),
    "list of sizes": (program(tensor([1], [1])), "not two tuples"),
    "too few things": (program(call("torch._utils._rebuild_tensor_v2", storage())), "of 1 things, 6 or 7"),
    "too many things": (program(tensor((1,), (1,), dtype="torch.float32", more=(None, None))), "of 9 things, 7 or 8"),
    "no dtype": (program(call("torch._utils._rebuild_tensor_v3", storage(), 0, (1,), (1,), False, EMPTY, 5)), "a dtype that is none"),
    "storage as a dtype": (program(tensor((1,), (1,), dtype="torch.FloatStorage")), "a dtype that is none"),
    "beyond the storage": (program(tensor((3, 4), (4, 1), 1)), r"float32\[3, 4\] that reaches beyond its storage of 48 bytes"),
    "beyond by stride": (program(tensor((2,), (12,))), "reaches beyond its storage of 48 bytes"),
    "beyond by dtype": (program(tensor((12,), (1,), dtype="torch.float64")), "reaches beyond its storage of 48 bytes"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_pickles(what):
    data, words = BROKEN[what]
    assert refused(archive(data), f"its pickle .*{words}").endswith("the file is damaged, download it again")


CONTENTS = {
    "no tensor": ({"epoch": 3}, r"holds no tensor under a name \(dict\); give a file of a state_dict"),
    "a tensor alone": (W, r"holds no tensor under a name \(Tensor\)"),
    "same name": ({"a": {"b": W}, "a.b": W}, "two tensors are called 'a.b'; rename one"),
    "no such storage": ({"w": tensor((1,), (1,), of=storage("9"))}, "'w' lies in 'archive/data/9', which is not in the file"),
    "storage of another size": ({"w": tensor((1,), (1,), of=storage(count=11))}, "'w' lies in 'archive/data/0' of 48 bytes, its pickle says 44"),
    "expanded beyond the file": ({"w": tensor((10_000,), (0,))}, r"'w' is an expanded view, float32\[10000\] of 48 stored bytes; save it again after"),
    "empty but too large": ({"w": tensor((0, 2**59, 2**59), (1, 1, 1))}, "'w' has shape .*, too large for any machine"),
    "set": ({"s": {W}}, "'s' is a set, whose tensors have no names; save a plain state_dict"),
    "key": ({(1, 2): W}, "has a key that is a tuple; save"),
    "float key": ({"a": {1.5: [W]}}, "'a' has a key that is a float"),
}  # fmt: skip


@pytest.mark.parametrize("what", CONTENTS)
def test_contents_without_sense(what):
    value, words = CONTENTS[what]
    refused(archive(program(value)), words)


# ---- work and memory are bounded ----
def deep(levels: int, bottom: bytes = W) -> bytes:
    return b"\x80\x02" + b"](" * levels + bottom + b"e" * levels + b"."


def laughs(levels: int) -> bytes:
    """Lists that hold the list before ten times: 10**levels paths to one tensor."""
    out = b"\x80\x02" + W + b"q\0"
    for i in range(levels):
        out += b"0](" + (b"h" + bytes([i])) * 10 + b"eq" + bytes([i + 1])
    return out + b"."


def copies(times: int) -> bytes:
    """One list of 5,000 pairs, made into an OrderedDict again and again."""
    pairs = b"](" + b"(NNt" * 5000 + b"eq\x01"
    return b"\x80\x02" + pairs + b"0" + name("collections.OrderedDict") + b"q\x020" + b"h\x02h\x01\x85R0" * times + b"N."


FEW = 50_000  # instructions, where the real limit is 250,000
LONG = 80_000
BOMBS = {
    "dicts": (b"\x80\x02" + b"}" * LONG, "is too long for the file it is in"),
    "sets": (b"\x80\x04" + b"\x8f" * LONG, "is too long"),
    "filled dicts": (b"\x80\x02" + b"}NNs" * (LONG // 4), "is too long"),
    "marks": (b"\x80\x02" + b"(" * LONG, "is too long"),
    "duplicates": (b"\x80\x02N" + b"2" * LONG, "is too long"),
    "memo": (b"\x80\x04N" + b"\x94" * LONG, "is too long"),
    "memo far away": (b"\x80\x02N" + b"".join(b"r" + struct.pack("<I", 2**32 - 1 - i) for i in range(LONG // 5)), "is cut off"),
    "nested tuples": (b"\x80\x02N" + b"\x85" * 45_000 + b".", "nested too deep"),
    "nested lists": (deep(15_000), "nested too deep, too often"),
    "nested dicts": (b"\x80\x02" + b"}N" * 15_000 + W + b"s" * 15_000 + b".", "has a key that is a NoneType"),
    "nested dicts without names": (b"\x80\x02" + b"}X\0\0\0\0" * 12_000 + W + b"s" * 12_000 + b".", "nested too deep"),
    "ten to the ninth paths": (laughs(9), "nested too deep, too often"),
    "copied lists": (copies(2000), "is too long"),
    "long keys": (program({"k" * 1000: [W] * 1000}), "too long keys"),
    "many names for one tensor": (b"\x80\x02" + W + b"q\x010}(" + b"".join(b"\x8c\x05%05dh\x01" % i for i in range(10_000)) + b"u.", None),
}


@pytest.mark.parametrize("what", BOMBS)
def test_bombs_do_not_go_off(what, monkeypatch):
    """No more memory than 256 bytes for an allowed instruction + the file's size; work is counted likewise, so time is bounded too."""
    monkeypatch.setattr(torch_pickle, "FREE_INSTRUCTIONS", FEW)
    data, words = BOMBS[what]
    data = archive(data)
    gc.collect()
    tracemalloc.start()
    try:
        if words is None:
            assert len(TorchFile(HERE, data).infos) == 10_000
        else:
            refused(data, words)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < FEW * BYTES_PER_INSTRUCTION + 2 * len(data), f"{peak / 2**20:.1f} MB"


def test_the_limit_grows_with_the_file():
    assert instruction_limit(0) == FREE_INSTRUCTIONS and instruction_limit(2**30) == FREE_INSTRUCTIONS + 2**22
    long = program([W])[:-1] + b"N0" * (FREE_INSTRUCTIONS // 2 + 1000) + b"."
    refused(archive(long), "is too long for the file it is in")
    assert list(TorchFile(HERE, archive(long, more={"filler": bytes(2**20)})).infos) == ["0"]


# ---- archives ----
GOOD = archive(program({"w": W}))


def patched(data: bytes, old: bytes, new: bytes, count: int = -1) -> bytes:
    assert old in data and len(old) == len(new)
    return data.replace(old, new, count)


def eocd(data: bytes, at: int, value: bytes) -> bytes:
    start = data.rfind(b"PK\5\6") + at
    return data[:start] + value + data[start + len(value) :]


ARCHIVES = {
    "cut in the middle": (GOOD[: len(GOOD) // 2], "its zip directory is missing; the file is damaged or cut off"),
    "cut by one byte": (GOOD[:-1], "its zip directory is missing"),
    "one byte more": (GOOD + b"x", "does not end with the file"),
    "compressed": (archive(program({"w": W}), method=zipfile.ZIP_DEFLATED), "is compressed; save it again with torch.save"),
    "big-endian": (archive(program({"w": W}), order=b"big"), "its byte order is b'big', only little is read; save it again on"),
    "no pickle": (archive(b"", more={"data.pkl": None}), "with 0 data.pkl, torch.save writes one; give a file"),
    "npz": (archive(b"", more={"data.pkl": None, "a.npy": b""}), "it is a numpy .npz"),
    "TorchScript": (archive(program({"w": W}), more={"code/__torch__.py": b"", "constants.pkl": b""}), "is a TorchScript program; save the module's state"),
    "more entries promised": (eocd(GOOD, 10, b"\x09\0"), "promises 9 entries and lists 4"),
    "directory elsewhere": (eocd(GOOD, 16, b"\1\0\0\0"), "is no list of entries"),
    "directory outside": (eocd(GOOD, 12, b"\0\0\0\x70"), "points outside the file"),
    "64-bit directory missing": (eocd(GOOD, 16, b"\xff" * 4), "its 64-bit zip directory is missing"),
    "names differ": (patched(GOOD, b"archive/data/0", b"archive/data/1", 1), "'archive/data/0' is not where the zip directory says"),
    "encrypted": (patched(GOOD, b"PK\1\2\x14\3\x14\0\0\0", b"PK\1\2\x14\3\x14\0\1\0"), "is encrypted; save it again without a password"),
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
    refused(by_hand([first, second], [*lines, lines[1]]), "its entry 'a/data/0' comes twice")
    inside = local_entry(b"a/data/1", local_entry(b"a/data/0", data))
    both = [lines[0], directory_entry(b"a/data/1", 38 + 48, len(first)), directory_entry(b"a/data/0", 48, len(first) + 38)]
    refused(by_hand([first, inside], both), "its entries 'a/data/1' and 'a/data/0' overlap")
    refused(by_hand([first, second], [lines[0], directory_entry(b"a/data/0", 49, len(first))]), "'a/data/0' reaches beyond the data")


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
    assert file.places["w"].offset % ALIGNMENT == 0
    if wide:
        cut = data.replace(struct.pack("<2H", 1, 16), struct.pack("<2H", 9, 16))
        refused(cut, "lacks its 64-bit sizes|is not where the zip directory says")


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
            file.write(b"PK\1\2" + struct.pack("<6H3I5H2I", 45, 45, 0, 0, 0, 0, 0, full, full, len(name_), len(wide), 0, 0, 0, 0, full) + name_ + wide)
        end = file.tell()
        file.write(b"PK\6\6" + struct.pack("<Q2H2I4Q", 44, 45, 45, 0, 0, 3, 3, end - start, start))
        file.write(b"PK\6\7" + struct.pack("<IQI", 0, end, 1) + b"PK\5\6" + struct.pack("<4H2IH", 0, 0, 3, 3, end - start, 2**32 - 1, 0))
    opened_ = TorchFile(tmp_path / "a.pth")
    assert opened_.infos["hole"].nbytes == gap and opened_.places["w"].offset > gap
    np.testing.assert_array_equal(opened_.read("w"), FLOATS.reshape(3, 4))
    assert opened_.read("hole")[-1] == 0
    opened_.release("hole")


# ---- writing ----
def everything() -> dict[str, np.ndarray]:
    out = {f"values.{name_}": bits(dtype).reshape(2, 3) for name_, dtype in DTYPES.items()}
    strided = np.arange(60, dtype=np.float32).reshape(3, 4, 5).transpose(2, 0, 1)[::2]
    return out | {"strided": strided, "scalar": np.float32(7) * np.ones(()), "empty": np.zeros((0, 3), np.int64), "big end": np.arange(3, dtype=">i4"), "é": FLOATS}


def test_what_is_written_comes_back(tmp_path):
    tensors = everything()
    write_torch_file(tmp_path / "a.pth", tensors)
    file = TorchFile(tmp_path / "a.pth")
    assert list(file.infos) == list(tensors)
    for key, value in tensors.items():
        assert file.read(key).shape == value.shape and file.read(key).tobytes() == value.astype(value.dtype.newbyteorder("=")).tobytes(), key
        assert file.read(key).dtype == value.dtype.newbyteorder("=")
    assert all(place.offset % ALIGNMENT == 0 for place in file.places.values())
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


def test_an_interrupted_write_leaves_what_was_there(tmp_path):
    write_torch_file(tmp_path / "a.pth", {"w": FLOATS})
    before = (tmp_path / "a.pth").read_bytes()
    with pytest.raises(ZeroDivisionError):
        write_torch_file(tmp_path / "a.pth", {"w": FLOATS, "x": LazyTensor(np.float32, (1,), lambda: 1 / 0)})
    assert [p.name for p in tmp_path.iterdir()] == ["a.pth"] and (tmp_path / "a.pth").read_bytes() == before


@pytest.mark.parametrize(
    "tensor_, words",
    [
        (np.zeros(2, ml_dtypes.float4_e2m1fn), "torch has no dtype for 'w' of dtype float4_e2m1fn; cast it first"),
        (np.array(["a"]), "torch has no dtype for 'w' of dtype <U1"),
        (LazyTensor(np.float32, (3,), lambda: np.zeros(2, np.float32)), r"'w' came out as float32\[2\], float32\[3\] was promised"),
        (LazyTensor(np.float32, (2,), lambda: np.zeros(2, np.float16)), r"'w' came out as float16\[2\], float32\[2\] was promised"),
        (LazyTensor(np.float32, (2**58,), lambda: None), "GB are to be written, .* GB are free; free some space or choose another disk"),
    ],
)
def test_what_cannot_be_written(tmp_path, tensor_, words):
    with pytest.raises(TensorFileError, match=words):
        write_torch_file(tmp_path / "a.pth", {"w": tensor_})
    assert list(tmp_path.iterdir()) == []


# ---- fuzz ----
def fuzz_values():
    return {"a": W, "b": {"c": [tensor((2,), (3,), 1, storage("1", "torch.UntypedStorage", 16), "torch.float16"), 3, "x", None]}}


def test_mutated_pickles():
    """The archive is whole, its pickle is not: 12,000 inputs that reach the interpreter."""
    storages = {"0": FLOATS.tobytes(), "1": bytes(16)}
    memo = b"\x80\x04}\x94(" + code("x") + b"\x94" + code("collections") + code("OrderedDict") + b"\x93)R\x94" + code("y") + b"h\x01u0" + W + b"\x85."
    seeds = [program(fuzz_values()), memo]
    fuzz(lambda data: TorchFile(HERE, archive(data, storages)), seeds, runs=12_000, kinds=40, survivors=150)


def test_mutated_archives():
    """10,000 files with damage anywhere."""
    seeds = [archive(program(fuzz_values()), {"0": FLOATS.tobytes(), "1": bytes(16)}), GOOD]
    fuzz(lambda data: TorchFile(HERE, data), seeds, runs=10_000, kinds=20, survivors=500)
