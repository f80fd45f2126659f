"""Plain models that a new training starts from: a Qwen2.5 becomes the transformer, a SigLIP2 the image tokenizer; what they lack is drawn."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from xomni_jax.checkpoint import released_configs as configs
from xomni_jax.checkpoint.assemble import Sources
from xomni_jax.checkpoint.found import Found, Release, count, finish, shape_of
from xomni_jax.checkpoint.names import qwen2, siglip2
from xomni_jax.checkpoint.released_configs import ConfigFile
from xomni_jax.checkpoint.tensors import open_sharded
from xomni_jax.models.siglip_vq import SigLIPVQConfig


def qwen2_parts(folder: Path, out: Release) -> dict[str, Callable[[], Found]]:
    """The transformer of a plain Qwen2.5."""

    def opened() -> Found:
        p, c = out.parts, ConfigFile(folder / "config.json")
        vision = dict(
            num_mm_adap_layers=p.adapter_layers,
            num_mm_head_layers=p.head_layers,
            mm_vocab_size=p.mm_vocab_size,
            image_vocab_size=p.image_vocab_size,
        )
        cfg, sources = configs.read_transformer(c, vision), Sources().add(open_sharded(folder))
        if c.get("tie_word_embeddings", False) and "lm_head.weight" not in sources.infos and "model.embed_tokens.weight" in sources.infos:
            sources.alias("lm_head.weight", "model.embed_tokens.weight")
        return finish("transformer", cfg, qwen2.table(cfg, c.number("initializer_range", 0.02)), sources, {})

    out.tokenizers["tokenizer"], out.extend = folder, True
    out.notes.append(
        f"{folder}: a plain language model; vision layers, image embedding and image head start at random (seed {out.parts.seed})"
    )
    return {"transformer": opened}


def siglip2_parts(folder: Path, out: Release) -> dict[str, Callable[[], Found]]:
    """The image tokenizer of a plain SigLIP2."""

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
