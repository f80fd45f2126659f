"""What the given directories hold: released X-Omni and FLUX.1-dev, or the plain Qwen2.5, SigLIP2 and FLUX.1-dev a new training starts from.

Only names, shapes and configs are read here. Layout of a released X-Omni directory:

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
import functools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from flax.linen import meta

from xomni_jax.checkpoint import released_configs as configs
from xomni_jax.checkpoint.assemble import FLOATS, Sources, usual_dtype
from xomni_jax.checkpoint.conversion import ConversionError, Make, Table, flatten
from xomni_jax.checkpoint.names import autoencoder, clip, mmdit, new, qwen2, siglip2, siglip_vq, t5, transformer
from xomni_jax.checkpoint.released_configs import ConfigFile
from xomni_jax.checkpoint.tensors import TensorFileError, open_sharded, open_tensor_file
from xomni_jax.models.mmdit import MMDiTConfig
from xomni_jax.models.registry import init_params
from xomni_jax.models.siglip_vq import SigLIPVQConfig

# What --only names -> components.
PARTS = {"transformer": ("transformer",), "tokenizer": ("siglip_vq",), "decoder": ("mmdit",), "vae": ("autoencoder",), "text": ("t5", "clip")}
HEADS = {"siglip2_giant_patch16_384": 16, "siglip_so400m_patch16_384": 16}  # the one size that no tensor shows
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json", "chat_template.jinja")
LORA_FILES = {"adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "pytorch_lora_weights.safetensors"}
SIGLIP = ("siglip", "siglip2", "siglip_vision_model", "siglip2_vision_model")


class NotThere(ConversionError):
    """The given directories are not of a kind that holds the wanted part."""


@dataclasses.dataclass(frozen=True)
class NewParts:
    """Sizes of what a plain model lacks (the released ones by default), and the seed it is drawn from.

    `semantic_dim`, of the decoder's semantic input, is the image tokenizer's width where that is known.
    """

    image_vocab_size: int = 16384
    mm_vocab_size: int = 16448
    adapter_layers: int = 4
    head_layers: int = 4
    code_width: int = 2048
    semantic_dim: int = MMDiTConfig.semantic_dim
    seed: int = 0


@dataclasses.dataclass
class Found:
    """One component: where it is and what it becomes.

    Attributes:
      original: its `config.json`, kept so that an export can give it back.
    """

    name: str
    config: Any
    table: Table
    sources: Sources
    original: dict[str, Any]

    def wanted(self) -> dict[str, tuple[int, ...]]:
        """{path: shape} of the parameters."""
        return wanted_shapes(self.name, self.config)


@dataclasses.dataclass
class Release:
    """Everything found in the given directories.

    Attributes:
      settings: {name: fields} of how the model is run, as model.json keeps them. tokenizers: {folder of the model directory: source folder}.
      extend: whether the text tokenizer must be given image tokens (a plain language model's). notes: lines for the user.
    """

    components: dict[str, Found] = dataclasses.field(default_factory=dict)
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    tokenizers: dict[str, Path] = dataclasses.field(default_factory=dict)
    extend: bool = False
    notes: list[str] = dataclasses.field(default_factory=list)
    parts: NewParts = NewParts()


def wanted_shapes(name: str, config: Any) -> dict[str, tuple[int, ...]]:
    """{path: shape} of a component's parameters; nothing is computed."""
    return dict(_shapes(name, config))


@functools.lru_cache(maxsize=32)  # tracing a model takes seconds
def _shapes(name: str, config: Any) -> dict[str, tuple[int, ...]]:
    tree = meta.unbox(jax.eval_shape(lambda: init_params(name, config, jax.random.key(0))))
    return {path: tuple(leaf.shape) for path, leaf in flatten(tree).items()}


def kind_of(folder: str | Path) -> str:
    """"xomni", "qwen2", "siglip2" or "flux"; what is something else is named.

    Raises:
      ConversionError: one sentence.
    """
    folder = Path(folder)
    if not folder.exists():
        raise ConversionError(f"{folder}: no such directory; give the directory of a downloaded checkpoint")
    if not folder.is_dir():
        raise ConversionError(f"{folder}: is a file; give the directory of a downloaded checkpoint")
    has = {path.name for path in folder.iterdir()}
    strangers = (
        ("model.json" in has, "already a model directory of this package; use it as it is"),
        (bool(has & LORA_FILES), "a LoRA; merge it into its base model first"),
        (any(name.endswith(".gguf") for name in has), "a GGUF model (quantised for llama.cpp); give the safetensors it was made from"),
    )
    for is_it, what in strangers:
        if is_it:
            raise ConversionError(f"{folder}: is {what}")
    if "model_index.json" in has:
        name = configs.read_json(folder / "model_index.json").get("_class_name")
        if not str(name).startswith("Flux"):
            raise ConversionError(f"{folder}: is a diffusers pipeline ({name}); only FLUX.1-dev's belongs to X-Omni")
        return "flux"
    if "config.json" not in has:
        if {"vae", "text_encoder_2"} & has:
            return "flux"
        raise ConversionError(f"{folder}: holds no config.json; give the directory of a downloaded checkpoint")
    data = configs.read_json(folder / "config.json")
    if isinstance(data.get("vision_config"), dict) and "encoder" in data["vision_config"] or data.get("model_type") == "x-omni":
        return "xomni"
    if data.get("model_type") in SIGLIP:
        return "siglip2"
    if data.get("model_type") == "qwen2":
        return "qwen2"
    kind = data.get("model_type") or data.get("_class_name") or "model of an unnamed type"
    raise ConversionError(f"{folder}: is a {kind}; X-Omni, Qwen2.5 (qwen2), SigLIP2 and FLUX.1-dev are read")


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
        openers |= {"xomni": _xomni_parts, "qwen2": _qwen2_parts, "siglip2": _siglip2_parts}[kind](xomni, out)
    if flux is not None:
        if (other := kind_of(flux)) != "flux":
            raise ConversionError(f"{flux}: is {'X-Omni' if other == 'xomni' else other}, not FLUX.1-dev; give it as --xomni")
        openers = _flux_parts(Path(flux), out, plain=kind != "xomni") | openers
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


def finish(name: str, config: Any, table: Table, sources: Sources, original: Mapping[str, Any]) -> Found:
    """A component whose config says the dtype that is stored, and that it computes in: bfloat16 if that is stored, else float32."""
    stored = usual_dtype(sources, table)
    stored = stored if stored in FLOATS else np.dtype(np.float32)  # others are refused, or cast
    run = stored if stored == ml_dtypes.bfloat16 else np.dtype(np.float32)
    return Found(name, dataclasses.replace(config, dtype=run, param_dtype=stored), table, sources, dict(original))


# ---- released X-Omni ----
def _xomni_parts(folder: Path, out: Release) -> dict[str, Callable[[], Found]]:
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


def count(sources: Sources, pattern: str) -> int:
    """Layers that the keys number: one more than the highest."""
    return max((int(m[1]) for key in sources.infos if (m := re.match(pattern, key))), default=-1) + 1


def shape_of(sources: Sources, key: str, rank: int) -> tuple[int, ...]:
    """Shape of a tensor that sizes are read from."""
    if key not in sources.infos:
        raise ConversionError(f"{sources.absent(key)}: missing from the checkpoint")
    shape = tuple(sources.infos[key].shape)
    if len(shape) != rank or 0 in shape:
        raise ConversionError(f"{sources.found(key)}: shape {shape}, expected {rank} dimensions")
    return shape


def _siglip_vq(folder: Path, vision: ConfigFile) -> Found:
    c = vision.part("encoder")
    name = c.get("siglip_name")
    heads = c.size("num_heads", HEADS.get(name, 0))
    if not heads:
        raise ConversionError(f"{c.path}: {c.section}siglip_name={name!r} is unknown, and no tensor shows its head count; known: {', '.join(HEADS)}")
    sources = Sources()
    for key, prefix, known in (("siglip_path", "vit.", "patch_embed.proj.weight"), ("projector_path", "vqproj.", "quantize.embedding.weight")):
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
            raise ConversionError(f"{c.path}: {c.section}{key}={c.get(key)}, but the tensors have {size}; take config and weights from one checkpoint")
    return run_as(vision, finish("siglip_vq", cfg, siglip_vq.table(cfg), sources, vision.data))


def _mmdit(folder: Path, vision: ConfigFile) -> Found:
    return run_as(vision, open_mmdit(_below(folder, vision.part("decoder"), "model_path"), None))


def run_as(vision: ConfigFile, found: Found) -> Found:
    """The component computing in `vision_config.dtype`, as the released code casts both vision parts; float16 becomes float32 here."""
    if (name := vision.get("dtype", None)) is not None:
        vision.expect("dtype", "float32", "float16", "bfloat16")
    run = found.config.dtype if name is None else np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else np.float32)
    return dataclasses.replace(found, config=dataclasses.replace(found.config, dtype=run))


