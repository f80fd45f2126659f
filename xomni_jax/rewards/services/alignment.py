"""Does the image show what was asked for? The probability that Qwen2.5-VL answers yes, for the whole prompt or for each of its parts.

X-Omni (arXiv 2507.22058) asks Qwen2.5-VL-32B and publishes neither question nor formula. The question is that of VQAScore
(arXiv 2404.01291), the value the probability of yes among yes and no, in whatever case and spacing the model writes them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from xomni_jax.rewards.chat.messages import Question, quoted
from xomni_jax.rewards.protocol import Item, Score
from xomni_jax.rewards.services.asking import ChatOptions, ChatScorer, as_files

_WHOLE = 'Does this figure show "{}"? Please answer Yes or No.'
_PART = 'This is a question about the figure: "{}" Please answer it with Yes or No.'
_ANSWERS = ("yes", "no")
_LEAST_MASS = 0.5  # probability of yes and no together, below which the model was about to say something else
_FLOOR = 1e-6  # of a probability in a logarithm: an endpoint does not tell unlikely ones


class AlignmentScorer(ChatScorer):
    """The probability that a vision-language model answers yes. Applies to every item.

    Asked about are the item's targets["questions"], each a string that a right image answers with yes, or {"question": string,
    "answer": "yes" or "no"}; without them the whole prompt, with targets["measure"] = "yes" the prompt as a question. Detail: "chances",
    the probability of the right answer to each question, and "mass", the smallest probability of yes and no together. A model that
    begins its reply with anything else has not scored the image.
    """

    name = "alignment"
    scale = "probability of the right answer, 0 to 1, mostly near one of the ends; with --value log_odds -13.8 to 13.8"
    range = (-14.0, 14.0)
    published = "Qwen/Qwen2.5-VL-32B-Instruct from Hugging Face"

    @dataclass(frozen=True)
    class Options(ChatOptions):
        """How the answers become a number.

        Attributes:
          value: mean or geometric mean of the probabilities of the right answers, or their mean log_odds, which keep apart what is near
            0 or 1; the geometric mean is near 0 as soon as one part is missing.
        """

        value: Literal["mean", "geometric", "log_odds"] = "mean"

    def check(self) -> None:
        """See ChatScorer."""
        self.version = f"vqascore-{self.options.value}"

    def score(self, images: Sequence[np.ndarray], items: Sequence[Item]) -> list[Score]:
        """See Scorer. ValueError when the questions of an item are none; Unavailable."""
        asked = [_questions(item) for item in items]
        questions = [Question(text, (file,)) for file, of_image in zip(as_files(images), asked, strict=True) for text, _, _ in of_image]
        replies = iter(self.answered(self.chat.first_tokens(questions, _ANSWERS)))
        return [self._score(of_image, [next(replies) for _ in of_image]) for of_image in asked]

    def _score(self, asked: Sequence[tuple[str, str, str]], replies: Sequence[dict[str, float] | Exception]) -> Score:
        chances, masses = {}, []
        for (_, question, wanted), reply in zip(asked, replies, strict=True):
            if isinstance(reply, Exception):
                return Score(None, str(reply))
            yes, no = (sum(p for token, p in reply.items() if token.strip().lower() == answer) for answer in _ANSWERS)
            if yes + no < _LEAST_MASS:
                likeliest = max(reply, key=reply.__getitem__, default="")
                return Score(None, f"the reply begins with neither yes nor no ({yes + no:.3f} of it), the likeliest is {likeliest[:40]!r}")
            chances[question] = (yes if wanted == "yes" else no) / (yes + no)
            masses.append(yes + no)
        return Score(_combined(list(chances.values()), self.options.value), None, {"chances": chances, "mass": min(masses)})


def _combined(chances: Sequence[float], how: str) -> float:
    if how == "mean":
        return sum(chances) / len(chances)
    floored = [min(max(p, _FLOOR), 1 - _FLOOR) for p in chances]
    if how == "geometric":
        return math.exp(sum(map(math.log, floored)) / len(floored))
    return sum(math.log(p / (1 - p)) for p in floored) / len(floored)


def _questions(item: Item) -> list[tuple[str, str, str]]:
    """(message, question, right answer) for every question about an item's image."""
    if item["targets"].get("measure") == "yes":
        return [(_PART.format(quoted(item["prompt"], '"')), item["prompt"], "yes")]
    listed = item["targets"].get("questions")
    if listed is None:
        return [(_WHOLE.format(quoted(item["prompt"], '"')), item["prompt"], "yes")]
    if not isinstance(listed, list) or not listed:
        raise ValueError("targets['questions'] must be a list of one or more questions")
    return [_question(entry) for entry in listed]


def _question(entry: Any) -> tuple[str, str, str]:
    question, answer = (entry.get("question"), entry.get("answer")) if isinstance(entry, Mapping) else (entry, "yes")
    if not isinstance(question, str) or not question.strip() or answer not in _ANSWERS:
        raise ValueError(f"{str(entry)[:80]!r} is no question; give a string, or question and answer, which is yes or no")
    return _PART.format(quoted(question, '"')), question, answer
