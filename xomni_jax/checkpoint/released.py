"""What the given directories hold: released X-Omni and FLUX.1-dev, or the plain Qwen2.5, SigLIP2 and FLUX.1-dev a new training starts from.

Only names, shapes and configs are read here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from xomni_jax.checkpoint import released_configs as configs
from xomni_jax.checkpoint.base_models import qwen2_parts, siglip2_parts
from xomni_jax.checkpoint.conversion import ConversionError
from xomni_jax.checkpoint.found import Found, NewParts, Release
from xomni_jax.checkpoint.kinds import kind_of
from xomni_jax.checkpoint.released_configs import ConfigFile
from xomni_jax.checkpoint.released_flux import flux_parts
from xomni_jax.checkpoint.released_xomni import xomni_parts
from xomni_jax.checkpoint.tensors import TensorFileError

# What --only names -> components.
PARTS = {
    "transformer": ("transformer",),
    "tokenizer": ("siglip_vq",),
    "decoder": ("mmdit",),
    "vae": ("autoencoder",),
    "text": ("t5", "clip"),
}


class NotThere(ConversionError):
    """The given directories are not of a kind that holds the wanted part."""


def open_release(xomni: str | Path | None, flux: str | Path | None, only: str | None = None, parts: NewParts = NewParts()) -> Release:
    """Finds the components of both directories (either may be None); `only` one of `PARTS` leaves the others alone.

    Raises:
      ConversionError: listing every problem.
    """
    out, wanted, kind = Release(parts=parts), PARTS[only] if only else sum(PARTS.values(), ()), None
    openers: dict[str, Callable[[], Found]] = {}
    if xomni is not None:
        kind, xomni = kind_of(xomni), Path(xomni)
        if kind == "flux":
            raise ConversionError(f"{xomni}: is FLUX.1-dev; give it as --flux")
        openers |= {"xomni": xomni_parts, "qwen2": qwen2_parts, "siglip2": siglip2_parts}[kind](xomni, out)
    if flux is not None:
        if (other := kind_of(flux)) != "flux":
            raise ConversionError(f"{flux}: is {'X-Omni' if other == 'xomni' else other}, not FLUX.1-dev; give it as --xomni")
        openers = flux_parts(Path(flux), out, plain=kind != "xomni") | openers
    problems = []
    for name in wanted:
        try:
            if name in openers:
                out.components[name] = openers[name]()
        except (ConversionError, TensorFileError) as e:
            problems.append(str(e))
    if problems:
        raise ConversionError.of(problems)
    if not out.components:
        mend = "flux" if only in ("vae", "text") else "xomni"
        raise NotThere(f"--only {only}: the given directories hold no {' or '.join(wanted)}; give --{mend}")
    if "transformer" not in out.components:
        out.tokenizers.pop("tokenizer", None)
    out.tokenizers = {k: v for k, v in out.tokenizers.items() if k == "tokenizer" or k.removeprefix("tokenizer_") in out.components}
    _settings(out, Path(xomni) if kind == "xomni" else None, Path(flux) if flux else None)
    return out


# Sizes that two components must share.
SHARED = (
    ("transformer", "image_vocab_size", "siglip_vq", "codebook_size"),
    ("mmdit", "semantic_dim", "siglip_vq", "width"),
    ("mmdit", "in_channels", "autoencoder", "packed_channels"),
    ("mmdit", "text_dim", "t5", "d_model"),
    ("mmdit", "pooled_dim", "clip", "d_model"),
)


def strangers(components: Mapping[str, Any]) -> list[str]:
    """What keeps components ({name: config}) from being one model."""
    out = []
    for a, x, b, y in SHARED:
        if a in components and b in components and (m := getattr(components[a], x)) != (n := getattr(components[b], y)):
            out.append(f"{a}.{x}={m}, but {b}.{y}={n}; take both from checkpoints that belong together")
    return out


def _settings(out: Release, xomni: Path | None, flux: Path | None) -> None:
    vision = ConfigFile(xomni / "config.json").part("vision_config", {}) if xomni else None
    if "siglip_vq" in out.components:
        fields = configs.read_preprocess(vision.part("transform")) if vision and "transform" in vision.data else {}
        out.settings["preprocess"] = {"patch_size": out.components["siglip_vq"].config.patch} | fields
    decode: dict[str, Any] = {}
    if vision and "mmdit" in out.components and "decoder" in vision.data:
        decode |= configs.read_decode(vision.part("decoder"))
        if (second := vision.part("decoder").get("cfg_scale_2", 1.0)) != 1.0:
            out.notes.append(f"{vision.path}: vision_config.decoder.cfg_scale_2={second} is not used; cfg_scale alone guides the decoder")
    if flux and (flux / "scheduler").is_dir():
        decode |= configs.read_scheduler(ConfigFile(flux / "scheduler" / "scheduler_config.json"))
    if "clip" in out.components:
        decode["pooled_length"] = out.components["clip"].config.max_length
    if decode:
        out.settings["decode"] = decode
