"""Our reader and writer of tensor files against torch and the safetensors package themselves."""

import collections
import zipfile

import numpy as np
import pytest

torch = pytest.importorskip("torch")
import safetensors.torch  # noqa: E402

from tests.checkpoint.writing import write_safetensors, write_torch_file  # noqa: E402
from xomni_jax.checkpoint import torch_file  # noqa: E402
from xomni_jax.checkpoint.safetensors_file import NAMES  # noqa: E402
from xomni_jax.checkpoint.tensors import TensorFileError, open_sharded, open_tensor_file  # noqa: E402
from xomni_jax.checkpoint.torch_pickle import DTYPES  # noqa: E402

pytestmark = pytest.mark.parity
LOADS = [{}, {"mmap": True}]


def random(name: str, shape=(3, 5)) -> "torch.Tensor":
    """Random bits of a dtype; every bit pattern may come, NaNs too."""
    dtype = getattr(torch, name)
    raw = torch.randint(
        0, 256, (*shape[:-1], shape[-1] * dtype.itemsize), dtype=torch.uint8, generator=torch.Generator().manual_seed(len(name))
    )
    return raw % 2 == 1 if name == "bool" else raw.view(dtype)


def raw_bytes(value) -> bytes:
    """The elements of a torch tensor in C order."""
    value = value.detach().contiguous()
    return value.reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""


def assert_same(ours: np.ndarray, theirs) -> None:
    assert ours.shape == tuple(theirs.shape) and ours.dtype.name == str(theirs.dtype).removeprefix("torch.")
    assert ours.tobytes() == raw_bytes(theirs)


def views() -> dict:
    """One storage seen in many ways, and what else a state_dict holds."""
    base = torch.arange(120, dtype=torch.float32).reshape(2, 3, 4, 5)
    out = {
        "base": base, "permuted": base.permute(3, 1, 0, 2), "row": base[1], "steps": base[:, ::2, 1:, ::3], "scalar": base[1, 2, 3, 4],
        "empty": base[:, :0], "channels_last": base.to(memory_format=torch.channels_last), "own": torch.randn(7, dtype=torch.bfloat16),
        "parameter": torch.nn.Parameter(torch.randn(2, 2)), "expanded": torch.arange(6).reshape(2, 1, 3).expand(2, 4, 3),
        "diagonal": torch.eye(4).diagonal(), "unfolded": torch.arange(10.0).unfold(0, 4, 2),
    }  # fmt: skip
    out["tied"] = out["own"]
    return out


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_torch_files_are_read(tmp_path, protocol):
    tensors = views() | {f"dtype.{name}": random(name) for name in DTYPES}
    torch.save(tensors, tmp_path / "a.pth", pickle_protocol=protocol)
    file = open_tensor_file(tmp_path / "a.pth")
    assert list(file.infos) == list(tensors)
    for key, value in tensors.items():
        assert_same(file.read(key), value)
    assert np.shares_memory(file.read("base"), file.read("permuted")) and np.shares_memory(file.read("own"), file.read("tied"))
    assert file.read("permuted").strides == tuple(4 * s for s in tensors["permuted"].stride())


def test_state_dicts_of_modules_and_training_checkpoints(tmp_path):
    """`_metadata`, integer buffers, optimizer state under integer keys, nested wrappers."""
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.MultiheadAttention(8, 2))
    optimizer = torch.optim.AdamW(model.parameters())
    sum(p.sum() for p in model.parameters()).backward()
    optimizer.step()
    torch.save(model.state_dict(), tmp_path / "a.pth")
    file = open_tensor_file(tmp_path / "a.pth")
    assert list(file.infos) == list(model.state_dict())
    for key, value in model.state_dict().items():
        assert_same(file.read(key), value)
    torch.save(
        {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3, "size": torch.Size([1]), "d": torch.float16},
        tmp_path / "b.pth",
    )
    file = open_tensor_file(tmp_path / "b.pth")
    assert_same(file.read("model.0.weight"), model.state_dict()["0.weight"])
    assert_same(file.read("optimizer.state.0.exp_avg"), optimizer.state_dict()["state"][0]["exp_avg"])


UNNEEDED = {
    "a conjugated view": (lambda: torch.zeros(2, dtype=torch.complex64).conj(), "a tensor with metadata, such as a conjugated view"),
    "a sparse tensor": (lambda: torch.eye(3).to_sparse(), "'torch._utils._rebuild_sparse_tensor'"),
    "a quantised tensor": (lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "'torch._utils._rebuild_qtensor'"),
    "a tensor without data": (lambda: torch.zeros(2, device="meta"), "'torch._utils._rebuild_meta_tensor_no_storage'"),
    "half complex": (lambda: torch.zeros(2, dtype=torch.complex32), "'torch.complex32'"),
    "a numpy number": (lambda: np.float64(1), "'numpy.*scalar'"),
    "a module": (lambda: torch.nn.Linear(2, 2), "'torch.nn.modules.linear.Linear'"),
}
BESIDE = [collections.Counter("aab"), b"\xff\0", bytearray(b"ab"), 1.5 - 2j, {1, 2}, torch.strided, torch.device("cpu"), torch.Size([2])]


