"""Rollouts of GRPO: a batch of prompts is sampled, decoded to pixels and scored, chunk by chunk."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xomni_jax.core.config import Count, Natural, NonNegative, Share, check_known
from xomni_jax.core.distributed import gather_json
from xomni_jax.core.preemption import Outage, StepRefused, StopRequested, StopSignal
from xomni_jax.pipeline import XOmni
from xomni_jax.rewards.client import RewardClient
from xomni_jax.rewards.combine import MODES, Combined, column, combine, source_means
from xomni_jax.rewards.protocol import Item, Score
from xomni_jax.rl.advantages import AdvantageConfig
from xomni_jax.rl.rewards import Rewards
from xomni_jax.rl.text_statistics import join_text_counts, text_counts
from xomni_jax.rl.trajectory import Trajectory
from xomni_jax.sampling.batches import make_batches
from xomni_jax.sampling.decoder import DecodeConfig
from xomni_jax.sampling.keys import image_orders
from xomni_jax.sampling.logits import SamplingConfig
from xomni_jax.sampling.sampler import SEGMENT, Sampler
from xomni_jax.sampling.segments import Segment, image_spec
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
      refills: most further batches of prompts that a step draws to replace groups whose rewards are all equal (`dynamic_sampling`)
      chunks: parts of the batch; while one is being scored the next one is sampled and decoded
      logit_chunk: positions per piece of the image head; 0: all at once
      max_logp_gap: most that sampler and trainer may differ in a float32 log-prob before the first update; 0: not checked
      max_fail_frac: a step in which more than this share of rollouts could not be scored stops the run
      combine: how several rewards become one advantage: sum_then_normalize, normalize_then_sum or normalize_each
      reencode: images of a step that the tokenizer encodes again, for the metric image/reencode_frac; 0: none. Costs a forward pass of them
      reference: towards which the KL term pulls: start, the model that the run began with; or average, that of config.ema, which is in
        the saved state: with ema.every=K and ema.decay=0 a copy of the policy that is renewed every K updates
      reference_dtype: number format of the reference's matrices: float32, or bfloat16, which halves them and loses nothing where the
        transformer computes in it
    """

    prompt_length: Count = 32
    segment: Count = SEGMENT
    noise: str = "group"
    refills: Natural = 0
    chunks: Count = 2
    logit_chunk: Natural = 0
    max_logp_gap: NonNegative = 1e-4
    max_fail_frac: Share = 0.5
    combine: str = "sum_then_normalize"
    reencode: Natural = 0
    reference: str = "start"
    reference_dtype: str = "float32"

    def __post_init__(self):
        check_known(
            self, noise=("group", "independent"), combine=MODES, reference=("start", "average"), reference_dtype=("float32", "bfloat16")
        )


def param_converter(boxed: Any, mesh: jax.sharding.Mesh, dtype: Any, codes: int = 0, text: bool = False) -> Callable[[Any], Any]:
    """A jitted function that converts a transformer's parameters to another number format and, for the sampler, to its layout.

    Args:
      boxed: parameters with their logical axes; shapes are enough. mesh: where they are, and stay.
      dtype: of what the model computes in its own dtype; norm gains, which it reads in float32, and kernels in 8 bits keep theirs.
      codes: 0 keeps the training layout. Otherwise the sampler's: sharded by ROLLOUT_RULES, with the first `codes` columns of the image
        head, and without the text head. It computes the same log-probs as the training layout, bit for bit.
      text: the sampler keeps the text head: it draws texts as well.
    """
    here, there = param_shardings(boxed, mesh), param_shardings(boxed, mesh, ROLLOUT_RULES if codes else RULES)

    def cast(path, x, sharding):
        x = x if path[-1].key in ("scale", "kernel_scale") or x.dtype == jnp.int8 else x.astype(dtype)
        # Pinned where it lies, so that it is cast before the all-gather, which halves the traffic.
        return jax.lax.with_sharding_constraint(x, sharding)

    def layout(params):
        out = jax.tree_util.tree_map_with_path(cast, params, here)
        if codes:  # cut here, or every program that draws would make a copy of its own
            out["mm_head"] = {"kernel": out["mm_head"]["kernel"][:, :codes]}
        return {name: out[name] for name in there}

    if codes and not text:
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


