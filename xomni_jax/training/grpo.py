"""Stage (e): on-policy GRPO on pixels. Prompts -> rollouts -> frozen decoder -> remote rewards -> one sharded update (X-Omni section 3.4)."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from ml_collections import ConfigDict

from xomni_jax.data.rendered import RenderedConfig
from xomni_jax.data.sources import rendered_dataset
from xomni_jax.models.registry import init_params
from xomni_jax.pipeline import DECODER_PARTS, XOmni, pad_prompts, picture_keys
from xomni_jax.rewards.client import RewardClient, Score
from xomni_jax.rewards.combine import MODES, Combined, column, combine
from xomni_jax.sampling.decode import generate_codes, replay_logp
from xomni_jax.sampling.decoder import DecodeConfig
from xomni_jax.sampling.logits import SamplingConfig
from xomni_jax.sharding.arrays import owned_rows, rows_here, share, whole
from xomni_jax.sharding.distributed import gather_json
from xomni_jax.sharding.mesh import make_mesh, split_devices
from xomni_jax.sharding.rules import RULES, ROLLOUT_RULES, param_shardings
from xomni_jax.training.advantages import AdvantageConfig, group_advantages
from xomni_jax.training.components import PRESETS, DataIterator, check_heads, check_split, export_model, here, open_model, stored_or_preset
from xomni_jax.training.config import ConfigError, RunConfig, build
from xomni_jax.training.grpo_loss import GRPOConfig, grpo_loss, join_metrics, loss_items
from xomni_jax.training.loop import Stage, key_for, tile
from xomni_jax.training.operations import FlopCount
from xomni_jax.training.optimizer import OptimizerConfig, make_optimizer
from xomni_jax.training.preemption import StepRefused, StopRequested, StopSignal
from xomni_jax.training.state import TrainState, init_state

ROLLOUT, NOISE, SHUFFLE = 0, 1, 2  # purposes of a step's keys
MODELS = ("transformer", "siglip_vq", *DECODER_PARTS)
SECTIONS = (*MODELS, "decoder_mesh", "optimizer", "grpo", "advantage", "sampling", "rollout", "decode", "rewards", "data")


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """How a batch of rollouts is made and used.

    Attributes:
      prompt_length: prompts are padded to this many tokens; a longer one is an error.
      noise: "group": the rollouts of a prompt share the decoder's noise, so that reward differences come from codes; "independent".
      chunks: parts of the batch; while one is being scored the next one is sampled and decoded.
      micro_batch: rollouts per gradient accumulation step of the update; 0 is all at once.
      logit_chunk: positions per piece of the image head.
      max_logp_gap: before the first update, sampler and trainer may differ by this much in any float32 log-prob; 0 turns the gate off.
      max_fail_frac: a step in which more than this share of rollouts could not be scored stops the run.
      combine: sum_then_normalize | normalize_then_sum.
      reference_dtype: number format that the reference's matrices are kept in: the one they are computed in loses nothing.
    """

    prompt_length: int = 48
    noise: str = "group"
    chunks: int = 2
    micro_batch: int = 0
    logit_chunk: int = 0
    max_logp_gap: float = 1e-4
    max_fail_frac: float = 0.5
    combine: str = "sum_then_normalize"
    reference_dtype: str = "float32"

    def __post_init__(self):
        if self.noise not in ("group", "independent"):
            raise ValueError(f"noise={self.noise!r} is unknown; use group or independent")
        if self.chunks < 1:
            raise ValueError(f"chunks={self.chunks} must be at least 1")
        if self.combine not in MODES:
            raise ValueError(f"combine={self.combine!r} is unknown; use {' or '.join(MODES)}")
        if self.reference_dtype not in ("float32", "bfloat16"):
            raise ValueError(f"reference_dtype={self.reference_dtype!r} is unknown; use float32 or bfloat16")
        for name in ("micro_batch", "logit_chunk", "max_logp_gap"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative; 0 turns it off")


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """One reward: its service's addresses, and its weight in the sum; None does not ask it."""

    urls: tuple[str, ...]
    weight: float | None = None


