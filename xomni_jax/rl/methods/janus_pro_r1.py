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
from xomni_jax.rl.methods.texts import check_text_head
from xomni_jax.rl.rollouts import Rollouts
from xomni_jax.rl.trajectory import Credit, Trajectory, check_credit, credited
from xomni_jax.sampling.segments import Segment
from xomni_jax.sharding.arrays import whole

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
    credit: Credit = tuple((reward, segment, 1.0) for reward in REWARDS[:2] for segment in DRAWN)

    def __post_init__(self):
        super().__post_init__()
        if self.rollout.refills or self.rollout.combine != "sum_then_normalize" or self.sampling.window > 1:
            raise ConfigError(
                "stage janus_pro_r1 draws codes one by one and has advantages of its own; leave rollout.refills, rollout.combine and "
                "sampling.window as they are"
            )
        check_credit(self.credit, REWARDS, DRAWN)


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
            if any(reward == name for reward, _, _ in run.credit):
                ok_PR = np.isfinite(value_PR)
                advantage_PR, metrics = group_advantages(jnp.asarray(np.nan_to_num(value_PR), jnp.float32), ok_PR, cfg)
                advantage[name], ok[name] = advantage_PR.reshape(-1), jnp.asarray(ok_PR.reshape(-1))
                stats.append(metrics)
        advantages, (*others, last) = credited(run.credit, advantage, ok, DRAWN)
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

    n_images: ClassVar[int] = ROUNDS
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
        P, R, chunks = len(prompts), self.group, self.cfg.chunks
        drawn = self.draw(params, prompts, targets, own_weights, key, progress)
        judged = Judged.of(drawn.made)
        # Per reward: scores of the first and of the second images.
        each = {name: np.array(own, object).reshape(chunks, 2, -1).swapaxes(0, 1).reshape(2, P, R) for name, own in drawn.scores.items()}

        def combined(choose: Callable[[np.ndarray], np.ndarray]) -> tuple[dict[str, Any], Combined]:
            columns = {name: column(list(choose(images).flat), P) for name, images in each.items()}
            return columns, combine(columns, drawn.weights, self.cfg.combine, minimum=self.rewards.minimum)

        _, first = combined(lambda images: images[0])
        columns, final = combined(lambda images: np.where(judged.yes_PR, images[0], images[1]))
        advantages, oks, told = judged.worth(first, final, self.run, self.advantage)
        self.check_scored(drawn.scores, drawn.weights, 1.0 - float((first.ok_PR & final.ok_PR).mean()))
        rows = self.trajectory(drawn.inputs, tuple(s.rows() for s in judged.segments), advantages, oks)
        pairs = zip(np.split(judged.yes_PR.reshape(-1), chunks), drawn.images[::2], drawn.images[1::2], strict=True)
        images = [np.where(yes[list(drawn.rows)][:, None, None, None], *pair) for yes, *pair in pairs]
        return rows, final, np.concatenate(images), drawn.measured | source_means(sources, columns, final) | told

    def shown(self, made: Mapping[str, Any]) -> Sequence[tuple[jax.Array, np.ndarray | bool]]:
        """The first image, and the second one, which is scored where the verdict is not yes."""
        first, *_, final = made["segments"]
        return [(first.ids, False), (final.ids, made["said"] == 1)]


class JanusProR1Stage(GRPOStage):
    """Janus-Pro-R1, registered as a stage."""

    Config: ClassVar[type] = JanusProR1Run
    own_advantages: ClassVar[bool] = True
    abstract_batch: ClassVar[Callable[..., Trajectory]] = staticmethod(abstract_batch)

    @classmethod
    def programs(cls, cfg: JanusProR1Run, models: Mapping[str, Any], mesh: Mesh, decoder_mesh: Mesh | None = None) -> Programs:
        """As GRPO's; a text head must learn, or there would be no verdicts to learn."""
        made = super().programs(cfg, models, mesh, decoder_mesh)
        check_text_head(cfg, made, "verdicts")
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