def open_mmdit(folder: Path, semantic_dim: int | None) -> Found:
    """The MMDiT in diffusers' layout; with `semantic_dim`, plain FLUX.1-dev, whose semantic input starts at zero."""
    sources, c = Sources().add(open_sharded(folder)), ConfigFile(folder / "config.json")
    heads = c.size("num_attention_heads") * c.size("attention_head_dim")
    ratio = 4
    if "transformer_blocks.0.ff.net.0.proj.weight" in sources.infos and heads:
        ratio = shape_of(sources, "transformer_blocks.0.ff.net.0.proj.weight", 2)[0] // heads
    if semantic_dim is None:
        semantic_dim = shape_of(sources, "siglip_embed.weight", 2)[1]
        cfg = configs.read_mmdit(c, semantic_dim, ratio)
        return finish("mmdit", cfg, mmdit.table(cfg), sources, c.data)
    cfg = configs.read_mmdit(c, semantic_dim, ratio)
    full = mmdit.table(cfg)
    rules = [rule for rule in full.rules if rule.target != "siglip_embed/kernel"]
    return finish("mmdit", cfg, Table(rules, full.drops, [Make("siglip_embed/kernel", *new.constant(0))]), sources, c.data)


# ---- plain models ----
def _qwen2_parts(folder: Path, out: Release) -> dict[str, Callable[[], Found]]:
    def opened() -> Found:
        p, c = out.parts, ConfigFile(folder / "config.json")
        vision = dict(num_mm_adap_layers=p.adapter_layers, num_mm_head_layers=p.head_layers, mm_vocab_size=p.mm_vocab_size, image_vocab_size=p.image_vocab_size)
        cfg, sources = configs.read_transformer(c, vision), Sources().add(open_sharded(folder))
        if c.get("tie_word_embeddings", False) and "lm_head.weight" not in sources.infos and "model.embed_tokens.weight" in sources.infos:
            sources.alias("lm_head.weight", "model.embed_tokens.weight")
        return finish("transformer", cfg, qwen2.table(cfg, c.number("initializer_range", 0.02)), sources, {})

    out.tokenizers["tokenizer"], out.extend = folder, True
    out.notes.append(f"{folder}: a plain language model; vision layers, image embedding and image head start at random (seed {out.parts.seed})")
    return {"transformer": opened}


