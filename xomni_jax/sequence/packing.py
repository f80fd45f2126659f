"""Packing of several sequences into rows of fixed length, with a segment and positions of its own for each sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from xomni_jax.sequence.tokenizer import TokenSequence


class PackedBatch(NamedTuple):
    """Rows of fixed length, all [B, L].

    `segments`: 1, 2, ... per sequence, 0 for padding. `positions` start at 0 in every segment. `loss`: True where the token is a target.
    """

    ids_BL: np.ndarray
    segments_BL: np.ndarray
    positions_BL: np.ndarray
    loss_BL: np.ndarray


class Targets(NamedTuple):
    """Targets of each position, all [B, L]: the next id of its segment (0 where there is none), and whether the text or the image head
    predicts it."""

    ids_BL: np.ndarray
    text_BL: np.ndarray
    image_BL: np.ndarray


def pack(sequences: Sequence[TokenSequence], length: int, pad: int, rows: int | None = None) -> tuple[PackedBatch, list[int]]:
    """Greedy first fit in the given order -> the batch, and the indices of the sequences left over.

    Args:
      rows: exact number of rows; sequences that do not fit are left over. By default rows are added as needed.

    Raises:
      ValueError: a sequence is longer than a row.
    """
    free: list[int] = [length] * (rows or 0)
    content: list[list[int]] = [[] for _ in free]
    left = []
    for i, sequence in enumerate(sequences):
        n = len(sequence.ids_L)
        if n > length:
            raise ValueError(f"Sequence {i} has {n} tokens, more than a row of {length}; raise the row length or cut it.")
        row = next((r for r, space in enumerate(free) if n <= space), None)
        if row is None and rows is None:
            row = len(free)
            free.append(length)
            content.append([])
        if row is None:
            left.append(i)
        else:
            free[row] -= n
            content[row].append(i)

    ids, segments, positions = (np.full((len(free), length), v, np.int32) for v in (pad, 0, 0))
    loss = np.zeros((len(free), length), bool)
    for r, members in enumerate(content):
        at = 0
        for segment, i in enumerate(members, start=1):
            n = len(sequences[i].ids_L)
            ids[r, at : at + n], loss[r, at : at + n] = sequences[i].ids_L, sequences[i].loss_L
            segments[r, at : at + n], positions[r, at : at + n] = segment, np.arange(n)
            at += n
    return PackedBatch(ids, segments, positions, loss), left


def targets(batch: PackedBatch, vocab_size: int, image_vocab_size: int) -> Targets:
    """Next-token targets and the head that predicts each.

    Text ids are predicted by the text head, image codes by the image head. `<SOM>`, `<IMAGE>` and `<EOM>` are not targets, since neither
    head has them. The first code is predicted at `<IMAGE>`. Nothing is predicted across segments.
    """
    next_BL = np.zeros_like(batch.ids_BL)
    next_BL[:, :-1] = batch.ids_BL[:, 1:]
    due_BL = np.zeros_like(batch.loss_BL)
    due_BL[:, :-1] = batch.loss_BL[:, 1:] & (batch.segments_BL[:, 1:] == batch.segments_BL[:, :-1]) & (batch.segments_BL[:, 1:] > 0)
    text_BL = due_BL & (next_BL < vocab_size)
    image_BL = due_BL & (next_BL >= vocab_size) & (next_BL < vocab_size + image_vocab_size)
    return Targets(np.where(text_BL | image_BL, next_BL, 0), text_BL, image_BL)
