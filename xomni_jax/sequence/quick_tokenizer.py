"""A Hugging Face tokenizer that is ready at once: `transformers` takes seconds to import and is needed only for what is rarely asked."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer


class QuickTokenizer:
    """The tokenizer of a folder with tokenizer.json. Texts become ids and back without transformers; any other attribute is that of its
    `PreTrainedTokenizerFast`, which is then loaded."""

    def __init__(self, folder: Path):
        self.name_or_path, self._quick = str(folder), Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._quick.no_padding()
        self._quick.no_truncation()
        config = json.loads((folder / "tokenizer_config.json").read_text())
        self.model_max_length = config.get("model_max_length", 10**30)  # without one, as transformers has it
        self.pad_token_id, self.eos_token_id = (self._id(config.get(name)) for name in ("pad_token", "eos_token"))

    def _id(self, token: str | dict[str, Any] | None) -> int | None:
        return token and self._quick.token_to_id(token["content"] if isinstance(token, dict) else token)

    def get_vocab(self) -> dict[str, int]:
        """{token: id}."""
        return self._quick.get_vocab()

    def get_added_vocab(self) -> dict[str, int]:
        """{token: id} of the tokens that texts are split at."""
        return {token.content: k for k, token in self._quick.get_added_tokens_decoder().items()}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Text -> ids."""
        return self._quick.encode(text, add_special_tokens=add_special_tokens).ids

    @functools.cached_property
    def _whole(self) -> Any:
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast.from_pretrained(self.name_or_path, local_files_only=True)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._whole, name)


def is_complete(folder: Path) -> bool:
    """Whether tokenizer.json alone holds every token; older folders name further ones in tokenizer_config.json."""
    if not (folder / "tokenizer.json").is_file() or not (folder / "tokenizer_config.json").is_file():
        return False
    added = json.loads((folder / "tokenizer_config.json").read_text()).get("added_tokens_decoder", {})
    known = {token["content"] for token in json.loads((folder / "tokenizer.json").read_text()).get("added_tokens", ())}
    return {token["content"] for token in added.values()} <= known
