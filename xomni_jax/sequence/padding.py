"""Id lists of several lengths as one array of few possible shapes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

PROMPT_BUCKET = 16  # prompts are padded to a multiple of this, so that few lengths are compiled


def pad_prompts(prompts: Sequence[Sequence[int]], multiple: int = PROMPT_BUCKET) -> tuple[np.ndarray, np.ndarray]:
    """Right-pads id lists to one bucketed length: (ids [P, S] int32, lengths [P] int32)."""
    lengths = np.array([len(p) for p in prompts], np.int32)
    ids = np.zeros((len(prompts), -(-int(lengths.max()) // multiple) * multiple), np.int32)
    for row, prompt in zip(ids, prompts):
        row[: len(prompt)] = prompt
    return ids, lengths
