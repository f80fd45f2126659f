"""OneIG-Bench, alignment: yes-or-no questions about an image that may depend on one another. A function, not a suite of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def alignment_score(answers: Mapping[str, Sequence[str]], dependency: Mapping[str, Sequence[int]]) -> float:
    """Score of one prompt: {question: one answer per image} and {question: its parents, 0 for none} -> 0 to 1.

    Right is the exact string "Yes". A question with a wrong parent counts as wrong, by the parents' own answers: unlike in
    DPG-Bench nothing cascades. Mean over questions, then over images; the dimension's score is the mean over prompts.
    """
    right = {question: [answer == "Yes" for answer in given] for question, given in answers.items()}
    images = len(next(iter(right.values())))
    counted = sum(
        right[question][n] and all(right[str(parent)][n] for parent in dependency[question] if parent)
        for question in right
        for n in range(images)
    )
    return counted / (len(right) * images)
