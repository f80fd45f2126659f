"""Small tokenizers of the decoder's text encoders, in FLUX.1-dev's files: T5 as tokenizer.json, CLIP as vocabulary and merges."""

from __future__ import annotations

import json
import string
from pathlib import Path

LETTERS = string.ascii_lowercase + string.digits + "\"'.,?!"
T5_PIECES = ("<pad>", "</s>", "<unk>", "▁", "▁a", "▁red", "▁sign", "▁that", "▁says", *LETTERS, *string.ascii_uppercase)
CLIP_MERGES = (("s", "i"), ("si", "g"), ("sig", "n</w>"), ("r", "e"), ("re", "d</w>"), ("t", "h"))
CLIP_TOKENS = (*LETTERS, *(c + "</w>" for c in LETTERS), *("".join(m) for m in CLIP_MERGES), "<|startoftext|>", "<|endoftext|>")
CLIP_BOS, CLIP_EOS = len(CLIP_TOKENS) - 2, len(CLIP_TOKENS) - 1


def write_t5(folder: Path) -> int:
    """Writes FLUX's `tokenizer_2` in small; returns its number of tokens."""
    from transformers import T5TokenizerFast

    # Whole words score better than their letters; a space alone is the last resort.
    vocab = [(piece, 0.0 if i < 3 else -2.0 * len(piece) ** 0.1 if len(piece) > 1 else -4.0) for i, piece in enumerate(T5_PIECES)]
    tokenizer = T5TokenizerFast(vocab=vocab, extra_ids=2, model_max_length=512)
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def write_clip(folder: Path) -> int:
    """Writes FLUX's `tokenizer` in small; returns its number of tokens."""
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(CLIP_TOKENS)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in CLIP_MERGES))
    end = dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>")
    config = {"tokenizer_class": "CLIPTokenizer", "bos_token": "<|startoftext|>", "model_max_length": 77, "do_lower_case": True, **end}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return len(CLIP_TOKENS)
