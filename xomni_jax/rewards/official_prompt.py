"""Prompts that belong to a published model, read from the user's copy of its official code. Nothing of that code is executed."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from xomni_jax.rewards.scorer import ServiceError


class OfficialPrompt(NamedTuple):
    """Where the two parts of a prompt stand, and the sha256 of their text.

    They are what stands before and after `variable` in the one f-string of the file that names it, or the values of two `constants`.
    """

    file: str
    sha256: str
    variable: str = "prompt"
    constants: tuple[str, ...] = ()


def read_prompt(prompt: OfficialPrompt, folder: str, origin: str, scorer: str, any_prompt: bool) -> tuple[str, str]:
    """The two parts.

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
    found = _constants(tree, prompt.constants) if prompt.constants else _around(tree, prompt.variable)
    if len(found) != 1:
        raise ServiceError(f"{path} holds {len(found)} prompts of {scorer}, not one; get it again: git clone {origin}")
    ((before, after),) = found
    if prompt_hash(before, after) != prompt.sha256 and not any_prompt:
        raise ServiceError(
            f"the prompt in {path} is not the one that {scorer} was written for; take the commit that README.md names, "
            "or use this text with --any-prompt"
        )
    return before, after


def prompt_hash(before: str, after: str) -> str:
    """sha256 of a prompt, which is recorded in its place."""
    return hashlib.sha256(f"{before}\0{after}".encode()).hexdigest()


def _around(tree: ast.Module, variable: str) -> list[tuple[str, str]]:
    """The text before and after a variable in each f-string that names it and nothing else."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            at = [n for n, value in enumerate(node.values) if isinstance(value, ast.FormattedValue)]
            if [ast.unparse(node.values[n].value) for n in at] == [variable]:
                found.append(tuple("".join(v.value for v in values) for values in (node.values[: at[0]], node.values[at[0] + 1 :])))
    return found


def _constants(tree: ast.Module, names: Sequence[str]) -> list[tuple[str, str]]:
    """The values of text that is assigned to these names, if it is assigned to each."""
    assigned = [node for node in tree.body if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)]
    values = {ast.unparse(node.targets[0]): node.value.value for node in assigned if isinstance(node.value.value, str)}
    return [tuple(values[name] for name in names)] if values.keys() >= set(names) else []
