"""What a user may choose about a suite: named switches away from official quirks, and the wording of instructions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

# name -> our wording. The official strings stand in the scorers themselves (see each suite's docstring); where a score must be
# comparable to the digit with one that used them, give the exact text in a file.
INSTRUCTIONS = {
    "ocr": "Write down all text that is visible in this image. Give the text alone and do not repeat what you have already written. "
    "If the image holds no text, reply: No text recognized",
    "yes-no": "{question} Reply with one word, yes or no.",
    "word": "{question}\nAnswer the question using a single word or phrase.",
    "rewrite": "Rewrite this prompt for an image generator as one detailed English sentence. Keep every object, its number, its colour and "
    "its position exactly as they are, add no further objects, and describe setting, light and style. Prompt: {prompt}",
    "letter": "Reply with the letter of the right option and nothing else.",
}


@dataclass(frozen=True)
class Choices:
    """The switches that are on, and instructions by name (`INSTRUCTIONS` where not given)."""

    switches: frozenset[str] = frozenset()
    instructions: Mapping[str, str] = field(default_factory=dict)

    def on(self, switch: str) -> bool:
        """Whether a switch is on."""
        return switch in self.switches

    def instruction(self, name: str) -> str:
        """The wording of one instruction."""
        return self.instructions.get(name, INSTRUCTIONS[name])
