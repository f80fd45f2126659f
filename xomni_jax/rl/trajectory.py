"""Trajectories: what rollouts are made of, whatever the method, and which reward each drawn segment answers for."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import jax
import jax.numpy as jnp
from flax import struct

from xomni_jax.core.config import ConfigError
from xomni_jax.sampling.segments import Prompts, Segment

# (reward, drawn segment, weight of the reward's advantage there); a segment that is left out learns nothing.
Credit = tuple[tuple[str, str, float], ...]


@struct.dataclass
class Trajectory:
    """B rollouts, those of a prompt side by side: a prompt, the segments that follow it, and what the drawn ones were worth.

    Attributes:
      prompts: right-padded ids [B, S] and their real tokens [B].
      segments: what follows, drawn or given, [B, L] each.
      negative: what guidance steers away from, as `prompts`; only where a segment is guided.
      advantage: of each drawn segment, [B] each.
      ok: whether it is known, [B] each; where it is not, the segment has no influence.
    """

    prompts: Prompts
    segments: tuple[Segment, ...]
    negative: Prompts | None
    advantage: tuple[jax.Array, ...]
    ok: tuple[jax.Array, ...]

    @property
    def passes(self) -> tuple[Trajectory, ...]:
        """The rows as `Passes` have them."""
        return (self,)

    @property
    def drawn(self) -> tuple[Segment, ...]:
        """The segments that the policy drew: those with a log-prob."""
        return tuple(segment for segment in self.segments if segment.spec is not None)

    @property
    def masks(self) -> tuple[jax.Array, ...]:
        """Tokens that the objective counts, [B, L] for each drawn segment."""
        masks = (jnp.broadcast_to(ok_B[:, None], s.ids.shape) for s, ok_B in zip(self.drawn, self.ok, strict=True))
        return tuple(m if s.lengths is None else m & s.mask for s, m in zip(self.drawn, masks, strict=True))


@struct.dataclass
class Passes:
    """B rollouts of several passes, such as an image drawn and a question answered: each segment is scored after the prompt of its pass.

    Attributes:
      passes: rows of the same B rollouts.
    """

    passes: tuple[Trajectory, ...]

    @property
    def drawn(self) -> tuple[Segment, ...]:
        """The drawn segments of all passes."""
        return tuple(segment for t in self.passes for segment in t.drawn)

    @property
    def advantage(self) -> tuple[jax.Array, ...]:
        """Of each drawn segment, [B] each."""
        return tuple(advantage_B for t in self.passes for advantage_B in t.advantage)

    @property
    def ok(self) -> tuple[jax.Array, ...]:
        """Whether it is known, [B] each."""
        return tuple(ok_B for t in self.passes for ok_B in t.ok)

    @property
    def masks(self) -> tuple[jax.Array, ...]:
        """Tokens that the objective counts, [B, L] for each drawn segment."""
        return tuple(mask_BL for t in self.passes for mask_BL in t.masks)


Rows = Trajectory | Passes


def check_credit(credit: Credit, rewards: Collection[str], segments: Collection[str]) -> None:
    """Raises ConfigError where a credit map is empty, or names a reward or a segment that a method does not have."""
    if not credit:
        raise ConfigError("config.credit is empty: nothing would be learned; leave it as it is, or name a reward and a segment")
    for reward, segment, _ in credit:
        if reward not in rewards:
            raise ConfigError(f"the credit map names the reward {reward!r}; this run has {', '.join(sorted(rewards))}")
        if segment not in segments:
            raise ConfigError(
                f"the credit of reward {reward!r} names the segment {segment!r}; the method draws {', '.join(sorted(segments))}"
            )


def credited(
    credit: Credit, advantage: Mapping[str, jax.Array], ok: Mapping[str, jax.Array], segments: Collection[str]
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """The advantage of each drawn segment, the weighted sum of its rewards' advantages, and whether all of these are known.

    Args:
      advantage, ok: of each reward, [B]; the advantage is read only where it is known.
      segments: names of the drawn segments in their order.

    Returns:
      (advantage, ok) as in `Trajectory`. A segment without any reward is not ok: nothing is known about it.
    """
    rows, out = next(iter(ok.values())).shape, []
    for name in segments:
        shares = {reward: weight for reward, segment, weight in credit if segment == name}
        known_B = jnp.stack([ok[reward] for reward in shares]).all(axis=0) if shares else jnp.zeros(rows, bool)
        total_B = sum((weight * advantage[reward] for reward, weight in shares.items()), jnp.zeros(rows))
        out.append((jnp.where(known_B, total_B, 0.0), known_B))
    advantages, known = zip(*out)
    return advantages, known
