"""Pre-training and supervised fine-tuning: next-token cross-entropy over packed text and image tokens (X-Omni section 3.2).

A batch of images with captions and questions becomes codes (frozen tokenizer), then sequences of three kinds (caption -> image,
image + question -> answer, text), then packed rows. Text targets go through the text head, image targets through the image head.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from xomni_jax.core.config import BelowOne, Count, Natural, NonNegative, PositiveShare, Share
from xomni_jax.models.vocab_heads import head_logp, select
from xomni_jax.sequence.packing import pack, targets
from xomni_jax.sequence.tokenizer import MultimodalTokenizer, TokenSequence


@dataclasses.dataclass(frozen=True)
class NextTokenConfig:
    """Mixture and shapes of a next-token stage.

    Attributes:
      generation: share of caption -> image sequences
      understanding: share of image + question -> answer sequences
      text: share of text-only sequences
      drop_prompt: share of generation sequences without their caption; classifier-free guidance needs some
      row_length: tokens of a packed row; sequences that find no room are left out and counted
      rows: packed rows per step over all devices
      image_weight: weight of the image loss beside the text loss
      target_share: room for targets of each kind per row, as a share of row_length: each head runs over that many positions
      chunk: positions per piece of the heads; 0: all at once
    """

    generation: Share = 0.8
    understanding: Share = 0.15
    text: Share = 0.05
    drop_prompt: BelowOne = 0.1
    row_length: Count = 208
    rows: Count = 16
    image_weight: NonNegative = 1.0
    target_share: PositiveShare = 1.0
    chunk: Natural = 0

    def __post_init__(self):
        shares = (self.generation, self.understanding, self.text)
        if abs(sum(shares) - 1) > 1e-6:
            raise ValueError(f"generation, understanding and text are {shares}; they are shares and must sum to 1")


class PackedTargets(NamedTuple):
    """A packed batch with its targets gathered: rows [B, L], targets [B, M] with the position that predicts each.

    `image_codes` are 0-based codes; masks are 0 where a slot holds no target.
    """

    ids_BL: np.ndarray
    positions_BL: np.ndarray
    segments_BL: np.ndarray
    text_at_BM: np.ndarray
    text_ids_BM: np.ndarray
    text_mask_BM: np.ndarray
    image_at_BM: np.ndarray
    image_codes_BM: np.ndarray
    image_mask_BM: np.ndarray


def build_sequences(
    examples: dict[str, Any], codes_BYX: np.ndarray, tokenizer: MultimodalTokenizer, cfg: NextTokenConfig, rng: np.random.Generator
) -> list[TokenSequence]:
    """One sequence per example, its kind drawn by the mixture."""
    out = []
    for i, codes_YX in enumerate(codes_BYX):
        kind = rng.choice(3, p=(cfg.generation, cfg.understanding, cfg.text))
        if kind == 0:
            prompt = "" if rng.random() < cfg.drop_prompt else examples["caption"][i]
            out.append(tokenizer.generation_sequence(prompt, codes_YX))
        elif kind == 1:
            out.append(tokenizer.understanding_sequence(codes_YX, examples["question"][i], examples["answer"][i]))
        else:
            out.append(tokenizer.text_sequence(examples["caption"][i]))
    return out


def pack_batch(
    sequences: list[TokenSequence], tokenizer: MultimodalTokenizer, cfg: NextTokenConfig
) -> tuple[PackedTargets, dict[str, float]]:
    """Packs sequences into the configured rows -> (batch, counts of what found no room)."""
    packed, left = pack(sequences, cfg.row_length, tokenizer.pad, rows=cfg.rows)
    due = targets(packed, tokenizer.vocab_size, tokenizer.image_vocab_size)
    room = max(1, int(cfg.row_length * cfg.target_share))
    text = gather_targets(due.ids_BL, due.text_BL, room)
    image = gather_targets(due.ids_BL - tokenizer.vocab_size, due.image_BL, room)
    kept = int(text[2].sum() + image[2].sum())
    counts = {
        "data/left_out": len(left) / max(len(sequences), 1),
        "data/filled": float((packed.segments_BL > 0).mean()),
        "data/targets_dropped": 1.0 - kept / max(int(due.text_BL.sum() + due.image_BL.sum()), 1),
    }
    return PackedTargets(packed.ids_BL, packed.positions_BL, packed.segments_BL, *text, *image), counts


def gather_targets(ids_BL: np.ndarray, due_BL: np.ndarray, room: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The first M = `room` positions of each row that are due -> (positions [B, M], ids there [B, M], mask [B, M])."""
    order_BM = np.argsort(~due_BL, axis=1, kind="stable")[:, :room].astype(np.int32)
    mask_BM = np.take_along_axis(due_BL, order_BM, axis=1)
    return order_BM, np.where(mask_BM, np.take_along_axis(ids_BL, order_BM, axis=1), 0).astype(np.int32), mask_BM


def next_token_loss(
    model: nn.Module, params: Any, batch: PackedTargets, whole: PackedTargets, cfg: NextTokenConfig
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean cross-entropy of text targets plus `image_weight` times that of image targets; float32 scalars in nats per token.

    `batch` may be some of the rows of `whole`, whose tokens the sums are divided by: the results of all parts add up to those of `whole`.
    """
    hidden_BLD = model.apply({"params": params}, batch.ids_BL, batch.positions_BL, batch.segments_BL)
    text_BM, _ = head_logp(model, params, "text", select(hidden_BLD, batch.text_at_BM), batch.text_ids_BM, cfg.chunk)
    image_BM, entropy_BM = head_logp(model, params, "image", select(hidden_BLD, batch.image_at_BM), batch.image_codes_BM, cfg.chunk)

    def mean(x_BM, mask_BM, all_BM):
        return jnp.sum(jnp.where(mask_BM, x_BM, 0.0)) / jnp.maximum(jnp.sum(all_BM), 1)

    text = -mean(text_BM, batch.text_mask_BM, whole.text_mask_BM)
    image = -mean(image_BM, batch.image_mask_BM, whole.image_mask_BM)
    loss = text + cfg.image_weight * image
    return loss, {
        "loss/total": loss,
        "loss/text": text,
        "loss/image": image,
        "image/entropy": mean(entropy_BM, batch.image_mask_BM, whole.image_mask_BM),
    }
