"""The pickle inside a .pth file may say anything: nothing of it is run, what weights do not need is refused by name, work is bounded."""

import copyreg
import gc
import io
import os
import pickle
import re
import struct
import tracemalloc

import pytest

from tests.checkpoint.fuzzing import fuzz
from tests.checkpoint.pickles import FLOATS, HERE, Raw, W, archive, call, code, name, program, refused, storage, tensor, two_storages
from xomni_jax.checkpoint import torch_pickle
from xomni_jax.checkpoint.torch_file import TorchFile
from xomni_jax.checkpoint.torch_pickle import BYTES_PER_INSTRUCTION, FREE_INSTRUCTIONS, instruction_limit


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
    "operator.methodcaller": lambda path: (
        b"\x80\x02" + call("operator.methodcaller", "touch") + b"(" + call("pathlib.Path", str(path)) + b"tR."
    ),
    "collections._sys.modules": lambda path: then_touch(code("collections") + code("_sys.modules") + b"\x93", path),
    "collections.OrderedDict.__init__": lambda path: then_touch(code("collections") + code("OrderedDict.__init__") + b"\x93", path),
    "copyreg.__newobj__": lambda path: then_touch(call("copyreg.__newobj__", name("decimal.Decimal")), path),
    "copyreg._reconstructor": lambda path: then_touch(
        call("copyreg._reconstructor", name("argparse.Namespace"), name("builtins.object"), None), path
    ),
    "copyreg.add_extension": lambda path: then_touch(call("copyreg.add_extension", "posix", "getpid", 77), path),
    "decimal.Decimal (NEWOBJ)": lambda path: then_touch(name("decimal.Decimal") + b")\x81", path),
    "types.SimpleNamespace (BUILD)": lambda path: then_touch(name("types.SimpleNamespace") + b")\x81" + code({"a": 1}) + b"b", path),
    **{
        f"the pickle instruction EXT{len(op) - 1} ({n})": lambda path, op=op: b"\x80\x02" + op + code((f"touch {path}",)) + b"R."
        for n, op in EXTENSIONS.items()
    },
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
    number = next((n for n in EXTENSIONS if what.endswith(f"({n})")), None)
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
    text = refused(archive(data), re.escape(named if "instruction" in named else repr(named)))
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
    "instance of an allowed name": (Raw(b"(icollections\nOrderedDict\n"), "the pickle instruction INST"),
    "object of an allowed name": (Raw(b"(" + name("collections.OrderedDict") + b"o"), "the pickle instruction OBJ"),
    "object of nothing": (Raw(b"(o"), "the pickle instruction OBJ"),
    "text persistent id": (Raw(b"Pposix.system\n"), "the pickle instruction PERSID"),
    "string persistent id": (Raw(code("posix.system") + b"Q"), "an outside object that is no storage"),
    "module persistent id": (Raw(code(("module", "a", "b", "c", 1)) + b"Q"), "an outside object that is no storage"),
    "list persistent id": (Raw(code(["storage"]) + b"Q"), "an outside object that is no storage"),
    "storage of a function": (storage(kind="torch.Size"), "a storage of type torch.Size"),
    "storage of a dtype": (storage(kind="torch.float32"), "a storage of type torch.float32"),
    "storage of text": (Raw(code(("storage", "FloatStorage", "0", "cpu", 1)) + b"Q"), "a storage of type str"),
    "bytearray": (Raw(b"\x96" + struct.pack("<Q", 1) + b"a"), "the pickle instruction BYTEARRAY8"),
    "protocol 0": (Raw(b"I1\n"), "the pickle instruction INT"),
    "conjugated view": (tensor((3,), (1,), more=({"conj": True},)), "a tensor with metadata, such as a conjugated view"),
    "an integer of 1 MB": (Raw(b"\x8b" + struct.pack("<i", 2**20) + bytes(2**20)), "the pickle instruction LONG4"),
}


@pytest.mark.parametrize("what", ODD)
def test_requests_are_refused_by_name(what):
    value, words = ODD[what]
    assert "nothing of it was run" in refused(archive(program({"w": W, "x": value})), f"asks for .*{words}.* which weights do not need")


