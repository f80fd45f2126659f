"""Copies the tokenizers of a converted model, and adds X-Omni's image tokens to that of a plain Qwen2.5."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from xomni_jax.checkpoint.component_source import Release
from xomni_jax.checkpoint.conversion import ConversionError
from xomni_jax.checkpoint.tensor_file import read_json
from xomni_jax.sequence.tokenizer import EOM, IMAGE, SOM

TEXT_TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json",
    "chat_template.jinja", "generation_config.json",  # the last is no tokenizer's, but names its special ids
)  # fmt: skip
FLAGS = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}


def copy_tokenizer(folder: Path, target: Path, say: Callable[[str], None]) -> None:
    """Copies a tokenizer's files. The text tokenizer's are picked out by name, because their folder holds weights too."""
    shutil.rmtree(target, ignore_errors=True)
    names = _text_tokenizer_files(folder) if target.name == "tokenizer" else [p.name for p in folder.iterdir() if p.is_file()]
    if not names:
        say(f"{folder}: holds no tokenizer files; put them into {target.name}/ of the model directory before you generate")
        return
    target.mkdir(parents=True)
    for name in names:
        shutil.copyfile(folder / name, target / name)


def _text_tokenizer_files(folder: Path) -> list[str]:
    names = [name for name in TEXT_TOKENIZER if (folder / name).is_file()]
    return [] if names == ["generation_config.json"] else names  # which transformers writes beside any weights


def with_image_tokens(release: Release) -> str | None:
    """tokenizer.json of a plain language model with image tokens added; None if there is nothing to add.

    `<MM-Token-k>` gets id vocab_size + k, and the multimodal specials follow. The ids between the tokenizer's last and `vocab_size`, which
    the embedding table has but no text uses, become reserved tokens, since the ids of added tokens must be consecutive.

    Raises:
      ConversionError: there is no tokenizer.json, or its ids reach beyond the embedding, or the specials beyond `mm_vocab_size`.
    """
    folder = release.tokenizers.get("tokenizer")
    if not release.extend or folder is None or not _text_tokenizer_files(folder):
        return None
    c, path = release.components["transformer"].config, folder / "tokenizer.json"
    if not path.is_file():
        raise ConversionError(f"{path}: no such file, image tokens cannot be added; download the whole directory")
    data = read_json(path)
    added = data.setdefault("added_tokens", [])
    last = max([*data["model"]["vocab"].values(), *(token["id"] for token in added)])
    if last >= c.vocab_size:
        raise ConversionError(f"{path}: uses ids up to {last}, the embedding has {c.vocab_size} rows; take both from one checkpoint")
    if c.image_vocab_size + 3 > c.mm_vocab_size:
        raise ConversionError(
            f"{path}: {c.image_vocab_size} image codes and 3 specials do not fit into {c.mm_vocab_size} multimodal ids; raise --mm-vocab"
        )
    names = [f"<|reserved_{k}|>" for k in range(c.vocab_size - last - 1)]
    names += [*(f"<MM-Token-{k}>" for k in range(c.image_vocab_size)), SOM, EOM, IMAGE]
    added += [{"id": last + 1 + i, "content": name} | FLAGS for i, name in enumerate(names)]
    return json.dumps(data, ensure_ascii=False) + "\n"
