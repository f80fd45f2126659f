"""FLUX.1-dev as diffusers saves it: VAE, text encoders, their tokenizers, and the MMDiT in both its forms."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from xomni_jax.checkpoint import released_configs as configs
from xomni_jax.checkpoint.assemble import Sources
from xomni_jax.checkpoint.conversion import Make, Table
from xomni_jax.checkpoint.found import Found, Release, finish, shape_of
from xomni_jax.checkpoint.names import autoencoder, clip, mmdit, new, t5
from xomni_jax.checkpoint.released_configs import ConfigFile
from xomni_jax.checkpoint.tensors import open_sharded


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


def flux_parts(folder: Path, out: Release, plain: bool) -> dict[str, Callable[[], Found]]:
    """{component: what opens it}; `plain`: FLUX.1-dev's own MMDiT too, to be trained."""

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
