"""Pre-training and supervised fine-tuning: next-token cross-entropy over packed text and image tokens (X-Omni section 3.2).

A batch of images with captions, questions and conversations becomes codes (frozen tokenizer), then sequences (caption -> image,
image + question -> answer, text, conversation), then packed rows. Text targets go through the text head, image targets through the
image head.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from xomni_jax.core.config import BelowOne, ConfigError, Count, Natural, NonNegative, PositiveShare, Share
from xomni_jax.models.vocab_heads import head_logp, select
from xomni_jax.sequence.orders import tree_order
from xomni_jax.sequence.packing import pack, targets
from xomni_jax.sequence.tokenizer import MultimodalTokenizer, TokenSequence

MARK = r"<image (\d+)>"  # of an image in a turn


@dataclasses.dataclass(frozen=True)
class NextTokenConfig:
    """Mixture and shapes of a next-token stage.

    Attributes:
      generation: share of caption -> image sequences among examples with an image and without a conversation
      understanding: share of image + question -> answer sequences
      text: share of text-only sequences
      drop_prompt: share of generation sequences without their caption; classifier-free guidance needs some
      row_length: tokens of a packed row; sequences that are longer, or find no room in the rows, are left out and counted
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

    `image_codes` are 0-based codes; masks are 0 where a slot holds no target. The numbers of the sources are there for a mixture alone.
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
    text_source_BM: np.ndarray | None = None
    image_source_BM: np.ndarray | None = None

    def without_sources(self) -> PackedTargets:
        """The same without the numbers of the sources."""
        return self._replace(text_source_BM=None, image_source_BM=None)


def build_sequences(
    examples: dict[str, Any],
    codes: Sequence[Sequence[np.ndarray]],
    tokenizer: MultimodalTokenizer,
    cfg: NextTokenConfig,
    rng: np.random.Generator,
    order: str = "raster",
) -> list[TokenSequence]:
    """One sequence per example: its conversation, its text where it has no image, or else of a kind that is drawn by the shares.

    A conversation that is one question about one image, beside a caption, is a question with its answer.

    Args:
      examples: collated; those with `turns` have marks `<image N>` for their images.
      codes: [Y, X] of every image of each example, of which an example without `turns` has one or none.
      order: of the codes of an image that follows a caption; see `ARConfig`.
    """
    rows = [{name: values[i] for name, values in examples.items()} for i in range(len(codes))]
    return [_sequence(example, images, tokenizer, cfg, rng, order) for example, images in zip(rows, codes, strict=True)]


def _sequence(
    example: dict[str, Any],
    codes: Sequence[np.ndarray],
    tokenizer: MultimodalTokenizer,
    cfg: NextTokenConfig,
    rng: np.random.Generator,
    order: str,
) -> TokenSequence:
    caption, question, turns = example.get("caption"), example.get("question"), example.get("turns") or ()
    shown = [int(number) for _, text in turns for number in re.findall(MARK, text)]
    system = [("system", [example["system"]])] if example.get("system") else []
    # One question about the image, beside a caption, is of a kind that is drawn: otherwise such captions were never learned.
    asked = caption and not system and shown == [0] and len(turns) == 2 and turns[0][1].startswith("<image 0>")
    if turns and not asked and max(shown, default=-1) < len(codes):  # of stored codes there are only those of the main image
        return tokenizer.conversation_sequence(system + [(role, _content(text, codes)) for role, text in turns])
    if not codes and caption:
        return tokenizer.text_sequence(caption)
    shares = np.array([cfg.generation, cfg.understanding, cfg.text]) * [bool(caption), bool(question), bool(caption)]
    if not codes or not shares.any():
        raise ConfigError(
            f"config.data: the example {example['id']} has nothing that this stage learns from: its fields are "
            f"{', '.join(sorted(name for name, value in example.items() if value is not None))}; set the share of what it has in next_token"
        )
    kind = rng.choice(3, p=shares / shares.sum())
    if kind == 0:
        shown, order_T = "" if rng.random() < cfg.drop_prompt else caption, None if order == "raster" else tree_order(codes[0].shape, rng)
        return tokenizer.generation_sequence(shown, codes[0], order_T)
    return tokenizer.understanding_sequence(codes[0], question, example["answer"]) if kind == 1 else tokenizer.text_sequence(caption)


def _content(text: str, codes: Sequence[np.ndarray]) -> list[str | np.ndarray]:
    """The text of a turn with the codes of its images in the places of their marks; the text behind an image is on a line of its own."""
    first, *rest = re.split(MARK, text)
    out: list[str | np.ndarray] = [first] if first else []
    for number, after in zip(rest[::2], rest[1::2], strict=True):
        out += [codes[int(number)]] + (["\n" + after.lstrip()] if after else [])
    return out


