"""Builds the tokenizer of the tiny configurations: `python -m xomni_jax.data.build_tiny_tokenizer [FOLDER]`.

A byte-level BPE with Qwen2.5's pre-tokenisation and chat format. Merges are learned from the lower-case words of captions and questions
only, so that the upper-case text of a sign is one token per character, and the model sees the letters that it has to draw.
Ids as in the released models: text, then `<MM-Token-k>` at vocab_size + k, then the multimodal special tokens.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from xomni_jax.data import glyphs, rendered

VOCAB_SIZE, IMAGE_VOCAB_SIZE = 384, 512  # of the multimodal embedding's 576 rows some stay unused after the special tokens
TEXT_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
FOLDER = Path(__file__).parents[1] / "assets" / "tiny_tokenizer"

# Qwen2.5's split: contractions, letters with one leading character, single digits, punctuation runs, line breaks, blanks.
PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def corpus() -> Iterator[str]:
    """Captions, questions and answers of the rendered set, with a digit as the text of signs; frequent ones are repeated."""
    for template in range(len(rendered.SIGN_CAPTIONS)):
        for colour in rendered.SIGN_GROUNDS:
            yield from [rendered.sign_prompt("0", colour, template)] * (40 if template == 0 else 20)
    for template in range(len(rendered.SHAPE_CAPTIONS)):
        for ground in rendered.SHAPE_GROUNDS:
            for shape in glyphs.SHAPES:
                for colour in rendered.COLOURS:
                    for count in range(1, len(rendered.NUMBERS)):
                        yield rendered.shapes_prompt(shape, colour, count, ground, template)
    for question in rendered.QUESTIONS[:7]:  # one more came later; its merges would give every shipped model other ids
        yield from [question] * 100
    for answer in (*rendered.COLOURS, *rendered.NUMBERS[1:], *glyphs.SHAPES, *(s + "s" for s in glyphs.SHAPES)):
        yield from [answer] * 10
    yield from ["user\n", "assistant\n", "\n", ' "', '" '] * 200


def build(folder: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(PATTERN), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(TEXT_SPECIALS), initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    reserved = [f"<|reserved_{k}|>" for k in range(VOCAB_SIZE - len(TEXT_SPECIALS) - tokenizer.get_vocab_size())]
    specials = [*reserved, *TEXT_SPECIALS, *(f"<MM-Token-{k}>" for k in range(IMAGE_VOCAB_SIZE)), "<SOM>", "<EOM>", "<IMAGE>"]
    tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in specials])
    assert tokenizer.token_to_id("<MM-Token-0>") == VOCAB_SIZE

    folder.mkdir(parents=True, exist_ok=True)
    # Compact: an indented file would be three times the size.
    (folder / "tokenizer.json").write_text(json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False, separators=(",", ":")) + "\n")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    build(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
