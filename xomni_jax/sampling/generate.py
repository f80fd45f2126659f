"""Generation of image codes and of text, and the teacher-forced log-probabilities of sampled codes. Pure functions, to be jitted."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import struct

from xomni_jax.models.transformer import ARTransformer
from xomni_jax.models.vocab_heads import head_kernel, head_logits, map_chunks, select, token_logp
from xomni_jax.sampling.cache import GENERATED_AXES, GeneratedCache, PromptCache, decode_step, prefill
from xomni_jax.sampling.logits import GREEDY, SamplingConfig, TracedSampling, draw, guide, temper
from xomni_jax.sharding.rules import constrain

Prompts = tuple[jax.Array, jax.Array]  # right-padded ids [P or 1, S] and lengths [P or 1]


@struct.dataclass
class RolloutState:
    """Unfinished rollouts, R of each of P prompts (with guidance also of their negative prompts).

    Attributes:
      hidden_PRD: hidden states that predict the next code.
      cache: keys and values of the codes so far; its column is their number.
    """

    hidden_PRD: jax.Array
    cache: GeneratedCache

    def constrained(self) -> RolloutState:
        """The same with its shardings fixed by the table, so that all calls with it use one compiled program."""
        kv = jax.tree.map(lambda x: constrain(x, *GENERATED_AXES, name="generated cache"), self.cache.kv)
        return RolloutState(constrain(self.hidden_PRD, "batch", None, "residual", name="hidden"), self.cache.replace(kv=kv))


def append_codes(ids_BS: jax.Array, lengths_B: jax.Array, codes_BT: jax.Array, vocab_size: int) -> jax.Array:
    """Right-padded prompts with image codes inserted before the padding: ids [B, S] and codes [B, T] -> ids [B, S + T]."""
    S, T = ids_BS.shape[1], codes_BT.shape[1]
    column_BL = jnp.broadcast_to(jnp.arange(S + T), (ids_BS.shape[0], S + T)) - lengths_B[:, None]
    codes_BL = jnp.take_along_axis(codes_BT, jnp.clip(column_BL, 0, T - 1), axis=1) + vocab_size
    prompt_BL = jnp.pad(ids_BS, ((0, 0), (0, T)))
    return jnp.where(column_BL < 0, prompt_BL, jnp.where(column_BL < T, codes_BL, 0))


def generate_codes(
    model: ARTransformer,
    params,
    prompt_ids_PS: jax.Array,
    lengths_P: jax.Array,
    n_codes: int,
    keys_PR: jax.Array,
    sampling: SamplingConfig = SamplingConfig(),
    negative: Prompts | None = None,
    return_mask: bool = False,
) -> dict[str, jax.Array | None]:
    """Samples exactly `n_codes` image codes for R rollouts of each of P prompts.

    Args:
      prompt_ids_PS: prompts that end in <IMAGE>, right-padded. lengths_P: their real tokens.
      n_codes: T = Y * X, static.
      keys_PR: PRNG keys; rollout (p, r) samples step t with fold_in(keys[p, r], t) and so does not depend on the others.
      negative: the prompts guidance steers away from (ids [P or 1, S'], lengths [P or 1]); needed when guidance is not 1.
      return_mask: also return which codes could have been sampled, for `replay_logp`.

    Returns:
      codes [P, R, T] int32, 0-based; logp [P, R, T] float32, under the truncated distribution each code was sampled from;
      sampling_mask: uint8 [P, R, T, ceil(image_vocab_size / 8)], eight codes per byte, or None.
    """
    prompt, state = start_codes(model, params, prompt_ids_PS, lengths_P, n_codes, keys_PR.shape[1], sampling, negative)
    return draw_codes(model, params, prompt, state, n_codes, keys_PR, sampling, return_mask)[1]


def start_codes(
    model: ARTransformer,
    params,
    prompt_ids_PS: jax.Array,
    lengths_P: jax.Array,
    n_codes: int,
    rollouts: int,
    sampling: SamplingConfig | TracedSampling,
    negative: Prompts | None = None,
) -> tuple[PromptCache, RolloutState]:
    """Runs the prompts; see `generate_codes`. Returns their cache and the state of rollouts that have no code yet."""
    if sampling.guided:
        prompt_ids_PS, lengths_P = _with_negative(prompt_ids_PS, lengths_P, negative)
    hidden_PD, prompt = prefill(model, params, prompt_ids_PS, lengths_P)
    hidden_PRD = jnp.broadcast_to(hidden_PD[:, None], (hidden_PD.shape[0], rollouts, hidden_PD.shape[1]))
    cache = GeneratedCache.empty(model.cfg, hidden_PD.shape[0], rollouts, n_codes)
    return prompt, RolloutState(hidden_PRD, cache).constrained()


def draw_codes(
    model: ARTransformer,
    params,
    prompt: PromptCache,
    state: RolloutState,
    n: int,
    keys_PR: jax.Array,
    sampling: SamplingConfig | TracedSampling,
    return_mask: bool = False,
) -> tuple[RolloutState, dict[str, jax.Array | None]]:
    """Samples the next `n` (static) codes of rollouts, and returns them as `generate_codes` does.

    Donate `state`, or the cache is copied. The codes do not depend, bit for bit, on how many are sampled per call.
    """
    P, kernel_DV = keys_PR.shape[0], head_kernel(params, "image", model.cfg)

    def step(state: RolloutState, _):
        logits = head_logits(state.hidden_PRD, kernel_DV)
        pair = logits.reshape(P, -1, *logits.shape[1:])  # the prompt's, and with guidance the negative prompt's
        scores_PRV = guide(pair[:, 0], pair[:, 1] if sampling.guided else None, sampling.guidance)
        codes_PR, logp_PR, mask_PRV = draw(scores_PRV, _fold_in(keys_PR, state.cache.column), sampling)
        ids = jnp.repeat(codes_PR + model.cfg.vocab_size, pair.shape[1], axis=0)
        state = RolloutState(*decode_step(model, params, ids, prompt, state.cache))
        return state, (codes_PR, logp_PR, jnp.packbits(mask_PRV, axis=-1) if return_mask else None)

    state, out = jax.lax.scan(step, state, length=n)
    codes, logp, sampling_mask = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 2), out)
    return state.constrained(), {"codes": codes, "logp": logp, "sampling_mask": sampling_mask}


def generate_text(
    model: ARTransformer,
    params,
    prompt_ids_PS: jax.Array,
    lengths_P: jax.Array,
    max_new: int,
    stop_ids: Sequence[int],
    pad_id: int = 0,
) -> jax.Array:
    """Continues prompts (which may hold images) with the most probable text, as released, until every row has stopped.

    Args:
      prompt_ids_PS, lengths_P: right-padded prompts and their real tokens. max_new: static bound on new tokens.
      stop_ids: a row ends with the first of these, which is returned; every later entry is `pad_id`.

    Returns:
      ids [P, max_new] int32, text ids only.
    """
    keys_P = jax.random.split(jax.random.key(0), prompt_ids_PS.shape[0])  # `draw` needs some; greedy, it does not depend on them
    P, stops = prompt_ids_PS.shape[0], jnp.asarray(list(stop_ids), jnp.int32)
    hidden_PD, prompt = prefill(model, params, prompt_ids_PS, lengths_P)

    def unfinished(state):
        return (state[0] < max_new) & ~jnp.all(state[4])

    def step(state):
        t, hidden_PRD, cache, ids_PT, done_P = state
        logits = model.apply({"params": params}, hidden_PRD, method="text_logits")
        tokens_P = draw(logits, _fold_in(keys_P[:, None], t), GREEDY)[0][:, 0]
        tokens_P = jnp.where(done_P, pad_id, tokens_P)
        ids_PT = jax.lax.dynamic_update_slice_in_dim(ids_PT, tokens_P[:, None], t, axis=1)
        done_P |= jnp.any(tokens_P[:, None] == stops, axis=1)
        hidden_PRD, cache = decode_step(model, params, tokens_P[:, None], prompt, cache, vision=False)
        return t + 1, hidden_PRD, cache, ids_PT, done_P

    cache = GeneratedCache.empty(model.cfg, P, 1, max_new, vision=False)
    empty = jnp.full((P, max_new), pad_id, jnp.int32)
    return jax.lax.while_loop(unfinished, step, (jnp.int32(0), hidden_PD[:, None], cache, empty, jnp.zeros(P, bool)))[3]


def make_answerer(model: ARTransformer, max_new: int, stop_id: int, pad_id: int) -> Callable[..., jax.Array]:
    """The jitted greedy `generate_text` (params, prompt ids [P, S], lengths [P]) -> ids [P, max_new]."""
    return jax.jit(lambda params, ids_PS, lengths_P: generate_text(model, params, ids_PS, lengths_P, max_new, (stop_id,), pad_id))


def replay_logp(
    model: ARTransformer,
    params,
    prompt_ids_BS: jax.Array,
    lengths_B: jax.Array,
    codes_BT: jax.Array,
    sampling: SamplingConfig,
    sampling_mask: jax.Array | None = None,
    negative: Prompts | None = None,
    chunk: int = 512,
) -> tuple[jax.Array, jax.Array]:
    """Teacher-forced log-probability and entropy of sampled codes, under the sampler's own temperature, truncation and guidance.

    Args:
      prompt_ids_BS, lengths_B, codes_BT: prompts and codes as given to and returned by `generate_codes`, one row per rollout.
      sampling_mask: [B, T, ceil(V / 8)] uint8 of the sampler; needed if `sampling` truncates.
      negative: as in `generate_codes`. Its branch is differentiated too: the result is the log-prob of the guided distribution.
      chunk: positions whose logits exist at a time; they are recomputed in the backward pass.

    Returns:
      (logp [B, T], entropy [B, T]), float32, differentiable in params.
    """
    cfg, prompts = model.cfg, [(prompt_ids_BS, lengths_B)]
    if sampling.guided:
        prompts.append(_rows_of(negative, prompt_ids_BS.shape[0]))
    kernel_DV = head_kernel(params, "image", cfg)
    hidden = [_hidden_before_codes(model, params, ids, lengths, codes_BT) for ids, lengths in prompts]

    def score(codes_BC, *arrays):
        logits = [head_logits(h_BCD, kernel_DV) for h_BCD in arrays[: len(hidden)]]
        scores = guide(logits[0], logits[1] if sampling.guided else None, sampling.guidance)
        mask = None
        if sampling_mask is not None:
            mask = jnp.unpackbits(arrays[-1], axis=-1, count=cfg.image_vocab_size).astype(bool)
        return token_logp(temper(scores, sampling.temperature), codes_BC, mask)

    return map_chunks(score, (codes_BT, *hidden, *(() if sampling_mask is None else (sampling_mask,))), chunk)


def _hidden_before_codes(model: ARTransformer, params, ids_BS, lengths_B, codes_BT) -> jax.Array:
    """Hidden states [B, T, D] of a full forward at the positions that predict the codes, from <IMAGE> on."""
    hidden_BLD = model.apply({"params": params}, append_codes(ids_BS, lengths_B, codes_BT, model.cfg.vocab_size))
    return select(hidden_BLD, lengths_B[:, None] - 1 + jnp.arange(codes_BT.shape[1]))


def _rows_of(negative: Prompts, rows: int) -> Prompts:
    """The negative prompts with one row per conditional row."""
    ids, lengths = negative
    return jnp.broadcast_to(ids, (rows, ids.shape[1])), jnp.broadcast_to(lengths, (rows,))


def _with_negative(ids_PS: jax.Array, lengths_P: jax.Array, negative: Prompts) -> Prompts:
    """Prompts with the negative prompt of each in the next row, so that both stay on one device when rows are sharded: [2 P, S]."""
    neg_ids, neg_lengths = _rows_of(negative, ids_PS.shape[0])
    S = max(ids_PS.shape[1], neg_ids.shape[1])
    pair = [jnp.pad(x, ((0, 0), (0, S - x.shape[1]))) for x in (ids_PS, neg_ids)]
    return jnp.stack(pair, axis=1).reshape(-1, S), jnp.stack([lengths_P, neg_lengths], axis=1).reshape(-1)


def _fold_in(keys_PR: jax.Array, t: jax.Array) -> jax.Array:
    return jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (0, None))(keys_PR, t)
