"""Grades in words: UnifiedReward (arXiv 2503.05236), a vision-language model that was trained to judge images.

The versions on Qwen models are used. Their prompts belong to the training and are read from the official code (MIT licence,
https://github.com/CodeGoat24/UnifiedReward at commit ff6f520). X-Omni does not say which version or prompt it uses.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from xomni_jax.rewards.chat.messages import EncodedImage, Question, quoted
from xomni_jax.rewards.chat.replies import Completion
from xomni_jax.rewards.official_prompt import OfficialPrompt, prompt_hash, read_prompt
from xomni_jax.rewards.protocol import Item, Score
from xomni_jax.rewards.services.asking import ChatOptions, ChatScorer, as_files

_ORIGIN = "https://github.com/CodeGoat24/UnifiedReward"
_NUMBER = r"([0-9]+(?:\.[0-9]+)?)"
_PLAIN = r"[ \t*.]*"  # what may stand around a line: space, the asterisks of bold type, a full stop
_COLON = r"[ \t*]*[:\uff1a][ \t*]*"
_AXES = ("Alignment", "Coherence", "Style")
_GRADES = (1.0, 5.0)
_SHOWN = 80  # characters of a reply that a failure quotes


class Form(NamedTuple):
    """A published way of asking: its prompt, the most tokens of a reply, and how a reply is read (ValueError when it cannot be)."""

    prompt: OfficialPrompt
    max_tokens: int
    read: Callable[[str], tuple[float, dict[str, Any]]]


def read_final_score(reply: str) -> tuple[float, dict[str, Any]]:
    """(grade, {"elements": {"red (color)": 1.0}}) of a reply that marks the caption's elements and ends with its `Final Score:`."""
    lines = [line.strip() for line in reply.splitlines() if line.strip()]
    grades = re.findall(r"Final\s+Score\s*[:\uff1a]", reply, re.IGNORECASE)
    last = re.fullmatch(rf"{_PLAIN}Final Score{_COLON}{_NUMBER}{_PLAIN}", lines[-1] if lines else "", re.IGNORECASE)
    if not last or len(grades) != 1:
        raise ValueError(f"{len(grades)} times 'Final Score:' instead of once, at the end")
    marks = re.findall(rf"^[ \t*-]*(\w.*?\([^()]+\)){_COLON}([01](?:\.[0-9]+)?)[ \t,]*$", reply, re.MULTILINE)
    return _grade(last[1]), {"elements": {name: float(mark) for name, mark in marks}}


def read_axes(reply: str) -> tuple[float, dict[str, Any]]:
    """(mean, {"alignment": grade, "coherence": ..., "style": ...}) of a reply with one line `Alignment Score (1-5): X` for each axis."""
    grades = {}
    for axis in _AXES:
        found = re.findall(rf"^{_PLAIN}{axis} Score \(1-5\){_COLON}{_NUMBER}{_PLAIN}$", reply, re.MULTILINE)
        if len(found) != 1:
            raise ValueError(f"{len(found)} lines '{axis} Score (1-5): number' instead of one")
        grades[axis.lower()] = _grade(found[0])
    return sum(grades.values()) / len(grades), grades


def read_winner(reply: str) -> tuple[float, dict[str, Any]]:
    """(share of the win that is image 1's, {}): 1, 0, or 0.5 of a reply that finds both equally good."""
    verdicts = re.findall(r"Image\s*([12])\s+is\s+better|(equally\s+good)", reply, re.IGNORECASE)
    shares = {1.0 if first == "1" else 0.0 if first else 0.5 for first, _ in verdicts}
    if len(shares) != 1:
        raise ValueError(f"{len(shares)} verdicts instead of one")
    return shares.pop(), {}


def read_shares(reply: str) -> tuple[float, dict[str, Any]]:
    """(mean share of image 1, {}) of a reply with a block `Style Score:`, ` Image 1: a`, ` Image 2: b` for each axis, a + b = 1."""
    shares = []
    for axis in _AXES:
        found = re.findall(
            rf"^{_PLAIN}{axis} Score{_COLON}\s*Image 1{_COLON}{_NUMBER}\s*Image 2{_COLON}{_NUMBER}\s*?$", reply, re.MULTILINE
        )
        if len(found) != 1 or abs(sum(map(float, found[0])) - 1) > 0.02:
            raise ValueError(f"{len(found)} blocks '{axis} Score:' with two shares of 1 instead of one")
        shares.append(float(found[0][0]))
    return sum(shares) / len(shares), {}


_QWEN, _V2 = "inference_qwen/image_generation/qwen_", "inference_qwen/UnifiedReward-2.0-inference/"


def _form(name: str, sha256: str, read: Callable[[str], tuple[float, dict[str, Any]]], max_tokens: int = 512) -> Form:
    return Form(OfficialPrompt(f"{name}_image_generation.py", sha256), max_tokens, read)


FORMS = {
    "elements": _form(_QWEN + "point_score", "284b965555c3a59d6f280b7ca907873a4f5889f44947553fa0e5b131c0d97bd2", read_final_score),
    "axes": _form(_V2 + "point_score_ACS", "93c4e515956797db4fe7d3b393b53ce906b41f725432f0ba61e1b1a4ed81de8e", read_axes),
    "words": _form(_QWEN + "point_score_ACS", "1fa410f0c870cf923bb71a30da34009e89eb0b08941e3dffde9c337234e5c6d5", read_axes, 4096),
}
PAIR_FORMS = {
    "rank": _form(_QWEN + "pair_rank", "071298e5e79106cdb1bc368481c86c252c84df1c2d770f2c1341b1b19f940a20", read_winner),
    "shares": _form(_V2 + "pair_score", "6cd1f4af08b200e06b78ef196e22f4a24ef6c144d59689ae3510e73bcd49b1b6", read_shares),
}


