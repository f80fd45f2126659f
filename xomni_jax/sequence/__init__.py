"""The multimodal token format: text and images to ids and back, packing and padding."""

from xomni_jax.sequence.packing import PackedBatch, Targets, pack, targets, unpack
from xomni_jax.sequence.spans import ImageSpan, SpanError, TextSpan, parse, unparse
from xomni_jax.sequence.tokenizer import TINY_TOKENIZER, MultimodalTokenizer, TokenSequence, encoder_ids, fixed_length_ids, read_tokenizer

__all__ = [
    "TINY_TOKENIZER",
    "ImageSpan",
    "MultimodalTokenizer",
    "PackedBatch",
    "SpanError",
    "Targets",
    "TextSpan",
    "TokenSequence",
    "encoder_ids",
    "fixed_length_ids",
    "pack",
    "parse",
    "read_tokenizer",
    "targets",
    "unpack",
    "unparse",
]
