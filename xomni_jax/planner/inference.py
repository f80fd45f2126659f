"""The roles of inference: a batch of images from prompts to pixels, and answers to a batch of questions about images."""

from __future__ import annotations

from jax.sharding import Mesh
from ml_collections import ConfigDict

from xomni_jax.core.config import ConfigError, check_sections
from xomni_jax.inference import PARTS, SECTIONS, STAGE, settings
from xomni_jax.models.registry import COMPONENTS
from xomni_jax.planner import abstract, work
from xomni_jax.planner.roles import Role, Stage, image_roles, sampling_roles
from xomni_jax.sampling.decode import make_answerer
from xomni_jax.sampling.logits import SamplingConfig
from xomni_jax.sampling.sampler import SEGMENT
from xomni_jax.sharding.rules import ROLLOUT_RULES, row_ways
from xomni_jax.training.components import check_heads

SIZE = 1152  # pixels of a side, of the released model


def build(config: ConfigDict, mesh: Mesh) -> Stage:
    """The roles of a configuration of inference; a batch takes the place of a training step.

    Raises:
      ConfigError: what the commands would refuse as well.
    """
    check_sections(config, SECTIONS, STAGE)
    c, cfgs = settings(config), {name: abstract.component(config, name) for name in PARTS}
    ar, patch = cfgs.pop("transformer"), cfgs["siglip_vq"].patch
    check_heads(ar.n_kv_heads, mesh)
    height, width = c.height or SIZE, c.width or SIZE
    if height % patch or width % patch:
        raise ConfigError(f"config.height={height}, config.width={width} are not whole tokens of {patch} pixels")
    grid = height // patch, width // patch
    sampling = SamplingConfig(c.temperature, c.top_k, c.top_p, c.min_p, c.guidance)
    weights = abstract.params("transformer", ar, mesh, ROLLOUT_RULES)
    rows, T = c.batch * row_ways(mesh), grid[0] * grid[1]
    decoded = min(c.decode_batch, c.batch)
    decode, times = abstract.decode_settings(config), -(-c.batch // decoded)
    frozen, images = image_roles(cfgs, grid, decode, decoded * row_ways(mesh), times, mesh)
    asked, net = c.prompt_length + T, COMPONENTS["transformer"].module(ar)
    answer = Role(
        "answer", f"up to {c.max_tokens} tokens to each of {rows} questions of {asked} tokens with their images",
        make_answerer(net, c.max_tokens, 0, 0), (weights, abstract.rows(mesh, (rows, asked), "int32"), abstract.rows(mesh, (rows,), "int32")),
        work.answer(ar, rows, asked), ("sampler",), per_step=0,
    )  # fmt: skip
    roles = [*sampling_roles(ar, weights, sampling, (rows, 1, c.prompt_length, T), SEGMENT, 1, mesh), *images, answer]
    return Stage(STAGE, mesh, {role.name: role for role in roles}, {"sampler": weights} | frozen)
