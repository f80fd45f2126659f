"""Reads the released layout as its documentation describes it, by json and pickle: nothing of the package's readers."""

import json
import pickle
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np

DTYPES = {"F32": np.float32, "BF16": ml_dtypes.bfloat16, "FloatStorage": np.float32, "BFloat16Storage": ml_dtypes.bfloat16}


def read_json(path: Path) -> dict:
    return json.loads(path.read_text())


def safetensors(path: Path) -> dict[str, np.ndarray]:
    """The tensors of one .safetensors file."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header.pop("__metadata__")
    return {
        key: np.frombuffer(data[start + row["data_offsets"][0] : start + row["data_offsets"][1]], DTYPES[row["dtype"]]).reshape(
            row["shape"]
        )
        for key, row in header.items()
    }


def torch_file(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a plain state_dict that torch.save wrote."""
    with zipfile.ZipFile(path) as archive:
        (top,) = {name.split("/")[0] for name in archive.namelist()}

        class Loader(pickle.Unpickler):
            def find_class(self, module, name):
                if (module, name) == ("collections", "OrderedDict"):
                    return dict
                assert module in ("torch", "torch._utils"), (module, name)
                return (
                    name if module == "torch" else lambda storage, offset, shape, *_: storage[offset:][: int(np.prod(shape))].reshape(shape)
                )

            def persistent_load(self, pid):
                return np.frombuffer(archive.read(f"{top}/data/{pid[2]}"), DTYPES[pid[1]])

        return Loader(archive.open(f"{top}/data.pkl")).load()


def folder(path: Path, stem: str = "model") -> dict[str, np.ndarray]:
    """The tensors of a folder: the shards of its index, or its one file."""
    index = path / f"{stem}.safetensors.index.json"
    names = set(read_json(index)["weight_map"].values()) if index.is_file() else {f"{stem}.safetensors"}
    return {key: tensor for name in sorted(names) for key, tensor in safetensors(path / name).items()}


def whole(path: Path, flux: Path | None = None) -> dict[str, dict[str, np.ndarray]]:
    """{part: tensors} of a released directory and of FLUX.1-dev's, which an export holds in its folder `flux`."""
    vision, flux = read_json(path / "config.json")["vision_config"], path / "flux" if flux is None else flux
    parts = {"": folder(path), "mmdit": folder(path / vision["decoder"]["model_path"], "diffusion_pytorch_model")}
    for key in ("siglip_path", "projector_path"):
        file = path / vision["encoder"][key]
        parts[key] = safetensors(file) if file.suffix == ".safetensors" else torch_file(file)
    if flux.is_dir():
        parts |= {name: folder(flux / name) for name in ("text_encoder", "text_encoder_2")}
        parts["vae"] = folder(flux / "vae", "diffusion_pytorch_model")
    return parts


def configs(path: Path, flux: Path | None = None) -> dict[str, dict]:
    """{file: its JSON} of all configs."""
    flux = path / "flux" if flux is None else flux
    decoder = read_json(path / "config.json")["vision_config"]["decoder"]["model_path"]
    files = {"config.json": path / "config.json", "mmdit": path / decoder / "config.json", "model_index": flux / "model_index.json"}
    files |= {name: flux / name / "config.json" for name in ("vae", "text_encoder", "text_encoder_2")}
    return {name: read_json(file) for name, file in (files | {"scheduler": flux / "scheduler" / "scheduler_config.json"}).items()}
