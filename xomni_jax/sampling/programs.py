"""The sampling programs of GRPO and of inference: prompts to codes, and codes to pixels."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from xomni_jax.core.program import Program, Work
from xomni_jax.models import work
from xomni_jax.models.registry import COMPONENTS, abstract_params
from xomni_jax.models.transformer import ARConfig
from xomni_jax.sampling.cache import GENERATED_AXES, PROMPT_AXES
from xomni_jax.sampling.decoder import DECODER_COMPONENTS, DecodeConfig, Decoder, make_decode
from xomni_jax.sampling.sampler import Sampler
from xomni_jax.sharding import abstract
from xomni_jax.sharding.rules import SPREAD_RULES, microbatches, num_data_shards
from xomni_jax.tokenizers.registry import IMAGE_TOKENIZERS


@dataclasses.dataclass(frozen=True)
class RolloutShape:
    """Sizes of one call of the sampler.

    Attributes:
      prompts, rollouts: prompts, and samples drawn for each.
      prompt_length, codes: tokens of a padded prompt, and codes of an image.
    """

    prompts: int
    rollouts: int
    prompt_length: int
    codes: int


def sampler_programs(
    sampler: Sampler, ar: ARConfig, weights: Any, shape: RolloutShape, guided: bool, calls: int, mesh: Mesh
) -> dict[str, Program]:
    """The sampler's two programs, for `calls` calls in a training step. `weights`: abstract parameters as the sampler takes them."""
    P, R, S, T, sides = shape.prompts, shape.rollouts, shape.prompt_length, shape.codes, 2 if guided else 1
    keys = abstract.keys(mesh, (P, R), "batch")
    ids = lambda *more: abstract.rows(mesh, (P, *more), jnp.int32)
    order = None if ar.order == "raster" else abstract.array(mesh, (P, R, T), jnp.int32, "batch")
    prompts = (weights, ids(S), ids(), keys, (ids(S), ids()) if guided else None, order)
    with jax.set_mesh(mesh):  # the attention kernels choose the sizes of the cache by the mesh
        cache, state = placed_caches(jax.eval_shape(sampler.start, *prompts), mesh)
    rollout = Program(
        sampler.draw,
        (weights, cache, state, keys, order),
        f"{sampler.segment} codes of {P} prompts x {R} rollouts of {S} + {T} tokens",
        work.rollout(ar, P, R, S, T, sampler.segment, sides, mesh.shape),
        uses=("sampler",),
        per_step=calls * sampler.segments,
        state=state,
    )
    prefill = Program(
        sampler.start, prompts, f"{P * sides} prompts of {S} tokens", work.prefill(ar, P, S, sides), uses=("sampler",), per_step=calls
    )
    return {"rollout": rollout, "prefill": prefill}


def placed_caches(shapes: Any, mesh: Mesh) -> Any:
    """Shapes of caches and hidden states with the shardings that the sampler's programs give them."""
    axes = {len(names): names for names in (PROMPT_AXES, GENERATED_AXES)}
    return jax.tree.map(lambda x: abstract.array(mesh, x.shape, x.dtype, *axes.get(x.ndim, ("batch",)[: x.ndim])), shapes)


def decoder_programs(
    configs: Mapping[str, Any], grid: tuple[int, int], cfg: DecodeConfig, rows: int, calls: int, mesh: Mesh
) -> tuple[dict[str, Any], dict[str, Program]]:
    """The frozen image decoder: codes to pixels in one program, and its text encoders and VAE on their own.

    Args:
      configs: of the tokenizer and the decoder's parts. grid: tokens of an image, rows x columns.
      rows: images of a call. calls: in a training step.

    Returns:
      ({component: abstract parameters}, {name: program}).
    """
    params = {name: abstract_params(name, configs[name], mesh) for name in ("siglip_vq", *DECODER_COMPONENTS)}
    decoder = Decoder(**{name: COMPONENTS[name].module(configs[name]) for name in DECODER_COMPONENTS})
    tokenizer = IMAGE_TOKENIZERS["siglip_vq"](configs["siglip_vq"])
    shards = num_data_shards(mesh)
    rows += -rows % shards  # as the pipeline fills them up
    T, S, sides = grid[0] * grid[1], cfg.text_length, 2 if cfg.guidance != 1.0 else 1
    parts = {name: params[name] for name in DECODER_COMPONENTS}

    def ids(n: int, length: int):
        return abstract.array(mesh, (n, length), jnp.int32, *(("batch",) if n > 1 else ()))

    noise = abstract.rows(mesh, (rows, T, configs["mmdit"].in_channels), jnp.float32)
    texts = ids(rows, S), ids(rows, cfg.pooled_length)
    empty = ids(1, S), ids(1, cfg.pooled_length)
    latents = abstract.rows(mesh, (rows, 2 * grid[0], 2 * grid[1], configs["autoencoder"].latent_channels), jnp.float32)
    text = work.dense(params["t5"], {"": S}) + work.dense(params["clip"], {"": cfg.pooled_length})
    steps = cfg.steps * sides * work.dense(params["mmdit"], work.mmdit_tokens(T, S))
    semantics = work.dense(params["siglip_vq"], {"post": T, "vit": 0, "quant": 0})
    images = f"{rows} images of {grid[0] * configs['siglip_vq'].patch}x{grid[1] * configs['siglip_vq'].patch}"
    rules, pieces = microbatches(rows, configs["mmdit"].microbatch, mesh)
    gathered = cfg.steps * pieces * sum(x.size * x.dtype.itemsize for _, x in abstract.leaves(params["mmdit"]))
    gathered = gathered if rules is SPREAD_RULES and mesh.shape["fsdp"] * mesh.shape["tensor"] > 1 else 0.0
    return params, {
        "decoder": Program(
            make_decode(tokenizer, decoder, cfg, shards),
            (params["siglip_vq"], parts, abstract.rows(mesh, (rows, *grid), jnp.int32), *texts, noise, empty),
            f"{images}, {cfg.steps} steps, guidance {cfg.guidance:g}",
            Work(forward=rows * (steps + text + semantics), tokens=rows * T, images=rows, gathered=gathered),
            uses=("siglip_vq", *DECODER_COMPONENTS),
            per_step=calls,
        ),
        "text": Program(
            jax.jit(lambda p, *ids: decoder.condition(p, *ids, None)),
            (parts, *texts),
            f"{rows} prompts of {S} and {cfg.pooled_length} tokens",
            Work(forward=rows * text, tokens=rows * S),
            uses=DECODER_COMPONENTS,
            per_step=0,
        ),
        "vae": Program(
            jax.jit(decoder.pixels), (parts, latents), images, Work(tokens=rows * T, images=rows), uses=DECODER_COMPONENTS, per_step=0
        ),
    }