EMPTY = call("collections.OrderedDict")
BROKEN = {
    "text cut off": (b"\x80\x02X\xff\xff\xff\xff", "expected 4294967295 bytes in a unicodestring4, but only 0 remain"),
    "bytes longer than memory": (b"\x80\x04\x8e" + b"\xff" * 8, "bytes8 byte count > sys.maxsize"),
    "no end": (b"\x80\x02}", "pickle exhausted before seeing STOP"),
    "empty": (b"", "pickle exhausted before seeing STOP"),
    "global without its line feed": (b"ctorch", "no newline found"),
    "underflow": (b"\x80\x02\x86.", "unpickling stack underflow"),
    "below the mark": (b"\x80\x02N(\x85.", "unexpected MARK found"),
    "no mark": (b"\x80\x02t.", "could not find MARK"),
    "nothing to drop": (b"\x80\x020.", "unpickling stack underflow"),
    "memo": (b"\x80\x02h\x07.", "Memo value not found at index 7"),
    "odd dict": (b"\x80\x02}(Nu.", "odd number of items for SETITEMS"),
    "unknown instruction": (b"\x80\x02\xff.", "opcode .* unknown"),
    "not UTF-8": (b"\x80\x02U\x01\xff.", "codec can't decode byte 0xff"),
    "half a surrogate pair": (b"\x80\x02X\x03\0\0\0\xed\xa0\x80.", "surrogates not allowed"),
    "global of numbers": (b"\x80\x04NN\x93.", "STACK_GLOBAL requires str"),
    "arguments": (b"\x80\x02" + name("torch.Size") + b"NR.", "argument list must be a tuple"),
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
    "too few things": (program(call("torch._utils._rebuild_tensor_v2", storage())), "missing 5 required positional arguments"),
    "too many things": (
        program(tensor((1,), (1,), dtype="torch.float32", more=(None, None))),
        "takes from 6 to 7 positional arguments but 8",
    ),
    "no dtype": (program(call("torch._utils._rebuild_tensor_v3", storage(), 0, (1,), (1,), False, EMPTY, 5)), "a dtype that is none"),
    "storage as a dtype": (program(tensor((1,), (1,), dtype="torch.FloatStorage")), "a dtype that is none"),
    "beyond the storage": (program(tensor((3, 4), (4, 1), 1)), r"float32\[3, 4\] that reaches beyond its storage of 48 bytes"),
    "beyond by stride": (program(tensor((2,), (12,))), "reaches beyond its storage of 48 bytes"),
    "text called": (program(Raw(code("os.system") + code(("x",)) + b"R")), "'str' object is not callable"),
    "tensor called": (program(Raw(W + code(()) + b"R")), "'Tensor' object is not callable"),
    "newobj with keywords": (
        program(Raw(name("torch.Size") + code(()) + code({"a": 1}) + b"\x92")),
        "NEWOBJ_EX class argument must be a type",
    ),
    "state of a function": (program(Raw(name("torch.Size") + code({"__code__": 1}) + b"b")), "state is not a dictionary"),
    "state of a tensor": (program(Raw(W + code({"storage": 1}) + b"b")), "state is not a dictionary"),
    "append to a global": (program(Raw(name("torch.Size") + b"Na")), "'Global' object has no attribute 'append'"),
    "set an item of a list": (program(Raw(b"]NNs")), "list indices must be integers"),
    "set an item of a tuple": (program(Raw(b")NNs")), "does not support item assignment"),
    "add to a dict": (program(Raw(b"}(N\x90")), "'Pairs' object has no attribute 'add'"),
    "a negative length": (program(Raw(b"\x8b" + struct.pack("<i", -1))), "long4 byte count < 0"),
    "beyond by dtype": (program(tensor((12,), (1,), dtype="torch.float64")), "reaches beyond its storage of 48 bytes"),
}


HARMLESS = {  # makes no sense, and no tensor
    "two objects": b"\x80\x02NN.",
    "a mark left": b"\x80\x02(N.",
    "dict of a number": program(call("collections.OrderedDict", 3)),
    "set of a number": program(call("builtins.set", 3)),
    "size of a number": program(call("torch.Size", 3)),
    "parameter of a number": program(call("torch._utils._rebuild_parameter", 1, True, None)),
}


@pytest.mark.parametrize("what", HARMLESS)
def test_pickles_of_no_tensor(what):
    refused(archive(HARMLESS[what]), "holds no tensor under a name|object is not iterable; save a plain state_dict")


@pytest.mark.parametrize("what", BROKEN)
def test_broken_pickles(what):
    data, words = BROKEN[what]
    assert refused(archive(data), f"its pickle .*{words}").endswith("the file is damaged, download it again")


