"""The padding rule of prompts: right-padded to a few lengths, so that few programs are compiled."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

SHORTEST = 16  # tokens
IMAGE_STEPS = 4  # of `bucket`, for prompts that hold an image: their prefill is most of the work


def bucket(length: int, steps: int = 1) -> int:
    """The padded length of a prompt: powers of two from `SHORTEST` on, each octave divided into `steps` lengths."""
    if length <= SHORTEST:
        return SHORTEST
    step = max(1, (1 << (length - 1).bit_length() - 1) // steps)
    return -(-length // step) * step


def pad_prompts(prompts: Sequence[Sequence[int]], length: int | None = None, steps: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Right-pads P id lists to S = `length` tokens, by default the bucket of the longest: (ids [P, S] int32, lengths [P] int32)."""
    lengths_P = np.array([len(p) for p in prompts], np.int32)
    ids_PS = np.zeros((len(prompts), length or bucket(int(lengths_P.max()), steps)), np.int32)
    for row_S, prompt in zip(ids_PS, prompts):
        row_S[: len(prompt)] = prompt
    return ids_PS, lengths_P
