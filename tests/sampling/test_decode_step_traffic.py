"""What a decode step moves on a TPU: the weights once and the cache once. Compiled ahead of time for slices that are not there."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from jax.sharding import NamedSharding

from tests.topologies import tpu_mesh
from xomni_jax.models.registry import init_params
from xomni_jax.models.transformer import PRESETS, ARTransformer
from xomni_jax.planner import collectives, hlo, traffic
from xomni_jax.sampling.cache import GENERATED_AXES, PROMPT_AXES
from xomni_jax.sampling.engine import Engine
from xomni_jax.sampling.logits import SamplingConfig
from xomni_jax.sampling.segments import image_spec
from xomni_jax.sharding.rules import ROLLOUT_RULES, param_shardings, spec_for

PROMPTS, ROLLOUTS, PROMPT, CODES, SEGMENT = 8, 16, 128, 5184, 432


def placed(x, mesh):
    """A cache, or what else is carried from one segment to the next."""
    axes = {5: PROMPT_AXES, 6: GENERATED_AXES}.get(len(x.shape), ("batch", None, None)[: len(x.shape)])
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec_for("carried", x.shape, axes, mesh)))


@pytest.mark.parametrize("topology, ragged", [("v5e:2x4", False), ("v5p:2x2x2", False), ("v6e:2x4", False), ("v6e:2x4", True)])
def test_weights_and_cache_are_read_once(topology, ragged):
    """The released heads and codes on a narrow model of ten layers; prompts over fsdp, heads over tensor. Ragged: after a text."""
    cfg = dataclasses.replace(
        PRESETS["xomni-7b"], vocab_size=1024, mm_vocab_size=1088, image_vocab_size=1024, d_model=512, mlp_dim=2048,
        n_adapter_layers=2, n_language_layers=6, n_head_layers=2, param_dtype=jnp.bfloat16,
    )  # fmt: skip
    mesh = tpu_mesh(topology, fsdp=2, tensor=4)
    boxed = jax.eval_shape(lambda: init_params("transformer", cfg, jax.random.key(0)))
    params = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), nn.meta.unbox(boxed), param_shardings(boxed, mesh, ROLLOUT_RULES)
    )

    def rows(shape, dtype):
        spec = spec_for("rows", shape, ("batch", None)[: len(shape)], mesh)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    engine, spec = Engine(ARTransformer(cfg)), image_spec(SEGMENT, SamplingConfig(top_k=0, min_p=0.0))
    keys = rows((PROMPTS, ROLLOUTS), jax.eval_shape(lambda: jax.random.key(0)).dtype)
    start = lambda params, ids, lengths: engine.start(params, (ids, lengths), ROLLOUTS, CODES)  # noqa: E731
    draw = jax.jit(lambda params, prompt, state, keys: engine.sample(params, prompt, state, spec, keys), donate_argnums=2)
    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(start, params, rows((PROMPTS, PROMPT), jnp.int32), rows((PROMPTS,), jnp.int32))
        prompt, state = jax.tree.map(lambda x: placed(x, mesh), shapes)
        if ragged:
            state = state.replace(cache=state.cache.replace(column=rows((PROMPTS, ROLLOUTS), jnp.int32)))
        compiled = draw.trace(params, prompt, state, keys).lower(lowering_platforms=("tpu",)).compile()

    module = hlo.parse(compiled.as_text())
    assert not module.unknown
    moved = traffic.moves(module)
    step = sum(m.total for m in moved if m.times >= SEGMENT) / SEGMENT
    read = [params[name] for name in cfg.layers] + [params["mm_head"]["kernel"]]
    weights = sum(x.dtype.itemsize * x.size for x in jax.tree.leaves(read)) / 4
    cache = cfg.n_layers * 2 * 2 * cfg.n_kv_heads // 4 * cfg.head_dim * PROMPTS // 2 * (PROMPT + ROLLOUTS * CODES)
    assert 0.98 * (weights + cache) < step < 1.1 * (weights + cache)
    assert not traffic.copies(moved, cache // 100)
    # The weights are whole along their width already.
    gathered = [c for c in collectives.collectives(module, dict(mesh.shape)) if c.kind == "all-gather" and "fsdp" in c.axes]
    assert not gathered
    memory = compiled.memory_analysis()
    # The cache goes in and comes out at the same place; beside the arguments there is next to nothing.
    generated = cache * ROLLOUTS * CODES / (PROMPT + ROLLOUTS * CODES)
    assert generated <= memory.alias_size_in_bytes < 1.01 * generated
    assert memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes < 0.02 * cache
