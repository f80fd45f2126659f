"""Published checkpoints that are one file without a config: what it holds and its sizes are read from names and shapes."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from xomni_jax.checkpoint.component_source import ComponentSource, NewParts, component_source, layer_count, shape_of
from xomni_jax.checkpoint.conversion import ConversionError
from xomni_jax.checkpoint.names import llamagen, llamagen_vq, omnitokenizer
from xomni_jax.checkpoint.tensor_file import TensorFile
from xomni_jax.checkpoint.tensors import TensorFiles, open_tensor_file
from xomni_jax.models.llamagen_vq import LlamaGenVQConfig
from xomni_jax.models.omnitokenizer import OmniTokenizerConfig
from xomni_jax.models.transformer import ARConfig

GROUPS = 32  # of LlamaGen's GroupNorms
# Heads of LlamaGen's published models, by width and layers.
HEADS = {
    (768, 12): 12, (1024, 24): 16, (1280, 36): 20, (1536, 48): 24, (2560, 48): 40, (2048, 22): 32, (3200, 24): 32, (4096, 32): 32,
}  # fmt: skip


def open_file(path: Path, parts: NewParts = NewParts()) -> dict[str, Callable[..., ComponentSource]]:
    """{component: opens it} of the file. The opener takes fields of the config that no tensor shows, in place of their defaults.

    Raises:
      ConversionError: it is no file of tensors, or of another model.
    """
    file = open_tensor_file(path)
    for known, (component, read) in FILES.items():
        if any(key == known or key.endswith("." + known) for key in file.infos):
            return {component: functools.partial(read, file, known, parts)}
    known = "a tokenizer or a class-conditional model of LlamaGen, nor an OmniTokenizer"
    raise ConversionError(f"{path}: is not {known}; give such a file, or the directory of a downloaded checkpoint")


def _llamagen_vq(file: TensorFile, known: str, parts: NewParts, **fields: Any) -> ComponentSource:
    sources = TensorFiles().add(file, known=known)
    codes, code_width = shape_of(sources, "quantize.embedding.weight", 2)
    levels = range(layer_count(sources, r"encoder\.conv_blocks\."))
    cfg = _config(
        file,
        LlamaGenVQConfig,
        codebook_size=codes,
        code_width=code_width,
        z_channels=shape_of(sources, "quant_conv.weight", 4)[1],
        in_features=shape_of(sources, "encoder.conv_in.weight", 4)[0],
        block_channels=tuple(shape_of(sources, f"encoder.conv_blocks.{i}.res.0.conv1.weight", 4)[0] for i in levels),
        layers_per_block=layer_count(sources, r"encoder\.conv_blocks\.0\.res\."),
        groups=GROUPS,
        **fields,
    )
    return component_source("llamagen_vq", cfg, llamagen_vq.table(cfg), sources)


def _llamagen(file: TensorFile, known: str, parts: NewParts, **fields: Any) -> ComponentSource:
    sources = TensorFiles().add(file, known=known)
    codes, width = shape_of(sources, "tok_embeddings.weight", 2)
    layers = layer_count(sources, r"layers\.")
    heads = parts.heads or HEADS.get((width, layers), 0)
    if not heads or width % heads:
        raise ConversionError(f"{file.path}: {width} columns in {layers} layers are no published size; give the attention heads as --heads")
    cfg = _config(
        file,
        ARConfig,
        vocab_size=shape_of(sources, "cls_embedding.embedding_table.weight", 2)[0],
        mm_vocab_size=codes,
        image_vocab_size=codes,
        d_model=width,
        mlp_dim=shape_of(sources, "layers.0.feed_forward.w1.weight", 2)[0],
        n_heads=heads,
        n_kv_heads=heads,
        head_dim=width // heads,
        n_language_layers=layers,
        n_adapter_layers=0,
        n_head_layers=0,
        rope_theta=1e4,
        grid_columns=parts.columns,
        qkv_bias=False,
        rms_eps=1e-5,
        **fields,
    )
    return component_source("transformer", cfg, llamagen.table(cfg), llamagen.prepare(sources, layers))


def _omnitokenizer(file: TensorFile, known: str, parts: NewParts, **fields: Any) -> ComponentSource:
    sources = TensorFiles().add(file, known=known)
    at = {ours: source for source, ours in omnitokenizer.STACKS.items()}
    depths = {ours: layer_count(sources, re.escape(source) + r"\.layers\.") for ours, source in at.items()}

    def blocks(ours: str) -> str:
        return "".join("w" if f"{at[ours]}.layers.{i}.1.qkv.weight" in sources.infos else "t" for i in range(depths[ours]))

    first = f"{at['encoder_time']}.layers.0.1."
    head_dim = shape_of(sources, first + "q_scale", 1)[0]
    (inner, width), codes = shape_of(sources, first + "to_q.weight", 2), shape_of(sources, "codebook.embeddings", 2)
    windows = [key for key in sources.infos if key.endswith(".relative_position_bias_table")]
    pixels, rest = (shape_of(sources, f"decoder.{name}.0.bias", 1)[0] for name in ("to_pixels_first_frame", "to_pixels"))
    cfg = _config(
        file,
        OmniTokenizerConfig,
        kind="kl" if shape_of(sources, "pre_vq_conv.1.bias", 1)[0] == 2 * codes[1] else "vq",
        width=width,
        heads=inner // head_dim,
        head_dim=head_dim,
        encoder_blocks=blocks("encoder_space"),
        decoder_blocks=blocks("decoder_space"),
        temporal_layers=depths["encoder_time"],
        window=(math.isqrt(shape_of(sources, windows[0], 2)[0]) + 1) // 2 if windows else OmniTokenizerConfig.window,
        # With relative positions, layers over space hold a network for them.
        rope=f"{at['decoder_space']}.layers.0.1.spatial_rel_pos_bias.net.2.bias" not in sources.infos,
        patch=math.isqrt(pixels // 3),
        frame_patch=rest // pixels,
        codebook_size=codes[0],
        code_width=codes[1],
        scrambled=True,
        **fields,
    )
    return component_source("omnitokenizer", cfg, omnitokenizer.table(cfg), omnitokenizer.prepare(sources))


def _config(file: TensorFile, cls: type, **fields: Any) -> Any:
    """A config dataclass; its errors name the file."""
    try:
        return cls(**fields)
    except ValueError as error:
        raise ConversionError(f"{file.path}: {error}") from None


# A key that tells these files from others -> the component, and how it is read.
FILES: dict[str, tuple[str, Callable[..., ComponentSource]]] = {
    "encoder.conv_blocks.0.res.0.conv1.weight": ("llamagen_vq", _llamagen_vq),
    "layers.0.attention.wqkv.weight": ("transformer", _llamagen),
    "encoder.to_patch_emb_first_frame.2.weight": ("omnitokenizer", _omnitokenizer),
}
