"""Continuous batching: rows of a running batch that begin and end on their own.

A slot holds one row with its own prompt, position, key and sampling. Slots advance by one segment at a time, the lowest ones alone where
few are in use, in programs of a few fixed sizes; between segments finished rows leave and waiting ones enter the lowest free slots. A
row's tokens depend on nothing that runs beside it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from xomni_jax.pipeline import XOmni
from xomni_jax.sampling.cache import GENERATED_AXES, PROMPT_AXES, extend
from xomni_jax.sampling.engine import Engine, RolloutState
from xomni_jax.sampling.logits import SamplingConfig, TracedSampling, draw
from xomni_jax.sampling.sampler import segment_length
from xomni_jax.sampling.segments import image_spec
from xomni_jax.sequence.padding import pad_prompts
from xomni_jax.sharding.rules import spec_for, unconstrained

ENTERING = 4  # most rows that are prefilled at a time
# Of a row's arrays as the sampler makes them for one prompt, by their rank; in front of them comes the axis of the slots.
_AXES = {len(names): names for names in (PROMPT_AXES, GENERATED_AXES, (None, None, "residual"), ("batch",), ())}


def row_counts(most: int, multiple: int = 1) -> list[int]:
    """Sizes of batches up to `most` rows, about a factor of 4 apart: each is a program of its own, which the accelerator must compile."""
    return sorted({multiple * -(-most // (multiple * 4**n)) for n in range(8)})


def fitting(rows: int, counts: Sequence[int]) -> int:
    """The smallest of the ascending `counts` that holds so many rows; the last at most."""
    return next((count for count in counts if count >= rows), counts[-1])


@dataclasses.dataclass
class Entry:
    """What a row begins with.

    Attributes:
      slot: where. ids_S, negative_S: its prompt, and the one that guidance steers away from, if any.
      key: data of its PRNG key. sampling: how its tokens are chosen.
      plan: what the slots' `plan` says of it, if anything else.
    """

    slot: int
    ids_S: np.ndarray
    negative_S: np.ndarray | None
    key: np.ndarray
    sampling: SamplingConfig
    plan: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)


class Slots:
    """Rows of one shape on one model.

    Args:
      start: (params, ids [1, S], lengths [1], negative prompts | None, plan) -> prompt cache and state of one row.
      draw: (params, prompt cache, state, key, sampling, plan) of one row -> state, {"tokens": [segment], "logp": [segment]}.
      count: slots. prompt_length: S. segment: tokens that a call of `advance` adds to a row.
      shape: the static part of the rows' sampling, and what free slots sample with.
      plan: what else `start` and `draw` are told of a row, for rows whose entry does not say.
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
        plan: Mapping[str, np.ndarray],
    ):
        self.model, self.count, self.prompt_length, self.segment, self.shape = model, count, prompt_length, segment, shape
        self._plan = dict(plan)
        self._shards, self._counts = model.num_data_shards, row_counts(count, model.num_data_shards)
        start_rows = jax.vmap(start, in_axes=(None, 0, 0, 0, 0))
        ids = jax.ShapeDtypeStruct((1, prompt_length), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)
        with unconstrained():
            row = jax.eval_shape(start, model.params("transformer"), *ids, ids if shape.guided else None, self._plan)
            shardings = jax.tree.map(self._sharding, row)
            empty = lambda: jax.tree.map(lambda x: jnp.zeros((count, *x.shape), x.dtype), row)
            self._prompts, self._states = jax.jit(empty, out_shardings=shardings)()

        def enter(params, rows, places, ids, lengths, negative, plans):
            new = start_rows(params, ids, lengths, negative, plans)
            return jax.tree.map(lambda x, y: x.at[places].set(y, mode="drop"), rows, new)

        self._enter = jax.jit(enter, donate_argnums=1, out_shardings=shardings)
        advance_rows = jax.vmap(draw, in_axes=(None, 0, 0, 0, 0, 0))

        def advance(params, prompts, states, keys, sampling, plans):
            """Advances as many of the lowest slots as there are keys."""
            n = len(keys)
            by_shard = lambda x: x.reshape(self._shards, -1, *x.shape[1:])
            lowest = lambda x: by_shard(x)[:, : n // self._shards].reshape(n, *x.shape[1:])
            put = lambda x, y: by_shard(x).at[:, : n // self._shards].set(by_shard(y)).reshape(x.shape)
            some = jax.tree.map(lowest, (prompts, states)) if n < count else (prompts, states)
            new, out = advance_rows(params, *some, jax.random.wrap_key_data(keys), sampling, plans)
            return (jax.tree.map(put, states, new) if n < count else new), out

        replicated = NamedSharding(model.mesh, PartitionSpec())
        self._advance = jax.jit(advance, donate_argnums=2, out_shardings=(shardings[1], replicated))
        self._keys = np.zeros((count, *jax.random.key_data(jax.random.key(0)).shape), np.uint32)
        self._sampling = jax.tree.map(lambda x: np.repeat(x, count), shape)
        self._plans = {name: np.repeat(x[None], count, axis=0) for name, x in plan.items()}

    def _sharding(self, x: jax.ShapeDtypeStruct) -> NamedSharding:
        """Slots are split as rows of a batch are, heads over "tensor"; of one row nothing else is."""
        axes = ("batch", *(None if axis == "batch" else axis for axis in _AXES[x.ndim]))
        return NamedSharding(self.model.mesh, spec_for("slots", (self.count, *x.shape), axes, self.model.mesh))

    def _order(self, count: int) -> np.ndarray:
        """The lowest slots as the devices hold them: neighbours are on different data shards, so that few slots use all shards."""
        return np.arange(count).reshape(-1, self._shards).T.ravel()

    def enter(self, entries: Sequence[Entry]) -> None:
        """Begins rows in free slots."""
        places = np.append(np.argsort(self._order(self.count)), self.count)  # of a slot; the last is none and takes nothing
        for first in range(0, len(entries), ENTERING):
            part = entries[first : first + ENTERING]
            fill = [part[0]] * (fitting(len(part), row_counts(ENTERING)) - len(part))
            ids, lengths = pad_prompts([e.ids_S for e in (*part, *fill)], self.prompt_length)
            negative = None
            if self.shape.guided:
                padded = pad_prompts([e.negative_S for e in (*part, *fill)], self.prompt_length)
                negative = padded[0][:, None], padded[1][:, None]
            slots = places[[e.slot for e in part] + [self.count] * len(fill)].astype(np.int32)
            plans = {name: np.stack([e.plan.get(name, x) for e in (*part, *fill)]) for name, x in self._plan.items()}
            with unconstrained():
                rows, params = (self._prompts, self._states), self.model.params("transformer")
                self._prompts, self._states = self._enter(params, rows, slots, ids[:, None], lengths[:, None], negative, plans)
            for n, e in enumerate(part):
                self._keys[e.slot] = e.key
                for name, x in plans.items():
                    self._plans[name][e.slot] = x[n]
                for held, x in zip(jax.tree.leaves(self._sampling), jax.tree.leaves(TracedSampling.of(e.sampling))):
                    held[e.slot] = x

    def advance(self, used: int) -> dict[str, np.ndarray]:
        """Adds a segment to the rows of the lowest `used` slots and perhaps of more.

        Returns:
          {"tokens": int32 [at least used, segment], "logp": float32 [at least used, segment]}; free slots give any values.
        """
        order = self._order(fitting(used, self._counts))
        with unconstrained():
            params = self.model.params("transformer")
            own = jax.tree.map(lambda x: x[order], (self._keys, self._sampling, self._plans))  # copies, which the device may read later
            self._states, out = self._advance(params, self._prompts, self._states, *own)
        return jax.tree.map(lambda x: x[np.argsort(order)], jax.device_get(out))


def image_slots(model: XOmni, grid: tuple[int, int], shape: TracedSampling, count: int, prompt_length: int, segment: int) -> Slots:
    """Slots for images of Y x X codes, at most `segment` codes at a time. `shape`: see `Slots`.

    The plan of a row is int32 [T] "given", the codes that are known, -1 elsewhere; and, where the model does not draw row by row, "order",
    the cells in the order of drawing, in which "given" is then, too.
    """
    engine, n_codes = Engine(model.module("transformer")), grid[0] * grid[1]
    segment = segment_length(n_codes, segment)
    plan = {"given": np.full(n_codes, -1, np.int32)}
    if model.config("transformer").order != "raster":
        plan["order"] = np.arange(n_codes, dtype=np.int32)

    def start(params, ids_PS, lengths_P, negative, plan):
        first_PR = plan["order"][None, :1] if "order" in plan else None
        return engine.start(params, (ids_PS, lengths_P), 1, n_codes, negative, first_PR=first_PR)

    def draw_row(params, prompt, state, key, sampling, plan):
        codes, plan = image_spec(segment, sampling), {name: x[None, None] for name, x in plan.items()}
        first = state.cache.column - ("order" in plan)  # then the last token of the prompt is in the cache
        state, part = engine.sample(
            params, prompt, state, codes, key[None, None], first=first, order_PRT=plan.get("order"), given_PRT=plan["given"]
        )
        return state, {"tokens": part.ids[0, 0], "logp": part.logp[0, 0]}

    return Slots(model, start, draw_row, count, prompt_length, segment, shape, plan)


def text_slots(model: XOmni, max_tokens: int, shape: TracedSampling, count: int, prompt_length: int, segment: int) -> Slots:
    """Slots for texts of at most `max_tokens` tokens, `segment` at a time; a row goes on behind its end of turn until it is replaced."""
    net = model.module("transformer")

    def start(params, ids_PS, lengths_P, negative, plan):
        return Engine(net).start(params, (ids_PS, lengths_P), 1, max_tokens, vision=False)

    def draw_row(params, prompt, state, key, sampling, plan):
        def step(state, _):
            logits = net.apply({"params": params}, state.hidden_PRD, method="text_logits")
            tokens_PR, logp_PR, _ = draw(logits, jax.random.fold_in(key, state.cache.column)[None, None], sampling)
            hidden_PWRD, cache = extend(net, params, tokens_PR[:, None], prompt, state.cache)
            return RolloutState(hidden_PWRD[:, 0], cache), {"tokens": tokens_PR[0, 0], "logp": logp_PR[0, 0]}

        return jax.lax.scan(step, state, length=segment)

    return Slots(model, start, draw_row, count, prompt_length, segment, shape, {})