@pytest.mark.parametrize("value", BESIDE, ids=lambda value: type(value).__name__)
def test_what_torch_loads_beside_weights_is_read(tmp_path, value):
    torch.save({"model": {"w": torch.ones(2)}, "x": value, "y": [value]}, tmp_path / "a.pth")
    torch.load(tmp_path / "a.pth", weights_only=True)
    file = open_tensor_file(tmp_path / "a.pth")
    assert list(file.infos) == ["model.w"] and file.others == {"x", "y"}


@pytest.mark.parametrize("what", UNNEEDED)
@pytest.mark.filterwarnings("ignore")
def test_what_torch_saves_and_weights_do_not_need(tmp_path, what):
    make, words = UNNEEDED[what]
    torch.save({"w": torch.ones(2), "x": make()}, tmp_path / "a.pth")
    with pytest.raises(TensorFileError, match=f"a.pth: its pickle asks for .*({words})"):
        open_tensor_file(tmp_path / "a.pth")


@pytest.mark.filterwarnings("ignore")
def test_other_files_of_torch(tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(TensorFileError, match="is a pickle outside a zip archive"):
        open_tensor_file(tmp_path / "old.pth")
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "script.pt")
    with pytest.raises(TensorFileError, match="is a TorchScript program"):
        open_tensor_file(tmp_path / "script.pt")


@pytest.mark.parametrize("options", LOADS)
@pytest.mark.parametrize("wide", [False, True])
def test_our_files_are_loaded_by_torch(tmp_path, options, wide, monkeypatch):
    """Also with the 64-bit fields of files above 4 GB."""
    if wide:
        monkeypatch.setattr(torch_file, "ZIP64_BYTES", -1)
        monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 100)
    tensors = views() | {f"dtype.{name}": random(name) for name in DTYPES}
    torch.save(tensors, tmp_path / "theirs.pth")
    source = open_tensor_file(tmp_path / "theirs.pth")
    write_torch_file(tmp_path / "ours.pth", {k: source.read(k) for k in source.infos})
    loaded = torch.load(tmp_path / "ours.pth", weights_only=True, **options)
    assert type(loaded) is collections.OrderedDict and list(loaded) == list(tensors)
    for key, value in tensors.items():
        assert loaded[key].dtype == value.dtype and loaded[key].shape == value.shape and raw_bytes(loaded[key]) == raw_bytes(value), key
        assert loaded[key].is_contiguous() and not loaded[key].requires_grad
    assert {t.data_ptr() % 64 for t in loaded.values() if t.numel()} == {0} or not options


def test_a_module_takes_our_file(tmp_path):
    model, other = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    write_torch_file(tmp_path / "a.pth", {k: v.numpy() for k, v in model.state_dict().items()})
    other.load_state_dict(torch.load(tmp_path / "a.pth", weights_only=True), strict=True)
    assert torch.equal(model.weight, other.weight) and torch.equal(model.bias, other.bias)


def test_safetensors_of_every_dtype_both_ways(tmp_path):
    names = [dtype.name for dtype in NAMES if dtype.name in DTYPES]
    assert len(names) == len(NAMES)
    tensors = {f"{i}.{name}": random(name) for i, name in enumerate(names)}
    safetensors.torch.save_file(tensors, tmp_path / "theirs.safetensors", {"format": "pt"})
    theirs = open_tensor_file(tmp_path / "theirs.safetensors")
    for key, value in tensors.items():
        assert_same(theirs.read(key), value)
    (ours,) = write_safetensors(tmp_path / "ours", {k: theirs.read(k) for k in theirs.infos})
    assert ours.read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()
    for key, value in safetensors.torch.load_file(ours).items():
        assert value.dtype == tensors[key].dtype and raw_bytes(value) == raw_bytes(tensors[key])


def test_our_shards_are_loaded_by_transformers(tmp_path):
    """A Qwen2 of four tiny layers, saved by us in shards of 20 kB, and saved by transformers, read by us."""
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen2Config(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    model = transformers.Qwen2ForCausalLM(config)
    model.save_pretrained(tmp_path / "theirs", max_shard_size="6KB")
    theirs = open_sharded(tmp_path / "theirs")
    assert len({i.file for i in theirs.infos.values()}) > 1 and set(theirs.infos) == set(model.state_dict())
    config.save_pretrained(tmp_path / "ours")
    write_safetensors(tmp_path / "ours", {k: theirs.read(k) for k in theirs.infos}, shard_bytes=6000)
    assert (tmp_path / "ours" / "model.safetensors.index.json").is_file()
    again = transformers.Qwen2ForCausalLM.from_pretrained(tmp_path / "ours").state_dict()
    for key, value in model.state_dict().items():
        assert torch.equal(value, again[key]), key
