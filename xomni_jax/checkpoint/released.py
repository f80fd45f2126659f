"""Finds the components in published directories: released X-Omni, or the plain Qwen2.5, SigLIP2 and FLUX.1-dev that training starts from;
or in one file of a model that `released_files` knows.

Only names, shapes and configs are read here. A released X-Omni directory:

    config.json                       sizes; vision_config.{transform, encoder, decoder} name the files below
    model*.safetensors, tokenizer*    the unified transformer and its tokenizer
    <encoder.siglip_path>             the ViT (.pth)
    <encoder.projector_path>          quantizer and projector (.pth)
    <decoder.model_path>/             the MMDiT, as diffusers saves it

The keys of vision_config are those that the published `modeling_xomni.py` and `modeling_siglip_tokenizer.py` read. The published ViT module
was not available; if its file wraps the tensors in a dict, the wrapper's name is found by the patch embedding in it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from xomni_jax.checkpoint import released_configs as configs
from xomni_jax.checkpoint.component_source import ComponentSource, NewParts, Release, component_source, layer_count, shape_of
from xomni_jax.checkpoint.conversion import ConversionError, Init, NameTable
from xomni_jax.checkpoint.formats import detect_format
from xomni_jax.checkpoint.names import autoencoder, clip, mmdit, qwen2, siglip2, siglip_vq, t5, transformer
from xomni_jax.checkpoint.names.initializers import constant
from xomni_jax.checkpoint.official import HEADS
from xomni_jax.checkpoint.released_configs import ConfigFile
from xomni_jax.checkpoint.released_files import open_file
from xomni_jax.checkpoint.tensor_file import absence, check_links, read_json
from xomni_jax.checkpoint.tensors import TensorFiles, open_sharded, open_tensor_file
from xomni_jax.models.siglip_vq import SigLIPVQConfig
from xomni_jax.tokenizers.registry import IMAGE_TOKENIZERS

# What --only names -> components.
PARTS = {
    "transformer": ("transformer",),
    "tokenizer": tuple(IMAGE_TOKENIZERS),
    "decoder": ("mmdit",),
    "vae": ("autoencoder",),
    "text": ("t5", "clip"),
}
ALL = sum(PARTS.values(), ())
FILE_ONLY = set(IMAGE_TOKENIZERS) - {"siglip_vq"}  # published as single files, never in a directory
# Sizes that two components must share.
SHARED = (
    ("transformer", "image_vocab_size", "siglip_vq", "codebook_size"),
    ("transformer", "image_vocab_size", "llamagen_vq", "codebook_size"),
    ("mmdit", "semantic_dim", "siglip_vq", "width"),
    ("mmdit", "in_channels", "autoencoder", "packed_channels"),
    ("mmdit", "text_dim", "t5", "d_model"),
    ("mmdit", "pooled_dim", "clip", "d_model"),
)
LLAMAGEN_PATCH = 16  # pixels per code of all published class-conditional models
Openers = dict[str, Callable[[], ComponentSource]]  # {component: opens its files}


class MissingPart(ConversionError):
    """No given directory is of a kind that holds the wanted part."""


def open_release(xomni: str | Path | None, flux: str | Path | None, only: str | None = None, parts: NewParts = NewParts()) -> Release:
    """Finds the components of both directories (either may be None); `only`, a key of `PARTS`, ignores the others.

    Raises:
      ConversionError: listing every problem.
    """
    out, wanted, kind = Release(parts=parts), PARTS[only] if only else ALL, None
    openers: Openers = {}
    if xomni is not None:
        kind, xomni = detect_format(xomni), Path(xomni)
        if kind == "flux":
            raise ConversionError(f"{xomni}: is FLUX.1-dev; give it as --flux")
        openers |= open_file(xomni, parts) if kind == "file" else {"xomni": _xomni, "qwen2": _qwen2, "siglip2": _siglip2}[kind](xomni, out)
        if flux is None and kind == "xomni" and (xomni / "flux").is_dir():
            flux = xomni / "flux"
            out.notes.append(f"{flux}: read as FLUX.1-dev, as no other is given")
    if flux is not None:
        if (other := detect_format(flux)) != "flux":
            raise ConversionError(f"{flux}: is {'X-Omni' if other == 'xomni' else other}, not FLUX.1-dev; give it as --xomni")
        openers = _flux(Path(flux), out, plain=kind != "xomni") | openers
    problems = []
    for name in wanted:
        try:
            if name in openers:
                out.components[name] = openers[name]()
                out.notes += out.components[name].sources.left
        except ConversionError as e:
            problems.append(str(e))
    if problems:
        raise ConversionError.of(problems)
    if not out.components:
        fix = "flux" if only in ("vae", "text") else "xomni"
        raise MissingPart(f"--only {only}: the given directories hold no {' or '.join(wanted)}; give --{fix}")
    if "transformer" not in out.components:
        out.tokenizers.pop("tokenizer", None)
    out.tokenizers = {k: v for k, v in out.tokenizers.items() if k == "tokenizer" or k.removeprefix("tokenizer_") in out.components}
    for tokenizer in out.tokenizers.values():
        check_links(tokenizer)
    _settings(out, Path(xomni) if kind == "xomni" else None, Path(flux) if flux else None)
    return out


def check_compatible(components: Mapping[str, Any]) -> list[str]:
    """Sizes that differ between components ({name: config}) but must be equal in one model, as sentences."""
    out = []
    for a, x, b, y in SHARED:
        if a in components and b in components and (m := getattr(components[a], x)) != (n := getattr(components[b], y)):
            out.append(f"{a}.{x}={m}, but {b}.{y}={n}; take both from checkpoints that belong together")
    return out


def _settings(out: Release, xomni: Path | None, flux: Path | None) -> None:
    """How the model is run, by the configs of both directories."""
    top = ConfigFile(xomni / "config.json") if xomni else None
    vision = top.part("vision_config", {}) if top else None
    if own := set(IMAGE_TOKENIZERS) & set(out.components):
        fields = configs.read_preprocess(vision.part("transform")) if vision and "transform" in vision.data else {}
        out.settings["preprocess"] = {"patch_size": out.components[own.pop()].config.patch} | fields
    if (transformer := out.components.get("transformer")) and transformer.config.grid_columns:
        side = LLAMAGEN_PATCH * transformer.config.grid_columns
        out.settings["size"] = {"height": side, "width": side}
    decode: dict[str, Any] = {}
    if vision and "mmdit" in out.components and "decoder" in vision.data:
        decode |= configs.read_decode(vision.part("decoder"))
        first, second = (vision.data["decoder"].get(key, 1.0) for key in ("cfg_scale", "cfg_scale_2"))
        if first != second:
            out.notes.append(f"{vision.path}: vision_config.decoder.cfg_scale_2={second} is not used; cfg_scale={first} guides the decoder")
    if flux and (flux / "scheduler").is_dir():
        scheduler = ConfigFile(flux / "scheduler" / "scheduler_config.json")
        decode |= configs.read_scheduler(scheduler)
        out.released["scheduler"] = scheduler.data
    if flux and (flux / "model_index.json").is_file():
        out.released["flux"] = read_json(flux / "model_index.json")
    if "clip" in out.components:
        decode["pooled_length"] = out.components["clip"].config.max_length
    if top:
        out.released["xomni"] = top.data
        lengths, size = configs.read_own(top)
        decode |= lengths
        if size:
            out.settings["size"] = size
    if decode:
        out.settings["decode"] = decode


# ---- X-Omni ----
def _xomni(folder: Path, out: Release) -> Openers:
    """The components that the config describes."""
    c = ConfigFile(folder / "config.json")
    out.tokenizers["tokenizer"] = folder
    openers: Openers = {"transformer": lambda: _transformer(folder, c)}
    if "hidden_size" not in c.data:
        out.notes.append(f"{c.path}: describes no transformer, so none is read")
        openers = {}
    vision = c.part("vision_config", {})
    reads = {
        "siglip_vq": ("encoder", "image tokenizer", lambda: _siglip_vq(folder, vision)),
        "mmdit": ("decoder", "decoder", lambda: _mmdit(_path_in(folder, vision.part("decoder"), "model_path"), None, out)),
    }
    for name, (section, what, read) in reads.items():
        if section in vision.data:
            openers[name] = lambda read=read: _cast_compute(vision, read())
        else:
            out.notes.append(f"{c.path}: no vision_config.{section}, so no {what} is read")
    return openers


def _transformer(folder: Path, c: ConfigFile) -> ComponentSource:
    cfg = configs.read_transformer(c)
    return component_source("transformer", cfg, transformer.table(cfg), open_sharded(folder))


def _siglip_vq(folder: Path, vision: ConfigFile) -> ComponentSource:
    c = vision.part("encoder")
    name = c.get("siglip_name")
    heads = c.size("num_heads", HEADS.get(name, 0))
    if not heads:
        known = f"no tensor shows its head count; known: {', '.join(HEADS)}"
        raise ConversionError(f"{c.path}: {c.section}siglip_name={name!r} is unknown, and {known}")
    sources = TensorFiles()
    sources.add(open_tensor_file(_path_in(folder, c, "siglip_path")), "vit.", "patch_embed.proj.weight")
    sources.add(open_tensor_file(_path_in(folder, c, "projector_path")), "vqproj.", "quantize.embedding.weight")
    vit = _vit_sizes(sources, "vit.patch_embed.proj.weight", "vit.pos_embed", 3, r"vit\.blocks\.", "vit.blocks.0.mlp.fc1.weight")
    codes, code_width = shape_of(sources, "vqproj.quantize.embedding.weight", 2)
    for key, size in (("z_channels", vit["width"]), ("codebook_size", codes), ("codebook_dim", code_width)):
        if c.size(key, size) != size:
            wrong = f"{c.section}{key}={c.get(key)}, but the tensors have {size}"
            raise ConversionError(f"{c.path}: {wrong}; take config and weights from one checkpoint")
    blocks = layer_count(sources, r"vqproj\.post_conv\.")
    quantizer = dict(codebook_size=codes, code_width=code_width, conv_blocks=blocks, groups=c.size("num_groups", 32))
    cfg = c.build(SigLIPVQConfig, **vit, heads=heads, **quantizer)
    return component_source("siglip_vq", cfg, siglip_vq.table(cfg), sources)


def _vit_sizes(sources: TensorFiles, patch: str, positions: str, rank: int, blocks: str, mlp: str) -> dict[str, int]:
    """Sizes of an image tower, from the shapes of three tensors and the number of its blocks; `rank` is that of its positions."""
    width, _, side, _ = shape_of(sources, patch, 4)
    grid = shape_of(sources, positions, rank)[-2]
    layers, hidden = layer_count(sources, blocks), shape_of(sources, mlp, 2)[0]
    return dict(width=width, layers=layers, mlp=hidden, patch=side, pos_grid=configs.side_of(grid, sources.describe(positions)))


def _path_in(folder: Path, c: ConfigFile, key: str) -> Path:
    """A path that a config names, which must exist within the config's directory."""
    path = folder / c.path_within(key)
    if not path.exists():
        raise ConversionError(f"{path}: {absence(path)}, but {c.path.name} names it as {c.section}{key}; download it too")
    return path


