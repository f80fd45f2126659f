"""A model directory back into the released layout, by the tables that read it, one tensor at a time.

TO/config.json, model*.safetensors, tokenizer files     the unified transformer
TO/<siglip_path>, TO/<projector_path>                   the image tokenizer, as safetensors or .pth
TO/<decoder.model_path>/                                the MMDiT, as diffusers saves it
TO/flux/                                                what belongs to FLUX.1-dev: vae, text encoders, their tokenizers, scheduler
"""

from __future__ import annotations

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
from xomni_jax.checkpoint.tensors import LazyTensor
from xomni_jax.checkpoint.torch_file import write_torch_file
from xomni_jax.models.registry import COMPONENTS
from xomni_jax.models.siglip_vq import SigLIPVQConfig

Say = Callable[[str], None]
# (released name, width, layers): a ViT of another size gets a name that says its sizes, and its head count beside it.
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
    """Writes TO, which appears when all of it is there.

    Args:
      model: a model directory. dtype: a key of `convert.DTYPES`. only: a key of `released.PARTS`.
      shard_bytes: the most that one safetensors file of the transformer, MMDiT or T5 holds.
      pth: the image tokenizer as .pth, which `torch.load(weights_only=True)` reads, instead of safetensors.

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
        job = _Export(Path(model), part, DTYPES[dtype], shard_bytes, pth, say)
        job.run(PARTS[only] if only else ALL)
        shutil.rmtree(job.spill)
        if to.is_dir():
            to.rmdir()
        os.replace(part, to)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


class _Export:
    """One export; `configs` of the parts end up in one config.json."""

    def __init__(self, model: Path, folder: Path, dtype: np.dtype | None, shard_bytes: int, pth: bool, say: Say):
        self.model, self.folder, self.dtype, self.shard_bytes, self.pth, self.say = model, folder, dtype, shard_bytes, pth, say
        self.data = read_model_json(model)
        self.spill = folder / ".unpacked"
        self.spill.mkdir()

    def run(self, wanted: Sequence[str]) -> None:
        """Writes every part that the model has."""
        have = [name for name in wanted if name in self.data["components"]]
        if not have:
            raise CheckpointError(f"{self.model}: has no {' or '.join(wanted)} (it has {', '.join(sorted(self.data['components']))})")
        if {"transformer", "siglip_vq", "mmdit"} & set(have):
            self._xomni(have)
        flux = {"autoencoder": self._vae, "t5": self._t5, "clip": self._clip}
        for name in flux:
            if name in have:
                flux[name]()
        if {"autoencoder", "t5", "clip"} & set(have):
            self._scheduler()

    # ---- pieces ----
    def config(self, name: str) -> Any:
        """Config dataclass of a component."""
        return config_from_json(COMPONENTS[name].config, self.data["components"][name]["config"], f"{self.model}/model.json")

    def original(self, name: str) -> dict[str, Any]:
        """The config.json it was converted from, if it was; training keeps what it did not train."""
        return dict(self.data["components"][name].get("note", {}).get("released_config", {}))

    def settings(self, name: str) -> dict[str, Any]:
        """Settings of model.json."""
        return self.data.get("settings", {}).get(name, {})

    def tensors(self, name: str, table: NameTable) -> dict[str, LazyTensor]:
        """{released key: tensor}, read when written."""
        stored = OrbaxReader(self.model / name, self.spill)
        missing = sorted({rule.target for rule in table.rules} - set(stored.arrays))
        if missing:
            raise CheckpointError(f"{self.model / name}: lacks {missing[0]!r}; it belongs to another configuration")
        return {rule.source: lazy(stored, rule, self.dtype) for rule in table.rules}

    def write(self, folder: Path, name: str, table: NameTable, stem: str, config: dict[str, Any]) -> None:
        """One component in a folder of its own."""
        files = write_safetensors(folder, self.tensors(name, table), self.shard_bytes, stem)
        write_json(folder / "config.json", config)
        self.say(f"{name}: {len(table.rules)} tensors in {len(files)} file{'s' * (len(files) > 1)}")

    def dtype_name(self, name: str) -> str:
        """Of most of the weights that are written."""
        return self.dtype.name if self.dtype is not None else np.dtype(self.config(name).param_dtype).name

    # ---- X-Omni ----
    def _xomni(self, have: Sequence[str]) -> None:
        config: dict[str, Any] = {}
        vision: dict[str, Any] = {}
        if "transformer" in self.data["components"]:
            config = self.original("transformer")
            vision = dict(config.pop("vision_config", {}))
        if "transformer" in have:
            config = config | configs.write_transformer(self.config("transformer")) | {"torch_dtype": self.dtype_name("transformer")}
            files = write_safetensors(
                self.folder, self.tensors("transformer", table := transformer.table(self.config("transformer"))), self.shard_bytes
            )
            self.say(f"transformer: {len(table.rules)} tensors in {len(files)} file{'s' * (len(files) > 1)}")
            if (self.model / "tokenizer").is_dir():
                shutil.copytree(self.model / "tokenizer", self.folder, dirs_exist_ok=True)
        else:
            config = {}
        if "siglip_vq" in have:
            self._image_tokenizer(vision)
        if "mmdit" in have:
            self._decoder(vision)
        if vision:
            run = self.config("mmdit" if "mmdit" in have else "siglip_vq").dtype if self.dtype is None else self.dtype
            vision.setdefault("dtype", np.dtype(run).name)
            config["vision_config"] = vision
        write_json(self.folder / "config.json", config)

    def _image_tokenizer(self, vision: dict[str, Any]) -> None:
        c: SigLIPVQConfig = self.config("siglip_vq")
        encoder = dict(vision.get("encoder", {}))
        name = next(
            (n for n, width, layers in RELEASED_VITS if (c.width, c.layers, c.heads, c.groups) == (width, layers, HEADS[n], 32)), None
        )
        if name is None and encoder.get("siglip_name") in HEADS and HEADS[encoder["siglip_name"]] == c.heads and c.groups == 32:
            name = encoder["siglip_name"]
        encoder |= {"siglip_name": name or f"siglip_{c.width}_{c.layers}_patch{c.patch}"} | (
            {} if name else {"num_heads": c.heads, "num_groups": c.groups}
        )
        encoder |= {"z_channels": c.width, "codebook_size": c.codebook_size, "codebook_dim": c.code_width}
        suffix = ".pth" if self.pth else ".safetensors"
        for key, default, table in (
            ("siglip_path", "tokenizer_vit/siglip.pth", siglip_vq.vit_table(c)),
            ("projector_path", "tokenizer_vit/projector.pth", siglip_vq.projector_table(c)),
        ):
            path = Path(encoder.get(key, default)).with_suffix(suffix)
            encoder[key] = str(path)
            target, tensors = self.folder / path, self.tensors("siglip_vq", table)
            target.parent.mkdir(parents=True, exist_ok=True)
            if self.pth:
                write_torch_file(target, tensors)
            else:
                write_safetensors(target.parent, tensors, 2**62, target.stem)
            self.say(f"siglip_vq: {len(tensors)} tensors in {path}")
        vision["encoder"] = encoder
        limits = {k: v for k, v in self.settings("preprocess").items() if k != "dtype"}
        vision["transform"] = vision.get("transform", {}) | {"patch_size": c.patch} | limits

    def _decoder(self, vision: dict[str, Any]) -> None:
        c, decoder = self.config("mmdit"), dict(vision.get("decoder", {}))
        decoder.setdefault("model_path", "mmdit")
        patch = self.config("siglip_vq").patch if "siglip_vq" in self.data["components"] else 16
        decoder.setdefault("upscale_factor", patch)
        run = self.settings("decode")
        decoder |= {key: run[ours] for key, ours in (("num_inference_steps", "steps"), ("cfg_scale", "guidance")) if ours in run}
        config = self.original("mmdit") | configs.write_mmdit(c)
        self.write(self.folder / decoder["model_path"], "mmdit", mmdit.table(c), "diffusion_pytorch_model", config)
        if c.prediction != "velocity":
            self.say("mmdit: its last layer gives data, not velocity; diffusers would have to compute (latents - output) / sigma")
        vision["decoder"] = decoder

    # ---- FLUX.1-dev ----
    def _vae(self) -> None:
        c = self.config("autoencoder")
        if c.kind != "kl":
            self.say(f"autoencoder: the {c.kind} kind has no weights and no released form; left out")
            return
        config = self.original("autoencoder") | configs.write_vae(c)
        self.write(self.folder / "flux" / "vae", "autoencoder", autoencoder.table(c), "diffusion_pytorch_model", config)

    def _t5(self) -> None:
        c = self.config("t5")
        config = self.original("t5") | configs.write_t5(c) | {"torch_dtype": self.dtype_name("t5")}
        self.write(self.folder / "flux" / "text_encoder_2", "t5", t5.table(c), "model", config)
        self._tokenizer("t5", "tokenizer_2")

    def _clip(self) -> None:
        c, original = self.config("clip"), self.original("clip")
        config = original | configs.write_clip(c) | {"torch_dtype": self.dtype_name("clip")}
        # 2 in OpenAI's files means the largest id; what was read is given back.
        config |= {key: original[key] for key in ("eos_token_id", "bos_token_id", "pad_token_id", "projection_dim") if key in original}
        self.write(self.folder / "flux" / "text_encoder", "clip", clip.table(c), "model", config)
        self._tokenizer("clip", "tokenizer")

    def _tokenizer(self, name: str, folder: str) -> None:
        if (self.model / f"tokenizer_{name}").is_dir():
            shutil.copytree(self.model / f"tokenizer_{name}", self.folder / "flux" / folder)

    def _scheduler(self) -> None:
        (self.folder / "flux" / "scheduler").mkdir(parents=True, exist_ok=True)
        write_json(self.folder / "flux" / "scheduler" / "scheduler_config.json", configs.write_scheduler(self.settings("decode")))


def lazy(stored: OrbaxReader, rule: Rule, dtype: np.dtype | None) -> LazyTensor:
    """One released tensor, made from its place in a stored parameter when it is written."""
    array = stored.arrays[rule.target]
    kind, place = np.dtype(array.dtype if dtype is None else dtype), rule.place(len(array.shape))
    shape = rule.transform.to_torch(np.broadcast_to(np.int8(0), tuple(array.shape))[place]).shape

    def make() -> np.ndarray:
        value = stored.read(rule.target, ... if rule.layer is None else rule.layer)
        if rule.part is not None:
            value = value[place[1:] if rule.layer is not None else place]
        value = rule.transform.to_torch(value)
        if value.dtype == kind and value.flags.c_contiguous:
            return value
        out = np.empty(shape, kind)
        copy_strided(out, value)
        return out

    return LazyTensor(kind, shape, make)
