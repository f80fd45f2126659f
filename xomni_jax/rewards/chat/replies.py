"""What replies say: the answer of a chat completion without its thinking, one of several answers, the odds of its first token."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

_NAMES = "think|thinking|thought|thoughts|reasoning"
_CLOSED = re.compile(rf"</(?:{_NAMES})>|\[/THINK\]|◁/think▷|<\|channel\|>final<\|message\|>", re.IGNORECASE)
_OPENED = re.compile(rf"<(?:{_NAMES})>|\[THINK\]|◁think▷|<\|channel\|>analysis", re.IGNORECASE)
_AROUND = re.compile(r"</?answer>|<\|(?:begin|end)_of_box\|>|<\|return\|>", re.IGNORECASE)  # how some models mark their answer


class Unreadable(ValueError):
    """A reply that holds no answer. One sentence that says why."""


class Completion(NamedTuple):
    """What a chat model said.

    Attributes:
      text: the answer without the thinking before it; None where there is only thinking.
      cut: whether the model stopped at the limit of tokens.
      thought: whether it thought before its answer.
    """

    text: str | None
    cut: bool = False
    thought: bool = False


def completion(text: str | None, cut: bool, thought: bool = False) -> Completion:
    """The completion of a model that wrote `text`, where thinking may stand in any of the usual marks, also without the opening one."""
    *before, answer = _CLOSED.split(text or "")
    answer, *unfinished = _OPENED.split(answer, maxsplit=1)
    thought = thought or bool(before or unfinished)
    answer = _AROUND.sub("", answer).strip() if thought else answer
    return Completion(answer if answer or (text is not None and not thought) else None, cut, thought)


def read_completion(body: Any) -> Completion:
    """The completion in the JSON of an OpenAI-compatible endpoint.

    Raises:
      ValueError: it is no chat completion with one choice and a text.
      Unreadable: the model or a filter refused.
    """
    try:
        (choice,) = body["choices"]
        message, finish = choice["message"], choice.get("finish_reason")
        content, thought = message["content"], bool(message.get("reasoning_content") or message.get("reasoning"))
        if isinstance(content, list):  # parts, of which those of other types are thinking
            thought = thought or any(part["type"] not in ("text", "output_text") for part in content)
            content = "".join(part["text"] for part in content if part["type"] in ("text", "output_text"))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError("the answer is not a chat completion with one choice") from error
    if message.get("refusal") or finish == "content_filter":
        raise Unreadable(f"the model refused: {message.get('refusal') or finish}")
    if not isinstance(content, str) and (content is not None or not (thought or finish == "length")):
        raise ValueError(f"the reply is {type(content).__name__}, not text")
    return completion(content, finish == "length", thought)


def choose(text: str, answers: Sequence[str]) -> str | None:
    """Which of the answers a reply gives: its first word, or the word after "answer", whatever the punctuation; None for neither."""
    one = "|".join(map(re.escape, answers))
    first = re.match(rf"\W*({one})(?!\w)", text, re.IGNORECASE)
    named = re.findall(rf"\banswer\W+(?:is\W+)?({one})(?!\w)", text, re.IGNORECASE)
    found = first[1] if first else named[-1] if named else ""
    return next((answer for answer in answers if answer.lower() == found.lower()), None)


def read_first_tokens(body: Any) -> dict[str, float]:
    """Probabilities of the first token of a reply by its text, in the JSON of an OpenAI-compatible endpoint.

    Raises:
      ValueError: it is no chat completion with one choice and a text.
      Unreadable: the model refused, or the server sends no log-probabilities.
    """
    read_completion(body)
    found: dict[str, float] = {}
    try:
        for entry in body["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
            found[entry["token"]] = found.get(entry["token"], 0.0) + math.exp(min(entry["logprob"], 0.0))
    except (KeyError, TypeError, IndexError) as error:
        raise Unreadable("the reply holds no top_logprobs; use a server that sends them, as vLLM does") from error
    return found