class RolloutBatch(NamedTuple):
    """Everything the update needs, one row per rollout, rollouts of a prompt side by side.

    `kept` [B, T, bytes] only where sampling truncates; `negative` (ids, lengths) only where it is guided.
    """

    ids_BS: jax.Array
    lengths_B: jax.Array
    codes_BT: jax.Array
    sampler_logp_BT: jax.Array
    kept: jax.Array | None
    negative: tuple[jax.Array, jax.Array] | None
    adv_B: jax.Array
    ok_B: jax.Array


class Policy(NamedTuple):
    """The policy network with how it samples: what a log-prob of a rollout depends on."""

    model: nn.Module
    sampling: SamplingConfig
    chunk: int

    def logp(self, params: Any, batch: RolloutBatch) -> tuple[jax.Array, jax.Array]:
        """Log-prob and entropy [B, T] of the sampled codes under `params`, replaying the sampler."""
        b = batch
        return replay_logp(self.model, params, b.ids_BS, b.lengths_B, b.codes_BT, self.sampling, b.kept, b.negative, self.chunk)


def split_rows(rows: Any, parts: int) -> Any:
    """[B, ...] -> [parts, B / parts, ...] for every array, dealt out in turn: a batch axis split over a mesh stays where it is."""
    return jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), rows)


