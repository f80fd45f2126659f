"""Packing of several sequences into rows of fixed length, with a segment and positions of its own for each sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from xomni_jax.sequence.tokenizer import TokenSequence


class PackedBatch(NamedTuple):
    """Rows of fixed length, all [B, L].

    `segments`: 1, 2, ... per sequence, 0 for padding. `positions`: those of each sequence, from 0 on where it names none.
    `loss`: True where the token is a target. `members`: index of the sequence that the token belongs to, -1 for padding.
    """

    ids_BL: np.ndarray
    segments_BL: np.ndarray
    positions_BL: np.ndarray
    loss_BL: np.ndarray
    members_BL: np.ndarray


class Targets(NamedTuple):
    """Targets of each position, all [B, L]: the next id of its segment (0 where there is none), and whether the text or the image head
    predicts it."""

    ids_BL: np.ndarray
    text_BL: np.ndarray
    image_BL: np.ndarray


def pack(sequences: Sequence[TokenSequence], length: int, pad: int, rows: int | None = None) -> tuple[PackedBatch, list[int]]:
    """First fit, longest first -> the batch, and the indices of the sequences left over, among them those longer than a row.

    With a number of rows, the sequences that come first and together have as many tokens as the rows go first; the others take the room
    that is left. Otherwise short sequences would be left over more often than long ones.

    Args:
      rows: exact number of rows; sequences that do not fit are left over. By default rows are added as needed.
    """
    sizes = np.array([len(sequence.ids_L) for sequence in sequences], int)
    later = np.cumsum(np.where(sizes <= length, sizes, 0)) > (sizes.sum() if rows is None else rows * length)
    free, content, left = [length] * (rows or 0), [[] for _ in range(rows or 0)], []
    for i in np.lexsort((-sizes, later)).tolist():
        row = next((r for r, space in enumerate(free) if sizes[i] <= space), None)
        if row is None and rows is None and sizes[i] <= length:
            row = len(free)
            free.append(length)
            content.append([])
        if row is None:
            left.append(i)
        else:
            free[row] -= sizes[i]
            content[row].append(i)

    ids, segments, positions, members = (np.full((len(free), length), v, np.int32) for v in (pad, 0, 0, -1))
    loss = np.zeros((len(free), length), bool)
    for r, row in enumerate(content):
        at = 0
        for segment, i in enumerate(row, start=1):
            here = slice(at, at + sizes[i])
            ids[r, here], loss[r, here], own = sequences[i]
            segments[r, here], members[r, here] = segment, i
            positions[r, here] = np.arange(sizes[i]) if own is None else own
            at += sizes[i]
    return PackedBatch(ids, segments, positions, loss, members), sorted(left)


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
