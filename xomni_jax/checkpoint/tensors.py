"""Opens files of tensors, whose format is told by their content, and folders of shards."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from xomni_jax.checkpoint.safetensors_file import SafetensorsFile, lora_only
from xomni_jax.checkpoint.tensor_file import TensorFile, TensorFileError, TensorInfo, check_links, map_file, read_json, show
from xomni_jax.checkpoint.torch_file import TorchFile

STEMS = ("model", "diffusion_pytorch_model")
MOMENTS = re.compile(r"optim|exp_avg|moment", re.IGNORECASE)  # an optimizer's tensors, which may go by the names of the weights
SHOWN = 8  # parts of a file that one sentence names
LISTED = 20  # problems shown of one folder
# (first bytes, what it is, what the user can do)
OTHER_FORMATS = (
    (b"GGUF", "a GGUF file (quantised for llama.cpp)", "download the safetensors it was made from"),
    (b"GGML", "a GGML file (quantised for llama.cpp)", "download the safetensors it was made from"),
    (b"\x89HDF", "an HDF5 file", "convert it to safetensors"),
    (b"\x93NUMPY", "a numpy .npy file", "convert it to safetensors"),
    (b"version https://git-lfs", "a Git LFS pointer, not the weights", "run `git lfs pull` in its repository"),
    (b"<", "a web page, not the weights", "download it again, signed in if the model asks for it"),
    (
        b"\x80",
        "a pickle outside a zip archive (PyTorch before 1.6)",
        "load it with torch and torch.save it again, or convert it to safetensors",
    ),
    (b"\x1f\x8b", "compressed with gzip", "unpack it first"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd", "unpack it first"),
)
# (pattern of a file's name, what the folder holds then, what the user can do)
OTHER_FOLDERS = (
    (r"adapter_(config\.json|model\.safetensors)|pytorch_lora_weights\.safetensors", "a LoRA", "merge it into its base first"),
    (r"model_index\.json", "a whole diffusers pipeline", "give one of its folders, such as transformer or vae"),
    (r".*-of-.*\.safetensors.*", "shards without an index: copying or writing was interrupted", "fetch or write it again"),
    (r".*\.gguf", "GGUF files", "download the safetensors they were made from"),
    (r".*\.(bin|pth|pt|ckpt)", "PyTorch pickles", "give the file itself, or convert the folder to safetensors"),
    (r".*\.safetensors", "a safetensors file of another name", "give the file itself"),
)


def open_tensor_file(path: str | Path) -> TensorFile:
    """Opens a safetensors file or a zip file of torch.save, told apart by content, not by name.

    Raises:
      TensorFileError: anything else (GGUF, pickles outside a zip, LoRA matrices alone, ...) by name, or a damaged file.
    """
    path = Path(path)
    if path.is_dir():
        raise TensorFileError(f"{path}: is a folder, a file is wanted; give the file inside, or open the folder as shards")
    data = map_file(path)
    head = bytes(data[:32])
    if not head:
        raise TensorFileError(f"{path}: is empty; download it again")
    if head[8:9] == b"{":  # first, as a header length may look like any other mark; no zip archive has this byte here
        file: TensorFile = SafetensorsFile(path, data)
    elif head.startswith(b"PK"):
        file = TorchFile(path, data)
    else:
        for start, kind, remedy in OTHER_FORMATS:
            if head.startswith(start):
                raise TensorFileError(f"{path}: is {kind}; {remedy}")
        if path.suffix == ".safetensors":
            raise TensorFileError(f"{path}: does not start like a safetensors file; download it again")
        raise TensorFileError(f"{path}: is neither safetensors nor a zip file of torch.save; give one of these")
    if lora_only(list(file.infos)):
        raise TensorFileError(
            f"{path}: holds only LoRA matrices, such as {show(next(iter(file.infos)))}; merge them into their base model first"
        )
    return file


class TensorFiles:
    """The tensors of one or several files as one mapping.

    Attributes:
      infos: {name: TensorInfo}; `info.file` and `info.key` are those of the file.
      paths: {prefix of names: file or folder}, to say where a missing tensor should be.
      left: a sentence for each file of which a part is left out.
    """

    def __init__(self) -> None:
        self.infos: dict[str, TensorInfo] = {}
        self.paths: dict[str, Path] = {}
        self.left: list[str] = []
        self._files: dict[str, tuple[TensorFile, str]] = {}
        self._rows: dict[str, slice] = {}

    def add(self, file: TensorFile, prefix: str = "", known: str = "") -> TensorFiles:
        """Adds all tensors of a `TensorFile`, with `prefix` before their keys.

        Args:
          known: a key of the weights that the file must hold. Where it lies in a wrapper such as {"model": ...}, the wrapper is removed
            from the keys, and what lies beside it is left.
        """
        self.paths[prefix] = file.path
        wrapper = wrapper_of(file, known) if known else ""
        for key, info in file.infos.items():
            if key.startswith(wrapper):
                name = prefix + key.removeprefix(wrapper)
                self.infos[name], self._files[name] = info, (file, key)
        beside = {".".join(key.split(".")[: wrapper.count(".")]) for key in file.infos if not key.startswith(wrapper)}
        if known and (beside := sorted(beside | file.others)):
            more = f" and {len(beside) - SHOWN} more" if len(beside) > SHOWN else ""
            self.left.append(f"{file.path}: holds {', '.join(map(show, beside[:SHOWN]))}{more} beside the weights; left out")
        for name, key in file.tied.items():
            self.tie(prefix + name, prefix + key)
        return self

    def tie(self, name: str, other: str) -> None:
        """Reads `name` from the tensor `other` where only that one is stored: tied weights."""
        if name not in self.infos and other in self.infos:
            self.infos[name], self._files[name] = self.infos[other], self._files[other]

    def split(self, name: str, rows: Mapping[str, int]) -> None:
        """Replaces a tensor by tensors {name: number of its rows}, in their order: a projection that is stored fused with others."""
        info, file, at = self.infos.pop(name), self._files.pop(name), 0
        for part, n in rows.items():
            self.infos[part], self._files[part] = dataclasses.replace(info, shape=(n, *info.shape[1:])), file
            self._rows[part] = slice(at, at := at + n)

    def read(self, name: str) -> np.ndarray:
        """The tensor, as a view of the memory map."""
        file, key = self._files[name]
        return file.read(key)[self._rows.get(name, ...)]

    def release(self, name: str) -> None:
        """Frees the memory that reading the tensor filled."""
        file, key = self._files[name]
        file.release(key)

    def describe(self, name: str) -> str:
        """Names a tensor in a message, with its file."""
        return f"{self.infos[name].file}: {self.infos[name].key}"

    def describe_missing(self, name: str) -> str:
        """Names a tensor that should be there."""
        prefix = max((p for p in self.paths if name.startswith(p)), key=len, default="")
        return f"{self.paths.get(prefix, '')}: {name.removeprefix(prefix)}"


def wrapper_of(file: TensorFile, known: str) -> str:
    """What stands before the key `known` in a file: "" in a plain state_dict, otherwise the names of what it is wrapped in, and a dot.

    Raises:
      TensorFileError: several parts, such as the weights and their moving average, hold the key.
    """
    found = {key.removesuffix(known) for key in file.infos if key == known or key.endswith("." + known)}
    found = {wrapper for wrapper in found if not MOMENTS.search(wrapper)}
    if len(found) > 1 and "" not in found:
        parts = " and ".join(show(wrapper[:-1]) for wrapper in sorted(found))
        raise TensorFileError(f"{file.path}: {parts} each hold {known}; save the one to be read alone, as a plain state_dict")
    return min(found, default="")


def open_sharded(folder: str | Path) -> TensorFiles:
    """Opens a Hugging Face folder: its `*.safetensors.index.json` and the shards it names, or its single safetensors file.

    Raises:
      TensorFileError: not such a folder, or its index and shards disagree; every problem of the folder is listed.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise TensorFileError(f"{folder}: no such folder; give a folder with {STEMS[0]}.safetensors or its index")
    check_links(folder)
    index, out = find_index(folder), TensorFiles()
    for file in [open_tensor_file(find_file(folder))] if index is None else open_shards(index):
        out.add(file)
    out.paths[""] = folder
    return out


