"""TwiG-GRPO (2511.16671): the policy thinks before each band of rows that it draws, and one reward counts for all of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np
from jax.sharding import Mesh

from xomni_jax.core.program import Program, Programs
from xomni_jax.models.transformer import ARTransformer
from xomni_jax.pipeline import XOmni
from xomni_jax.rewards.combine import Combined
from xomni_jax.rl.grpo import GRPOStage
from xomni_jax.rl.methods.passes import PassesRollouts
from xomni_jax.rl.methods.texts import check_text_head
from xomni_jax.rl.methods.thoughts import KINDS, ThinkingRun, ThinkingSampler, abstract_batch, drawing_programs
from xomni_jax.rl.rollouts import Drawn
from xomni_jax.rl.trajectory import Credit, Passes, check_credit


@dataclasses.dataclass(frozen=True)
class TwigRun(ThinkingRun):
    """GRPO of a policy that thinks while it draws. The segments of `credit` are thought, band, reflection and redraw, all bands' alike."""

    stage: str = "twig"
    run_dir: str = "runs/twig"
    credit: Credit = tuple(("total", kind, 1.0) for kind in KINDS)

    def __post_init__(self):
        super().__post_init__()
        check_credit(self.credit, ("total",), KINDS)


@dataclasses.dataclass(frozen=True)
class ThinkingRollouts(PassesRollouts):
    """Rollouts with thoughts and reflections."""

    def rows(self, drawn: Drawn, total: Combined) -> tuple[Passes, dict[str, float]]:
        """Adds metrics of the reflections."""
        rows, told = super().rows(drawn, total)
        if scores := [own for m in drawn.made for own in m["scores"]]:
            told["reflection/unclear_frac"] = float(np.mean(np.isnan(scores)))
            told["reflection/redrawn_frac"] = float(np.mean(np.array(scores) < self.run.thoughts.threshold))
        return rows, told


class TwigStage(GRPOStage):
    """TwiG-GRPO, registered as a stage."""

    Config: ClassVar[type] = TwigRun
    own_advantages: ClassVar[bool] = True
    abstract_batch: ClassVar[Callable[..., Passes]] = staticmethod(abstract_batch)

    @classmethod
    def programs(cls, cfg: TwigRun, models: Mapping[str, Any], mesh: Mesh, decoder_mesh: Mesh | None = None) -> Programs:
        """As GRPO's; the text head must learn where thoughts are to."""
        made = super().programs(cfg, models, mesh, decoder_mesh)
        if not cfg.thoughts.given and any(segment == "thought" for _, segment, _ in cfg.credit):
            check_text_head(cfg, made, "thoughts")
        return made

    @classmethod
    def drawing(cls, cfg: TwigRun, net: ARTransformer, grid: tuple[int, int], weights: Any, mesh: Mesh) -> dict[str, Program]:
        """The programs that draw a chunk's passes."""
        return drawing_programs(cfg, net, grid, weights, mesh)

    @classmethod
    def rollouts(
        cls, run: TwigRun, programs: Mapping[str, Callable[..., Any]], model: XOmni, image_decoder: XOmni, **own: Any
    ) -> ThinkingRollouts:
        """What thinks, draws, decodes and scores."""
        sampler = ThinkingSampler.of(run, programs, own["grid"])
        return ThinkingRollouts(
            model, image_decoder, sampler=sampler, run=run, kinds=tuple(one.kind for one in sampler.script.passes), **own
        )
