"""What methods share whose rollouts are several passes: one reward, whose advantage goes where the credit map says."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from xomni_jax.core.config import ConfigError
from xomni_jax.rewards.combine import Combined
from xomni_jax.rl.advantages import group_advantages
from xomni_jax.rl.grpo import GRPORun
from xomni_jax.rl.methods.texts import ended_at
from xomni_jax.rl.rollouts import Drawn, Rollouts
from xomni_jax.rl.trajectory import Credit, Passes, credited
from xomni_jax.sharding.arrays import whole


@dataclasses.dataclass(frozen=True)
class PassesRun(GRPORun):
    """GRPO of several passes with one reward.

    Attributes:
      credit: (total, segment, weight of the advantage there); a segment that is left out is drawn and does not learn
    """

    credit: Credit = ()

    def __post_init__(self):
        super().__post_init__()
        if self.rollout.refills or self.rollout.combine != "sum_then_normalize" or self.sampling.window > 1:
            raise ConfigError(
                f"stage {self.stage} draws codes one by one and has advantages of its own; leave rollout.refills, rollout.combine and "
                "sampling.window as they are"
            )


@dataclasses.dataclass(frozen=True)
class PassesRollouts(Rollouts):
    """Rollouts of several passes, each of one drawn segment; the sampler returns them as `passes`, whose ok tells which rows count.

    Attributes:
      run: the configuration. kinds: names of the passes' segments in the credit map.
    """

    run: PassesRun
    kinds: tuple[str, ...]

    def rows(self, drawn: Drawn, total: Combined) -> tuple[Passes, dict[str, float]]:
        """All passes of all chunks with their advantages, and metrics of the texts."""
        advantage_PR, told = group_advantages(jnp.asarray(np.nan_to_num(total.total_PR), jnp.float32), total.ok_PR, self.advantage)
        advantage, ok = {"total": advantage_PR.reshape(-1)}, {"total": jnp.asarray(total.ok_PR.reshape(-1))}
        passes = [jax.tree.map(lambda *x: jnp.concatenate(x), *parts) for parts in zip(*(m["passes"] for m in drawn.made), strict=True)]
        shares = zip(*credited(self.run.credit, advantage, ok, self.kinds), strict=True)
        rows = Passes(tuple(t.replace(advantage=(a,), ok=(o & t.ok[0],)) for t, (a, o) in zip(passes, shares, strict=True)))
        for kind in dict.fromkeys(self.kinds):
            texts = [t.segments[0] for t, name in zip(passes, self.kinds, strict=True) if name == kind]
            if texts[0].kind == "text":
                ended = [whole(ended_at(s, self.model.tokenizer.end_of_turn)) for s in texts]
                told |= {f"{kind}/tokens": np.mean([whole(s.lengths) for s in texts]), f"{kind}/unended_frac": 1 - np.mean(ended)}
        return rows, {name: float(value) for name, value in told.items()}
