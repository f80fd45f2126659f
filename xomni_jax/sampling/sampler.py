"""Image codes of many rollouts, in segments between which the caller may stop."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from xomni_jax.sampling.engine import Engine
from xomni_jax.sampling.logits import SamplingConfig
from xomni_jax.sampling.segments import image_spec

SEGMENT = 512  # codes


def segment_length(n_codes: int, most: int) -> int:
    """Codes of a segment: the largest divisor of an image's codes that is at most `most`."""
    return max(n for n in range(1, min(most, n_codes) + 1) if n_codes % n == 0)


@dataclasses.dataclass(frozen=True)
class Sampler:
    """Rollouts in segments of equal length: the programs, and the loop over them. Between segments the caller may stop.

    Attributes:
      start: the jitted (params, prompt ids [P, S], lengths [P], keys [P, R], negative prompts | None) -> `Engine.start`.
      draw: the jitted (params, prompt cache, state, keys) -> (state, a part of what `generate_codes` returns);
        the state is donated: the cache never moves.
      segment, segments: codes of one segment, and how many make an image.
    """

    start: Callable[..., Any]
    draw: Callable[..., Any]
    segment: int
    segments: int

    @classmethod
    def make(cls, net: nn.Module, n_codes: int, sampling: SamplingConfig, most: int = SEGMENT, return_mask: bool = False) -> Sampler:
        """The programs for images of `n_codes`, at most `most` of them in a segment. `return_mask`: see `generate_codes`."""
        engine, spec = Engine(net), image_spec(segment_length(n_codes, most), sampling)

        def start(params, ids_PS, lengths_P, keys_PR, negative):
            return engine.start(params, (ids_PS, lengths_P), keys_PR.shape[1], n_codes, negative)

        def draw(params, prompt, state, keys_PR):
            state, part = engine.sample(params, prompt, state, spec, keys_PR, return_mask, state.cache.column)
            return state, {"codes": part.ids, "logp": part.logp, "sampling_mask": part.kept}

        return cls.of(jax.jit(start), jax.jit(draw, donate_argnums=2), n_codes, most)

    @classmethod
    def of(cls, start: Callable[..., Any], draw: Callable[..., Any], n_codes: int, most: int = SEGMENT) -> Sampler:
        """The loop over programs that were made for the same sizes."""
        segment = segment_length(n_codes, most)
        return cls(start, draw, segment, n_codes // segment)

    def __call__(self, params, ids_PS, lengths_P, keys_PR, negative, between: Callable[[], None] | None = None):
        """What `generate_codes` returns. `between` is called between segments, with at most one of them under way; it may raise.
        Without it nothing is waited for."""
        prompt, state = self.start(params, ids_PS, lengths_P, keys_PR, negative)
        made: list[dict[str, jax.Array | None]] = []
        for n in range(self.segments):
            if n > 1 and between:  # the device always has the next one waiting; with all of them waiting, a stop would wait for all
                jax.block_until_ready(made[n - 2]["codes"])
            if n and between:
                between()
            state, out = self.draw(params, prompt, state, keys_PR)
            made.append(out)
        return made[0] if self.segments == 1 else jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=2), *made)
