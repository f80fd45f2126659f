"""GRPO of a class-conditional model with instance- and distribution-level rewards (arXiv 2603.23086).

The policy is a transformer over the codes of a tokenizer that makes pixels itself, as LlamaGen's; a prompt is the number of a class. The
distribution-level reward is the scorer `loo_fid`. Advantages of each reward, the entropy that follows a target, the sequence ratio and the
KL term are those of GRPO.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from jax.sharding import Mesh

from xomni_jax.core.preemption import StopSignal
from xomni_jax.models import llamagen_vq, transformer
from xomni_jax.models.section import ModelSection
from xomni_jax.pipeline import XOmni
from xomni_jax.rewards.combine import Combined
from xomni_jax.rl.grpo import GRPORun, GRPOStage, abstract_batch
from xomni_jax.rl.objectives import GRPOConfig
from xomni_jax.rl.rewards import RewardConfig
from xomni_jax.rl.rollouts import Drawn, RolloutConfig, Rollouts
from xomni_jax.rl.trajectory import Rows, Trajectory
from xomni_jax.sampling.logits import SamplingConfig
from xomni_jax.training.stage import RunningStage

PLAIN = SamplingConfig(top_k=0, min_p=0.0)


@dataclasses.dataclass(frozen=True)
class LooFIDRun(GRPORun):
    """GRPO of a class-conditional model. Defaults are those of the paper's code, where it has them.

    Attributes:
      llamagen_vq: frozen, from codes to pixels; there is no other decoder
      plain: where rollouts are guided or truncated, learn the distribution that is neither, which then draws as well without
    """

    stage: str = "loo_fid"
    run_dir: str = "runs/loo_fid"
    llamagen_vq: ModelSection = ModelSection(llamagen_vq.PRESETS)
    plain: bool = True
    grpo: GRPOConfig = GRPOConfig(rollouts_per_prompt=12, updates_per_batch=2, ratio="sequence")
    rollout: RolloutConfig = RolloutConfig(prompt_length=1, chunks=1, combine="normalize_each")
    rewards: Mapping[str, RewardConfig] = dataclasses.field(
        default_factory=lambda: {"loo_fid": RewardConfig(("http://127.0.0.1:8002",), weight=2.0)}
    )

    @property
    def off_policy(self) -> bool:
        """Whether rollouts are drawn from another distribution than the one that learns."""
        return self.plain and (self.sampling.guided or self.sampling.truncates or self.sampling.temperature != 1.0)


def plain_batch(cfg: LooFIDRun, ar: transformer.ARConfig, grid: tuple[int, int], mesh: Mesh) -> Trajectory:
    """Shapes of all rollouts of a step, as they are learned."""
    return abstract_batch(dataclasses.replace(cfg, sampling=PLAIN) if cfg.off_policy else cfg, ar, grid, mesh)


class PlainRollouts(Rollouts):
    """Rollouts that are learned as if they had been drawn without guidance and truncation."""

    def rows(self, drawn: Drawn, total: Combined) -> tuple[Rows, dict[str, float]]:
        """As `Rollouts`, replayed without guidance and truncation."""
        return Rollouts.rows(dataclasses.replace(self, sampling=PLAIN), drawn._replace(inputs=(*drawn.inputs[:-1], None)), total)


class LooFIDStage(GRPOStage):
    """GRPO of a class-conditional model, registered as a stage."""

    Config: ClassVar[type] = LooFIDRun
    components: ClassVar[tuple[str, ...]] = ("transformer", "llamagen_vq")
    abstract_batch: ClassVar[Callable[..., Trajectory]] = staticmethod(plain_batch)

    @classmethod
    def rollouts(
        cls, run: LooFIDRun, programs: Mapping[str, Callable[..., Any]], model: XOmni, image_decoder: XOmni, **own: Any
    ) -> Rollouts:
        """What draws, decodes and scores."""
        made = super().rollouts(run, programs, model, image_decoder, **own)
        return PlainRollouts(**{f.name: getattr(made, f.name) for f in dataclasses.fields(made)}) if run.off_policy else made

    @classmethod
    def make(cls, cfg: LooFIDRun, mesh: Mesh, stop: StopSignal) -> RunningStage:
        """As GRPO's. Log-probs of another distribution than the sampler's are not compared with the sampler's."""
        if cfg.off_policy:
            cfg = dataclasses.replace(cfg, rollout=dataclasses.replace(cfg.rollout, max_logp_gap=0.0))
        return super().make(cfg, mesh, stop)
