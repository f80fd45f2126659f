"""Writes a model directory in the released layout, one tensor at a time, by the tables that convert it.

TO/config.json, model*.safetensors, tokenizer files     the unified transformer
TO/<siglip_path>, TO/<projector_path>                   the image tokenizer
TO/<decoder.model_path>/                                the MMDiT, as diffusers saves it
TO/flux/                                                FLUX.1-dev as diffusers saves a FluxPipeline; its transformer is a link to the MMDiT

The configs are those that the model was converted from, as far as they still describe it; what training changed is changed in them.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from xomni_jax.checkpoint import released_configs as configs
from xomni_jax.checkpoint.conversion import ConversionError, NameTable, Rule
from xomni_jax.checkpoint.conversion_plan import DTYPES
from xomni_jax.checkpoint.names import autoencoder, clip, mmdit, siglip_vq, t5, transformer
from xomni_jax.checkpoint.official import HEADS, limits, vit_name
from xomni_jax.checkpoint.orbax_reader import OrbaxReader
from xomni_jax.checkpoint.param_reader import copy_strided
from xomni_jax.checkpoint.released import ALL, PARTS
from xomni_jax.checkpoint.released_configs import ConfigFile, changed, restored
from xomni_jax.checkpoint.safetensors_file import write_safetensors
from xomni_jax.checkpoint.store import CheckpointError, config_from_json, read_model_json, write_json
from xomni_jax.checkpoint.tensor_file import LazyTensor, check_space
from xomni_jax.checkpoint.torch_file import write_torch_file
from xomni_jax.data.preprocess import ImageLimits
from xomni_jax.models.registry import COMPONENTS
from xomni_jax.sampling.decoder import DecodeConfig

Say = Callable[[str], None]
SECTIONS = {"encoder": "siglip_vq", "decoder": "mmdit"}  # of vision_config
# Component of FLUX.1-dev -> (its folder, stem of its files, table, config there, config of ours).
FLUX = {
    "autoencoder": ("vae", "diffusion_pytorch_model", autoencoder.table, configs.read_vae, configs.write_vae),
    "t5": ("text_encoder_2", "model", t5.table, configs.read_t5, configs.write_t5),
    "clip": ("text_encoder", "model", clip.table, configs.read_clip, configs.write_clip),
}


def export(
    model: str | Path,
    to: str | Path,
    dtype: str = "keep",
    only: str | None = None,
    shard_bytes: int = 5_000_000_000,
    safetensors: bool = False,
    say: Say = print,
) -> None:
    """Writes TO, which appears when it is complete.

    Args:
      model: a model directory. dtype: a key of `conversion_plan.DTYPES`. only: a key of `released.PARTS`.
      shard_bytes: the most that one safetensors file of the transformer, MMDiT or T5 holds.
      safetensors: writes the image tokenizer as safetensors instead of the released torch files, which the published code loads.

    Raises:
      CheckpointError, ConversionError: TO is untouched.
    """
    to = Path(to).resolve()
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise ConversionError(f"{to}: is there already; choose another --to")
    part = to.with_name(to.name + ".part")
    plan = _Export(Path(model), part / ".unpacked", DTYPES[dtype], safetensors, PARTS[only] if only else ALL)
    check_space(to, plan.nbytes + 2**20)
    with _whole_or_not_at_all(part, to):
        plan.write(part, shard_bytes, say)


@contextlib.contextmanager
def _whole_or_not_at_all(part: Path, to: Path) -> Iterator[None]:
    """Renames `part`, in which the block writes, to `to` at the end; removes it after an error."""
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield
        if to.is_dir():
            to.rmdir()
        os.replace(part, to)
    except OSError as e:
        if e.errno != errno.ENOSPC:
            raise
        raise ConversionError(f"{to}: the disk is full; free some space or choose another disk") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


class _Export:
    """What is written where: tensors, configs and copies by their path below TO. Nothing is written before `write`."""

    def __init__(self, model: Path, spill: Path, dtype: np.dtype | None, safetensors: bool, wanted: tuple[str, ...]):
        self.model, self.spill, self.dtype, self.safetensors, data = model, spill, dtype, safetensors, read_model_json(model)
        where = f"{model}/model.json"
        self.all = {name: config_from_json(COMPONENTS[name].config, c["config"], where) for name, c in data["components"].items()}
        self.components = {name: self.all[name] for name in wanted if name in self.all}
        if not self.components:
            raise CheckpointError(f"{model}: has no {' or '.join(wanted)} (it has {', '.join(sorted(self.all))})")
        self.released, self.settings = data.get("released", {}), data.get("settings", {})
        self.decode = config_from_json(DecodeConfig, self.settings.get("decode", {}), where)
        self.tensors: dict[Path, tuple[str, dict[str, LazyTensor]]] = {}
        self.configs: dict[Path, dict[str, Any]] = {}
        self.copies: dict[Path, Path] = {}
        self.linked: Path | None = None  # the MMDiT's folder, if it is the transformer of a FluxPipeline
        self.notes: list[str] = []
        if (ar := self.components.get("transformer")) and not (ar.qkv_bias and not ar.grid_columns):
            raise CheckpointError(f"{model}: its transformer is not X-Omni's, whose layout is the only one written; it cannot be exported")
        if {"transformer", "siglip_vq", "mmdit"} & set(self.components):
            self._xomni()
        if set(FLUX) & set(self.components):
            self._flux()
        if told := limits(self.components, self.decode):
            self.notes.append(told)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for _, tensors in self.tensors.values() for tensor in tensors.values())

    def write(self, folder: Path, shard_bytes: int, say: Say) -> None:
        """Writes all of it."""
        self.spill.mkdir()
        for path, source in self.copies.items():
            shutil.copytree(source, folder / path, dirs_exist_ok=True)
        for path, (name, tensors) in self.tensors.items():
            files = [folder / path]
            if path.suffix != ".safetensors":
                write_torch_file(*files, tensors)
            else:
                limit = shard_bytes if name != "siglip_vq" else self.nbytes  # config.json names one file each
                files = write_safetensors(files[0].parent, tensors, limit, path.stem)
            say(f"{name}: {len(tensors)} tensors in {path if len(files) == 1 else f'{len(files)} files'}")
        for path, config in self.configs.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            write_json(folder / path, config)
        if self.linked:
            (folder / "flux" / "transformer").symlink_to(Path("..") / self.linked)
        shutil.rmtree(self.spill)
        for note in self.notes:
            say(note)

    def _add(self, name: str, path: Path, table: NameTable) -> None:
        """The tensors of a table, read when they are written."""
        stored = OrbaxReader(self.model / name, self.spill)
        missing = sorted({rule.target for rule in table.rules} - set(stored.arrays))
        if missing:
            raise CheckpointError(f"{self.model / name}: lacks {missing[0]!r}; it belongs to another configuration")
        self.tensors[path] = name, {rule.source: lazy_tensor(stored, rule, self.dtype) for rule in table.rules}

    def _restored(self, name: str, original: dict[str, Any], read: Callable, write: Callable) -> dict[str, Any]:
        """A component's config, which names the dtype of its weights if it is one of transformers."""
        config = restored(original, self.components[name], read, write)
        key = "dtype" if "dtype" in config else "torch_dtype"
        dtype = np.dtype(self.components[name].param_dtype) if self.dtype is None else self.dtype
        return changed(config, {key: dtype.name}) if key in config or "model_type" in config and not original else config

    # ---- X-Omni ----
    def _xomni(self) -> None:
        original, config = self.released.get("xomni", {}), {}
        vision = dict(original.get("vision_config", {}))
        if "transformer" in self.components:
            language = {key: value for key, value in original.items() if key not in ("vision_config", "xomni_jax")}
            config = self._restored("transformer", language, configs.read_transformer, configs.write_transformer)
            self._add("transformer", Path("model.safetensors"), transformer.table(self.components["transformer"]))
            self._copy_tokenizer("tokenizer", Path())
        else:
            vision = {key: value for key, value in vision.items() if key not in ("encoder", "transform", "decoder")}
        if "siglip_vq" in self.components:
            self._image_tokenizer(vision, original.get("vision_config", {}))
        if "mmdit" in self.components:
            self._decoder(vision, original.get("vision_config", {}))
        if left := [section for section, name in SECTIONS.items() if section in vision and name not in self.components]:
            self.notes.append(f"config.json: vision_config.{' and '.join(left)} name files that are not part of this export")
        if vision:
            run = self.components.get("mmdit", self.components.get("siglip_vq"))
            config["vision_config"] = {"dtype": np.dtype(run.dtype).name if run else "bfloat16"} | vision
        pooled = self.all["clip"].max_length if "clip" in self.all else DecodeConfig.pooled_length
        if own := configs.write_own(self.decode, pooled, self.settings.get("size", {})):
            config["xomni_jax"] = own
        self.configs[Path("config.json")] = config

    def _copy_tokenizer(self, name: str, path: Path) -> None:
        if (self.model / name).is_dir():
            self.copies[path] = self.model / name

    def _image_tokenizer(self, vision: dict[str, Any], original: dict[str, Any]) -> None:
        c, encoder = self.components["siglip_vq"], dict(original.get("encoder", {}))
        encoder = changed(encoder, {"z_channels": c.width, "codebook_size": c.codebook_size, "codebook_dim": c.code_width})
        name = vit_name(c) or encoder.get("siglip_name")
        if c.heads != HEADS.get(name) or c.groups != 32:  # a name that says the head count, or the counts
            name = f"siglip_{c.width}_{c.layers}_patch{c.patch}"
            encoder |= {"num_heads": c.heads, "num_groups": c.groups}
        encoder["siglip_name"] = name
        section = ConfigFile(Path("config.json"), encoder, "vision_config.encoder.")
        for key, default, table in (
            ("siglip_path", "tokenizer_vit/siglip.pth", siglip_vq.vit_table(c)),
            ("projector_path", "tokenizer_vit/projector.pth", siglip_vq.projector_table(c)),
        ):
            path = section.path_within(key, default)
            if self.safetensors != (path.suffix == ".safetensors"):
                path = path.with_suffix(".safetensors" if self.safetensors else ".pth")
                encoder[key] = str(path)
            encoder.setdefault(key, str(path))
            self._add("siglip_vq", path, table)
        vision["encoder"] = encoder
        transform = original.get("transform", {})
        limits = config_from_json(ImageLimits, self.settings.get("preprocess", {}) | {"patch_size": c.patch}, f"{self.model}/model.json")
        usual = vars(ImageLimits()) if transform else {}
        vision["transform"] = transform | {key: n for key, n in vars(limits).items() if transform.get(key, usual.get(key)) != n}

    def _decoder(self, vision: dict[str, Any], original: dict[str, Any]) -> None:
        c = self.components["mmdit"]
        upscale = self.all["siglip_vq"].patch if "siglip_vq" in self.all else 16
        decoder = {"model_path": "mmdit", "upscale_factor": upscale} | original.get("decoder", {})
        vision["decoder"] = changed(decoder, configs.write_decode(self.decode))
        folder = ConfigFile(Path("config.json"), decoder, "vision_config.decoder.").path_within("model_path")
        read = lambda file: configs.read_mmdit(file, c.semantic_dim, c.mlp_ratio)  # noqa: E731
        self._add("mmdit", folder / "diffusion_pytorch_model.safetensors", mmdit.table(c))
        self.configs[folder / "config.json"] = self._restored("mmdit", self.released.get("mmdit", {}), read, configs.write_mmdit)

    # ---- FLUX.1-dev ----
    def _flux(self) -> None:
        flux = Path("flux")
        for name, (folder, stem, table, read, write) in FLUX.items():
            if name not in self.components:
                continue
            self.configs[flux / folder / "config.json"] = self._restored(name, self.released.get(name, {}), read, write)
            if rules := table(self.components[name]).rules:
                self._add(name, flux / folder / f"{stem}.safetensors", NameTable(rules))
        for name, folder in (("t5", "tokenizer_2"), ("clip", "tokenizer")):
            if name in self.components:
                self._copy_tokenizer(f"tokenizer_{name}", flux / folder)
        scheduler = {key: getattr(self.decode, key) for key in ("base_shift", "max_shift")}
        self.configs[flux / "scheduler" / "scheduler_config.json"] = changed(self.released.get("scheduler", configs.SCHEDULER), scheduler)
        written = {path.parts[1] for path in (*self.configs, *self.copies) if path.parts[:1] == ("flux",)}
        vae = self.components.get("autoencoder")
        own = ["its VAE is the identity"] if vae and vae.kind == "identity" else []
        if any(encoder in written and tokenizer not in written for encoder, tokenizer in configs.TOKENIZER_OF.items()):
            own.append("its text encoders read the ids of the text tokenizer")
        if own:
            self.notes.append(f"flux: is read by this package alone, diffusers has no such parts: {' and '.join(own)}")
            return
        self.configs[flux / "model_index.json"] = {"_class_name": "FluxPipeline"} | configs.PIPELINE | self.released.get("flux", {})
        if "mmdit" in self.components:
            written.add("transformer")
            self.linked = next(path.parent for path, (name, _) in self.tensors.items() if name == "mmdit")
        if missing := sorted(set(configs.PIPELINE) - written):
            self.notes.append(f"flux: diffusers opens it once {', '.join(missing)} of FLUX.1-dev lie in it, too")


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
