"""The multimodal token format: text and image spans to ids and back."""

from xomni_jax.sequence.packing import PackedBatch, Targets, pack, targets, unpack
from xomni_jax.sequence.spans import ImageSpan, SpanError, TextSpan, parse, unparse
from xomni_jax.sequence.tokenizer import TINY_TOKENIZER, MultimodalTokenizer, TokenSequence, fixed_length_ids

__all__ = [
    "TINY_TOKENIZER",
    "ImageSpan",
    "MultimodalTokenizer",
    "PackedBatch",
    "SpanError",
    "Targets",
    "TextSpan",
    "TokenSequence",
    "fixed_length_ids",
    "pack",
    "parse",
    "targets",
    "unpack",
    "unparse",
]