def open_shards(index: Path) -> list[TensorFile]:
    """The files that an index names, which must hold exactly the tensors that it lists."""
    weight_map = read_index(index)
    single = next((name for stem in STEMS if (index.parent / (name := f"{stem}.safetensors")).is_file()), None)
    if single not in (None, *weight_map.values()):
        raise TensorFileError(
            f"{index.parent}: holds {index.name} with its shards and {single} as well; remove the one that is out of date"
        )
    files, problems = {}, []
    for name in dict.fromkeys(weight_map.values()):
        try:
            files[name] = open_tensor_file(index.parent / name)
        except TensorFileError as e:
            problems.append(str(e))
    problems += disagreements(weight_map, files)
    if problems:
        more = [f"and {len(problems) - LISTED} more"] if len(problems) > LISTED else []
        raise TensorFileError("\n  ".join([f"{index}: {len(problems)} problems; download the folder again:", *problems[:LISTED], *more]))
    return list(files.values())


def disagreements(weight_map: dict[str, str], files: dict[str, TensorFile]) -> Iterator[str]:
    """One sentence for each key that is not in the shard that the index names; unreadable shards are left out."""
    for key, name in weight_map.items():
        if name in files and key not in files[name].infos:
            others = [other for other, file in files.items() if key in file.infos]
            yield f"{show(key)} is not in {name}, where the index places it" + (f", but in {others[0]}" if others else "")
    for name, file in files.items():
        for key in file.infos:
            owner = weight_map.get(key)
            if owner is None:
                yield f"{show(key)} is in {name}, the index does not list it"
            elif owner != name and owner in files and key in files[owner].infos:
                yield f"{show(key)} is in {name} as well as in {owner}, where the index places it"


