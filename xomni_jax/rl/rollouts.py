"""Rollouts of GRPO: a batch of prompts is sampled, decoded to pixels and scored, chunk by chunk."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import msgspec
import numpy as np

from xomni_jax.core.distributed import gather_json
from xomni_jax.core.preemption import StepRefused, StopRequested, StopSignal
from xomni_jax.pipeline import XOmni
from xomni_jax.rewards.client import RewardClient
from xomni_jax.rewards.combine import MODES, Combined, column, combine
from xomni_jax.rewards.protocol import Score
from xomni_jax.rl.advantages import AdvantageConfig
from xomni_jax.rl.update import RolloutBatch
from xomni_jax.sampling.batches import make_batches
from xomni_jax.sampling.decoder import DecodeConfig
from xomni_jax.sampling.logits import SamplingConfig
from xomni_jax.sampling.sampler import SEGMENT, Sampler
from xomni_jax.sequence.padding import pad_prompts
from xomni_jax.sharding.arrays import owned_rows, rows_here, whole
from xomni_jax.sharding.rules import ROLLOUT_RULES, RULES, param_shardings

ROLLOUT, NOISE = 0, 1  # purposes of a step's keys; the update's is SHUFFLE


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """How a batch of rollouts is made and used.

    Attributes:
      prompt_length: tokens that prompts are padded to, with the image prefix; a longer prompt is an error
      segment: most codes drawn between two looks for a signal to stop; the largest divisor of an image's codes is taken
      noise: decoder noise: group (one for all rollouts of a prompt, so that reward differences come from codes) or independent
      chunks: parts of the batch; while one is being scored the next one is sampled and decoded
      micro_batch: rollouts per gradient accumulation step of the update; 0: all at once
      logit_chunk: positions per piece of the image head; 0: all at once
      max_logp_gap: most that sampler and trainer may differ in a float32 log-prob before the first update; 0: not checked
      max_fail_frac: a step in which more than this share of rollouts could not be scored stops the run
      combine: sum_then_normalize or normalize_then_sum
      reference_dtype: number format of the reference's matrices: float32, or bfloat16, which halves them and loses nothing where the
        transformer computes in it
    """

    prompt_length: int = 32
    segment: int = SEGMENT
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
        for name in ("chunks", "segment"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.combine not in MODES:
            raise ValueError(f"combine={self.combine!r} is unknown; use {' or '.join(MODES)}")
        if self.reference_dtype not in ("float32", "bfloat16"):
            raise ValueError(f"reference_dtype={self.reference_dtype!r} is unknown; use float32 or bfloat16")
        for name in ("micro_batch", "logit_chunk", "max_logp_gap"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative; 0 turns it off")


def param_converter(boxed: Any, mesh: jax.sharding.Mesh, dtype: Any, codes: int = 0) -> Callable[[Any], Any]:
    """The jitted change of a transformer's parameters to another number format and, for the sampler, another layout.

    Args:
      boxed: parameters with their logical axes, shapes are enough. mesh: where they are, and stay.
      dtype: of what the model computes in its own dtype; norm gains, which it reads in float32, keep theirs.
      codes: for the sampler: ROLLOUT_RULES, and of the heads so many rows of the image's. It computes what the trainer does, bit for bit.
    """
    here, there = param_shardings(boxed, mesh), param_shardings(boxed, mesh, ROLLOUT_RULES if codes else RULES)

    def cast(path, x, sharding):
        x = x if path[-1].key == "scale" else x.astype(dtype)
        # Pinned where it lies, so that it is cast before the all-gather, which halves the traffic.
        return jax.lax.with_sharding_constraint(x, sharding)

    def layout(params):
        out = jax.tree_util.tree_map_with_path(cast, params, here)
        if codes:  # cut here, or every program that draws would make a copy of its own
            out["mm_head"] = {"kernel": out["mm_head"]["kernel"][:, :codes]}
        return {name: out[name] for name in there}

    if codes:
        del there["lm_head"]
    return jax.jit(layout, out_shardings=there)


@contextlib.contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Adds the time that passes within to `seconds[name]`."""
    began = time.perf_counter()
    try:
        yield
    finally:
        seconds[name] += time.perf_counter() - began


