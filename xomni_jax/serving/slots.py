"""Continuous batching: rows of a running batch that begin and end on their own.

A slot holds one row with its own prompt, position, key and sampling. All slots advance by one segment at a time in one program of fixed
shape, so that a row's tokens do not depend on what runs beside it; between segments finished rows leave and waiting ones enter.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from xomni_jax.pipeline import XOmni
from xomni_jax.sampling.cache import GENERATED_AXES, PROMPT_AXES, GeneratedCache, decode_step, prefill
from xomni_jax.sampling.generate import RolloutState, draw_codes, start_codes
from xomni_jax.sampling.logits import SamplingConfig, TracedSampling, draw
from xomni_jax.sampling.sampler import segment_length
from xomni_jax.sequence.padding import pad_prompts
from xomni_jax.sharding.rules import spec_for, unconstrained

ENTERING = 4  # rows that are prefilled at a time
# Of a row's arrays as the sampler makes them for one prompt, by their rank; in front of them comes the axis of the slots.
_AXES = {len(names): names for names in (PROMPT_AXES, GENERATED_AXES, (None, None, "residual"), ("batch",), ())}


@dataclasses.dataclass
class Entry:
    """What a row begins with.

    Attributes:
      slot: where. ids_S, negative_S: its prompt, and the one that guidance steers away from, if any.
      key: data of its PRNG key. sampling: how its tokens are chosen.
    """

    slot: int
    ids_S: np.ndarray
    negative_S: np.ndarray | None
    key: np.ndarray
    sampling: SamplingConfig


class Slots:
    """Rows of one shape on one model.

    Args:
      start: (params, ids [1, S], lengths [1], negative prompts | None) -> prompt cache and state of one row.
      draw: (params, prompt cache, state, key, sampling) of one row -> state, {"tokens": [segment], "logp": [segment]}.
      count: slots. prompt_length: S. segment: tokens that a call of `advance` adds to every row.
      shape: the static part of the rows' sampling, and what free slots sample with.
    """

    def __init__(
        self,
        model: XOmni,
        start: Callable[..., Any],
        draw: Callable[..., Any],
        count: int,
        prompt_length: int,
        segment: int,
        shape: TracedSampling,
    ):
        self.model, self.count, self.prompt_length, self.segment, self.shape = model, count, prompt_length, segment, shape
        start_rows = jax.vmap(start, in_axes=(None, 0, 0, 0))
        ids = jax.ShapeDtypeStruct((1, prompt_length), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)
        with unconstrained():
            row = jax.eval_shape(start, model.params("transformer"), *ids, ids if shape.guided else None)
            shardings = jax.tree.map(self._sharding, row)
            empty = lambda: jax.tree.map(lambda x: jnp.zeros((count, *x.shape), x.dtype), row)
            self._prompts, self._states = jax.jit(empty, out_shardings=shardings)()

        def enter(params, rows, slots, ids, lengths, negative):
            new = start_rows(params, ids, lengths, negative)
            return jax.tree.map(lambda x, y: x.at[slots].set(y, mode="drop"), rows, new)

        self._enter = jax.jit(enter, donate_argnums=1, out_shardings=shardings)
        replicated = NamedSharding(model.mesh, PartitionSpec())
        advance = jax.vmap(draw, in_axes=(None, 0, 0, 0, 0))
        self._draw = jax.jit(
            lambda params, prompts, states, keys, sampling: advance(params, prompts, states, jax.random.wrap_key_data(keys), sampling),
            donate_argnums=2,
            out_shardings=(shardings[1], replicated),
        )
        self._keys = np.zeros((count, *jax.random.key_data(jax.random.key(0)).shape), np.uint32)
        self._sampling = jax.tree.map(lambda x: np.repeat(x, count), shape)

    def _sharding(self, x: jax.ShapeDtypeStruct) -> NamedSharding:
        """Slots are split as rows of a batch are, heads over "tensor"; of one row nothing else is."""
        axes = ("batch", *(None if axis == "batch" else axis for axis in _AXES[x.ndim]))
        return NamedSharding(self.model.mesh, spec_for("slots", (self.count, *x.shape), axes, self.model.mesh))

    def enter(self, entries: Sequence[Entry]) -> None:
        """Begins rows in free slots, a fixed number at a time, so that what they become does not depend on how many begin together."""
        for first in range(0, len(entries), ENTERING):
            part = entries[first : first + ENTERING]
            fill = [part[0]] * (ENTERING - len(part))
            ids, lengths = pad_prompts([e.ids_S for e in (*part, *fill)], self.prompt_length)
            negative = None
            if self.shape.guided:
                padded = pad_prompts([e.negative_S for e in (*part, *fill)], self.prompt_length)
                negative = padded[0][:, None], padded[1][:, None]
            slots = np.array([e.slot for e in part] + [self.count] * len(fill), np.int32)  # a slot that is not there takes nothing
            with unconstrained():
                rows, params = (self._prompts, self._states), self.model.params("transformer")
                self._prompts, self._states = self._enter(params, rows, slots, ids[:, None], lengths[:, None], negative)
            for e in part:
                self._keys[e.slot] = e.key
                for held, x in zip(jax.tree.leaves(self._sampling), jax.tree.leaves(TracedSampling.of(e.sampling))):
                    held[e.slot] = x

    def advance(self) -> dict[str, np.ndarray]:
        """Adds a segment to every row: {"tokens": int32 [slots, segment], "logp": float32 [slots, segment]}; free slots give any values."""
        with unconstrained():
            params = self.model.params("transformer")
            # Copies: the host's arrays may be read after this returns, and change.
            self._states, out = self._draw(params, self._prompts, self._states, self._keys.copy(), jax.tree.map(np.copy, self._sampling))
        return jax.device_get(out)


def image_slots(model: XOmni, grid: tuple[int, int], shape: TracedSampling, count: int, prompt_length: int, segment: int) -> Slots:
    """Slots for images of Y x X codes, at most `segment` codes at a time. `shape`: see `Slots`."""
    net, n_codes = model.module("transformer"), grid[0] * grid[1]
    segment = segment_length(n_codes, segment)

    def start(params, ids_PS, lengths_P, negative):
        return start_codes(net, params, ids_PS, lengths_P, n_codes, 1, shape, negative)

    def draw_row(params, prompt, state, key, sampling):
        state, out = draw_codes(net, params, prompt, state, segment, key[None, None], sampling)
        return state, {"tokens": out["codes"][0, 0], "logp": out["logp"][0, 0]}

    return Slots(model, start, draw_row, count, prompt_length, segment, shape)


def text_slots(model: XOmni, max_tokens: int, shape: TracedSampling, count: int, prompt_length: int, segment: int) -> Slots:
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

    return Slots(model, start, draw_row, count, prompt_length, segment, shape)
