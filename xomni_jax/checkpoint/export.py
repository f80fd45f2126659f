"""Writes a model directory in the released layout, one tensor at a time, by the tables that convert it.

TO/config.json, model*.safetensors, tokenizer files     the unified transformer
TO/<siglip_path>, TO/<projector_path>                   the image tokenizer, as safetensors or .pth
TO/<decoder.model_path>/                                the MMDiT, as diffusers saves it
TO/flux/                                                what belongs to FLUX.1-dev: vae, text encoders, their tokenizers, scheduler
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xomni_jax.checkpoint import released_configs as configs
from xomni_jax.checkpoint.conversion import ConversionError, NameTable, Rule
from xomni_jax.checkpoint.conversion_plan import DTYPES
from xomni_jax.checkpoint.names import autoencoder, clip, mmdit, siglip_vq, t5, transformer
from xomni_jax.checkpoint.orbax_reader import OrbaxReader
from xomni_jax.checkpoint.param_reader import copy_strided
from xomni_jax.checkpoint.released import ALL, HEADS, PARTS
from xomni_jax.checkpoint.safetensors_file import write_safetensors
from xomni_jax.checkpoint.store import CheckpointError, config_from_json, read_model_json, write_json
from xomni_jax.checkpoint.tensor_file import LazyTensor
from xomni_jax.checkpoint.torch_file import write_torch_file
from xomni_jax.models.registry import COMPONENTS
from xomni_jax.models.siglip_vq import SigLIPVQConfig

Say = Callable[[str], None]
# (released name, width, layers). A ViT of another size gets a name made of its sizes, and its head count in the config.
RELEASED_VITS = (("siglip2_giant_patch16_384", 1536, 40), ("siglip_so400m_patch16_384", 1152, 27))


def export(
    model: str | Path,
    to: str | Path,
    dtype: str = "keep",
    only: str | None = None,
    shard_bytes: int = 5_000_000_000,
    pth: bool = False,
    say: Say = print,
) -> None:
    """Writes TO, which appears when it is complete.

    Args:
      model: a model directory. dtype: a key of `conversion_plan.DTYPES`. only: a key of `released.PARTS`.
      shard_bytes: the most that one safetensors file of the transformer, MMDiT or T5 holds.
      pth: writes the image tokenizer as .pth, which `torch.load(weights_only=True)` reads, instead of safetensors.

    Raises:
      CheckpointError, ConversionError: TO is untouched.
    """
    to = Path(to).absolute()
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise ConversionError(f"{to}: is there already; choose another --to")
    part = to.with_name(to.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        job = _Export(Path(model), part, DTYPES[dtype], shard_bytes, pth, say, read_model_json(model))
        job.spill.mkdir()
        job.run(PARTS[only] if only else ALL)
        shutil.rmtree(job.spill)
        if to.is_dir():
            to.rmdir()
        os.replace(part, to)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


@dataclasses.dataclass
class _Export:
    """One export of `model`, described by model.json's `data`, into `folder`."""

    model: Path
    folder: Path
    dtype: np.dtype | None
    shard_bytes: int
    pth: bool
    say: Say
    data: dict[str, Any]

    def run(self, wanted: Sequence[str]) -> None:
        """Writes every wanted component that the model has."""
        have = {name for name in wanted if name in self.data["components"]}
        if not have:
            raise CheckpointError(f"{self.model}: has no {' or '.join(wanted)} (it has {', '.join(sorted(self.data['components']))})")
        if have & {"transformer", "siglip_vq", "mmdit"}:
            self._xomni(have)
        for name, write in (("autoencoder", self._vae), ("t5", self._t5), ("clip", self._clip)):
            if name in have:
                write()
        if have & {"autoencoder", "t5", "clip"}:
            (self.folder / "flux" / "scheduler").mkdir(parents=True, exist_ok=True)
            write_json(self.folder / "flux" / "scheduler" / "scheduler_config.json", configs.write_scheduler(self._settings("decode")))

    @property
    def spill(self) -> Path:
        """See `OrbaxReader`."""
        return self.folder / ".unpacked"

    def _config(self, name: str) -> Any:
        return config_from_json(COMPONENTS[name].config, self.data["components"][name]["config"], f"{self.model}/model.json")

    def _original(self, name: str) -> dict[str, Any]:
        """The config.json that the component was converted from, or {}; training keeps that of what it does not train."""
        return dict(self.data["components"][name].get("note", {}).get("released_config", {}))

    def _settings(self, name: str) -> dict[str, Any]:
        return self.data.get("settings", {}).get(name, {})

    def _dtype_name(self, name: str) -> str:
        """Dtype name of the exported weights."""
        return self.dtype.name if self.dtype is not None else np.dtype(self._config(name).param_dtype).name

    def _tensors(self, name: str, table: NameTable) -> dict[str, LazyTensor]:
        """{released key: tensor}, read when written."""
        stored = OrbaxReader(self.model / name, self.spill)
        missing = sorted({rule.target for rule in table.rules} - set(stored.arrays))
        if missing:
            raise CheckpointError(f"{self.model / name}: lacks {missing[0]!r}; it belongs to another configuration")
        return {rule.source: lazy_tensor(stored, rule, self.dtype) for rule in table.rules}

    def _write(self, folder: Path, name: str, table: NameTable, stem: str, config: dict[str, Any] | None = None) -> None:
        """One component's safetensors, and its config if given."""
        files = write_safetensors(folder, self._tensors(name, table), self.shard_bytes, stem)
        if config is not None:
            write_json(folder / "config.json", config)
        self.say(f"{name}: {len(table.rules)} tensors in {len(files)} file{'s' * (len(files) > 1)}")

    def _copy_tokenizer(self, name: str, target: Path) -> None:
        if (self.model / name).is_dir():
            shutil.copytree(self.model / name, target, dirs_exist_ok=True)

    # ---- X-Omni ----
    def _xomni(self, have: set[str]) -> None:
        original = self._original("transformer") if "transformer" in self.data["components"] else {}
        vision, config = dict(original.pop("vision_config", {})), {}
        if "transformer" in have:
            c = self._config("transformer")
            config = original | configs.write_transformer(c) | {"torch_dtype": self._dtype_name("transformer")}
            self._write(self.folder, "transformer", transformer.table(c), "model")
            self._copy_tokenizer("tokenizer", self.folder)
        if "siglip_vq" in have:
            self._image_tokenizer(vision)
        if "mmdit" in have:
            self._decoder(vision)
        if vision:
            run = self._config("mmdit" if "mmdit" in have else "siglip_vq").dtype if self.dtype is None else self.dtype
            vision.setdefault("dtype", np.dtype(run).name)
            config["vision_config"] = vision
        write_json(self.folder / "config.json", config)

    def _image_tokenizer(self, vision: dict[str, Any]) -> None:
        c: SigLIPVQConfig = self._config("siglip_vq")
        encoder = dict(vision.get("encoder", {}))
        sizes = (c.width, c.layers, c.heads, c.groups)
        name = next((n for n, width, layers in RELEASED_VITS if sizes == (width, layers, HEADS[n], 32)), None)
        if name is None and HEADS.get(encoder.get("siglip_name")) == c.heads and c.groups == 32:
            name = encoder["siglip_name"]
        if name is None:
            encoder |= {"num_heads": c.heads, "num_groups": c.groups}
        encoder["siglip_name"] = name or f"siglip_{c.width}_{c.layers}_patch{c.patch}"
        encoder |= {"z_channels": c.width, "codebook_size": c.codebook_size, "codebook_dim": c.code_width}
        for key, default, table in (
            ("siglip_path", "tokenizer_vit/siglip.pth", siglip_vq.vit_table(c)),
            ("projector_path", "tokenizer_vit/projector.pth", siglip_vq.projector_table(c)),
        ):
            path = Path(encoder.get(key, default)).with_suffix(".pth" if self.pth else ".safetensors")
            encoder[key] = str(path)
            target, tensors = self.folder / path, self._tensors("siglip_vq", table)
            if self.pth:
                write_torch_file(target, tensors)
            else:
                write_safetensors(target.parent, tensors, 2**62, target.stem)
            self.say(f"siglip_vq: {len(tensors)} tensors in {path}")
        vision["encoder"] = encoder
        limits = {k: v for k, v in self._settings("preprocess").items() if k != "dtype"}
        vision["transform"] = vision.get("transform", {}) | {"patch_size": c.patch} | limits

    def _decoder(self, vision: dict[str, Any]) -> None:
        c, decoder = self._config("mmdit"), dict(vision.get("decoder", {}))
        decoder.setdefault("model_path", "mmdit")
        decoder.setdefault("upscale_factor", self._config("siglip_vq").patch if "siglip_vq" in self.data["components"] else 16)
        run = self._settings("decode")
        decoder |= {key: run[ours] for key, ours in (("num_inference_steps", "steps"), ("cfg_scale", "guidance")) if ours in run}
        config = self._original("mmdit") | configs.write_mmdit(c)
        self._write(self.folder / decoder["model_path"], "mmdit", mmdit.table(c), "diffusion_pytorch_model", config)
        if c.prediction != "velocity":
            self.say("mmdit: its last layer gives data, not velocity; diffusers would have to compute (latents - output) / sigma")
        vision["decoder"] = decoder

    # ---- FLUX.1-dev ----
    def _vae(self) -> None:
        c = self._config("autoencoder")
        if c.kind != "kl":
            self.say(f"autoencoder: the {c.kind} kind has no weights and no released form; left out")
            return
        config = self._original("autoencoder") | configs.write_vae(c)
        self._write(self.folder / "flux" / "vae", "autoencoder", autoencoder.table(c), "diffusion_pytorch_model", config)

    def _t5(self) -> None:
        c = self._config("t5")
        config = self._original("t5") | configs.write_t5(c) | {"torch_dtype": self._dtype_name("t5")}
        self._write(self.folder / "flux" / "text_encoder_2", "t5", t5.table(c), "model", config)
        self._copy_tokenizer("tokenizer_t5", self.folder / "flux" / "tokenizer_2")

    def _clip(self) -> None:
        c, original = self._config("clip"), self._original("clip")
        config = original | configs.write_clip(c) | {"torch_dtype": self._dtype_name("clip")}
        # The original values are restored, because OpenAI's files write 2 for the largest id.
        config |= {key: original[key] for key in ("eos_token_id", "bos_token_id", "pad_token_id", "projection_dim") if key in original}
        self._write(self.folder / "flux" / "text_encoder", "clip", clip.table(c), "model", config)
        self._copy_tokenizer("tokenizer_clip", self.folder / "flux" / "tokenizer")


def lazy_tensor(stored: OrbaxReader, rule: Rule, dtype: np.dtype | None) -> LazyTensor:
    """One released tensor, read from its part of a stored parameter when it is written."""
    array = stored.arrays[rule.target]
    dtype, index = np.dtype(array.dtype if dtype is None else dtype), rule.place(len(array.shape))
    shape = rule.transform.to_torch(np.broadcast_to(np.int8(0), tuple(array.shape))[index]).shape

    def make() -> np.ndarray:
        value = stored.read(rule.target, ... if rule.layer is None else rule.layer)
        if rule.part is not None:
            value = value[index[1:] if rule.layer is not None else index]
        value = rule.transform.to_torch(value)
        if value.dtype == dtype and value.flags.c_contiguous:
            return value
        out = np.empty(shape, dtype)
        copy_strided(out, value)
        return out

    return LazyTensor(dtype, shape, make)
