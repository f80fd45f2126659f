"""Image codes of many rollouts, in segments between which the caller may stop."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from xomni_jax.sampling.engine import Engine
from xomni_jax.sampling.logits import SamplingConfig
from xomni_jax.sampling.parallel import ParallelSampler
from xomni_jax.sampling.segments import Segment, image_spec

SEGMENT = 512  # codes


def segment_length(n_codes: int, most: int) -> int:
    """Codes of a segment: the largest divisor of an image's codes that is at most `most`."""
    return max(n for n in range(1, min(most, n_codes) + 1) if n_codes % n == 0)


@dataclasses.dataclass(frozen=True)
class Sampler:
    """Rollouts in segments of equal length: the programs, and the loop over them. Between segments the caller may stop.

    Attributes:
      start: the jitted (params, prompt ids [P, S], lengths [P], keys [P, R], negative prompts | None, order | None) -> `Engine.start`.
      draw: the jitted (params, prompt cache, state, keys, order | None, given | None) -> (state, a part of what `generate_codes`
        returns); the state is donated: the cache never moves.
      segment, segments: codes of one segment, and how many make an image. With `sampling.window` above 1 a call goes on until that many
        more codes of the slowest image are certain.
      whole: a call returns images from their beginning, certain or not, rather than a segment of them.
    """

    start: Callable[..., Any]
    draw: Callable[..., Any]
    segment: int
    segments: int
    whole: bool = False

    @classmethod
    def make(
        cls, net: nn.Module, grid: tuple[int, ...], sampling: SamplingConfig, most: int = SEGMENT, return_mask: bool = False
    ) -> Sampler:
        """The programs for images of a grid of codes, at most `most` of them in a segment. `return_mask`: see `generate_codes`."""
        engine, n_codes = Engine(net), math.prod(grid)
        segment = segment_length(n_codes, most)
        if sampling.window > 1:
            if net.cfg.order != "raster":
                raise ValueError(
                    f"sampling window={sampling.window}: a model of order {net.cfg.order} draws one code per pass; use window 1"
                )
            parallel = ParallelSampler(engine, image_spec(n_codes, sampling), grid[-1], return_mask)

            def start_draft(params, ids_PS, lengths_P, keys_PR, negative, order_PRT=None):
                prompt, state = engine.start(params, (ids_PS, lengths_P), keys_PR.shape[1], parallel.room, negative)
                return prompt, parallel.begin(params, state, keys_PR)

            def draw_some(params, prompt, draft, keys_PR, order_PRT=None, given_PRT=None):
                until = jnp.minimum((jnp.min(draft.count) // segment + 1) * segment, n_codes)
                draft = parallel.advance(params, prompt, draft, keys_PR, until)
                return draft, _found(parallel.image(draft))

            return cls.of(jax.jit(start_draft), jax.jit(draw_some, donate_argnums=2), n_codes, most, whole=True)
        spec = image_spec(segment, sampling)

        def start(params, ids_PS, lengths_P, keys_PR, negative, order_PRT=None):
            first_PR = None if order_PRT is None else order_PRT[:, :, 0]
            return engine.start(params, (ids_PS, lengths_P), keys_PR.shape[1], n_codes, negative, first_PR=first_PR)

        def draw(params, prompt, state, keys_PR, order_PRT=None, given_PRT=None):
            first = state.cache.column if order_PRT is None else state.cache.column - 1  # the last token of the prompt is in there
            state, part = engine.sample(params, prompt, state, spec, keys_PR, return_mask, first, order_PRT, given_PRT)
            return state, _found(part)

        return cls.of(jax.jit(start), jax.jit(draw, donate_argnums=2), n_codes, most)

    @classmethod
    def of(cls, start: Callable[..., Any], draw: Callable[..., Any], n_codes: int, most: int = SEGMENT, whole: bool = False) -> Sampler:
        """The loop over programs that were made for the same sizes."""
        segment = segment_length(n_codes, most)
        return cls(start, draw, segment, n_codes // segment, whole)

    def __call__(
        self, params, ids_PS, lengths_P, keys_PR, negative, between: Callable[[], None] | None = None, order_PRT=None, given_PRT=None
    ):
        """What `generate_codes` returns. Where codes are drawn in another order than row by row, `codes` are row by row all the same, the
        other entries are not, and that `order` [P, R, T] is an entry.

        Args:
          between: called between segments, with at most one of them under way; it may raise. Without it nothing is waited for.
          order_PRT, given_PRT: see `Engine.sample`; a model of another order than row by row needs the first.
        """
        prompt, state = self.start(params, ids_PS, lengths_P, keys_PR, negative, order_PRT)
        made: list[dict[str, jax.Array | None]] = []
        for n in range(self.segments):
            if n > 1 and between:  # the device always has the next one waiting; with all of them waiting, a stop would wait for all
                jax.block_until_ready(made[n - 2]["codes"])
            if n and between:
                between()
            state, out = self.draw(params, prompt, state, keys_PR, order_PRT, given_PRT)
            made.append(out)
        out = made[-1] if self.segments == 1 or self.whole else jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=2), *made)
        if order_PRT is None:
            return out
        return out | {"codes": jnp.take_along_axis(out["codes"], jnp.argsort(order_PRT, axis=2), axis=2), "order": jnp.asarray(order_PRT)}


def _found(image: Segment) -> dict[str, jax.Array | None]:
    return {"codes": image.ids, "logp": image.logp, "sampling_mask": image.kept}
