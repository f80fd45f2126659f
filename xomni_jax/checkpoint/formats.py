"""Which published format a directory has."""

from __future__ import annotations

from pathlib import Path

from xomni_jax.checkpoint.conversion import ConversionError
from xomni_jax.checkpoint.tensor_file import read_json

LORA_FILES = {"adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "pytorch_lora_weights.safetensors"}
TENSOR_FILES = {".pt", ".pth", ".ckpt", ".safetensors"}
SIGLIP = ("siglip", "siglip2", "siglip_vision_model", "siglip2_vision_model")


def is_released(path: str | Path) -> bool:
    """Whether to open a path as a published directory, that is, not as a model directory of ours."""
    names = ("config.json", "model_index.json")
    return Path(path).is_dir() and not (Path(path) / "model.json").is_file() and any((Path(path) / name).is_file() for name in names)


def detect_format(folder: str | Path) -> str:
    """ "xomni", "qwen2", "siglip2", "flux", or "file" for one that `released_files` may know.

    Raises:
      ConversionError: one sentence that names what it is instead.
    """
    folder = Path(folder)
    if not folder.exists():
        raise ConversionError(f"{folder}: no such directory; give the directory of a downloaded checkpoint")
    if folder.suffix in TENSOR_FILES and folder.is_file():
        return "file"
    if not folder.is_dir():
        raise ConversionError(f"{folder}: is a file; give the directory of a downloaded checkpoint")
    has = {path.name for path in folder.iterdir()}
    if "model.json" in has:
        raise ConversionError(f"{folder}: is already a model directory of this package; use it as it is")
    if has & LORA_FILES:
        raise ConversionError(f"{folder}: is a LoRA; merge it into its base model first")
    if any(name.endswith(".gguf") for name in has):
        raise ConversionError(f"{folder}: is a GGUF model (quantised for llama.cpp); give the safetensors it was made from")
    if "model_index.json" in has:
        name = read_json(folder / "model_index.json").get("_class_name")
        if not str(name).startswith("Flux"):
            raise ConversionError(f"{folder}: is a diffusers pipeline ({name}); only FLUX.1-dev's belongs to X-Omni")
        return "flux"
    if "config.json" not in has:
        if {"vae", "text_encoder_2"} & has:
            return "flux"
        raise ConversionError(f"{folder}: holds no config.json; give the directory of a downloaded checkpoint")
    data = read_json(folder / "config.json")
    if isinstance(data.get("vision_config"), dict) and "encoder" in data["vision_config"] or data.get("model_type") == "x-omni":
        return "xomni"
    if data.get("model_type") in SIGLIP:
        return "siglip2"
    if data.get("model_type") == "qwen2":
        return "qwen2"
    kind = data.get("model_type") or data.get("_class_name") or "model of an unnamed type"
    raise ConversionError(f"{folder}: is a {kind}; X-Omni, Qwen2.5 (qwen2), SigLIP2 and FLUX.1-dev are read")
