"""The transformer run forward over prompts and the segments that follow them: `start`, `extend`, `sample`, `score`. Pure, to be jitted.

One cache holds every row at a length of its own, so that texts of unequal length, images and given tokens follow one another in any
order. Masks and positions carry the raggedness, and all shapes are static. A prompt is run once and shared by its rollouts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from xomni_jax.models.transformer import ARTransformer
from xomni_jax.models.vocab_heads import head_kernel, head_logits, map_chunks, select, token_logp
from xomni_jax.sampling.cache import GENERATED_AXES, GeneratedCache, PromptCache, extend, prefill
from xomni_jax.sampling.logits import draw, guide, temper
from xomni_jax.sampling.segments import Prompts, Segment, SegmentSpec, append, placed
from xomni_jax.sharding.rules import constrain


@struct.dataclass
class RolloutState:
    """Unfinished rollouts, R of each of P prompts (with guidance also of their negative prompts, each after its own).

    Attributes:
      hidden_PRD: hidden states that predict the next token.
      cache: keys and values of the tokens that follow the prompt.
    """

    hidden_PRD: jax.Array
    cache: GeneratedCache

    def constrained(self) -> RolloutState:
        """The same with its shardings fixed by the table, so that all calls with it use one compiled program."""
        kv = jax.tree.map(lambda x: constrain(x, *GENERATED_AXES, name="generated cache"), self.cache.kv)
        return RolloutState(constrain(self.hidden_PRD, "batch", None, "residual", name="hidden"), self.cache.replace(kv=kv))


@dataclasses.dataclass(frozen=True)
class Engine:
    """What a transformer draws, and how likely that was.

    `start` runs prompts; `extend` and `sample` add a segment to the state, which a jitted caller donates, or the cache is copied.
    A token depends on its row alone: its prompt, its key and the tokens before it, whatever else is in the batch.
    """

    model: ARTransformer

    def start(
        self,
        params,
        prompts: Prompts,
        rollouts: int,
        tokens: int,
        negative: Prompts | None = None,
        vision: bool = True,
        first_PR: jax.Array | None = None,
    ) -> tuple[PromptCache, RolloutState]:
        """Runs prompts, and makes room for `rollouts` of each that no token follows yet.

        Args:
          prompts: [P, S] and [P].
          tokens: that will follow at most: the sum of the lengths of all segments.
          negative: the prompts that guidance steers away from, [P or 1, S'] and [P or 1]; the same segments follow them.
          vision: False leaves out the vision layers of what follows: exact, and cheaper, if that is text alone.
          first_PR: the cell of the first code that follows each, where codes are not drawn row by row: the last token of the prompt,
            which predicts it, is then run for each rollout.
        """
        if negative is not None:
            prompts = _with_negative(prompts, negative)
        (ids_PS, lengths_P), apart = prompts, first_PR is not None
        hidden_PD, prompt = prefill(self.model, params, ids_PS, lengths_P - 1 if apart else lengths_P)
        hidden_PRD = jnp.broadcast_to(hidden_PD[:, None], (hidden_PD.shape[0], rollouts, hidden_PD.shape[1]))
        cache = GeneratedCache.empty(self.model.cfg, hidden_PD.shape[0], rollouts, tokens + apart, vision)
        if apart:
            last_PR = jnp.broadcast_to(jnp.take_along_axis(ids_PS, lengths_P[:, None] - 1, axis=1), hidden_PRD.shape[:2])
            by_PR = jnp.repeat(first_PR, hidden_PD.shape[0] // first_PR.shape[0], axis=0)
            moved = jnp.zeros_like(by_PR)[:, None], by_PR[:, None]
            hidden_PWRD, cache = extend(self.model, params, last_PR[:, None], prompt, cache, moved)
            hidden_PRD = hidden_PWRD[:, 0]
        return prompt, RolloutState(hidden_PRD, cache).constrained()

    def extend(self, params, prompt: PromptCache, state: RolloutState, segment: Segment) -> RolloutState:
        """Adds a given segment [P, R, L], such as the words of a judge or the prefix of an image, in one pass."""
        tokens_PRW, lengths, sides = segment.tokens(self.model.cfg.vocab_size), segment.lengths, self._sides(state, segment.ids)
        ids_PWR = jnp.repeat(jnp.swapaxes(tokens_PRW, 1, 2), sides, axis=0)
        hidden_PWRD, cache = extend(self.model, params, ids_PWR, prompt, state.cache)
        if lengths is None:
            return RolloutState(hidden_PWRD[:, -1], cache).constrained()
        lengths_PR = jnp.repeat(lengths, sides, axis=0)
        last_PRD = jnp.take_along_axis(hidden_PWRD, jnp.maximum(lengths_PR - 1, 0)[:, None, :, None], axis=1)[:, 0]
        hidden_PRD = jnp.where(lengths_PR[..., None] > 0, last_PRD, state.hidden_PRD)
        # What the cache holds behind a row's column is never read, and overwritten.
        return RolloutState(hidden_PRD, cache.replace(column=state.cache.column + lengths_PR)).constrained()

    def sample(
        self,
        params,
        prompt: PromptCache,
        state: RolloutState,
        spec: SegmentSpec,
        keys_PR: jax.Array,
        return_mask: bool = False,
        first: jax.Array | int = 0,
        order_PRT: jax.Array | None = None,
        given_PRT: jax.Array | None = None,
    ) -> tuple[RolloutState, Segment]:
        """Draws a segment [P, R, L]. It does not depend, bit for bit, on how many of an image's codes are drawn per call.

        Args:
          keys_PR: of this segment: token t of it is drawn with fold_in(key, t).
          return_mask: the segment keeps which tokens could be drawn; `score` needs it where sampling truncates.
          first: t of the first token, where an image is drawn in several calls.
          order_PRT: int32, the cells of the whole image in the order they are drawn; without it row by row.
          given_PRT: int32, codes of the whole image in that order which are not drawn but known, and so have log-prob 0; -1 elsewhere.
        """
        cfg, c, sides = self.model.cfg, spec.sampling, self._sides(state, keys_PR)
        if c.guided and sides == 1:
            raise ValueError(f"segment {spec.name!r} has guidance={c.guidance:g}, for which `start` needs negative prompts")
        if spec.kind == "image" and order_PRT is None and cfg.order != "raster":
            raise ValueError(
                f"this model draws its codes in the order {cfg.order}, which is not possible here; use xomni generate or train"
            )
        kernel_DV, offset = head_kernel(params, spec.kind, cfg), cfg.vocab_size if spec.kind == "image" else 0

        def step(state: RolloutState, t: jax.Array):
            logits = head_logits(state.hidden_PRD, kernel_DV)
            pair = logits.reshape(-1, sides, *logits.shape[1:])  # the prompt's, and where there is one the negative prompt's
            scores_PRV = guide(pair[:, 0], pair[:, 1] if c.guided else None, c.guidance)
            ids_PR, logp_PR, mask_PRV = draw(scores_PRV, _fold_in(keys_PR, t), c)
            if given_PRT is not None:
                given_PR = given_PRT[:, :, t]
                ids_PR, logp_PR = jnp.where(given_PR < 0, ids_PR, given_PR), jnp.where(given_PR < 0, logp_PR, 0.0)
            tokens = jnp.repeat(ids_PR + offset, sides, axis=0)
            moved = None
            if order_PRT is not None:  # the last code keeps its own position, for there is no next one
                at = t, jnp.minimum(t + 1, order_PRT.shape[2] - 1)
                moved = tuple(jnp.repeat(order_PRT[:, :, n] - n, sides, axis=0)[:, None] for n in at)
            hidden_PWRD, cache = extend(self.model, params, tokens[:, None], prompt, state.cache, moved)
            kept = jnp.packbits(mask_PRV, axis=-1) if return_mask else None
            return RolloutState(hidden_PWRD[:, 0], cache), (ids_PR, logp_PR, kept)

        if spec.kind == "image":
            state, out = jax.lax.scan(step, state, first + jnp.arange(spec.length))
            ids, logp, kept = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 2), out)
            at = None if order_PRT is None else jax.lax.dynamic_slice_in_dim(order_PRT, first, spec.length, axis=2)
            return state.constrained(), Segment(ids, None, logp, kept, spec.kind, spec, at)

        state, segment = _sample_text(step, state, spec, keys_PR.shape, sides)
        return state.constrained(), segment

    def score(
        self, params, prompts: Prompts, segments: Sequence[Segment], negative: Prompts | None = None, chunk: int = 512
    ) -> list[tuple[jax.Array, jax.Array]]:
        """Log-prob and entropy of the drawn segments among `segments`, under their own temperature, truncation and guidance.

        Args:
          prompts: [B, S] and [B], one row per rollout. segments: all that followed, [B, L] each, in their order.
          negative: as in `start`. Its branch is differentiated too: the result is the log-prob of the guided distribution.
          chunk: positions whose logits exist at a time; they are recomputed in the backward pass. 0: all.

        Returns:
          (log-prob [B, L], entropy [B, L]) of each drawn segment, float32, differentiable in params; undefined at padding.
        """
        cfg, drawn = self.model.cfg, [s for s in segments if s.spec is not None]
        rows = [prompts]
        if any(s.spec.sampling.guided for s in drawn):
            rows.append(_rows_of(negative, prompts[0].shape[0]))
        kernels = {kind: head_kernel(params, kind, cfg) for kind in dict.fromkeys(s.kind for s in drawn)}
        hidden = [self._hidden_before(params, *row, segments) for row in rows]
        return [self._segment_logp(s, kernels[s.kind], sides, chunk) for s, *sides in zip(drawn, *hidden, strict=True)]

    def _hidden_before(self, params, ids_BS: jax.Array, lengths_B: jax.Array, segments: Sequence[Segment]) -> list[jax.Array]:
        """Hidden states [B, L, D] of a full pass over whole rows, at the positions that predict each drawn segment."""
        begins = []
        for segment in segments:
            begins.append(lengths_B)
            ids_BS, lengths_B = append(ids_BS, lengths_B, segment, self.model.cfg.vocab_size)
        positions_BL = jnp.broadcast_to(jnp.arange(ids_BS.shape[1]), ids_BS.shape)
        for segment, begin_B in zip(segments, begins):
            positions_BL = positions_BL if segment.order is None else placed(positions_BL, begin_B, segment.order)
        hidden_BLD = self.model.apply({"params": params}, ids_BS, positions_BL)

        def before(segment: Segment, begin_B: jax.Array) -> jax.Array:
            return select(hidden_BLD, begin_B[:, None] - 1 + jnp.arange(segment.ids.shape[1]))

        return [before(segment, begin_B) for segment, begin_B in zip(segments, begins) if segment.spec is not None]

    def _segment_logp(self, segment: Segment, kernel_DV: jax.Array, hidden: Sequence[jax.Array], chunk: int) -> tuple[jax.Array, jax.Array]:
        c, arrays = segment.spec.sampling, hidden if segment.spec.sampling.guided else hidden[:1]

        def score(ids_BC, *arrays):
            logits = [head_logits(h_BCD, kernel_DV) for h_BCD in (arrays if segment.kept is None else arrays[:-1])]
            scores = guide(logits[0], logits[1] if c.guided else None, c.guidance)
            mask = None
            if segment.kept is not None:
                mask = jnp.unpackbits(arrays[-1], axis=-1, count=kernel_DV.shape[1]).astype(bool)
            return token_logp(temper(scores, c.temperature), ids_BC, mask)

        return map_chunks(score, (segment.ids, *arrays, *(() if segment.kept is None else (segment.kept,))), chunk)

    @staticmethod
    def _sides(state: RolloutState, rows_PR: jax.Array) -> int:
        """1, or 2 with negative prompts."""
        return state.hidden_PRD.shape[0] // rows_PR.shape[0]


def _sample_text(step: Any, state: RolloutState, spec: SegmentSpec, rows: tuple[int, int], sides: int) -> tuple[RolloutState, Segment]:
    """Repeats `step` until all rows [P, R] have stopped. Until then they stay abreast; what those that have stopped draw is discarded."""
    begin, stops = state.cache.column, jnp.asarray(spec.stop_ids, jnp.int32)

    def unfinished(carry) -> jax.Array:
        t, _, done_PR, *_ = carry
        return (t < spec.length) & ~jnp.all(done_PR)

    def text_step(carry):
        t, state, done_PR, lengths_PR, out = carry
        new, drawn = step(state, t)
        hidden_PRD = jnp.where(jnp.repeat(done_PR, sides, axis=0)[..., None], state.hidden_PRD, new.hidden_PRD)

        def put(x_PRL: jax.Array, x_PR: jax.Array) -> jax.Array:
            x_PR = jnp.where(jnp.expand_dims(done_PR, range(2, x_PR.ndim)), jnp.zeros_like(x_PR), x_PR)
            return jax.lax.dynamic_update_slice_in_dim(x_PRL, x_PR[:, :, None], t, axis=2)

        stopped_PR = done_PR | jnp.any(drawn[0][..., None] == stops, axis=-1)
        return t + 1, new.replace(hidden_PRD=hidden_PRD), stopped_PR, lengths_PR + ~done_PR, jax.tree.map(put, out, drawn)

    empty = jax.tree.map(lambda x: jnp.zeros((*rows, spec.length, *x.shape[2:]), x.dtype), jax.eval_shape(step, state, 0)[1])
    carry = jnp.int32(0), state, jnp.zeros(rows, bool), jnp.zeros(rows, jnp.int32), empty
    _, state, _, lengths_PR, (ids, logp, kept) = jax.lax.while_loop(unfinished, text_step, carry)
    cache = state.cache.replace(column=begin + jnp.repeat(lengths_PR, sides, axis=0))
    return state.replace(cache=cache), Segment(ids, lengths_PR, logp, kept, spec.kind, spec)


def _rows_of(negative: Prompts, rows: int) -> Prompts:
    """The negative prompts with one row per conditional row."""
    ids, lengths = negative
    return jnp.broadcast_to(ids, (rows, ids.shape[1])), jnp.broadcast_to(lengths, (rows,))


def _with_negative(prompts: Prompts, negative: Prompts) -> Prompts:
    """Prompts with the negative prompt of each in the next row, so that both stay on one device when rows are sharded: [2 P, S]."""
    (ids_PS, lengths_P), (neg_ids, neg_lengths) = prompts, _rows_of(negative, prompts[0].shape[0])
    S = max(ids_PS.shape[1], neg_ids.shape[1])
    pair = [jnp.pad(x, ((0, 0), (0, S - x.shape[1]))) for x in (ids_PS, neg_ids)]
    return jnp.stack(pair, axis=1).reshape(-1, S), jnp.stack([lengths_P, neg_lengths], axis=1).reshape(-1)


def _fold_in(keys_PR: jax.Array, t: jax.Array) -> jax.Array:
    return jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (0, None))(keys_PR, t)