# ---- work and memory are bounded ----
def deep(levels: int, bottom: bytes = W) -> bytes:
    return b"\x80\x02" + b"](" * levels + bottom + b"e" * levels + b"."


def laughs(levels: int) -> bytes:
    """Lists that hold the list before ten times: 10**levels paths to one tensor."""
    out = b"\x80\x02" + W + b"q\0"
    for i in range(levels):
        out += b"0](" + (b"h" + bytes([i])) * 10 + b"eq" + bytes([i + 1])
    return out + b"."


def key(code_: bytes) -> bytes:
    """A dict with one key."""
    return b"\x80\x02}" + code_ + b"Ns."


def doubled(levels: int) -> bytes:
    """A tuple of a tuple twice, and so on: hashing it takes 2**levels steps."""
    return b")q\0" + b"".join(b"0h%ch%c\x86q%c" % (i, i, i + 1) for i in range(levels))


def copies(times: int) -> bytes:
    """One list of 5,000 pairs, made into an OrderedDict again and again."""
    pairs = b"](" + b"(NNt" * 5000 + b"eq\x01"
    return b"\x80\x02" + pairs + b"0" + name("collections.OrderedDict") + b"q\x020" + b"h\x02h\x01\x85R0" * times + b"N."


FEW = 50_000  # instructions, where the real limit is 250,000
LONG = 80_000
BOMBS = {
    "dicts": (b"\x80\x02" + b"}" * LONG, "asks for more than .* instructions"),
    "sets": (b"\x80\x04" + b"\x8f" * LONG, "asks for more than"),
    "filled dicts": (b"\x80\x02" + b"}NNs" * (LONG // 4), "asks for more than"),
    "marks": (b"\x80\x02" + b"(" * LONG, "asks for more than"),
    "duplicates": (b"\x80\x02N" + b"2" * LONG, "asks for more than"),
    "memo": (b"\x80\x04N" + b"\x94" * LONG, "asks for more than"),
    "memo far away": (
        b"\x80\x02N" + b"".join(b"r" + struct.pack("<I", 2**32 - 1 - i) for i in range(LONG // 5)),
        "memo index 4294967295 after 2 instructions",
    ),
    "nested tuples": (b"\x80\x02N" + b"\x85" * 45_000 + b".", "nested too deep"),
    "nested lists": (deep(15_000), "nested too deep, too often"),
    "nested dicts": (b"\x80\x02" + b"}N" * 15_000 + W + b"s" * 15_000 + b".", "has a key that is a NoneType"),
    "nested dicts without names": (b"\x80\x02" + b"}X\0\0\0\0" * 12_000 + W + b"s" * 12_000 + b".", "nested too deep"),
    "ten to the ninth paths": (laughs(9), "nested too deep, too often"),
    "copied lists": (copies(2000), "holds no tensor"),
    "key that takes 2**60 steps to hash": (key(doubled(60)), "holds no tensor"),
    "set of what takes 2**60 steps to hash": (b"\x80\x04\x8f(" + doubled(60) + b"\x90.", "nested too deep, too often"),
    "key too deep for the C stack": (key(b"N" + b"\x85" * 45_000), "holds no tensor"),
    "keys of one hash": (
        b"\x80\x02}(" + b"".join(b"\x8a\x0a%bN" % ((2**61 - 1) * i).to_bytes(10, "little") for i in range(20_000)) + b"u.",
        "holds no tensor",
    ),
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
    refused(archive(long), "asks for more than .* instructions")
    assert list(TorchFile(HERE, archive(long, more={"filler": bytes(2**20)})).infos) == ["0"]


# ---- fuzz ----
def test_mutated_pickles():
    """The archive is whole, its pickle is not: 12,000 inputs that reach the interpreter."""
    storages = {"0": FLOATS.tobytes(), "1": bytes(16)}
    memo = (
        b"\x80\x04}\x94("
        + code("x")
        + b"\x94"
        + code("collections")
        + code("OrderedDict")
        + b"\x93)R\x94"
        + code("y")
        + b"h\x01u0"
        + W
        + b"\x85."
    )
    seeds = [program(two_storages()), memo]
    fuzz(lambda data: TorchFile(HERE, archive(data, storages)), seeds, runs=12_000, kinds=40, survivors=150)