class Rollouts:
    """Samples, decodes and scores one batch of prompts, chunk by chunk, with scoring in the background."""

    def __init__(
        self,
        model: XOmni,
        image_decoder: XOmni,
        grid: tuple[int, int],
        group: int,
        cfg: RolloutConfig,
        advantage: AdvantageConfig,
        sampling: SamplingConfig,
        decode: DecodeConfig,
        sampler: Sampler,
        sampler_params: Callable[[Any], Any],
        clients: Mapping[str, RewardClient],
        weights: Mapping[str, float],
        stop: StopSignal,
    ):
        """`model` samples codes and `image_decoder` decodes them: the same, or one on a mesh of its own.

        Args:
          grid: rows and columns of an image's codes. group: rollouts of a prompt.
          sampler, sampler_params: the sampler's programs, and what makes their parameters of those that learn.
          clients, weights: of the rewards.
          stop: looked at between segments of codes and after each chunk, and within waits for rewards.
        """
        self.model, self.image_decoder, self.grid, self.group = model, image_decoder, grid, group
        self.cfg, self.advantage, self.sampling, self.decode = cfg, advantage, sampling, decode
        self.sampler, self.sampler_params = sampler, sampler_params
        self.clients, self.weights, self.stop = clients, weights, stop

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

    def __call__(
        self, params: Any, prompts: Sequence[str], targets: Sequence[dict], key: jax.Array
    ) -> tuple[RolloutBatch, Combined, np.ndarray, dict]:
        """One scored batch under the policy's parameters -> (rows without advantages, combined rewards, images [B, H, W, 3], timings)."""
        params = self.sampler_params(params)
        P, R, n = len(prompts), self.group, len(prompts) // self.cfg.chunks
        mine = owned_rows(self.image_decoder.mesh, n * R)  # of a chunk: the images whose rewards this process asks for
        keys_P = jax.vmap(lambda p: jax.random.fold_in(jax.random.fold_in(key, ROLLOUT), p))(jnp.arange(P))
        keys_PR = jax.vmap(lambda k: jax.random.split(k, R))(keys_P)
        noise_keys_P = jax.vmap(lambda p: jax.random.fold_in(jax.random.fold_in(key, NOISE), p))(jnp.arange(P))
        noise_keys_PR = (
            jnp.broadcast_to(noise_keys_P[:, None], (P, R))
            if self.cfg.noise == "group"
            else jax.vmap(lambda k: jax.random.split(k, R))(noise_keys_P)
        )
        ids_PS, lengths_P = self.prompt_ids(prompts)
        negative = pad_prompts([self.model.tokenizer.image_prefix(*self.grid)] * P) if self.sampling.guided else None
        seconds = {"perf/rollout_s": 0.0, "perf/decode_s": 0.0}
        made, drawing, images, waiting = [], [], [], []

        def send(wait: bool = False) -> None:
            """Gives images to the scorers, those that are drawn already or all."""
            while drawing and (wait or drawing[0].is_ready()):
                with timed(seconds, "perf/decode_s"):
                    images.append(rows_here(drawing.pop(0), mine))
                asked = [(len(images) - 1) * n + row // R for row in mine]
                items = [{"prompt": prompts[p], "targets": targets[p]} for p in asked]
                waiting.append({name: client.score_async(list(images[-1]), items) for name, client in self.clients.items()})

        def between() -> None:
            self.stop.check()
            send()

        for part in make_batches(P, n):
            with timed(seconds, "perf/rollout_s"):
                inputs = jax.tree.map(part.take, (ids_PS, lengths_P, keys_PR, negative))
                out = jax.block_until_ready(self.sampler(params, *inputs, between))
            with timed(seconds, "perf/decode_s"):
                texts = [p for p in part.take(prompts) for _ in range(R)]
                drawing.append(self.images(out["codes"], texts, part.take(noise_keys_PR).reshape(-1)))
            made.append(out)
            # With devices of its own the decoder draws this chunk while the next one is sampled, which would else wait for it.
            send(wait=self.image_decoder is self.model)
            self.stop.check()
        send(wait=True)
        began = time.perf_counter()
        columns = {name: column(scores, P) for name, scores in self.scores(waiting, mine, n * R).items()}
        seconds["perf/reward_wait_s"] = time.perf_counter() - began
        total = combine(columns, self.weights, self.cfg.combine, ddof=self.advantage.ddof, eps=self.advantage.eps)
        rows = lambda name: jnp.concatenate([m[name] for m in made]).reshape(P * R, *made[0][name].shape[2:])  # noqa: E731
        repeat = lambda x: jnp.repeat(jnp.asarray(x), R, axis=0)  # noqa: E731
        batch = RolloutBatch(
            repeat(ids_PS), repeat(lengths_P), rows("codes"), rows("logp"), rows("sampling_mask") if self.sampling.truncates else None,
            negative and tuple(map(repeat, negative)), jnp.zeros(P * R), jnp.asarray(total.ok_PR.reshape(-1)),
        )  # fmt: skip
        return batch, total, np.concatenate(images), seconds

    def scores(self, waiting: Sequence[Mapping[str, Any]], mine: Sequence[int], n: int) -> dict[str, list[Score]]:
        """{reward: a score for every rollout of the batch}: waits for this process's own and exchanges them with the others.

        A stop is acted upon after the exchange, which all must make: whoever raised before would leave the others waiting.
        """
        try:
            own = [{name: client.wait(chunk[name], self.stop.check_waiting) for name, client in self.clients.items()} for chunk in waiting]
        except StopRequested:
            own = []
        # Without the details, which only reports need.
        told = [{name: [Score(s.value, s.error) for s in scores] for name, scores in chunk.items()} for chunk in own]
        table = gather_json({"rows": list(mine), "chunks": msgspec.to_builtins(told)})
        self.stop.check()
        out: dict[str, list[Score]] = {name: [None] * (n * len(waiting)) for name in self.clients}
        for part in table:
            for c, chunk in enumerate(msgspec.convert(part["chunks"], list[dict[str, list[Score]]])):
                for name, scores in chunk.items():
                    for row, score in zip(part["rows"], scores, strict=True):
                        out[name][c * n + row] = score
        return out

    def images(self, codes_PRT: jax.Array, prompts: Sequence[str], noise_keys_B: jax.Array) -> jax.Array:
        """uint8 images [B, H, W, 3] of rollouts, on the mesh."""
        codes_BYX = codes_PRT.reshape(-1, *self.grid)
        noise = self.image_decoder.noise(noise_keys_B, self.grid)
        if self.image_decoder is not self.model:  # copies through the host, because the meshes differ
            codes_BYX, noise = whole(codes_BYX), whole(noise)
        return self.image_decoder.decode_images(codes_BYX, prompts, noise, self.decode)
