"""A text tokenizer given image tokens: what X-Omni adds to Qwen2.5's, for a training that starts from the latter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from xomni_jax.checkpoint.conversion import ConversionError
from xomni_jax.checkpoint.released_configs import read_json
from xomni_jax.sequence.tokenizer import EOM, IMAGE, SOM


def extended(path: Path, vocab_size: int, image_vocab_size: int, mm_vocab_size: int) -> dict[str, Any]:
    """A tokenizer.json with `<MM-Token-k>` at id vocab_size + k and the multimodal specials behind them.

    The ids between the tokenizer's last and `vocab_size`, which the embedding table has and no text uses, become reserved tokens: ids of
    added tokens must follow one another.

    Raises:
      ConversionError: there is no such file, or the ids it uses reach beyond `vocab_size`, or the specials beyond `mm_vocab_size`.
    """
    if not path.is_file():
        raise ConversionError(f"{path}: no such file, image tokens cannot be added; download the whole directory")
    data = read_json(path)
    added = data.setdefault("added_tokens", [])
    last = max([*data["model"]["vocab"].values(), *(token["id"] for token in added)])
    if last >= vocab_size:
        raise ConversionError(f"{path}: uses ids up to {last}, the embedding has {vocab_size} rows; take both from one checkpoint")
    if image_vocab_size + 3 > mm_vocab_size:
        raise ConversionError(
            f"{path}: {image_vocab_size} image codes and 3 specials do not fit into {mm_vocab_size} multimodal ids; raise --mm-vocab"
        )
    names = [f"<|reserved_{k}|>" for k in range(vocab_size - last - 1)]
    names += [*(f"<MM-Token-{k}>" for k in range(image_vocab_size)), SOM, EOM, IMAGE]
    for i, name in enumerate(names):
        token = {
            "id": last + 1 + i,
            "content": name,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        added.append(token)
    return data