def _siglip2_parts(folder: Path, out: Release) -> dict[str, Callable[[], Found]]:
    def opened() -> Found:
        c = ConfigFile(folder / "config.json")
        c = c.part("vision_config") if "vision_config" in c.data else c
        sources = Sources().add(open_sharded(folder))
        top = "" if "embeddings.patch_embedding.weight" in sources.infos else "vision_model."
        at = top + "embeddings."
        width, _, patch, _ = shape_of(sources, at + "patch_embedding.weight", 4)
        positions = shape_of(sources, at + "position_embedding.weight", 2)[0]
        cfg = c.build(
            SigLIPVQConfig, width=width, layers=count(sources, re.escape(top) + r"encoder\.layers\.(\d+)\."), heads=c.size("num_attention_heads"),
            mlp=shape_of(sources, top + "encoder.layers.0.mlp.fc1.weight", 2)[0], patch=patch,
            pos_grid=configs.side_of(positions, sources.found(at + "position_embedding.weight")),
            codebook_size=out.parts.image_vocab_size, code_width=out.parts.code_width,
        )  # fmt: skip
        return finish("siglip_vq", cfg, siglip2.table(cfg, top), sources, {})

    out.notes.append(f"{folder}: a plain image tower; quantizer, codebook and projector start at random (seed {out.parts.seed})")
    return {"siglip_vq": opened}


def _flux_parts(folder: Path, out: Release, plain: bool) -> dict[str, Callable[[], Found]]:
    def found(sub: str, read: Callable, table: Callable, name: str, fix: Callable[[Sources], None] = lambda s: None) -> Callable[[], Found]:
        def opened() -> Found:
            c, sources = ConfigFile(folder / sub / "config.json"), Sources().add(open_sharded(folder / sub))
            fix(sources)
            cfg = read(c)
            return finish(name, cfg, table(cfg, sources), sources, c.data)

        return opened

    def shared(sources: Sources) -> None:
        if "shared.weight" not in sources.infos and "encoder.embed_tokens.weight" in sources.infos:
            sources.alias("shared.weight", "encoder.embed_tokens.weight")

    def clip_table(cfg: Any, sources: Sources) -> Table:
        return clip.table(cfg, "text_model." if any(key.startswith("text_model.") for key in sources.infos) else "")

    def decoder() -> Found:
        width = out.components["siglip_vq"].config.width if "siglip_vq" in out.components else out.parts.semantic_dim
        out.notes.append(f"{folder}: plain FLUX.1; its semantic input ({width} wide) starts at zero")
        return open_mmdit(folder / "transformer", width)

    for key, sub in (("tokenizer_clip", "tokenizer"), ("tokenizer_t5", "tokenizer_2")):
        if (folder / sub).is_dir():
            out.tokenizers[key] = folder / sub
    return {
        "autoencoder": found("vae", configs.read_vae, lambda cfg, s: autoencoder.table(cfg), "autoencoder"),
        "t5": found("text_encoder_2", configs.read_t5, lambda cfg, s: t5.table(cfg), "t5", shared),
        "clip": found("text_encoder", configs.read_clip, clip_table, "clip"),
    } | ({"mmdit": decoder} if plain and (folder / "transformer").is_dir() else {})


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
