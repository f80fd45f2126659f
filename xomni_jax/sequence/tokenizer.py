"""Prompts, images and answers as token ids, in the released format.

An image of Y x X codes is `<SOM>`, the text "Y X", `<IMAGE>`, Y*X codes in row-major order and `<EOM>`. Text ids come first, image code
k is id `vocab_size + k`, and the three special tokens, looked up by name, lie below `vocab_size + mm_vocab_size`.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from xomni_jax.sequence.orders import check_order
from xomni_jax.sequence.quick_tokenizer import QuickTokenizer, is_complete

SOM, EOM, IMAGE, FIRST_CODE = "<SOM>", "<EOM>", "<IMAGE>", "<MM-Token-0>"
END_OF_TURN = "<|im_end|>"
TINY_TOKENIZER = Path(str(resources.files("xomni_jax"))) / "assets" / "tiny_tokenizer"


class TokenSequence(NamedTuple):
    """`ids` int32 [L] and `loss` bool [L], True where the token is a target; a target's id tells which head predicts it.

    `positions`: int32 [L], rotary positions; None for 0..L-1.
    """

    ids_L: np.ndarray
    loss_L: np.ndarray
    positions_L: np.ndarray | None = None


class Shown(NamedTuple):
    """An image of a conversation that is context: its codes [Y, X] are no targets, whoever shows it."""

    codes_YX: np.ndarray


Turns = Sequence[tuple[str, Sequence[str | np.ndarray | Shown]]]  # (role, texts and images in their order)


class MultimodalTokenizer:
    """A Hugging Face tokenizer together with the ids of image codes.

    Attributes:
      vocab_size: number of text ids, and the id of code 0. image_vocab_size: number of codes.
      mm_vocab_size: codes, special and unused ids. som, eom, image, end_of_turn, pad: ids of special tokens.
      text: the wrapped tokenizer.
    """

    def __init__(self, text: Any, *, vocab_size: int | None = None, image_vocab_size: int | None = None, mm_vocab_size: int | None = None):
        """Sizes are those of the model's config, or by default those of the tokenizer. Raises ValueError where the two disagree."""
        self.text = text
        table = text.get_vocab()
        missing = [name for name in (SOM, EOM, IMAGE, FIRST_CODE, END_OF_TURN) if name not in table]
        if missing:
            raise ValueError(
                f"The tokenizer {text.name_or_path!r} has no {', '.join(missing)}; use the tokenizer files of an X-Omni checkpoint."
            )
        self.som, self.eom, self.image, first, self.end_of_turn = (table[n] for n in (SOM, EOM, IMAGE, FIRST_CODE, END_OF_TURN))
        self.pad = text.pad_token_id if text.pad_token_id is not None else self.end_of_turn
        self.vocab_size = first if vocab_size is None else vocab_size
        if first != self.vocab_size:
            raise ValueError(
                f"The tokenizer {text.name_or_path!r} puts {FIRST_CODE} at id {first} but the model's vocab_size is"
                f" {self.vocab_size}; take both from the same checkpoint."
            )
        if image_vocab_size is None:  # codes follow each other without a gap
            image_vocab_size = next(k for k in itertools.count(1) if table.get(f"<MM-Token-{k}>") != first + k)
        self.image_vocab_size = image_vocab_size
        last = f"<MM-Token-{self.image_vocab_size - 1}>"
        if table.get(last) != first + self.image_vocab_size - 1:
            raise ValueError(
                f"The tokenizer {text.name_or_path!r} puts {last} at {table.get(last)} instead of"
                f" {first + self.image_vocab_size - 1}; image_vocab_size={self.image_vocab_size} does not fit it."
            )
        # Longest first: a mark may begin with another.
        marks = {END_OF_TURN, *(mark for mark, k in text.get_added_vocab().items() if k < self.vocab_size)}
        self._marks = re.compile("|".join(map(re.escape, sorted(marks, key=len, reverse=True))))
        top = max(self.som, self.eom, self.image) + 1 - self.vocab_size
        self.mm_vocab_size = top if mm_vocab_size is None else mm_vocab_size
        for name, k in ((SOM, self.som), (EOM, self.eom), (IMAGE, self.image)):
            if not self.vocab_size + self.image_vocab_size <= k < self.vocab_size + self.mm_vocab_size:
                raise ValueError(
                    f"{name} has id {k}, outside {self.vocab_size + self.image_vocab_size}.."
                    f"{self.vocab_size + self.mm_vocab_size - 1}, the specials of mm_vocab_size={self.mm_vocab_size};"
                    " take the tokenizer and the config from the same checkpoint."
                )

    @classmethod
    def load(cls, path: str | Path = TINY_TOKENIZER, **sizes: int) -> MultimodalTokenizer:
        """Reads a local folder, by default the package's tiny tokenizer; `sizes` as in the constructor. Never online."""
        return cls(read_tokenizer(path, quick=True), **sizes)

    def encode_text(self, text: str) -> np.ndarray:
        """Plain text -> ids [L]. The name of a special token, such as a chat mark, is text like any other.

        Raises ValueError where the text contains a multimodal token, which only this class may insert.
        """
        # A mark that is cut after its first character is no longer one for the tokenizer.
        cuts = [0, *(mark.start() + 1 for mark in self._marks.finditer(text)), len(text)]
        ids = np.array([k for a, b in itertools.pairwise(cuts) for k in self._encode(text[a:b])], np.int32)
        wrong = np.flatnonzero(ids >= self.vocab_size)
        if wrong.size:
            token = self.text.convert_ids_to_tokens(int(ids[wrong[0]]))
            shown = text.strip() if len(text) <= 60 else text.strip()[:57] + "..."
            raise ValueError(f"The text {shown!r} contains the multimodal token {token}; leave it out.")
        return ids

    def decode_text(self, ids: Sequence[int] | np.ndarray) -> str:
        """Ids -> text without special tokens."""
        return self.text.decode([int(i) for i in ids], skip_special_tokens=True)

    def image_prefix(self, *shape: int) -> np.ndarray:
        """`<SOM>Y X<IMAGE>` of codes of this shape -> ids [L]; the negative prompt of guidance."""
        return np.concatenate([[self.som], self.encode_text(" ".join(map(str, shape))), [self.image]]).astype(np.int32)

    def image_ids(self, codes_YX: np.ndarray) -> np.ndarray:
        """Codes [Y, X], or of another shape -> ids of the whole image, `<SOM>` to `<EOM>`, in row-major order."""
        codes_YX = self._checked(codes_YX)
        codes = codes_YX.ravel().astype(np.int32) + self.vocab_size
        return np.concatenate([self.image_prefix(*codes_YX.shape), codes, [self.eom]]).astype(np.int32)

    def generation_prompt(self, prompt: str, *shape: int, conditions: Sequence[np.ndarray] = ()) -> np.ndarray:
        """Prompt of an image to be sampled: the plain text, the codes [Y, X] of images that it starts from, and the image prefix, without
        chat template -> ids [L]."""
        return np.concatenate([self.encode_text(prompt), *map(self.image_ids, conditions), self.image_prefix(*shape)])

    def generation_sequence(
        self,
        prompt: str,
        codes_YX: np.ndarray,
        order_T: np.ndarray | None = None,
        conditions: Sequence[np.ndarray] = (),
        hidden: bool = False,
    ) -> TokenSequence:
        """Prompt and image for training. Targets are the codes; `<EOM>` is appended and never predicted, and so is not a target.

        Args:
          order_T: the cells in the order in which the model draws them; by default row by row.
          conditions: codes [Y, X] of images between them, which are no targets.
          hidden: the conditions are left out, but the image keeps its positions. For the image this is attention that is masked from
            the conditions, as in the Disentangled Causal Attention of OmniGen-AR (arXiv 2606.09156), on a shorter row.
        """
        text_L, image_L, shown = self.encode_text(prompt), self.image_ids(codes_YX), [self.image_ids(codes) for codes in conditions]
        ids_L = np.concatenate([text_L, *([] if hidden else shown), image_L])
        positions_L = np.arange(len(ids_L), dtype=np.int32)
        if hidden:
            positions_L[len(text_L) :] += sum(map(len, shown))
        if order_T is not None:
            cells, to = slice(len(ids_L) - 1 - codes_YX.size, -1), check_order(order_T, codes_YX.size)
            ids_L[cells], positions_L[cells] = ids_L[cells][to], positions_L[cells][to]
        return TokenSequence(ids_L, self._is_code(ids_L) & (np.arange(len(ids_L)) >= len(ids_L) - len(image_L)), positions_L)

    def text_sequence(self, text: str) -> TokenSequence:
        """Plain text for training, closed by the end of turn; every token but the first is a target."""
        ids_L = np.append(self.encode_text(text), np.int32(self.end_of_turn))
        return TokenSequence(ids_L, np.arange(len(ids_L)) > 0)

    def understanding_prompt(self, codes_YX: np.ndarray, question: str) -> np.ndarray:
        """Prompt of an answer: image and question as the user's turn of the tokenizer's chat template, then the start of the
        assistant's turn -> ids [L]."""
        return self.conversation_prompt([("user", [codes_YX, "\n" + question])])

    def conversation_prompt(self, turns: Sequence[tuple[str, Sequence[str | np.ndarray]]]) -> np.ndarray:
        """A conversation in the tokenizer's chat template, then the start of the assistant's next turn -> ids [L].

        Args:
          turns: as in `conversation_sequence`; the last is the user's.
        """
        pieces = self._template(tuple(role for role, _ in turns), True)
        ids = [pieces[0]]
        for (_, content), after_L in zip(turns, pieces[1:], strict=True):
            ids += [self.encode_text(part) if isinstance(part, str) else self.image_ids(part) for part in content]
            ids.append(after_L)
        return np.concatenate(ids).astype(np.int32)

    def understanding_sequence(self, codes_YX: np.ndarray, question: str, answer: str) -> TokenSequence:
        """Image, question and answer for training. Targets are the answer and the end of turn."""
        return self.conversation_sequence([("user", [codes_YX, "\n" + question]), ("assistant", [answer])])

    def conversation_sequence(self, turns: Turns) -> TokenSequence:
        """A conversation for training, in the tokenizer's chat template.

        Targets are the texts of the assistant with their ends of turn, and the codes of the images it shows; of these the size and the
        special tokens are no targets, as in `generation_sequence`. It ends with the last answer.

        Args:
          turns: (system | user | assistant | plain, texts and codes [Y, X] in their order). What is plain stands outside of the template,
            as the prompt of an image and the image do in `generation_sequence`: codes are targets, texts are none.
        """
        last = max(i for i, (role, _) in enumerate(turns) if role in ("assistant", "plain"))
        parts: list[TokenSequence] = []
        for plain, block in itertools.groupby(turns[: last + 1], lambda turn: turn[0] == "plain"):
            said = list(block)
            parts += [self._part(part, "plain") for _, content in said for part in content] if plain else self._chat(said)
        return TokenSequence(
            np.concatenate([part.ids_L for part in parts]).astype(np.int32), np.concatenate([part.loss_L for part in parts])
        )

    def _chat(self, turns: Turns) -> list[TokenSequence]:
        """Turns in the chat template. It ends behind the end of the last turn, which the template puts first in what follows it."""
        start, *after = self._template(tuple(role for role, _ in turns), False)
        out = [TokenSequence(start, np.zeros(len(start), bool))]
        for n, ((role, content), after_L) in enumerate(zip(turns, after, strict=True), 1):
            after_L = after_L[:1] if n == len(turns) else after_L
            end = TokenSequence(after_L, (np.arange(len(after_L)) == 0) & (role == "assistant"))
            out += [*(self._part(part, role) for part in content), end]
        return out

    def _part(self, part: str | np.ndarray | Shown, role: str) -> TokenSequence:
        """A text or an image of a turn."""
        if isinstance(part, str):
            ids_L = self.encode_text(part)
            return TokenSequence(ids_L, np.full(len(ids_L), role == "assistant"))
        ids_L = self.image_ids(part.codes_YX if isinstance(part, Shown) else part)
        return TokenSequence(ids_L, self._is_code(ids_L) & (role in ("assistant", "plain") and not isinstance(part, Shown)))

    def _template(self, roles: tuple[str, ...], answer_next: bool) -> list[np.ndarray]:
        """The ids of the chat template before, between and after the contents of turns.

        The tokenizer splits text at special tokens, so contents may be tokenised apart from them, without spelling out names of codes.
        """
        turns = [{"role": role, "content": IMAGE} for role in roles]
        text = self.text.apply_chat_template(turns, tokenize=False, add_generation_prompt=answer_next)
        return [np.array(self._encode(piece), np.int32) for piece in text.split(IMAGE)]

    def _is_code(self, ids_L: np.ndarray) -> np.ndarray:
        return (ids_L >= self.vocab_size) & (ids_L < self.vocab_size + self.image_vocab_size)

    def _encode(self, text: str) -> list[int]:
        return self.text.encode(text, add_special_tokens=False)

    def _checked(self, codes_YX: np.ndarray) -> np.ndarray:
        codes_YX = np.asarray(codes_YX)
        if not codes_YX.ndim or not np.issubdtype(codes_YX.dtype, np.integer):
            raise ValueError(f"Image codes must be integers [Y, X], not {codes_YX.dtype} {list(codes_YX.shape)}.")
        if codes_YX.size and not 0 <= codes_YX.min() <= codes_YX.max() < self.image_vocab_size:
            raise ValueError(f"Image codes {codes_YX.min()}..{codes_YX.max()} must lie within 0..{self.image_vocab_size - 1}.")
        return codes_YX