def _cast_compute(vision: ConfigFile, part: ComponentSource) -> ComponentSource:
    """The component, computed in `vision_config.dtype` as in the released code, except that float16 becomes float32."""
    if (name := vision.get("dtype", None)) is None:
        return part
    vision.expect("dtype", "float32", "float16", "bfloat16")
    dtype = np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else np.float32)
    return dataclasses.replace(part, config=dataclasses.replace(part.config, dtype=dtype))


# ---- plain models that a training starts from ----
def _qwen2(folder: Path, out: Release) -> Openers:
    """A plain Qwen2.5 becomes the transformer."""

    def opened() -> ComponentSource:
        p, c = out.parts, ConfigFile(folder / "config.json")
        c.data |= dict(num_mm_adap_layers=p.adapter_layers, num_mm_head_layers=p.head_layers)
        c.data |= dict(mm_vocab_size=p.mm_vocab_size, image_vocab_size=p.image_vocab_size)
        c.data["num_hidden_layers"] = c.size("num_hidden_layers") + p.adapter_layers + p.head_layers
        cfg, sources = configs.read_transformer(c), open_sharded(folder)
        if c.get("tie_word_embeddings", False):
            sources.tie("lm_head.weight", "model.embed_tokens.weight")
            sources.tie("model.embed_tokens.weight", "lm_head.weight")
        return component_source("transformer", cfg, qwen2.table(cfg, c.number("initializer_range", 0.02)), sources)

    out.tokenizers["tokenizer"], out.extend = folder, True
    what = "a plain language model; vision layers, image embedding and image head start at random"
    out.notes.append(f"{folder}: {what} (seed {out.parts.seed})")
    return {"transformer": opened}