def pack_batch(
    sequences: list[TokenSequence],
    tokenizer: MultimodalTokenizer,
    cfg: NextTokenConfig,
    names: Sequence[str] = (),
    source_of: Sequence[int] = (),
) -> tuple[PackedTargets, dict[str, float]]:
    """Packs sequences into the configured rows -> (batch, counts of what found no room).

    Args:
      names: of a mixture's sources, which are counted one by one; `source_of`: number of the source of each sequence.

    Raises:
      ConfigError: every sequence is longer than a row.
    """
    sizes = np.array([len(sequence.ids_L) for sequence in sequences])
    if sizes.min() > cfg.row_length:
        raise ConfigError(f"config.next_token.row_length={cfg.row_length}: a batch has no sequence below {sizes.min()} tokens; raise it")
    packed, left = pack(sequences, cfg.row_length, tokenizer.pad, rows=cfg.rows)
    due = targets(packed, tokenizer.vocab_size, tokenizer.image_vocab_size)
    room = max(1, int(cfg.row_length * cfg.target_share))
    text = gather_targets(due.ids_BL, due.text_BL, room)
    image = gather_targets(due.ids_BL - tokenizer.vocab_size, due.image_BL, room)
    kept = int(text[2].sum() + image[2].sum())
    counts = {
        "data/left_out": len(left) / len(sequences),
        "data/filled": float((packed.segments_BL > 0).mean()),
        "data/targets_dropped": 1.0 - kept / max(int(due.text_BL.sum() + due.image_BL.sum()), 1),
    }
    batch = PackedTargets(packed.ids_BL, packed.positions_BL, packed.segments_BL, *text, *image)
    if names:
        of = np.array(source_of, np.int32)
        text_source, image_source = (of[np.take_along_axis(packed.members_BL, at_BM, axis=1)] for at_BM in (text[0], image[0]))
        batch = batch._replace(text_source_BM=text_source, image_source_BM=image_source)
        learned = np.concatenate([text_source[batch.text_mask_BM], image_source[batch.image_mask_BM]])
        found = {"examples": of, "left_out": of[left], "too_long": of[sizes > cfg.row_length], "targets": learned}
        counts |= {f"data/{what}/{name}": int((of == k).sum()) for k, name in enumerate(names) for what, of in found.items()}
    return batch, counts


def gather_targets(ids_BL: np.ndarray, due_BL: np.ndarray, room: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The first M = `room` positions of each row that are due -> (positions [B, M], ids there [B, M], mask [B, M])."""
    order_BM = np.argsort(~due_BL, axis=1, kind="stable")[:, :room].astype(np.int32)
    mask_BM = np.take_along_axis(due_BL, order_BM, axis=1)
    return order_BM, np.where(mask_BM, np.take_along_axis(ids_BL, order_BM, axis=1), 0).astype(np.int32), mask_BM


def next_token_loss(
    model: nn.Module, params: Any, batch: PackedTargets, whole: PackedTargets, cfg: NextTokenConfig, sources: Sequence[str] = ()
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean cross-entropy of text targets plus `image_weight` times that of image targets; float32 scalars in nats per token.

    `batch` may be some of the rows of `whole`, whose tokens the sums are divided by: the results of all parts add up to those of `whole`.
    For every one of `sources`, loss/source/NAME is the mean over its targets of both kinds.
    """
    hidden_BLD = model.apply({"params": params}, batch.ids_BL, batch.positions_BL, batch.segments_BL)
    text_BM, _ = head_logp(model, params, "text", select(hidden_BLD, batch.text_at_BM), batch.text_ids_BM, cfg.chunk)
    image_BM, entropy_BM = head_logp(model, params, "image", select(hidden_BLD, batch.image_at_BM), batch.image_codes_BM, cfg.chunk)

    def mean(x_BM, mask_BM, all_BM):
        return jnp.sum(jnp.where(mask_BM, x_BM, 0.0)) / jnp.maximum(jnp.sum(all_BM), 1)

    text = -mean(text_BM, batch.text_mask_BM, whole.text_mask_BM)
    image = -mean(image_BM, batch.image_mask_BM, whole.image_mask_BM)
    loss = text + cfg.image_weight * image
    metrics = {
        "loss/total": loss,
        "loss/text": text,
        "loss/image": image,
        "image/entropy": mean(entropy_BM, batch.image_mask_BM, whole.image_mask_BM),
    }
    for k, name in enumerate(sources):
        own, every = (
            jnp.concatenate([b.text_mask_BM & (b.text_source_BM == k), b.image_mask_BM & (b.image_source_BM == k)], 1)
            for b in (batch, whole)
        )
        metrics[f"loss/source/{name}"] = -mean(jnp.concatenate([text_BM, image_BM], 1), own, every)
    return loss, metrics
