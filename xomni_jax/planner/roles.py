"""The roles of a stage: each is the function the trainer jits, with abstract arguments, and the work it has to do."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from xomni_jax.core.config import ConfigError, build, check_sections, run_config
from xomni_jax.models.registry import COMPONENTS, init_params
from xomni_jax.models.transformer import ARConfig
from xomni_jax.planner import abstract, work
from xomni_jax.planner.work import Work
from xomni_jax.rl import grpo as grpo_stage
from xomni_jax.rl.advantages import AdvantageConfig
from xomni_jax.rl.objectives import GRPOConfig
from xomni_jax.rl.rollouts import RolloutConfig, make_layout
from xomni_jax.rl.update import Policy, RolloutBatch, frozen_logp, make_update
from xomni_jax.sampling.cache import GENERATED_AXES, PROMPT_AXES
from xomni_jax.sampling.decoder import DecodeConfig, Decoder
from xomni_jax.sampling.logits import SamplingConfig
from xomni_jax.sampling.pixels import DECODER_PARTS, make_decode
from xomni_jax.sampling.sampler import Sampler
from xomni_jax.sharding.rules import SPREAD_RULES, row_pieces, row_ways
from xomni_jax.training import decoder as decoder_stage
from xomni_jax.training import pretrain, tokenizer, understanding
from xomni_jax.training.components import check_heads, check_split, from_preset
from xomni_jax.training.next_token import NextTokenConfig, PackedTargets
from xomni_jax.training.optimizer import OptimizerConfig, make_optimizer
from xomni_jax.training.run import STAGES
from xomni_jax.training.stages import FREEZE
from xomni_jax.training.state import abstract_state


@dataclasses.dataclass
class Role:
    """One program of a stage.

    Attributes:
      name: what it is called on the command line. about: what it does, with its sizes.
      fn: the jitted function. args: abstract arguments with their shardings.
      work: the least it must do. uses: the resident groups among its arguments.
      gone: resident groups that are not there while it runs.
      per_step: executions in a training step; 0 for a part of another role, looked at on its own.
      state: the donated argument, if any.
      apart: it runs on the decoder's own devices.
    """

    name: str
    about: str
    fn: Callable[..., Any]
    args: tuple[Any, ...]
    work: Work
    uses: tuple[str, ...] = ()
    gone: tuple[str, ...] = ()
    per_step: int = 1
    state: Any = None
    apart: bool = False


@dataclasses.dataclass
class Stage:
    """The roles of a configuration.

    Attributes:
      mesh: of the policy, and of everything else. apart: of a decoder with devices of its own.
      resident: group -> arrays that stay on their devices through a whole step, whichever role runs. moved: groups that lie on `apart`.
    """

    name: str
    mesh: Mesh
    roles: dict[str, Role]
    resident: dict[str, Any]
    apart: Mesh | None = None
    moved: tuple[str, ...] = ()

    def mesh_of(self, role: Role) -> Mesh:
        """Where a role runs."""
        return self.apart if role.apart else self.mesh


def build_stage(config: ConfigDict, mesh: Mesh, apart: Mesh | None = None) -> Stage:
    """The roles of a training configuration; `apart` is the decoder's own mesh.

    Raises:
      ConfigError: the configuration is one the trainer would refuse as well.
    """
    stage = run_config(config).stage
    if stage not in STAGES:
        raise ConfigError(f"config.stage={stage!r} is unknown; use one of {', '.join(STAGES)}, inference")
    module = {"tokenizer": tokenizer, "decoder": decoder_stage, "grpo": grpo_stage}.get(stage, pretrain)
    check_sections(config, ("mesh", *module.SECTIONS), stage)
    if stage == "grpo":
        return _grpo(config, mesh, apart)
    return {"tokenizer": _tokenizer, "decoder": _decoder}.get(stage, _next_token)(config, mesh)


def _next_token(config: ConfigDict, mesh: Mesh) -> Stage:
    run, section = run_config(config), dict(config.next_token)
    phase = section.pop("phase")
    cfg, ar = build(NextTokenConfig, section, "config.next_token"), abstract.component(config, "transformer")
    check_heads(ar.n_kv_heads, mesh)
    check_split("config.next_token.rows", cfg.rows, mesh)
    optimizer = make_optimizer(build(OptimizerConfig, config.optimizer, "config.optimizer"), run.steps, train=FREEZE[phase])
    _, state = abstract_state(lambda: init_params("transformer", ar, jax.random.key(0)), optimizer, mesh)
    B, L, M = cfg.rows, cfg.row_length, max(1, int(cfg.row_length * cfg.target_share))
    ids, flags = lambda *shape: abstract.rows(mesh, shape, jnp.int32), lambda *shape: abstract.rows(mesh, shape, jnp.bool_)  # noqa: E731
    targets = (ids(B, M), ids(B, M), flags(B, M))
    batch = PackedTargets(ids(B, L), ids(B, L), ids(B, L), *targets, *targets)
    role = Role(
        f"{run.stage}-update", f"{B} packed rows of {L} tokens, {M} targets of each kind a row",
        pretrain.make_update(COMPONENTS["transformer"].module(ar), optimizer, cfg), (state, batch),
        work.next_token(ar, B, L, M, phase, cfg.chunk, mesh.shape), ("state",), state=state,
    )  # fmt: skip
    return Stage(run.stage, mesh, {role.name: role}, {"state": state})


def _tokenizer(config: ConfigDict, mesh: Mesh) -> Stage:
    run, cfg = run_config(config), build(tokenizer.TokenizerConfig, config.tokenizer, "config.tokenizer")
    check_split("config.batch_size", run.batch_size, mesh)
    vq = abstract.component(config, "siglip_vq")
    read = from_preset(config.reader, understanding.PRESETS, "config.reader")
    check_heads(read.n_kv_heads, mesh)
    learner = understanding.TokenizerLearner(vq, dataclasses.replace(read, dense_classes=tokenizer.N_COLUMN_CLASSES))
    optimizer = make_optimizer(build(OptimizerConfig, config.optimizer, "config.optimizer"), run.steps)
    size, B = tuple(config.data.sizes[0]), run.batch_size
    _, state = abstract_state(lambda: tokenizer.init_params(learner, 0, size), optimizer, mesh, lambda: tokenizer.even_usage(vq))
    grid = (size[0] // vq.patch, size[1] // vq.patch)
    batch = {
        "pixels": abstract.rows(mesh, (B, *size, 3), jnp.float32),
        "columns": abstract.rows(mesh, (B, *grid), jnp.int32),
        "ids": abstract.rows(mesh, (B, cfg.text_length), jnp.int32),
        "loss_mask": abstract.rows(mesh, (B, cfg.text_length), jnp.bool_),
    }
    args = (state, batch, abstract.keys(mesh, ()), abstract.array(mesh, (), jnp.float32))
    tokens, text = grid[0] * grid[1], cfg.text_length
    each = {"tokenizer/": tokens, "reader/head": text, "reader/layers": tokens + text, "reader/projector": tokens, "dense/": tokens}
    searched = 2.0 * tokens * vq.code_width * vq.codebook_size * (3 + 3)  # distances and assigned rows, forward and backward
    role = Role(
        "tokenizer-update", f"{B} images of {size[0]}x{size[1]} with {text} tokens of text",
        tokenizer.make_update(learner, optimizer, cfg), args,
        Work(learned=3 * dense(state.params, each) * B + searched * B, tokens=B * (tokens + text), images=B), ("state",), state=state,
    )  # fmt: skip
    return Stage(run.stage, mesh, {role.name: role}, {"state": state})


def dense(params: Any, tokens: dict[str, int]) -> float:
    """Forward operations, 2 x values x tokens, of all kernels; `tokens` by the start of the path, one where none matches."""
    total = 0.0
    for name, x in abstract.leaves(params):
        if name.rsplit("/", 1)[-1] == "kernel":
            total += 2.0 * x.size * next((n for start, n in tokens.items() if name.startswith(start)), 1)
    return total


def mmdit_tokens(image: int, text: int) -> dict[str, int]:
    """Tokens by kernel of the MMDiT: modulations and condition vectors see one row an image."""
    once = {f"{block}_blocks/{m}modulation": 1 for block in ("double", "single") for m in ("text_", "image_", "")}
    streams = {"double_blocks/text": text, "double_blocks/image": image, "single_blocks": image + text}
    return once | streams | {"text_embed": text, "latent_embed": image, "siglip_embed": image, "out/": image}


def _sizes(config: ConfigDict) -> tuple[dict[str, Any], tuple[int, int], DecodeConfig]:
    """Configs of the decoder's side, the token grid of its images, and how it is sampled."""
    cfgs = {name: abstract.component(config, name) for name in ("siglip_vq", *DECODER_PARTS)}
    if len(config.data.sizes) != 1:
        raise ConfigError(f"config.data.sizes={config.data.sizes} must hold one size to be planned: a program has one static shape")
    patch = cfgs["siglip_vq"].patch
    grid = (config.data.sizes[0][0] // patch, config.data.sizes[0][1] // patch)
    return cfgs, grid, abstract.decode_settings(config)


def _decoder(config: ConfigDict, mesh: Mesh) -> Stage:
    run, cfg = run_config(config), build(decoder_stage.DecoderTrainConfig, config.decoder, "config.decoder")
    check_split("config.batch_size", run.batch_size, mesh)
    cfgs, grid, decode = _sizes(config)
    decoder = Decoder(**{name: COMPONENTS[name].module(cfgs[name]) for name in DECODER_PARTS})

    def init():
        return {name: init_params(name, cfgs[name], jax.random.key(0)) for name in DECODER_PARTS}

    frozen = decoder_stage.frozen_parts(cfg, jax.eval_shape(init))
    optimizer = make_optimizer(build(OptimizerConfig, config.optimizer, "config.optimizer"), run.steps, freeze=frozen)
    _, state = abstract_state(init, optimizer, mesh)
    vq, vq_params = COMPONENTS["siglip_vq"].module(cfgs["siglip_vq"]), abstract.params("siglip_vq", cfgs["siglip_vq"], mesh)
    B, S, T = run.batch_size, decode.text_length, grid[0] * grid[1]
    ids = lambda n, length: abstract.array(mesh, (n, length), jnp.int32, *(("batch",) if n > 1 else ()))  # noqa: E731
    batch = {
        "pixels": abstract.rows(mesh, (B, *config.data.sizes[0], 3), jnp.float32),
        "text": ids(B, S), "pooled": ids(B, decode.pooled_length), "empty": (ids(1, S), ids(1, decode.pooled_length)),
    }  # fmt: skip
    learned = 3 * dense(state.params["mmdit"], mmdit_tokens(T, S)) * B
    text = dense(state.params["t5"], {"": S}) * B + dense(state.params["clip"], {"": decode.pooled_length}) * B
    searched = 2.0 * T * B * cfgs["siglip_vq"].code_width * cfgs["siglip_vq"].codebook_size
    encode = dense(vq_params, {"vit": T, "quant_conv": T, "post": T}) * B + searched
    role = Role(
        "decoder-update", f"{B} images of {config.data.sizes[0][0]}x{config.data.sizes[0][1]}",
        decoder_stage.make_update(decoder, vq, optimizer, cfg), (state, vq_params, batch, abstract.keys(mesh, ())),
        Work(learned=learned + (2 * text if cfg.train_text_encoders else 0), forward=text + encode, tokens=B * (S + T), images=B),
        ("state", "siglip_vq"), state=state,
    )  # fmt: skip
    return Stage(run.stage, mesh, {role.name: role}, {"state": state, "siglip_vq": vq_params})


def _grpo(config: ConfigDict, mesh: Mesh, apart: Mesh | None) -> Stage:
    run, cfg = run_config(config), build(GRPOConfig, config.grpo, "config.grpo")
    rolls = build(RolloutConfig, config.rollout, "config.rollout")
    sampling = build(SamplingConfig, config.sampling, "config.sampling")
    ar = abstract.component(config, "transformer")
    check_heads(ar.n_kv_heads, mesh)
    cfgs, grid, decode = _sizes(config)
    grpo_stage.check_divides(run.batch_size, cfg, rolls, row_ways(mesh))
    P, R, S, T = run.batch_size, cfg.rollouts_per_prompt, rolls.prompt_length, grid[0] * grid[1]
    B, part, sides = P * R, P // rolls.chunks, 2 if sampling.guided else 1
    parts = grpo_stage.micro_batches(P, cfg, rolls)
    optimizer = make_optimizer(build(OptimizerConfig, config.optimizer, "config.optimizer"), run.steps * cfg.updates_per_batch)
    _, state = abstract_state(lambda: init_params("transformer", ar, jax.random.key(0)), optimizer, mesh)
    net, boxed = COMPONENTS["transformer"].module(ar), abstract.boxed("transformer", ar)
    layout = make_layout(boxed, mesh, ar.dtype, ar.image_vocab_size)
    weights = jax.eval_shape(layout, state.params)
    kept_reference = make_layout(boxed, mesh, rolls.reference_dtype)
    reference = jax.eval_shape(kept_reference, state.params) if cfg.kl_coef else None
    policy = Policy(net, sampling, rolls.logit_chunk)

    def ids(n, *shape):
        return abstract.rows(mesh, (n, *shape), jnp.int32)

    kept = abstract.rows(mesh, (B, T, -(-ar.image_vocab_size // 8)), jnp.uint8) if sampling.truncates else None
    f32 = lambda *shape: abstract.rows(mesh, shape, jnp.float32)  # noqa: E731
    others, scored = (ids(B, S), ids(B)) if sampling.guided else None, abstract.rows(mesh, (B,), jnp.bool_)
    batch = RolloutBatch(ids(B, S), ids(B), ids(B, T), f32(B, T), kept, others, f32(B), scored)
    advantage = build(AdvantageConfig, config.advantage, "config.advantage")
    update = make_update(policy, optimizer, cfg, advantage, parts)
    replay = jax.jit(lambda params, batch: frozen_logp(policy, params, batch, parts))
    shape, chunk = f"{S} + {T} tokens", rolls.logit_chunk
    roles = [
        Role("policy-update", f"{B} rollouts of {shape} in {parts} micro-batches", update,
             (state, reference, batch, f32(P, R), None, abstract.keys(mesh, ())),
             work.policy_update(ar, B, S, T, parts, sides, bool(cfg.kl_coef), chunk, mesh.shape), ("params", "optimizer", "reference"),
             ("sampler",), state=state),
        Role("reference", f"log-probs of {B} rollouts of {shape}", replay, (reference, batch),
             work.replay(ar, B, S, T, parts, sides, chunk, mesh.shape), ("reference",), ("sampler",), per_step=0),
        Role("layout", "the policy's weights in the sampler's layout and number format", layout, (state.params,), Work(), ("params",),
             ("sampler",)),
        *sampling_roles(ar, weights, sampling, (part, R, S, T), rolls.segment, rolls.chunks, mesh, sampling.truncates),
    ]  # fmt: skip
    if apart is not None and len({d.process_index for d in apart.devices.flat}) > 1:
        check_split("config.batch_size x grpo.rollouts_per_prompt / rollout.chunks", part * R, apart)
    frozen, more = image_roles(cfgs, grid, decode, part * R, rolls.chunks, apart or mesh)
    more = [dataclasses.replace(role, apart=apart is not None) for role in more]
    resident = {"params": state.params, "optimizer": state.opt_state, "reference": reference, "sampler": weights} | frozen
    if reference is None:
        del roles[1], resident["reference"]
    return Stage(run.stage, mesh, {role.name: role for role in [*roles, *more]}, resident, apart, tuple(frozen) if apart else ())


def _as_left(shapes: Any, mesh: Mesh) -> Any:
    """Caches and hidden states placed as a program of the sampler leaves them, and the next one finds them."""
    axes = {len(names): names for names in (PROMPT_AXES, GENERATED_AXES)}
    return jax.tree.map(lambda x: abstract.array(mesh, x.shape, x.dtype, *axes.get(x.ndim, ("batch",)[: x.ndim])), shapes)


def sampling_roles(
    ar: ARConfig,
    weights: Any,
    sampling: SamplingConfig,
    sizes: tuple[int, int, int, int],
    segment: int,
    times: int,
    mesh: Mesh,
    kept: bool = False,
) -> list[Role]:
    """The sampler's programs, run `times` in a step. `sizes`: prompts, rollouts of each, tokens of a prompt, codes of an image; `kept`: for a
    replay."""
    (P, R, S, T), sides = sizes, 2 if sampling.guided else 1
    draws, keys = Sampler(COMPONENTS["transformer"].module(ar), T, sampling, segment, kept), abstract.keys(mesh, (P, R), "batch")
    ids = lambda *shape: abstract.rows(mesh, (P, *shape), jnp.int32)  # noqa: E731
    prompts = (weights, ids(S), ids(), keys, (ids(S), ids()) if sampling.guided else None)
    with jax.set_mesh(mesh):  # the kernels want other sizes of a cache
        cache, state = _as_left(jax.eval_shape(draws.start, *prompts), mesh)
    return [
        Role("rollout", f"{draws.segment} codes of {P} prompts x {R} rollouts of {S} + {T} tokens", draws.draw, (weights, cache, state, keys),
             work.rollout(ar, P, R, S, T, draws.segment, sides, mesh.shape), ("sampler",), per_step=times * draws.segments, state=state),
        Role("prefill", f"{P * sides} prompts of {S} tokens", draws.start, prompts, work.prefill(ar, P, S, sides), ("sampler",),
             per_step=times),
    ]  # fmt: skip


def image_roles(
    cfgs: dict[str, Any], grid: tuple[int, int], cfg: DecodeConfig, rows: int, times: int, mesh: Mesh
) -> tuple[dict[str, Any], list[Role]]:
    """The frozen decoder: codes to pixels in one program, and its text encoders and VAE on their own."""
    params = {name: abstract.params(name, c, mesh) for name, c in cfgs.items()}
    decoder = Decoder(**{name: COMPONENTS[name].module(cfgs[name]) for name in DECODER_PARTS})
    vq = COMPONENTS["siglip_vq"].module(cfgs["siglip_vq"])
    ways = row_ways(mesh)
    rows += -rows % ways  # as the pipeline fills them up
    T, S, sides = grid[0] * grid[1], cfg.text_length, 2 if cfg.guidance != 1.0 else 1
    parts = {name: params[name] for name in DECODER_PARTS}

    def ids(n: int, length: int):
        return abstract.array(mesh, (n, length), jnp.int32, *(("batch",) if n > 1 else ()))

    noise = abstract.rows(mesh, (rows, T, cfgs["mmdit"].in_channels), jnp.float32)
    texts = ids(rows, S), ids(rows, cfg.pooled_length)
    empty = ids(1, S), ids(1, cfg.pooled_length)
    latents = abstract.rows(mesh, (rows, 2 * grid[0], 2 * grid[1], cfgs["autoencoder"].latent_channels), jnp.float32)
    text = dense(params["t5"], {"": S}) + dense(params["clip"], {"": cfg.pooled_length})
    steps = cfg.steps * sides * dense(params["mmdit"], mmdit_tokens(T, S))
    semantics = dense(params["siglip_vq"], {"post": T, "vit": 0, "quant": 0})
    images = f"{rows} images of {grid[0] * cfgs['siglip_vq'].patch}x{grid[1] * cfgs['siglip_vq'].patch}"
    decode = make_decode(vq, decoder, cfg, ways)
    rules, pieces = row_pieces(rows, cfgs["mmdit"].at_once, mesh)
    gathered = cfg.steps * pieces * sum(x.size * abstract.item_size(x.dtype) for _, x in abstract.leaves(params["mmdit"]))
    gathered = gathered if rules is SPREAD_RULES and mesh.shape["fsdp"] * mesh.shape["tensor"] > 1 else 0.0
    drawn = Work(forward=rows * (steps + text + semantics), tokens=rows * T, images=rows, gathered=gathered)
    roles = [
        Role("decoder", f"{images}, {cfg.steps} steps, guidance {cfg.guidance:g}", decode,
             (params["siglip_vq"], parts, abstract.rows(mesh, (rows, *grid), jnp.int32), *texts, noise, empty), drawn,
             ("siglip_vq", *DECODER_PARTS), per_step=times),
        Role("text", f"{rows} prompts of {S} and {cfg.pooled_length} tokens", jax.jit(lambda p, *ids: decoder.condition(p, *ids, None)),
             (parts, *texts), Work(forward=rows * text, tokens=rows * S), DECODER_PARTS, per_step=0),
        Role("vae", images, jax.jit(decoder.pixels), (parts, latents), Work(tokens=rows * T, images=rows), DECODER_PARTS, per_step=0),
    ]  # fmt: skip
    return params, roles


def choose(stage: Stage, names: Iterable[str]) -> list[Role]:
    """The roles asked for; "all" is every one.

    Raises:
      ValueError: the stage has no such role.
    """
    names = list(names)
    if "all" in names:
        return list(stage.roles.values())
    for name in names:
        if name not in stage.roles:
            raise ValueError(f"--role {name}: stage {stage.name} has no such role; it has {', '.join(stage.roles)}, and all")
    return [stage.roles[name] for name in names]