def _siglip2(folder: Path, out: Release) -> Openers:
    """A plain SigLIP2 becomes the image tokenizer."""

    def opened() -> ComponentSource:
        c = ConfigFile(folder / "config.json")
        c = c.part("vision_config") if "vision_config" in c.data else c
        sources = open_sharded(folder)
        top = "" if "embeddings.patch_embedding.weight" in sources.infos else "vision_model."
        at, layers = f"{top}embeddings.", f"{top}encoder.layers."
        names = at + "patch_embedding.weight", at + "position_embedding.weight", 2, re.escape(layers), layers + "0.mlp.fc1.weight"
        sizes = _vit_sizes(sources, *names) | dict(codebook_size=out.parts.image_vocab_size, code_width=out.parts.code_width)
        cfg = c.build(SigLIPVQConfig, **sizes, heads=c.size("num_attention_heads"))
        return component_source("siglip_vq", cfg, siglip2.table(cfg, top), sources)

    out.notes.append(f"{folder}: a plain image tower; quantizer, codebook and projector start at random (seed {out.parts.seed})")
    return {"siglip_vq": opened}


# ---- FLUX.1-dev as diffusers saves it ----
def _flux(folder: Path, out: Release, plain: bool) -> Openers:
    """VAE and text encoders; if `plain`, FLUX.1-dev's own MMDiT too, to be trained."""

    def opener(name: str, sub: str, read: Callable, table: Callable) -> Callable[[], ComponentSource]:
        def opened() -> ComponentSource:
            c = ConfigFile(folder / sub / "config.json")
            cfg = read(c)
            sources = TensorFiles() if getattr(cfg, "kind", None) == "identity" else open_sharded(folder / sub)
            out.released[name] = c.data
            return component_source(name, cfg, table(cfg, sources), sources)

        return opened

    def t5_table(cfg: Any, sources: TensorFiles) -> NameTable:
        sources.tie("shared.weight", "encoder.embed_tokens.weight")
        return t5.table(cfg)

    def clip_table(cfg: Any, sources: TensorFiles) -> NameTable:
        return clip.table(cfg, "text_model." if any(key.startswith("text_model.") for key in sources.infos) else "")

    def decoder() -> ComponentSource:
        width = out.components["siglip_vq"].config.width if "siglip_vq" in out.components else out.parts.semantic_dim
        out.notes.append(f"{folder}: plain FLUX.1; its semantic input ({width} wide) starts at zero")
        return _mmdit(folder / "transformer", width, out)

    for key, sub in (("tokenizer_clip", "tokenizer"), ("tokenizer_t5", "tokenizer_2")):
        if (folder / sub).is_dir():
            out.tokenizers[key] = folder / sub
    return {
        "autoencoder": opener("autoencoder", "vae", configs.read_vae, lambda cfg, sources: autoencoder.table(cfg)),
        "t5": opener("t5", "text_encoder_2", configs.read_t5, t5_table),
        "clip": opener("clip", "text_encoder", configs.read_clip, clip_table),
    } | ({"mmdit": decoder} if plain and (folder / "transformer").is_dir() else {})


def _mmdit(folder: Path, semantic_dim: int | None, out: Release) -> ComponentSource:
    """The MMDiT in diffusers' layout. Plain FLUX.1-dev's gets a semantic input of `semantic_dim` columns that starts at zero."""
    sources, c = open_sharded(folder), ConfigFile(folder / "config.json")
    width, ratio = c.size("num_attention_heads") * c.size("attention_head_dim"), 4
    if "transformer_blocks.0.ff.net.0.proj.weight" in sources.infos and width:
        ratio = shape_of(sources, "transformer_blocks.0.ff.net.0.proj.weight", 2)[0] // width
    plain = semantic_dim is not None and "siglip_embed.weight" not in sources.infos
    cfg = configs.read_mmdit(c, semantic_dim if plain else shape_of(sources, "siglip_embed.weight", 2)[1], ratio)
    table = mmdit.table(cfg)
    if plain:
        rules = [rule for rule in table.rules if rule.target != "siglip_embed/kernel"]
        table = NameTable(rules, table.ignored, [Init("siglip_embed/kernel", constant(0))])
    out.released["mmdit"] = c.data
    return component_source("mmdit", cfg, table, sources)
