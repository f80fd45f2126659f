"""Continuous batching: rows of a running batch that begin and end on their own.

A slot holds one row with its own prompt, position, key and sampling. All slots advance by one segment at a time in one program of fixed
shape, so that a row's tokens do not depend on what runs beside it; between segments finished rows leave and waiting ones enter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from xomni_jax.pipeline import XOmni
from xomni_jax.sampling.cache import GENERATED_AXES, PROMPT_AXES, GeneratedCache, decode_step, prefill
from xomni_jax.sampling.generate import RolloutState, draw_codes, start_codes
from xomni_jax.sampling.logits import GREEDY, SamplingConfig, TracedSampling, draw
from xomni_jax.sampling.sampler import segment_length
from xomni_jax.sequence.padding import pad_prompts
from xomni_jax.sharding.rules import spec_for, unconstrained

# Of a row's arrays as the sampler makes them for one prompt, by their rank; in front of them comes the axis of the slots.
_AXES = {len(names): names for names in (PROMPT_AXES, GENERATED_AXES, (None, None, "residual"), ("batch",), ())}


class Slots:
    """Rows of one shape on one model.

    Args:
      start: (params, ids [1, S], lengths [1], negative prompts | None) -> prompt cache and state of one row.
      draw: (params, prompt cache, state, key, sampling) of one row -> state, {"tokens": [segment], "logp": [segment]}.
      count: slots. prompt_length: S. segment: tokens that a call of `advance` adds to every row.
      guided: rows have negative prompts.
    """

    def __init__(
        self, model: XOmni, start: Callable[..., Any], draw: Callable[..., Any], count: int, prompt_length: int, segment: int, guided: bool
    ):
        self.model, self.count, self.prompt_length, self.segment, self.guided = model, count, prompt_length, segment, guided
        self._start = jax.jit(start)
        ids = jax.ShapeDtypeStruct((1, prompt_length), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)
        with unconstrained():
            row = jax.eval_shape(start, model.params("transformer"), *ids, ids if guided else None)
        self._shardings = jax.tree.map(self._sharding, row)
        rows = jax.jit(lambda: jax.tree.map(lambda x: jnp.zeros((count, *x.shape), x.dtype), row), out_shardings=self._shardings)
        with unconstrained():
            self._prompts, self._states = rows()
        self._put = jax.jit(
            lambda rows, row, slot: jax.tree.map(lambda x, y: x.at[slot].set(y), rows, row),
            donate_argnums=0,
            out_shardings=self._shardings,
        )
        self._draw = jax.jit(
            jax.vmap(draw, in_axes=(None, 0, 0, 0, 0)), donate_argnums=2, out_shardings=(self._shardings[1], self._replicated)
        )
        self._keys = np.zeros((count, *jax.random.key_data(jax.random.key(0)).shape), np.uint32)
        self._sampling = [TracedSampling.of(GREEDY).replace(guided=guided)] * count

    @property
    def _replicated(self) -> NamedSharding:
        return NamedSharding(self.model.mesh, spec_for("tokens", (), (), self.model.mesh))

    def _sharding(self, x: jax.ShapeDtypeStruct) -> NamedSharding:
        """Slots are split as rows of a batch are, heads over "tensor"; of one row nothing else is."""
        axes = ("batch", *(None if axis == "batch" else axis for axis in _AXES[x.ndim]))
        return NamedSharding(self.model.mesh, spec_for("slots", (self.count, *x.shape), axes, self.model.mesh))

    def enter(self, slots: Sequence[int], ids_S: np.ndarray, negative_S: np.ndarray | None, keys: Any, sampling: SamplingConfig) -> None:
        """Begins rows of one prompt in free slots.

        Args:
          keys: a PRNG key for each.
        """
        padded = pad_prompts([ids_S], self.prompt_length)
        negative = pad_prompts([negative_S], self.prompt_length) if self.guided else None
        data = np.asarray(jax.random.key_data(keys))
        with unconstrained():
            row = self._start(self.model.params("transformer"), *padded, negative)
            for slot, key in zip(slots, data, strict=True):
                self._prompts, self._states = self._put((self._prompts, self._states), row, slot)
                self._keys[slot] = key
                self._sampling[slot] = TracedSampling.of(sampling).replace(guided=self.guided)

    def advance(self) -> dict[str, np.ndarray]:
        """Adds a segment to every row: {"tokens": int32 [slots, segment], "logp": float32 [slots, segment]}; free slots give any values."""
        sampling = jax.tree.map(lambda *x: np.stack(x), *self._sampling)
        keys = jax.random.wrap_key_data(self._keys)
        with unconstrained():
            self._states, out = self._draw(self.model.params("transformer"), self._prompts, self._states, keys, sampling)
        return jax.device_get(out)


def image_slots(model: XOmni, grid: tuple[int, int], guided: bool, count: int, prompt_length: int, segment: int) -> Slots:
    """Slots for images of Y x X codes, at most `segment` codes at a time."""
    net, n_codes = model.module("transformer"), grid[0] * grid[1]
    segment = segment_length(n_codes, segment)
    shape = TracedSampling.of(SamplingConfig()).replace(guided=guided)

    def start(params, ids_PS, lengths_P, negative):
        return start_codes(net, params, ids_PS, lengths_P, n_codes, 1, shape, negative)

    def draw_row(params, prompt, state, key, sampling):
        state, out = draw_codes(net, params, prompt, state, segment, key[None, None], sampling)
        return state, {"tokens": out["codes"][0, 0], "logp": out["logp"][0, 0]}

    return Slots(model, start, draw_row, count, prompt_length, segment, guided)


def text_slots(model: XOmni, max_tokens: int, count: int, prompt_length: int, segment: int) -> Slots:
    """Slots for texts of at most `max_tokens` tokens, `segment` at a time; a row goes on behind its end of turn until it is replaced."""
    net = model.module("transformer")

    def start(params, ids_PS, lengths_P, negative):
        hidden_PD, prompt = prefill(net, params, ids_PS, lengths_P)
        return prompt, RolloutState(hidden_PD[:, None], GeneratedCache.empty(net.cfg, 1, 1, max_tokens, vision=False))

    def draw_row(params, prompt, state, key, sampling):
        def step(state, _):
            logits = net.apply({"params": params}, state.hidden_PRD, method="text_logits")
            tokens_PR, logp_PR, _ = draw(logits, jax.random.fold_in(key, state.cache.column)[None, None], sampling)
            state = RolloutState(*decode_step(net, params, tokens_PR, prompt, state.cache, vision=False))
            return state, {"tokens": tokens_PR[0, 0], "logp": logp_PR[0, 0]}

        return jax.lax.scan(step, state, length=segment)

    return Slots(model, start, draw_row, count, prompt_length, segment, guided=False)
