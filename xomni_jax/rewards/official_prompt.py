"""Prompts that belong to a published model, read from the user's copy of its official code. Nothing of that code is executed."""

from __future__ import annotations

import ast
import hashlib
from pathlib import Path
from typing import NamedTuple

from xomni_jax.rewards.scorer import ServiceError


class OfficialPrompt(NamedTuple):
    """Where a prompt stands: the one f-string of a file that names `variable`, and the sha256 of its text."""

    file: str
    sha256: str
    variable: str = "prompt"


def read_prompt(prompt: OfficialPrompt, folder: str, origin: str, scorer: str, any_prompt: bool) -> tuple[str, str]:
    """The text before and after the variable.

    Args:
      folder: the user's copy of the official code. origin: where to get it.
      any_prompt: take the text also when it is not the recorded one.

    Raises:
      ServiceError: the copy is missing, or holds another text.
    """
    path = Path(folder) / prompt.file
    if not folder or not path.is_file():
        missing = f"{path} is no file" if folder else "it was not given"
        raise ServiceError(f"scorer {scorer!r} needs --official-code DIR, for its prompt: git clone {origin} DIR; {missing}")
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError, OSError) as error:
        raise ServiceError(f"{path} cannot be read as Python ({error}); get it again: git clone {origin}") from error
    found = [node for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) and _variables(node) == [prompt.variable]]
    if len(found) != 1:
        raise ServiceError(f"{path} holds {len(found)} prompts with {{{prompt.variable}}}, not one; get it again: git clone {origin}")
    at = next(n for n, value in enumerate(found[0].values) if isinstance(value, ast.FormattedValue))
    before, after = ("".join(v.value for v in values) for values in (found[0].values[:at], found[0].values[at + 1 :]))
    if prompt_hash(before, after) != prompt.sha256 and not any_prompt:
        raise ServiceError(
            f"the prompt in {path} is not the one that {scorer} was written for; take the commit that README.md names, "
            "or use this text with --any-prompt"
        )
    return before, after


def prompt_hash(before: str, after: str) -> str:
    """sha256 of a prompt, which is recorded in its place."""
    return hashlib.sha256(f"{before}\0{after}".encode()).hexdigest()


def _variables(node: ast.JoinedStr) -> list[str]:
    return [ast.unparse(value.value) for value in node.values if isinstance(value, ast.FormattedValue)]
