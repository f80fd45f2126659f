"""Janus-Pro-R1 (2506.01480): the policy draws an image, says whether it shows what was asked for and why, and draws another if not.

A rollout is prompt, image, question, verdict, image. All rows draw both images, so that shapes are static; where the verdict is yes the
first one is the final one, and the second is neither scored nor learned.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from xomni_jax.core.config import ConfigError
from xomni_jax.core.program import Program, Programs
from xomni_jax.models.transformer import ARTransformer
from xomni_jax.pipeline import XOmni
from xomni_jax.rewards.combine import Combined, column, combine, source_means
from xomni_jax.rl.advantages import AdvantageConfig, group_advantages
from xomni_jax.rl.grpo import GRPOStage
from xomni_jax.rl.methods.judged_images import DRAWN, JudgingRun, JudgingSampler, abstract_batch, drawing_programs
from xomni_jax.rl.rollouts import Rollouts, Scoring, timed
from xomni_jax.rl.trajectory import Trajectory, check_credit, credited
from xomni_jax.sampling.batches import make_batches
from xomni_jax.sampling.segments import Segment
from xomni_jax.sharding.arrays import owned_rows, whole

REWARDS = ("generation", "verdict", "first", "final")
ROUNDS = 2  # T: images of a trajectory at most


@dataclasses.dataclass(frozen=True)
class JanusProR1Run(JudgingRun):
    """GRPO of a policy that judges its image and draws it again.

    Attributes:
      credit: (reward, segment, weight of the reward's advantage there). Rewards: generation (of all images of the trajectory), verdict,
        first and final (image); segments: first, verdict, final
    """

    stage: str = "janus_pro_r1"
    run_dir: str = "runs/janus_pro_r1"
    credit: tuple[tuple[str, str, float], ...] = tuple((reward, segment, 1.0) for reward in REWARDS[:2] for segment in DRAWN)

    def __post_init__(self):
        super().__post_init__()
        if self.rollout.refills or self.rollout.combine != "sum_then_normalize" or self.sampling.window > 1:
            raise ConfigError(
                "stage janus_pro_r1 draws codes one by one and has advantages of its own; leave rollout.refills, rollout.combine and "
                "sampling.window as they are"
            )
        if not self.credit:
            raise ConfigError("config.credit is empty: nothing would be learned; leave it as it is, or name a reward and a segment")
        check_credit(self.shares, REWARDS, DRAWN)

    @property
    def shares(self) -> dict[str, dict[str, float]]:
        """The credit map."""
        names = dict.fromkeys(reward for reward, _, _ in self.credit)
        return {name: {segment: w for reward, segment, w in self.credit if reward == name} for name in names}


# ---- rewards ----
def bilevel(first_PR: np.ndarray, final_PR: np.ndarray, yes_PR: np.ndarray, right_PR: np.ndarray) -> dict[str, np.ndarray]:
    """The rewards of trajectories [P, R] with T = 2, NaN where unknown; K = 1 images where the verdict is yes, else 2.

    generation: sum_{i<K} R_i + (T - K + 1) R_K, so that early success costs nothing; verdict: T / K times whether it was right (both as
    in the paper, R_gen and R_comp); first and final: of these images alone, as in the published code.

    Args:
      first_PR, final_PR: rewards of the images, the same one where the verdict is yes.
      right_PR: whether the verdict is right; read where the first image's reward is known.
    """
    return {
        "generation": first_PR + final_PR,  # 2 R_1 with one image, R_1 + R_2 with two
        "verdict": np.where(np.isfinite(first_PR), np.where(yes_PR, ROUNDS, 1) * right_PR, np.nan),
        "first": first_PR,
        "final": final_PR,
    }


class Judged(NamedTuple):
    """The trajectories of a batch [P, R]: their segments, what the verdicts say (1 yes, 0 no, -1 neither), and which of them end."""

    segments: tuple[Segment, ...]
    said_PR: np.ndarray
    ended_PR: np.ndarray

    @classmethod
    def of(cls, made: Sequence[Mapping[str, Any]]) -> Judged:
        """Of what `JudgingSampler` returned for each chunk."""
        segments = jax.tree.map(lambda *x: jnp.concatenate(x), *(m["segments"] for m in made))
        return cls(segments, *(np.concatenate([m[name] for m in made]) for name in ("said", "ended")))

    @property
    def yes_PR(self) -> np.ndarray:
        """Where the first image is the final one."""
        return self.said_PR == 1

    def worth(
        self, first: Combined, final: Combined, run: JanusProR1Run, cfg: AdvantageConfig
    ) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...], dict[str, float]]:
        """(advantage [B], whether it is known [B]) of each drawn segment, and metrics. `first`, `final`: rewards of these images."""
        known_PR, good_PR = first.ok_PR, first.total_PR >= run.verdict.threshold
        right_PR = (self.said_PR == good_PR) & self.ended_PR
        advantage, ok, stats = {}, {}, []
        for name, value_PR in bilevel(first.total_PR, final.total_PR, self.yes_PR, right_PR).items():
            if name in run.shares:
                ok_PR = np.isfinite(value_PR)
                advantage_PR, metrics = group_advantages(jnp.asarray(np.nan_to_num(value_PR), jnp.float32), ok_PR, cfg)
                advantage[name], ok[name] = advantage_PR.reshape(-1), jnp.asarray(ok_PR.reshape(-1))
                stats.append(metrics)
        advantages, (*others, last) = credited(run.shares, advantage, ok, DRAWN)
        told = {
            "verdict/yes_frac": self.yes_PR.mean(),
            "verdict/unclear_frac": (self.said_PR < 0).mean(),
            "verdict/unended_frac": 1.0 - self.ended_PR.mean(),
            "verdict/tokens": whole(self.segments[2].lengths).mean(),
        }
        if known_PR.any():
            told["reward/total/first"] = first.stats["reward/total/mean"]
            told |= {"verdict/accuracy": right_PR[known_PR].mean(), "verdict/good_frac": good_PR[known_PR].mean()}
        told |= {name: np.mean([metrics[name] for metrics in stats]) for name in stats[0]}
        # The second image counts where it was asked for.
        oks = (*others, last & ~jnp.asarray(self.yes_PR.reshape(-1)))
        return advantages, oks, {name: float(value) for name, value in told.items()}


@dataclasses.dataclass(frozen=True)
class JudgedRollouts(Rollouts):
    """Rollouts that are judged by the policy and drawn again.

    Attributes:
      run: the configuration.
    """

    run: JanusProR1Run

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
        """As `Rollouts`; combined rewards and images are those of the final images, and the rows have their advantages."""
        params, P, R, chunks = self.sampler_params(params), len(prompts), self.group, self.cfg.chunks
        chunk = P // chunks * R
        keys_PR, noise_keys_PR = self.keys(key, P)
        inputs = self.sampler_inputs(prompts, keys_PR)
        items, judges, weights_P = self.questions(prompts, targets, own_weights)
        # Of each chunk first its first images, then its second ones.
        order = np.repeat(np.arange(P * R).reshape(chunks, 1, chunk), 2, axis=1)
        items, judges = [items[n] for n in order.flat], [judges[n] for n in order.flat]
        scoring = Scoring(self.rewards.clients, items, judges, owned_rows(self.image_decoder.mesh, chunk), chunk, self.stop, progress)
        seconds = dict.fromkeys(("perf/rollout_s", "perf/decode_s", "perf/reward_wait_s"), 0.0)
        made = []

        def between() -> None:
            self.stop.check()
            with timed(seconds, "perf/decode_s"):
                scoring.send(wait=False)

        for c, part in enumerate(make_batches(P, P // chunks)):
            with timed(seconds, "perf/rollout_s"):
                made.append(jax.block_until_ready(self.sampler(params, *jax.tree.map(part.take, inputs), between)))
            for n in np.flatnonzero(made[-1]["said"] == 1):
                judges[(2 * c + 1) * chunk + n] = ()
            texts = [p for p in part.take(prompts) for _ in range(R)]
            for image in (0, -1):
                with timed(seconds, "perf/decode_s"):
                    shown = self.images(made[-1]["segments"][image].ids, texts, part.take(noise_keys_PR).reshape(-1))
                    scoring.decoding.append(shown)
                    scoring.send(wait=self.image_decoder is self.model)
                self.stop.check()
        with timed(seconds, "perf/decode_s"):
            scoring.send(wait=True)
        with timed(seconds, "perf/reward_wait_s"):
            scores = scoring.scores()

        # Per reward: scores of the first and of the second images.
        each = {name: np.array(own, object).reshape(chunks, 2, chunk).swapaxes(0, 1).reshape(2, P, R) for name, own in scores.items()}
        weights, drawn = self.rewards.weights_of(weights_P, self.cfg.combine), Judged.of(made)

        def combined(choose: Callable[[np.ndarray], np.ndarray]) -> tuple[dict[str, Any], Combined]:
            columns = {name: column(list(choose(images).flat), P) for name, images in each.items()}
            return columns, combine(columns, weights, self.cfg.combine, minimum=self.rewards.minimum)

        _, first = combined(lambda images: images[0])
        columns, final = combined(lambda images: np.where(drawn.yes_PR, images[0], images[1]))
        advantages, oks, told = drawn.worth(first, final, self.run, self.advantage)
        self.check_scored(scores, weights, 1.0 - float((first.ok_PR & final.ok_PR).mean()))
        rows = self.trajectory(inputs, tuple(s.rows() for s in drawn.segments), advantages, oks)
        pairs = zip(np.split(drawn.yes_PR.reshape(-1), chunks), scoring.images[::2], scoring.images[1::2], strict=True)
        images = [np.where(yes[list(scoring.rows)][:, None, None, None], *pair) for yes, *pair in pairs]
        measured = seconds | scoring.texts | self.rewards.failures(scores) | source_means(sources, columns, final) | told
        if self.cfg.reencode:
            measured |= self.reencoded(made[-1]["segments"][-1].ids, shown)
        return rows, final, np.concatenate(images), measured


class JanusProR1Stage(GRPOStage):
    """Janus-Pro-R1, registered as a stage."""

    Config: ClassVar[type] = JanusProR1Run
    own_advantages: ClassVar[bool] = True
    abstract_batch: ClassVar[Callable[..., Trajectory]] = staticmethod(abstract_batch)

    @classmethod
    def programs(cls, cfg: JanusProR1Run, models: Mapping[str, Any], mesh: Mesh, decoder_mesh: Mesh | None = None) -> Programs:
        """As GRPO's; a text head must learn, or there would be no verdicts to learn."""
        made = super().programs(cfg, models, mesh, decoder_mesh)
        if not cfg.lora.rank and "lm_head/kernel" not in cfg.make_optimizer().trained(made.persistent["params"]):
            raise ConfigError(
                f"config.train={cfg.train}, config.freeze={cfg.freeze}: the text head does not learn, so that verdicts cannot; let "
                "lm_head/kernel learn"
            )
        for name in [name for name in made.programs if name.startswith("decoder")]:  # of every chunk both images are decoded
            made.programs[name] = dataclasses.replace(made[name], per_step=2 * made[name].per_step)
        return made

    @classmethod
    def drawing(cls, cfg: JanusProR1Run, net: ARTransformer, grid: tuple[int, int], weights: Any, mesh: Mesh) -> dict[str, Program]:
        """The programs that draw a chunk's trajectories."""
        return drawing_programs(cfg, net, grid, weights, mesh)

    @classmethod
    def rollouts(
        cls, run: JanusProR1Run, programs: Mapping[str, Callable[..., Any]], model: XOmni, image_decoder: XOmni, **own: Any
    ) -> JudgedRollouts:
        """What draws, judges, decodes and scores."""
        if compares := [name for name, about in own["rewards"].about.items() if about.scope != "image"]:
            own["rewards"].close()
            raise ConfigError(
                f"config.rewards.{compares[0]} compares images, but second ones are drawn for some rollouts only; leave it out"
            )
        sampler = JudgingSampler.of(run, programs, model.tokenizer, own["grid"])
        return JudgedRollouts(model, image_decoder, sampler=sampler, run=run, **own)
