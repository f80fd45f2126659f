"""A released X-Omni directory. Layout:

    config.json                       sizes; vision_config.{transform, encoder, decoder} name the files below
    model*.safetensors, tokenizer*    the unified transformer and its tokenizer
    <encoder.siglip_path>             the ViT (.pth)
    <encoder.projector_path>          quantizer and projector (.pth)
    <decoder.model_path>/             the MMDiT, as diffusers saves it

The keys of vision_config are those that the published `modeling_xomni.py` and `modeling_siglip_tokenizer.py` read. The published ViT module was
not at hand: should its file wrap its tensors in a dict of another name, the wrapper is found by the patch embedding within.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np

from xomni_jax.checkpoint import released_configs as configs
from xomni_jax.checkpoint.assemble import Sources
from xomni_jax.checkpoint.conversion import ConversionError
from xomni_jax.checkpoint.found import Found, Release, count, finish, shape_of
from xomni_jax.checkpoint.names import siglip_vq, transformer
from xomni_jax.checkpoint.released_configs import ConfigFile
from xomni_jax.checkpoint.released_flux import open_mmdit
from xomni_jax.checkpoint.tensors import open_sharded, open_tensor_file
from xomni_jax.models.siglip_vq import SigLIPVQConfig

HEADS = {"siglip2_giant_patch16_384": 16, "siglip_so400m_patch16_384": 16}  # the one size that no tensor shows


def xomni_parts(folder: Path, out: Release) -> dict[str, Callable[[], Found]]:
    """{component: what opens it}, of those that the config describes."""
    c = ConfigFile(folder / "config.json")
    out.tokenizers["tokenizer"] = folder
    parts = {"transformer": lambda: _transformer(folder, c)}
    if "hidden_size" not in c.data:
        out.notes.append(f"{c.path}: describes no transformer, so none is read")
        parts = {}
    vision = c.part("vision_config", {})
    for section, name, what, read in (("encoder", "siglip_vq", "image tokenizer", _siglip_vq), ("decoder", "mmdit", "decoder", _mmdit)):
        if section in vision.data:
            parts[name] = lambda read=read: read(folder, vision)
        else:
            out.notes.append(f"{c.path}: no vision_config.{section}, so no {what} is read")
    return parts


def _transformer(folder: Path, c: ConfigFile) -> Found:
    cfg = configs.read_transformer(c, None)
    return finish("transformer", cfg, transformer.table(cfg), Sources().add(open_sharded(folder)), c.data)


def _below(folder: Path, c: ConfigFile, key: str) -> Path:
    """A path that a config names, which must lie in its directory and exist."""
    name = c.get(key)
    if not isinstance(name, str) or Path(name).is_absolute() or ".." in Path(name).parts:
        raise ConversionError(f"{c.path}: {c.section}{key}={name!r} is no path within the directory")
    if not (folder / name).exists():
        raise ConversionError(f"{folder / name}: no such file, but {c.path.name} names it as {c.section}{key}; download it too")
    return folder / name


def _siglip_vq(folder: Path, vision: ConfigFile) -> Found:
    c = vision.part("encoder")
    name = c.get("siglip_name")
    heads = c.size("num_heads", HEADS.get(name, 0))
    if not heads:
        raise ConversionError(
            f"{c.path}: {c.section}siglip_name={name!r} is unknown, and no tensor shows its head count; known: {', '.join(HEADS)}"
        )
    sources = Sources()
    for key, prefix, known in (
        ("siglip_path", "vit.", "patch_embed.proj.weight"),
        ("projector_path", "vqproj.", "quantize.embedding.weight"),
    ):
        sources.add(open_tensor_file(_below(folder, c, key)), prefix, known)
    width, _, patch, _ = shape_of(sources, "vit.patch_embed.proj.weight", 4)
    positions = shape_of(sources, "vit.pos_embed", 3)[1]
    codes, code_width = shape_of(sources, "vqproj.quantize.embedding.weight", 2)
    cfg = c.build(
        SigLIPVQConfig, width=width, layers=count(sources, r"vit\.blocks\.(\d+)\."), heads=heads, mlp=shape_of(sources, "vit.blocks.0.mlp.fc1.weight", 2)[0],
        patch=patch, pos_grid=configs.side_of(positions, sources.found("vit.pos_embed")), codebook_size=codes, code_width=code_width,
        conv_blocks=count(sources, r"vqproj\.post_conv\.(\d+)\."), groups=c.size("num_groups", 32),
    )  # fmt: skip
    for key, size in (("z_channels", width), ("codebook_size", codes), ("codebook_dim", code_width)):
        if c.size(key, size) != size:
            raise ConversionError(
                f"{c.path}: {c.section}{key}={c.get(key)}, but the tensors have {size}; take config and weights from one checkpoint"
            )
    return run_as(vision, finish("siglip_vq", cfg, siglip_vq.table(cfg), sources, vision.data))


def _mmdit(folder: Path, vision: ConfigFile) -> Found:
    return run_as(vision, open_mmdit(_below(folder, vision.part("decoder"), "model_path"), None))


def run_as(vision: ConfigFile, found: Found) -> Found:
    """The component computing in `vision_config.dtype`, as the released code casts both vision parts; float16 becomes float32 here."""
    if (name := vision.get("dtype", None)) is not None:
        vision.expect("dtype", "float32", "float16", "bfloat16")
    run = found.config.dtype if name is None else np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else np.float32)
    return dataclasses.replace(found, config=dataclasses.replace(found.config, dtype=run))