class Scoring:
    """The images of one batch of rollouts on their way to the scorers, chunk by chunk, and the scores on their way back.

    Attributes:
      decoding: images [chunk, H, W, 3] of chunks that the image decoder may still be working on.
      images: this process's images of the chunks that have been sent.
      texts: metrics of the texts that were read, once the scores are known.
    """

    def __init__(
        self,
        clients: Mapping[str, RewardClient],
        items: Sequence[Item],
        judges: Sequence[Collection[str]],
        rows: Sequence[int],
        chunk: int,
        stop: StopSignal,
        progress: float | None = None,
    ):
        """`items` of all rollouts, `chunk` of them at a time, and the names of the rewards that are asked about each.

        `rows` of a chunk are those whose scores this process asks for.
        """
        self.clients, self.items, self.judges, self.rows, self.chunk, self.stop = clients, items, judges, rows, chunk, stop
        self.progress = progress
        self.decoding: list[jax.Array] = []
        self.images: list[np.ndarray] = []
        self.texts: dict[str, float] = {}
        # Of each chunk, by reward: which of `rows` it is asked about, and their scores.
        self._waiting: list[dict[str, tuple[list[int], Future[list[Score]]]]] = []

    def send(self, wait: bool) -> None:
        """Sends decoded images to the scorers; without `wait` only those that are ready."""
        while self.decoding and (wait or self.decoding[0].is_ready()):
            first = len(self.images) * self.chunk
            images = rows_here(self.decoding.pop(0), self.rows)
            self.images.append(images)
            waiting = {}
            for name, client in self.clients.items():
                if asked := [n for n, row in enumerate(self.rows) if name in self.judges[first + row]]:
                    items = [self.items[first + self.rows[n]] for n in asked]
                    waiting[name] = asked, client.score_async([images[n] for n in asked], items, self.progress)
            self._waiting.append(waiting)

    def scores(self) -> dict[str, list[Score]]:
        """{reward: a score for every rollout of the batch}: waits for this process's own and exchanges them with the others.

        A stop is acted upon after the exchange, which all must make: whoever raised before would leave the others waiting.

        Raises:
          StepRefused: another version of a scorer answers than before.
        """
        poll = self.stop.check_waiting
        try:
            own = [{name: (asked, self.clients[name].wait(f, poll)) for name, (asked, f) in chunk.items()} for chunk in self._waiting]
        except StopRequested:
            own = []
        # Without the details, of which there may be much.
        told = [
            (name, c * self.chunk + self.rows[n], score.value, score.error, score.kind)
            for c, chunk in enumerate(own)
            for name, (asked, scores) in chunk.items()
            for n, score in zip(asked, scores, strict=True)
        ]
        texts = [
            text_counts([self.items[c * self.chunk + self.rows[n]] for n in asked], scores)
            for c, chunk in enumerate(own)
            for asked, scores in chunk.values()
        ]
        faults = [client.replicas.fault for client in self.clients.values() if client.replicas.fault]
        table = gather_json({"scores": told, "texts": texts, "faults": faults})
        self.stop.check()
        for fault in (fault for part in table for fault in part["faults"]):
            raise StepRefused(fault)
        self.texts = join_text_counts([counts for part in table for counts in part["texts"]])
        out = {name: [Score(None)] * len(self.items) for name in self.clients}
        for name, row, value, error, kind in (entry for part in table for entry in part["scores"]):
            out[name][row] = Score(value, error, kind=kind)
        return out