@dataclass(frozen=True)
class PromptOptions(ChatOptions):
    """Where the prompts are.

    Attributes:
      official_code: a copy of https://github.com/CodeGoat24/UnifiedReward, whose prompts are used; required.
      any_prompt: use its prompt also where it is not the recorded one; the version names its hash.
    """

    official_code: str = ""
    any_prompt: bool = False


class _Official(ChatScorer):
    """What both scorers share: the prompt of a form, and replies that are read or become a reason."""

    published = "CodeGoat24/UnifiedReward-qwen-7b from Hugging Face"
    forms: dict[str, Form]

    def check(self) -> None:
        """See ChatScorer."""
        o = self.options
        self._form = self.forms[o.form]
        self._before, self._after = read_prompt(self._form.prompt, o.official_code, _ORIGIN, self.name, o.any_prompt)
        self.version = f"{o.form}-{prompt_hash(self._before, self._after)[:8]}"

    def _question(self, prompt: str, *images: EncodedImage) -> Question:
        return Question(f"{self._before}{quoted(prompt, '[]')}{self._after}", images)

    def _read(self, questions: Sequence[Question]) -> list[tuple[float, dict[str, Any]] | str]:
        """What the replies say, or why one says nothing."""
        return [self._read_one(reply) for reply in self.answered(self.chat.complete_all(questions, self._form.max_tokens))]

    def _read_one(self, reply: Completion | Exception) -> tuple[float, dict[str, Any]] | str:
        if isinstance(reply, Exception):
            return str(reply)
        text = reply.text or ""
        try:
            if reply.cut:
                raise ValueError(f"it was cut after {self._form.max_tokens} tokens")
            return self._form.read(text)
        except ValueError as error:
            return f"the reply cannot be read: {error}; it begins {text.strip()[:_SHOWN]!r}"


class UnifiedRewardScorer(_Official):
    """UnifiedReward's grade of an image for its prompt, 1 to 5. Applies to every item.

    A reply that does not end as the form asks is no score. Detail: "elements" that were found in the image, or the grade of each axis.
    """

    name = "unified_reward"
    scale = "a grade from 1 to 5, mostly 2.5 to 4.5, often the same for several images of a group"
    range = _GRADES
    forms = FORMS

    @dataclass(frozen=True)
    class Options(PromptOptions):
        """What is asked.

        Attributes:
          form: elements marks the parts of the prompt and ends with one grade; axes (version 2.0) and words (1.x, which first grades
            every word) grade alignment, coherence and style, of which the mean counts.
        """

        form: Literal["elements", "axes", "words"] = "elements"

    def score(self, images: Sequence[np.ndarray], items: Sequence[Item]) -> list[Score]:
        """See Scorer."""
        found = self._read([self._question(item["prompt"], file) for file, item in zip(as_files(images), items, strict=True)])
        return [Score(None, one) if isinstance(one, str) else Score(one[0], None, one[1]) for one in found]


class UnifiedRewardPairsScorer(_Official):
    """The share of comparisons inside its group that an image wins by UnifiedReward, 0 to 1; a tie is half a win. Applies to every item.

    Every pair is asked about in both orders, since models favour a place: 240 questions for a group of 16. A comparison whose reply
    cannot be read is left out; an image with fewer than half of its comparisons is not scored. Detail: "comparisons", and "unread".
    """

    name = "unified_reward_pairs"
    scope = "group"  # images of one group come in one call
    scale = "share of comparisons that are won inside the group, 0 to 1, 0.5 on average"
    range = (0.0, 1.0)
    forms = PAIR_FORMS

    @dataclass(frozen=True)
    class Options(PromptOptions):
        """What is asked.

        Attributes:
          form: rank asks which image is better; shares (version 2.0) divides 1 between the two for alignment, coherence and style.
          both_orders: ask about every pair twice, with either image first.
        """

        form: Literal["rank", "shares"] = "rank"
        both_orders: bool = True

    def score(self, images: Sequence[np.ndarray], items: Sequence[Item]) -> list[Score]:
        """See Scorer."""
        files, groups = as_files(images), [item["group"] for item in items]
        pairs = [(a, b) for a, b in itertools.combinations(range(len(files)), 2) if groups[a] == groups[b]]
        if self.options.both_orders:
            pairs += [(b, a) for a, b in pairs]
        found = self._read([self._question(items[a]["prompt"], files[a], files[b]) for a, b in pairs])
        won: list[list[float]] = [[] for _ in files]
        unread: list[list[str]] = [[] for _ in files]
        for (a, b), one in zip(pairs, found, strict=True):
            for image, place in ((a, 0), (b, 1)):
                if isinstance(one, str):
                    unread[image].append(one)
                else:
                    won[image].append(1 - one[0] if place else one[0])
        return [_win_rate(*of_image) for of_image in zip(won, unread, strict=True)]


def _win_rate(won: Sequence[float], unread: Sequence[str]) -> Score:
    if not won and not unread:
        return Score(None, "the image is alone in its group; pairs need at least two")
    if len(won) < len(unread) or not won:
        return Score(None, f"{len(unread)} of {len(won) + len(unread)} comparisons failed: {unread[0]}")
    return Score(sum(won) / len(won), None, {"comparisons": len(won), "unread": len(unread)})


def _grade(text: str) -> float:
    if not _GRADES[0] <= float(text) <= _GRADES[1]:
        raise ValueError(f"the grade {text} is not between 1 and 5")
    return float(text)
