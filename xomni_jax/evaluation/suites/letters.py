"""Which option a reply means: the rules of lmms-eval and VLMEvalKit before they would ask a language model."""

from __future__ import annotations

from collections.abc import Collection, Mapping

# Signs that may stand right beside a letter, in the order in which lmms-eval tries them.
_AROUND = (("", "."), ("", ","), ("", ":"), ("", ")"), ("", ")."), ("(", ")"), ("(", ")."), (":", ""), (":", ","), (":", "."), (":", ")"),
           (":", ")."))  # fmt: skip
_BLANKED = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_LAST_WORDS = 4
# Replies in which a model refuses; VLMEvalKit counts them as the wrong option Z.
_FAILED = "Failed to obtain answer via API"


def lmms_eval(reply: str, options: Mapping[str, str]) -> str | None:
    """The option by lmms-eval's rules; None when undecided. Letters go to E however many options there are.

    A bare A in a reply of more than three words is taken for an article, and then no bare letter counts.
    """
    words, letters = reply.split(), "ABCDE"
    if _FAILED in reply:
        return None
    bare = _standing(words, letters)
    if len(bare) == 1 and not ("A" in words and len(words) > 3):
        return bare[0]
    for before, after in _AROUND:
        found = _standing(words, [before + letter + after for letter in letters])
        if len(found) == 1:
            return found[0].strip(".,:()")
    return _by_text(reply, options)


def vlmevalkit(reply: str, options: Mapping[str, str]) -> str | None:
    """The option by VLMEvalKit's rules; None when undecided.

    The letter must be the only one and among the last four words; an option's text is looked for only in replies no longer than
    twice all options together. Its list of refusals is not kept: they stay undecided here and count as wrong in both.
    """
    words = reply.translate(_BLANKED).split()
    found = _standing(words, options)
    if len(found) == 1 and words.index(found[0]) >= len(words) - _LAST_WORDS and _FAILED not in reply:
        return found[0]
    if len(reply) > 2 * sum(map(len, options.values())):
        return None
    return _by_text(reply, options)


def _standing(words: Collection[str], letters: Collection[str]) -> list[str]:
    return [letter for letter in letters if letter in words]


def _by_text(reply: str, options: Mapping[str, str]) -> str | None:
    found = [letter for letter, text in options.items() if text.lower() in reply.lower()]
    return found[0] if len(found) == 1 else None