@dataclasses.dataclass(frozen=True)
class Rollouts:
    """Samples, decodes and scores one batch of prompts, chunk by chunk, with scoring in the background.

    Attributes:
      model, image_decoder: samples codes, and decodes them to images: the same model, or one on a mesh of its own.
      grid: rows and columns of an image's codes.
      group: rollouts of a prompt.
      sampler, sampler_params: the sampler's programs, and the function from the policy's parameters to those that they take.
      rewards: their clients and weights.
      stop: polled between segments of codes, after each chunk, and while waiting for rewards.
    """

    model: XOmni
    image_decoder: XOmni
    grid: tuple[int, int]
    group: int
    cfg: RolloutConfig
    advantage: AdvantageConfig
    sampling: SamplingConfig
    decode: DecodeConfig
    sampler: Sampler
    sampler_params: Callable[[Any], Any]
    rewards: Rewards
    stop: StopSignal

    def __call__(
        self,
        params: Any,
        prompts: Sequence[str],
        targets: Sequence[dict],
        own_weights: Sequence[Mapping[str, float] | None],
        sources: Sequence[str | None],
        key: jax.Array,
        progress: float | None = None,
    ) -> tuple[Trajectory, Combined, np.ndarray, dict[str, float]]:
        """One scored batch under the policy's parameters -> (rows without advantages, combined rewards, images [B, H, W, 3], metrics).

        Args:
          own_weights: of each prompt's rewards; no others are asked about it. None: the configured ones.
          sources: names of the prompts' sources, for the metrics; None where there is none.
          progress: share of the training that is done, which the scorers are told.
        """
        params, P, R = self.sampler_params(params), len(prompts), self.group
        chunk = P // self.cfg.chunks * R
        keys_PR, noise_keys_PR = self.keys(key, P)
        inputs, orders_PRT = self.sampler_inputs(prompts, keys_PR), image_orders(self.model.config("transformer").order, self.grid, keys_PR)
        items, judges, weights_P = self.questions(prompts, targets, own_weights)
        scoring = Scoring(self.rewards.clients, items, judges, owned_rows(self.image_decoder.mesh, chunk), chunk, self.stop, progress)
        seconds = dict.fromkeys(("perf/rollout_s", "perf/decode_s", "perf/reward_wait_s"), 0.0)
        made = []

        def send(wait: bool = False) -> None:
            with timed(seconds, "perf/decode_s"):
                scoring.send(wait)

        def between() -> None:
            self.stop.check()
            send()

        for part in make_batches(P, P // self.cfg.chunks):
            with timed(seconds, "perf/rollout_s"):
                own, orders = jax.tree.map(part.take, (inputs, orders_PRT))
                made.append(jax.block_until_ready(self.sampler(params, *own, between, orders)))
            with timed(seconds, "perf/decode_s"):
                texts = [p for p in part.take(prompts) for _ in range(R)]
                images = self.images(made[-1]["codes"], texts, part.take(noise_keys_PR).reshape(-1))
                scoring.decoding.append(images)
            # A decoder with its own devices works on this chunk while the next one is sampled, which otherwise would wait for it.
            send(wait=self.image_decoder is self.model)
            self.stop.check()
        send(wait=True)
        seen_again = self.reencoded(made[-1]["codes"], images) if self.cfg.reencode else {}
        with timed(seconds, "perf/reward_wait_s"):
            scores = scoring.scores()
        columns = {name: column(own, P) for name, own in scores.items()}
        weights = self.rewards.weights_of(weights_P, self.cfg.combine)
        total = combine(columns, weights, self.cfg.combine, minimum=self.rewards.minimum, ddof=self.advantage.ddof, eps=self.advantage.eps)
        measured = seconds | seen_again | scoring.texts | self.rewards.failures(scores) | source_means(sources, columns, total)
        self.check_scored(scores, weights, 1.0 - float(total.ok_PR.mean()))
        return self.rows(made, inputs, total.ok_PR), total, np.concatenate(scoring.images), measured

    def questions(
        self, prompts: Sequence[str], targets: Sequence[dict], own_weights: Sequence[Mapping[str, float] | None]
    ) -> tuple[list[Item], list[Collection[str]], list[Mapping[str, float]]]:
        """What is asked about each rollout, the rewards that are asked, and the weights of each prompt's rewards."""
        asked, R = zip(prompts, targets, strict=True), self.group
        items = [{"prompt": prompt, "targets": target, "group": str(p)} for p, (prompt, target) in enumerate(asked) for _ in range(R)]
        weights_P = [own or self.rewards.weights for own in own_weights]
        return items, [names for names in map(self.rewards.asked, weights_P) for _ in range(R)], weights_P

    def check_scored(self, scores: Mapping[str, Sequence[Score]], weights: Mapping[str, Any], failed: float) -> None:
        """StepRefused if too many rollouts could not be scored; it names the service that failed most often, and why.

        Raises:
          Outage: that service did not answer at all.
        """
        if failed <= self.cfg.max_fail_frac:
            return
        counted = [name for name in scores if np.any(weights[name])]
        counted += [other for name in counted for other in self.rewards.minimum.get(name, ())]
        errors = Counter((name, score.error, score.kind) for name in counted for score in scores[name] if score.error)
        why, remedy, refusal = "no reward applies to them", "give the prompts targets that a scorer reads", StepRefused
        if errors:
            ((name, error, kind), _), *_ = errors.most_common(1)
            urls = self.rewards.clients[name].urls
            why = error if any(url in error for url in urls) else f"{name} at {', '.join(urls)}: {error}"
            remedy = "start the service again (`xomni rewards` checks it)"
            refusal = Outage if kind == "unanswered" else StepRefused
        raise refusal(
            f"{failed:.0%} of a step's rollouts could not be scored (limit config.rollout.max_fail_frac={self.cfg.max_fail_frac:.0%}): "
            f"{why}; {remedy}, then run the same command again"
        )

    def keys(self, key: jax.Array, prompts: int) -> tuple[jax.Array, jax.Array]:
        """Keys [P, R] of the codes and of the image decoder's noise, which a group shares where the configuration says so."""

        def each(purpose: int) -> jax.Array:
            return jax.vmap(lambda p: jax.random.fold_in(jax.random.fold_in(key, purpose), p))(jnp.arange(prompts))

        def split(keys_P: jax.Array) -> jax.Array:
            return jax.vmap(lambda k: jax.random.split(k, self.group))(keys_P)

        noise_P = each(NOISE)
        shared = jnp.broadcast_to(noise_P[:, None], (prompts, self.group))
        return split(each(ROLLOUT)), shared if self.cfg.noise == "group" else split(noise_P)

    def sampler_inputs(self, prompts: Sequence[str], keys_PR: jax.Array) -> tuple[Any, ...]:
        """What the sampler reads: prompt ids [P, S] padded to the configured length, lengths [P], keys, negative prompts with guidance."""
        ids = [self.model.tokenizer.generation_prompt(p, *self.grid) for p in prompts]
        longest = max(range(len(ids)), key=lambda i: len(ids[i]))
        if len(ids[longest]) > self.cfg.prompt_length:
            raise StepRefused(
                f"prompt {prompts[longest]!r} has {len(ids[longest])} tokens with its image prefix; raise config.rollout.prompt_length "
                f"(now {self.cfg.prompt_length})"
            )
        negative = pad_prompts([self.model.tokenizer.image_prefix(*self.grid)] * len(ids)) if self.sampling.guided else None
        return *pad_prompts(ids, self.cfg.prompt_length), keys_PR, negative

    def images(self, codes_PRT: jax.Array, prompts: Sequence[str], noise_keys_B: jax.Array) -> jax.Array:
        """uint8 images [B, H, W, 3] of rollouts, on the mesh."""
        codes_BYX = codes_PRT.reshape(-1, *self.grid)
        noise = self.image_decoder.noise(noise_keys_B, self.grid)
        if self.image_decoder is not self.model:  # copies through the host, because the meshes differ
            codes_BYX, noise = whole(codes_BYX), whole(noise)
        return self.image_decoder.decode_images(codes_BYX, prompts, noise, self.decode)

    def reencoded(self, codes_PRT: jax.Array, images: jax.Array) -> dict[str, float]:
        """Share of the codes that the tokenizer finds again in some images: it falls where a policy draws what no real image has."""
        every = -(-len(images) // self.cfg.reencode)
        codes_NYX = whole(codes_PRT).reshape(-1, *self.grid)[::every]
        found_NYX = np.stack(self.model.encode(list(whole(images[::every]))))
        return {"image/reencode_frac": float(np.mean(found_NYX == codes_NYX))}

    def rows(self, made: Sequence[Mapping[str, Any]], inputs: tuple[Any, ...], ok_PR: np.ndarray) -> Trajectory:
        """The rollouts of all chunks, one row each, without advantages yet."""
        B = inputs[2].size

        def joined(name: str) -> jax.Array:
            return jnp.concatenate([m[name] for m in made]).reshape(B, *made[0][name].shape[2:])

        logp, kept = joined("logp"), joined("sampling_mask") if self.sampling.truncates else None
        codes, order = joined("codes"), joined("order") if "order" in made[0] else None
        codes = codes if order is None else jnp.take_along_axis(codes, order, axis=1)
        image = Segment(codes, None, logp, kept, "image", image_spec(logp.shape[1], self.sampling), order)
        return self.trajectory(inputs, (image,), (jnp.zeros(B),), (jnp.asarray(ok_PR.reshape(-1)),))

    def trajectory(self, inputs: tuple[Any, ...], segments: tuple[Segment, ...], advantage: Sequence, ok: Sequence) -> Trajectory:
        """Rows after the prompts that the sampler read, those of a prompt side by side."""
        ids_PS, lengths_P, _, negative = inputs

        def repeated(x: np.ndarray) -> jax.Array:
            return jnp.repeat(jnp.asarray(x), self.group, axis=0)

        prompts = repeated(ids_PS), repeated(lengths_P)
        return Trajectory(prompts, segments, negative and tuple(map(repeated, negative)), tuple(advantage), tuple(ok))
