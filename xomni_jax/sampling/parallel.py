"""Several codes of an image per pass, and exactly those that would be drawn one by one.

Code t is drawn with fold_in(key, t): given the codes before it, it is a deterministic function, so the image is the fixed point of
"guess some codes, run them, draw again what follows each". A pass runs the last certain code and the guesses behind it; what it draws is
certain as far as the guesses before it were right, and one code further. No draw is rejected and no log-prob changes. What the pass draws
behind the first wrong guess are the guesses of the next one (a Jacobi iteration); further down, the code in the row above is the guess.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct

from xomni_jax.models.vocab_heads import head_kernel, head_logits
from xomni_jax.sampling.cache import PromptCache, extend
from xomni_jax.sampling.engine import Engine, RolloutState
from xomni_jax.sampling.logits import draw, guide
from xomni_jax.sampling.segments import Segment, SegmentSpec


@struct.dataclass
class Draft:
    """Images [P, R] that are being drawn, in N = T + window entries, of which the last are never used.

    Attributes:
      state: of the codes that are in the cache.
      ids: int32 [P, R, N]: certain codes up to entry `count`, then guesses up to entry `known`.
      logp, kept: of the codes, as in `Segment`.
      count: [P, R] certain codes whose keys and values are in the cache.
      known: [P, R] the last entry that has been drawn.
      passes: [P, R] that each image has taken part in.
    """

    state: RolloutState
    ids: jax.Array
    logp: jax.Array
    kept: jax.Array | None
    count: jax.Array
    known: jax.Array
    passes: jax.Array


@dataclasses.dataclass(frozen=True)
class ParallelSampler:
    """Draws images of `spec.length` codes, `spec.sampling.window` of them per pass.

    Attributes:
      columns: codes in a row of the image.
      keep_mask: see `Engine.sample`.
    """

    engine: Engine
    spec: SegmentSpec
    columns: int
    keep_mask: bool = False

    @property
    def room(self) -> int:
        """Tokens of the cache: a pass of an image that is complete writes behind its end."""
        return self.spec.length + self.spec.sampling.window

    def begin(self, params, state: RolloutState, keys_PR: jax.Array) -> Draft:
        """The draft in which the first code is certain."""
        zero_PR = jnp.zeros(keys_PR.shape, jnp.int32)
        first = self._draw(params, state.hidden_PRD[:, None], keys_PR, zero_PR)
        empty = jax.tree.map(lambda x: jnp.zeros((*x.shape[:2], self.room, *x.shape[3:]), x.dtype), first)
        found = jax.tree.map(lambda whole, one: whole.at[:, :, :1].set(one), empty, first)
        # Rows go on at their own pace from here.
        cache = state.cache.replace(column=jnp.broadcast_to(state.cache.column, state.hidden_PRD.shape[:2]))
        return Draft(state.replace(cache=cache).constrained(), *found, zero_PR, zero_PR, zero_PR)

    def advance(self, params, prompt: PromptCache, draft: Draft, keys_PR: jax.Array, until: jax.Array | int) -> Draft:
        """Makes passes until `until` codes of every image are in the cache. Every image goes on at its own pace meanwhile."""
        draft = jax.lax.while_loop(
            lambda draft: jnp.any(draft.count < until), lambda draft: self._one_pass(params, prompt, draft, keys_PR), draft
        )
        return draft.replace(state=draft.state.constrained())

    def image(self, draft: Draft) -> Segment:
        """The images of a draft, of which `count` codes are certain."""
        ids, logp, kept = jax.tree.map(lambda x: x[:, :, : self.spec.length], (draft.ids, draft.logp, draft.kept))
        return Segment(ids, None, logp, kept, self.spec.kind, self.spec)

    def _one_pass(self, params, prompt: PromptCache, draft: Draft, keys_PR: jax.Array) -> Draft:
        T, W, state = self.spec.length, self.spec.sampling.window, draft.state
        sides, model = state.hidden_PRD.shape[0] // keys_PR.shape[0], self.engine.model
        # ---- what is run: the first code is certain, those behind it are guesses ----
        at_PRW = draft.count[..., None] + jnp.arange(W)
        rows_up = jnp.maximum(-(-(at_PRW - draft.known[..., None]) // self.columns), 0)  # to the nearest code above that has been drawn
        fed_PRW = jnp.take_along_axis(draft.ids, jnp.maximum(at_PRW - self.columns * rows_up, 0), axis=2)
        tokens_PWR = jnp.repeat(jnp.swapaxes(fed_PRW, 1, 2) + model.cfg.vocab_size, sides, axis=0)
        hidden_PWRD, cache = extend(model, params, tokens_PWR, prompt, state.cache)
        drawn = self._draw(params, hidden_PWRD, keys_PR, draft.count + 1)

        # ---- how far it was right ----
        right_PRW = jnp.cumprod(fed_PRW[..., 1:] == drawn[0][..., :-1], axis=-1, dtype=jnp.int32)
        new_PR = jnp.minimum(1 + jnp.sum(right_PRW, axis=-1), T - draft.count)
        new_sides = jnp.repeat(new_PR, sides, axis=0)
        last_PRD = jnp.take_along_axis(hidden_PWRD, jnp.maximum(new_sides - 1, 0)[:, None, :, None], axis=1)[:, 0]
        hidden_PRD = jnp.where((new_sides > 0)[..., None], last_PRD, state.hidden_PRD)
        # What the cache holds behind a row's column is never read, and overwritten.
        after = RolloutState(hidden_PRD, cache.replace(column=state.cache.column + new_sides))

        # ---- what it drew ----
        open_PR = draft.count < T
        put = jax.vmap(jax.vmap(lambda whole, part, at: jax.lax.dynamic_update_slice_in_dim(whole, part, at, axis=0)))

        def written(whole: jax.Array, part: jax.Array) -> jax.Array:
            some = open_PR.reshape(*open_PR.shape, *[1] * (whole.ndim - 2))
            return jnp.where(some, put(whole, part.astype(whole.dtype), draft.count + 1), whole)

        found = jax.tree.map(written, (draft.ids, draft.logp, draft.kept), drawn)
        known_PR = jnp.where(open_PR, draft.count + W, draft.known)
        return Draft(after, *found, draft.count + new_PR, known_PR, draft.passes + open_PR)

    def _draw(
        self, params, hidden_PWRD: jax.Array, keys_PR: jax.Array, first_PR: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """(codes, log-probs, masks) [P, R, W] that follow hidden states; the first of them is entry `first_PR` of its image."""
        c, sides = self.spec.sampling, hidden_PWRD.shape[0] // keys_PR.shape[0]
        logits = head_logits(hidden_PWRD, head_kernel(params, self.spec.kind, self.engine.model.cfg))
        pair = logits.reshape(-1, sides, *logits.shape[1:])
        scores_PWRV = guide(pair[:, 0], pair[:, 1] if c.guided else None, c.guidance)
        P, W, R, V = scores_PWRV.shape
        at_PWR = first_PR[:, None] + jnp.arange(W)[:, None]
        keys_PWR = jax.vmap(jax.vmap(jax.vmap(jax.random.fold_in)))(jnp.broadcast_to(keys_PR[:, None], (P, W, R)), at_PWR)
        found = draw(scores_PWRV.reshape(P, -1, V), keys_PWR.reshape(P, -1), c)
        ids, logp, mask = (jnp.swapaxes(x.reshape(P, W, R, *x.shape[2:]), 1, 2) for x in found)
        return ids, logp, jnp.packbits(mask, axis=-1) if self.keep_mask else None
