"""The one table of image tokenizers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from typing import Any

from xomni_jax.tokenizers.clips import ClipTokenizer
from xomni_jax.tokenizers.patches import PatchTokenizer
from xomni_jax.tokenizers.protocol import ImageTokenizer

# Component -> (its config) -> the tokenizer. A model directory holds one of them.
IMAGE_TOKENIZERS: dict[str, Callable[[Any], ImageTokenizer]] = {
    "siglip_vq": functools.partial(PatchTokenizer, "siglip_vq", has_decoder=False),
    "llamagen_vq": functools.partial(PatchTokenizer, "llamagen_vq", has_decoder=True),
    "omnitokenizer": ClipTokenizer,
}


def tokenizer_in(components: Collection[str]) -> str:
    """The image tokenizer among the components of a model; X-Omni's, which is then missing, where there is none."""
    return next((name for name in IMAGE_TOKENIZERS if name in components), "siglip_vq")