def find_index(folder: Path) -> Path | None:
    """The folder's index; the usual names first, since a variant (such as fp16) may lie beside it."""
    for stem in STEMS:
        if (folder / f"{stem}.safetensors.index.json").is_file():
            return folder / f"{stem}.safetensors.index.json"
    found = sorted(folder.glob("*.safetensors.index.json"))
    if len(found) > 1:
        raise TensorFileError(f"{folder}: has {len(found)} indexes ({', '.join(p.name for p in found)}); leave the one to be read")
    return found[0] if found else None


def find_file(folder: Path) -> Path:
    """The folder's only safetensors file. TensorFileError says what a folder without one is instead."""
    single = [f"{stem}.safetensors" for stem in STEMS if (folder / f"{stem}.safetensors").is_file()]
    if len(single) > 1:
        raise TensorFileError(f"{folder}: holds {' and '.join(single)}; remove the one that is out of date")
    if single:
        return folder / single[0]
    names = sorted(p.name for p in folder.iterdir())
    for pattern, kind, remedy in OTHER_FOLDERS:
        for name in names:
            if re.fullmatch(pattern, name):
                raise TensorFileError(f"{folder}: holds {kind} ({show(name)}), not model.safetensors or an index of shards; {remedy}")
    raise TensorFileError(
        f"{folder}: holds no {' or '.join(s + '.safetensors' for s in STEMS)} and no index of shards; give the model's folder"
    )


def read_index(path: Path) -> dict[str, str]:
    """{key: shard file name} of an index."""
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(name, str) for name in weight_map.values()):
        raise TensorFileError(f"{path}: has no weight_map from keys to files; download it again")
    for key, name in weight_map.items():
        if not name or Path(name).name != name or "\0" in name:  # an index must not reach into other folders
            raise TensorFileError(f"{path}: places {show(key)} in {show(name)}, which is no file of this folder; download it again")
    return weight_map