def read_tokenizer(path: str | Path, quick: bool = False) -> Any:
    """The Hugging Face tokenizer of a local folder; `quick`: without transformers where possible. Never online.

    Raises ValueError if there is none.
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"The tokenizer folder {str(path)!r} does not exist; give the folder that holds tokenizer.json.")
    try:
        if quick and is_complete(path):
            return QuickTokenizer(path)
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

        # tokenizer.json is complete; AutoTokenizer would first read the model's config.json, whose type it may not know.
        kind = PreTrainedTokenizerFast if (path / "tokenizer.json").is_file() else AutoTokenizer
        return kind.from_pretrained(str(path), local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"The folder {str(path)!r} holds no readable tokenizer ({str(error).splitlines()[0]}).") from error


def encoder_ids(tokenizer: Any, texts: Sequence[str], length: int) -> np.ndarray:
    """Texts -> ids int32 [B, length] by a text encoder's own Hugging Face tokenizer, as FLUX prepares them.

    The tokenizer adds its special tokens (T5: end; CLIP: begin and end), truncates the text so that they fit, and pads.
    """
    rows = tokenizer(list(texts), padding="max_length", max_length=length, truncation=True)
    return np.array(rows["input_ids"], np.int32)


def fixed_length_ids(tokenizer: MultimodalTokenizer, texts: Sequence[str], length: int) -> np.ndarray:
    """Texts -> ids int32 [B, length] for text encoders that share the model's tokenizer: truncated, then padded.

    Every row ends with at least one padding token, the end-of-text position that CLIP pools.
    """
    pad = tokenizer.text.pad_token_id if tokenizer.text.pad_token_id is not None else tokenizer.text.eos_token_id
    ids = np.full((len(texts), length), pad, np.int32)
    for row, t in zip(ids, texts, strict=True):
        found = tokenizer.encode_text(t)[: length - 1]
        row[: len(found)] = found
    return ids
