"""Which option a reply means: the rules of two toolkits before they would ask a language model, and MMMU's.

All draw a random letter in the end; here such a reply is undecided, so that the number is reproducible.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

# Characters that may surround a letter, in the order in which lmms-eval tries them.
_AROUND = ("{}.", "{},", "{}:", "{})", "{}).", "({})", "({}).", ":{}", ":{},", ":{}.", ":{})", ":{}).")
_BLANKED = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_LAST_WORDS = 4
_FEW_WORDS = 5  # MMMU looks for an option's text only in replies of more words
_NO_REPLY = "Failed to obtain answer via API"
# Replies in which a model refuses; VLMEvalKit counts them as the wrong option Z.
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_SENTENCE = re.compile(r"answer\s+is\s+\**([ABCD])\**", re.IGNORECASE)


def listed(options: Mapping[str, str]) -> str:
    """The options, one a line."""
    return "\n".join(f"{letter}. {text}" for letter, text in options.items())


def lmms_eval(reply: str, options: Mapping[str, str]) -> str | None:
    """The option by lmms-eval's rules; None when undecided. Letters go to E however many options there are.

    A bare A in a reply of more than three words is taken for an article, and then no bare letter counts.
    """
    words, letters = reply.split(), "ABCDE"
    if _NO_REPLY in reply:
        return None
    bare = _present(words, letters)
    if len(bare) == 1 and not ("A" in words and len(words) > 3):
        return bare[0]
    for form in _AROUND:
        found = _present(words, [form.format(letter) for letter in letters])
        if len(found) == 1:
            return found[0].strip(".,:()")
    return _by_text(reply, options)


def vlmevalkit(reply: str, options: Mapping[str, str]) -> str | None:
    """The option by VLMEvalKit's rules, Z for a refusal; None when undecided.

    The letter must be the only one and among the last four words, or stand in a sentence such as "the answer is B". An option's text is
    looked for only in replies no longer than twice all options together.
    """
    if _NO_REPLY not in reply:
        if any(refusal in reply for refusal in _REFUSALS):
            return "Z"
        words = reply.translate(_BLANKED).split()
        found = _present(words, options)
        if len(found) == 1 and words.index(found[0]) >= len(words) - _LAST_WORDS:
            return found[0]
        if not found and "Z" in words:
            return "Z"
        sentence = _SENTENCE.search(reply)
        if sentence and sentence[1].upper() in options:
            return sentence[1].upper()
    if len(reply.lower()) > 2 * sum(map(len, options.values())):
        return None
    return _by_text(reply, options)


def mmmu(reply: str, options: Mapping[str, str]) -> str | None:
    """The last option in the reply by the rules of MMMU: a letter in brackets, else alone, else a text; None for none of them."""
    for sign in ",.!?;:'":
        reply = reply.strip(sign)
    reply = f" {reply} "
    marks = [{letter: f"({letter})" for letter in options}, {letter: f" {letter} " for letter in options}]
    tried = [(reply, mark) for mark in marks]
    if len(reply.split()) > _FEW_WORDS:
        tried.append((reply.lower(), {letter: text.lower() for letter, text in options.items()}))
    for text, mark in tried:
        if found := {letter: text.rfind(mark[letter]) for letter in options if mark[letter] in text}:
            return max(found, key=found.__getitem__)
    return None


def first_character(reply: str) -> str:
    """What lmms-eval takes for the answer to a question of SEED-Bench; "" of an empty reply."""
    return reply.strip()[:1]


def _present(words: Collection[str], letters: Collection[str]) -> list[str]:
    return [letter for letter in letters if letter in words]


def _by_text(reply: str, options: Mapping[str, str]) -> str | None:
    found = [letter for letter, text in options.items() if text.lower() in reply.lower()]
    return found[0] if len(found) == 1 else None