def grpo_update(
    policy: Policy,
    optimizer: Any,
    state: TrainState,
    ref_params: Any,
    batch: RolloutBatch,
    cfg: GRPOConfig,
    micro_batches: int = 1,
    key: jax.Array | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """`updates_per_batch` optimizer updates on one batch of rollouts; with one, the batch is on-policy and the ratio is 1.

    With several, old log-probs are computed once before the first, and the rows are shuffled by `key` into as many minibatches.
    Gradients are accumulated over `micro_batches` and equal those of the whole batch. Metrics of several updates are joined,
    except `grpo/logp_gap_max`: trainer against sampler in the first update, before anything has changed.
    """
    several = cfg.updates_per_batch > 1
    old = over_micro_batches(lambda b: policy.logp(state.params, b)[0], batch, micro_batches) if several else None
    ref = None if ref_params is None else over_micro_batches(lambda b: policy.logp(ref_params, b)[0], batch, micro_batches)

    def one_update(state: TrainState, rows: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        mask = lambda b: jnp.broadcast_to(b.ok_B[:, None], b.codes_BT.shape)  # noqa: E731
        n_items = loss_items(mask(rows[0]), cfg)

        def loss(params, part):
            b, old, ref = part
            logp_BT, entropy_BT = policy.logp(params, b)
            value, metrics = grpo_loss(logp_BT, old, ref, b.adv_B, mask(b), cfg, n_items, entropy_BT)
            gap = jnp.max(jnp.where(mask(b), jnp.abs(logp_BT - b.sampler_logp_BT), 0.0))
            return value, metrics | {"grpo/logp_gap_max": gap}

        def accumulate(carry, part):
            (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(state.params, part)
            return (jax.tree.map(jnp.add, carry[0], grads), carry[1] + value), metrics

        zeros = jax.tree.map(jnp.zeros_like, state.params)
        (grads, value), metrics = jax.lax.scan(accumulate, (zeros, jnp.float32(0.0)), split_rows(rows, micro_batches))
        state, optim = state.apply(optimizer, grads)
        return state, join_metrics(metrics) | optim | {"loss/grpo": value}

    rows = (batch, old, ref)
    if not several:
        return one_update(state, rows)
    order_B = jax.random.permutation(key, batch.adv_B.shape[0])
    minibatches = split_rows(jax.tree.map(lambda x: x[order_B], rows), cfg.updates_per_batch)
    state, stacked = jax.lax.scan(one_update, state, minibatches)
    joined = {name: (jnp.max if name.endswith("_max") else jnp.mean)(value) for name, value in stacked.items()}
    return state, joined | {"grpo/logp_gap_max": stacked["grpo/logp_gap_max"][0]}


def over_micro_batches(fn: Callable[[RolloutBatch], Any], batch: RolloutBatch, parts: int) -> Any:
    """fn over the rows in `parts` pieces, one after the other, joined again; no gradient flows."""
    out = jax.lax.map(lambda b: jax.lax.stop_gradient(fn(b)), split_rows(batch, parts))
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), out)


def make_update(policy: Policy, optimizer: Any, grpo: GRPOConfig, advantage: AdvantageConfig, parts: int) -> Callable[..., Any]:
    """The jitted update (state, reference, batch, rewards [P, R], advantages [P, R] | None, key) -> (state, metrics); the state is donated."""

    def update(state, ref_params, batch, reward_PR, given_PR, key):
        adv_PR, metrics = group_advantages(reward_PR, batch.ok_B.reshape(reward_PR.shape), advantage)
        adv_PR = adv_PR if given_PR is None else given_PR
        batch = batch._replace(adv_B=adv_PR.reshape(-1))
        state, learned = grpo_update(policy, optimizer, state, ref_params, batch, grpo, parts, key)
        return state, metrics | learned

    return jax.jit(update, donate_argnums=0)


def make_sampler(net: nn.Module, n_codes: int, sampling: SamplingConfig) -> Callable[..., dict[str, jax.Array | None]]:
    """The jitted rollout (params, prompt ids [P, S], lengths [P], keys [P, R], negative prompts | None) -> see `generate_codes`."""

    def sample(params, ids_PS, lengths_P, keys_PR, negative):
        return generate_codes(net, params, ids_PS, lengths_P, n_codes, keys_PR, sampling, negative, return_kept=sampling.truncates)

    return jax.jit(sample)


def make_layout(boxed: Any, mesh: jax.sharding.Mesh, dtype: Any, rules: Mapping = RULES) -> Callable[[Any], Any]:
    """The jitted change of a transformer's parameters to another number format and layout.

    Args:
      boxed: parameters with their logical axes, shapes are enough. mesh: where they are, and stay.
      dtype: of what the model computes in its own dtype; norm gains, which it reads in float32, keep theirs.
      rules: ROLLOUT_RULES for the sampler, which then computes what the trainer does, bit for bit.
    """
    here = param_shardings(boxed, mesh)

    def cast(path, x, sharding):
        x = x if path[-1].key == "scale" else x.astype(dtype)
        # Pinned where it lies: the cast comes before the way over the network, not after.
        return jax.lax.with_sharding_constraint(x, sharding)

    return jax.jit(lambda params: jax.tree_util.tree_map_with_path(cast, params, here), out_shardings=param_shardings(boxed, mesh, rules))


class Rollouts:
    """Samples, decodes and scores one batch of prompts, chunk by chunk, with scoring in the background."""

    def __init__(
        self, model: XOmni, painter: XOmni, grid: tuple[int, int], sampling: SamplingConfig, decode: DecodeConfig, cfg: RolloutConfig,
        advantage: AdvantageConfig, group: int, clients: Mapping[str, RewardClient], weights: Mapping[str, float], poll: Callable[[], None],
        waiting: Callable[[], None] | None = None,
    ):  # fmt: skip
        """`model` samples codes and `painter` decodes them: the same, or one on a mesh of its own.

        `poll` raises StopRequested where all processes have agreed to; `waiting` may raise it earlier, within a wait for rewards.
        """
        self.model, self.painter, self.grid, self.sampling, self.decode = model, painter, grid, sampling, decode
        self.cfg, self.advantage = cfg, advantage
        self.group, self.clients, self.weights, self.poll, self.waiting = group, clients, weights, poll, waiting or poll
        net = model.module("transformer")
        boxed = jax.eval_shape(lambda: init_params("transformer", net.cfg, jax.random.key(0)))
        self.layout, self.sample = make_layout(boxed, model.mesh, net.cfg.dtype, ROLLOUT_RULES), make_sampler(net, grid[0] * grid[1], sampling)

    def prompt_ids(self, prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Generation prompts padded to the configured length."""
        ids = [self.model.tokenizer.generation_prompt(p, *self.grid) for p in prompts]
        longest = max(range(len(ids)), key=lambda i: len(ids[i]))
        if len(ids[longest]) > self.cfg.prompt_length:
            raise StepRefused(
                f"prompt {prompts[longest]!r} has {len(ids[longest])} tokens with its image prefix; raise config.rollout.prompt_length "
                f"(now {self.cfg.prompt_length})"
            )
        return pad_prompts(ids, self.cfg.prompt_length)

    def __call__(self, params: Any, prompts: Sequence[str], targets: Sequence[dict], key: jax.Array) -> tuple[RolloutBatch, Combined, np.ndarray, dict]:
        """One scored batch under the policy's parameters -> (rows without advantages, combined rewards, images [B, H, W, 3], timings)."""
        params = self.layout(params)
        P, R, n = len(prompts), self.group, len(prompts) // self.cfg.chunks
        mine = owned_rows(self.painter.mesh, n * R)  # of a chunk: the pictures whose rewards this process asks for
        keys_P = jax.vmap(lambda p: jax.random.fold_in(jax.random.fold_in(key, ROLLOUT), p))(jnp.arange(P))
        keys_PR = jax.vmap(lambda k: jax.random.split(k, R))(keys_P)
        noise_keys_P = jax.vmap(lambda p: jax.random.fold_in(jax.random.fold_in(key, NOISE), p))(jnp.arange(P))
        noise_keys_PR = (
            jnp.broadcast_to(noise_keys_P[:, None], (P, R)) if self.cfg.noise == "group" else jax.vmap(lambda k: jax.random.split(k, R))(noise_keys_P)
        )
        ids_PS, lengths_P = self.prompt_ids(prompts)
        negative = pad_prompts([self.model.tokenizer.negative_prompt(*self.grid)] * P) if self.sampling.guided else None
        seconds = {"perf/rollout_s": 0.0, "perf/decode_s": 0.0}
        made, images, waiting, ahead = [], [], [], None

        def sampled(part: slice) -> dict[str, jax.Array | None]:
            return self.sample(params, ids_PS[part], lengths_P[part], keys_PR[part], negative and tuple(x[part] for x in negative))

        for start in range(0, P, n):
            part = slice(start, start + n)
            began = time.perf_counter()
            out = jax.block_until_ready(ahead or sampled(part))
            # With devices of its own the decoder draws this chunk while the next one is sampled; else it would have to wait for it.
            ahead = sampled(slice(start + n, start + 2 * n)) if self.painter is not self.model and start + n < P else None
            between = time.perf_counter()
            drawn = self.pictures(out["codes"], [p for p in prompts[part] for _ in range(R)], noise_keys_PR[part].reshape(-1))
            drawn = rows_here(drawn, mine)
            items = [{"prompt": prompts[start + row // R], "targets": targets[start + row // R]} for row in mine]
            seconds["perf/rollout_s"] += between - began
            seconds["perf/decode_s"] += time.perf_counter() - between
            waiting.append({name: client.score_async(list(drawn), items) for name, client in self.clients.items()})
            made.append(out)
            images.append(drawn)
            self.poll()
        began = time.perf_counter()
        columns = {name: column(scores, P) for name, scores in self.scores(waiting, mine, n * R).items()}
        seconds["perf/reward_wait_s"] = time.perf_counter() - began
        total = combine(columns, self.weights, self.cfg.combine, ddof=self.advantage.ddof, eps=self.advantage.eps)
        rows = lambda name: jnp.concatenate([m[name] for m in made]).reshape(P * R, *made[0][name].shape[2:])  # noqa: E731
        repeat = lambda x: jnp.repeat(jnp.asarray(x), R, axis=0)  # noqa: E731
        batch = RolloutBatch(
            repeat(ids_PS), repeat(lengths_P), rows("codes"), rows("logp"), rows("kept") if self.sampling.truncates else None,
            negative and tuple(map(repeat, negative)), jnp.zeros(P * R), jnp.asarray(total.ok_PR.reshape(-1)),
        )  # fmt: skip
        return batch, total, np.concatenate(images), seconds

    def scores(self, waiting: Sequence[Mapping[str, Any]], mine: Sequence[int], n: int) -> dict[str, list[Score]]:
        """{reward: a score for every rollout of the batch}: waits for this process's own and exchanges them with the others.

        A stop is acted upon after the exchange, which all must make: whoever raised before would leave the others waiting.
        """
        try:
            own = [{name: client.wait(chunk[name], self.waiting) for name, client in self.clients.items()} for chunk in waiting]
        except StopRequested:
            own = []
        told = [{name: [(s.value, s.error) for s in scores] for name, scores in chunk.items()} for chunk in own]
        table = gather_json({"rows": list(mine), "chunks": told})
        self.poll()
        out = {name: [None] * (n * len(waiting)) for name in self.clients}
        for part in table:
            for c, chunk in enumerate(part["chunks"]):
                for name, scores in chunk.items():
                    for row, (value, error) in zip(part["rows"], scores, strict=True):
                        out[name][c * n + row] = Score(value, error)
        return out

    def pictures(self, codes_PRT: jax.Array, prompts: Sequence[str], noise_keys_B: jax.Array) -> jax.Array:
        """uint8 pictures [B, H, W, 3] of rollouts, on the mesh."""
        codes_BYX = codes_PRT.reshape(-1, *self.grid)
        noise = self.painter.noise(noise_keys_B, self.grid)
        if self.painter is not self.model:  # arrays of one mesh are no arguments of a program on another
            codes_BYX, noise = whole(codes_BYX), np.asarray(noise)
        return self.painter.decode_images(codes_BYX, prompts, noise, self.decode)


def image_statistics(images: np.ndarray) -> dict[str, float]:
    """What reward hacking would move: edge density (mean absolute gradient, 0..255) and entropy in bits of colours at 4 levels a channel."""
    return join_statistics([image_sums(images)])


def image_sums(images: np.ndarray) -> list[float]:
    """What `image_statistics` are made of, to be added up over processes: pictures, mean gradients per picture, colours."""
    x = images.astype(np.float32)
    edges = np.abs(np.diff(x, axis=1)).mean((1, 2, 3)) + np.abs(np.diff(x, axis=2)).mean((1, 2, 3))
    level = images >> 6
    index = (level[..., 0].astype(np.int64) * 4 + level[..., 1]) * 4 + level[..., 2]
    return [len(images), float(edges.sum(dtype=np.float64)), *np.bincount(index.ravel(), minlength=64).tolist()]


def join_statistics(sums: Sequence[Sequence[float]]) -> dict[str, float]:
    """Image statistics of all processes' pictures."""
    n, edges, *colours = np.sum(sums, axis=0)
    p = np.array(colours) / np.sum(colours)
    return {"image/edge_density": float(edges / n), "image/colour_entropy": float(-(p[p > 0] * np.log2(p[p > 0])).sum())}


def open_clients(section: Mapping[str, Any], poll: Callable[[], None]) -> tuple[dict[str, RewardClient], dict[str, float]]:
    """Clients and weights of the configured rewards; every service must answer before a step is taken."""
    rewards = {name: build(RewardConfig, reward, f"config.rewards.{name}") for name, reward in section.items()}
    weights = {name: float(reward.weight) for name, reward in rewards.items() if reward.weight is not None}
    if not any(weights.values()) or not np.isfinite(list(weights.values())).all():
        raise ConfigError(f"config.rewards: the weights {weights or 'are all None'}; give at least one reward a weight other than 0")
    clients = {name: RewardClient(name, rewards[name].urls, poll=poll) for name in weights}
    try:
        for client in clients.values():
            client.health()
    except ValueError:
        close_all(clients)
        raise
    return clients, weights


def close_all(clients: Mapping[str, RewardClient]) -> None:
    """Ends every connection and what is under way."""
    for client in clients.values():
        client.close()


def make(config: ConfigDict, run: RunConfig, mesh: jax.sharding.Mesh, stop: StopSignal) -> Stage:
    """The GRPO stage of a configuration."""
    grpo, rollout = build(GRPOConfig, config.grpo, "config.grpo"), build(RolloutConfig, config.rollout, "config.rollout")
    advantage, sampling = build(AdvantageConfig, config.advantage, "config.advantage"), build(SamplingConfig, config.sampling, "config.sampling")
    data = build(RenderedConfig, config.data, "config.data")
    model = open_model(run.init_from, MODELS, mesh, run.stage)
    for name in MODELS:
        model.set_config(name, stored_or_preset(model, name, config[name], PRESETS[name], f"config.{name}"))
    check_heads(model.config("transformer").n_kv_heads, mesh)
    chosen = {k: v for k, v in config.decode.items() if v is not None}
    decode = build(DecodeConfig, dataclasses.asdict(model.decode_config) | chosen, "config.decode")
    painter = make_painter(config, model)
    if len(data.sizes) != 1:
        raise ConfigError(f"config.data.sizes={data.sizes} must hold one size: rollouts have one static shape")
    grid = model.grid(*data.sizes[0])
    B = run.batch_size * grpo.rollouts_per_prompt
    check_divides(run.batch_size, grpo, rollout, model.ways)
    if jax.process_count() > 1:  # each has its own rows of a chunk's pictures
        check_split("config.batch_size x grpo.rollouts_per_prompt / rollout.chunks", B // rollout.chunks, painter.mesh)

    # ---- policy, reference ----
    ar, start = model.config("transformer"), model.params("transformer")
    policy = Policy(model.module("transformer"), sampling, rollout.logit_chunk)
    optimizer = make_optimizer(build(OptimizerConfig, config.optimizer, "config.optimizer"), run.steps * grpo.updates_per_batch)
    init = lambda: init_params("transformer", ar, jax.random.key(0))  # noqa: E731
    state = init_state(init, optimizer, mesh).starting_from(start)
    ref_params = make_layout(jax.eval_shape(init), mesh, rollout.reference_dtype)(start) if grpo.kl_coef else None
    model.release("transformer")  # policy and reference are copies
    del start
    clients, weights = open_clients(config.rewards, stop.check_waiting)
    group = grpo.rollouts_per_prompt
    rollouts = Rollouts(model, painter, grid, sampling, decode, rollout, advantage, group, clients, weights, stop.check, stop.check_waiting)
    parts = micro_batches(run.batch_size, grpo, rollout)

    flops = FlopCount()
    update = flops(make_update(policy, optimizer, grpo, advantage, parts))

    def step(state: TrainState, batch: dict[str, Any], number: int):
        key = key_for(run.seed, number, 0)
        rows, total, images, seconds = rollouts(state.params, batch["caption"], batch["targets"], key)
        failed = 1.0 - float(total.ok_PR.mean())
        if failed > rollout.max_fail_frac:
            raise StepRefused(
                f"{failed:.0%} of the rollouts of step {number + 1} could not be scored (limit config.rollout.max_fail_frac="
                f"{rollout.max_fail_frac:.0%}); check the services with `xomni rewards` and run the same command again"
            )
        began = time.perf_counter()
        reward_PR = jnp.asarray(np.nan_to_num(total.total_PR), jnp.float32)
        given_PR = None if total.advantage_PR is None else jnp.asarray(total.advantage_PR, jnp.float32)
        state, metrics = update(state, ref_params, rows, reward_PR, given_PR, jax.random.fold_in(key, SHUFFLE))
        gap = float(metrics["grpo/logp_gap_max"])
        if rollout.max_logp_gap and ar.dtype == jnp.float32 and gap > rollout.max_logp_gap:
            raise FloatingPointError(f"sampler and trainer differ by {gap:.2e} in a log-prob at step {number + 1} (limit {rollout.max_logp_gap:g})")
        seconds["perf/update_s"] = time.perf_counter() - began
        return state, {k: v for k, v in total.stats.items() if np.isfinite(v)} | metrics | join_statistics(gather_json(image_sums(images))) | seconds

    def grid_picture(state: TrainState, number: int) -> np.ndarray:
        n = -(-2 // model.ways) * model.ways
        batch = next(iter(rendered_dataset(data, run.seed + 1_000_003, n, prefetch=0)))
        keys_P = picture_keys(run.seed, n)
        ids_PS, lengths_P = rollouts.prompt_ids(batch["caption"])
        negative = pad_prompts([model.tokenizer.negative_prompt(*grid)] * n) if sampling.guided else None
        out = rollouts.sample(rollouts.layout(state.params), ids_PS, lengths_P, jax.vmap(lambda k: jax.random.split(k, 8))(keys_P), negative)
        pictures = rollouts.pictures(out["codes"], [p for p in batch["caption"] for _ in range(8)], jnp.repeat(keys_P, 8))
        return tile(whole(pictures), columns=8)

    prompts_here = here("config.batch_size", run.batch_size, mesh)

    def to_batch(examples: dict[str, Any]) -> dict[str, list[Any]]:
        return share({name: examples[name] for name in ("caption", "targets")}, prompts_here, run.batch_size)

    batches = DataIterator(rendered_dataset(data, run.seed, run.batch_size, rows=prompts_here), to_batch)

    def export(state: TrainState, directory, note):
        export_model(directory, {"transformer": (state.params, ar)}, run.init_from, note)

    return Stage(state, batches, step, export, grid_picture, items_per_step=B, close=lambda: close_all(clients), flops=lambda: flops.total)


def micro_batches(prompts: int, grpo: GRPOConfig, rollout: RolloutConfig) -> int:
    """Gradient accumulation steps of an update."""
    minibatch = prompts * grpo.rollouts_per_prompt // grpo.updates_per_batch
    return max(1, minibatch // rollout.micro_batch) if rollout.micro_batch else 1


def make_painter(config: ConfigDict, model: XOmni) -> XOmni:
    """The model that decodes pictures: `model`, or one on `config.decoder_mesh`, whose devices the policy's mesh leaves out."""
    apart = math.prod(config.decoder_mesh.values())
    if not apart:
        return model
    _, devices = split_devices(jax.devices(), apart)
    return model.on(make_mesh(dict(config.decoder_mesh), devices))


def check_divides(prompts: int, grpo: GRPOConfig, rollout: RolloutConfig, ways: int) -> None:
    """Refuses batch sizes that do not split evenly, naming the keys."""
    if prompts % rollout.chunks:
        raise ConfigError(f"config.rollout.chunks={rollout.chunks} does not divide config.batch_size={prompts} prompts; use a divisor")
    chunk = prompts // rollout.chunks
    if chunk % ways:
        raise ConfigError(
            f"config.batch_size={prompts} in config.rollout.chunks={rollout.chunks} leaves {chunk} prompts a chunk, which config.mesh cannot "
            f"split {ways} ways (replica x data x fsdp); raise batch_size or lower those axes"
        )
    rollouts = prompts * grpo.rollouts_per_prompt
    if rollouts % grpo.updates_per_batch:
        raise ConfigError(f"config.grpo.updates_per_batch={grpo.updates_per_batch} does not divide the {rollouts} rollouts of a step; use a divisor")
    minibatch = rollouts // grpo.updates_per_batch
    micro = rollout.micro_batch or minibatch
    if minibatch % micro:
        raise ConfigError(f"config.rollout.micro_batch={micro} does not divide the {minibatch} rollouts of an update; use a divisor")
    if micro % ways:
        key = "config.rollout.micro_batch" if rollout.micro_batch else "config.grpo.updates_per_batch"
        raise ConfigError(f"{key}: {micro} rollouts at a time do not split over the {ways} ways of config.mesh; use a multiple of {ways}")
