"""Prompts that are rewritten before they are drawn, as the paper did for GenEval without publishing how.

Rewritten prompts come from a jsonl file, one object per line with "rewritten" and either "id" or "prompt" (the original), or from a
model behind an OpenAI-compatible endpoint with the instruction `rewrite` of suite.INSTRUCTIONS, which is ours. What a model wrote is
kept in a cache of the same form, so that a run that goes on, and the run of another model, draw the same prompts. Scoring does not change:
it goes by the original row.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from tqdm import tqdm

from xomni_jax.evaluation.judges import open_model
from xomni_jax.evaluation.judges.chat import answered
from xomni_jax.evaluation.judges.preparation import ChatOptions
from xomni_jax.evaluation.suite import Item, Suite, SuiteError
from xomni_jax.evaluation.suites.reading import read_rows
from xomni_jax.rewards.chat import is_endpoint
from xomni_jax.rewards.chat.replies import Unreadable

_TOKENS, _CONCURRENCY = 512, 8
FORMS = "a jsonl file with 'id' or 'prompt' and 'rewritten' on each line, or MODEL@URL of an OpenAI-compatible endpoint"


def with_rewrites(suite: Suite, spec: str, cache: Path) -> Suite:
    """The suite with its prompts rewritten by `spec` (see FORMS). `cache` keeps what a model wrote; a file needs none."""
    if suite.task != "generate":
        raise SuiteError(f"{suite.name} draws nothing; only prompts that are drawn can be rewritten")
    rewritten = copy.copy(suite)
    rewritten.load = lambda data: rewrite(suite.load(data), spec, cache, suite.instructions["rewrite"])
    return rewritten


def rewrite(items: Sequence[Item], spec: str, cache: Path, instruction: str) -> list[Item]:
    """The items with other prompts. SuiteError when one has none, JudgeUnavailable when the model is silent: what it wrote is kept."""
    if is_endpoint(spec):
        rewritten = _asked(items, spec, Path(cache), instruction)
    elif Path(spec).is_file():
        rewritten = read_rewrites(Path(spec))
    else:
        raise SuiteError(f"{spec!r} is not a source of rewritten prompts; it can be {FORMS}")
    missing = [item for item in items if not _found(item, rewritten)]
    if missing:
        raise SuiteError(f"{spec} has no rewritten prompt for {len(missing)} of {len(items)} items; the first is {missing[0].id!r}")
    return [dataclasses.replace(item, prompt=_found(item, rewritten)) for item in items]


def read_rewrites(path: Path) -> dict[str, str]:
    """{"id:..." or "prompt:...": rewritten prompt}. SuiteError with file and line, also when one item has two."""
    rewritten: dict[str, str] = {}
    for row in read_rows(path):
        kind = "id" if row.values.get("id") is not None else "prompt"
        key = f"{kind}:{row.text(kind)}"
        if key in rewritten:
            raise SuiteError(f"{row.where}: the {kind} {row.text(kind)!r} has a rewritten prompt already; keep one")
        rewritten[key] = row.text("rewritten")
    return rewritten


def _found(item: Item, rewritten: Mapping[str, str]) -> str | None:
    return rewritten.get(f"id:{item.id}") or rewritten.get(f"prompt:{item.prompt}")


def _asked(items: Sequence[Item], spec: str, cache: Path, instruction: str) -> dict[str, str]:
    """The cache, after the model has been asked for what it lacks."""
    _repair(cache)
    rewritten = read_rewrites(cache) if cache.exists() else {}
    prompts = list(dict.fromkeys(item.prompt for item in items if not _found(item, rewritten)))
    if not prompts:
        return rewritten
    cache.parent.mkdir(parents=True, exist_ok=True)
    failure: SuiteError | None = None

    def ask(prompt: str) -> str:
        if failure:
            raise failure
        try:
            text = answered(model, instruction.format(prompt=prompt), _TOKENS, ChatOptions().thinking_tokens)
        except Unreadable as error:
            raise SuiteError(f"{model.name} did not rewrite {prompt!r} ({error}); use another model or instruction") from None
        reply = " ".join(text.split()).strip('"')
        if not reply:
            raise SuiteError(f"{model.name} rewrote {prompt!r} as nothing; use another model or instruction")
        return reply

    model = open_model(spec)
    try:
        with ThreadPoolExecutor(_CONCURRENCY) as pool, cache.open("a", encoding="utf-8") as file:
            tasks = {pool.submit(ask, prompt): prompt for prompt in prompts}
            for task in tqdm(as_completed(tasks), total=len(tasks), desc="rewriting prompts", unit="prompt"):
                try:
                    rewritten[f"prompt:{tasks[task]}"] = text = task.result()
                    line = {"prompt": tasks[task], "rewritten": text, "model": model.name, "instruction": instruction}
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
                    file.flush()
                except SuiteError as error:  # the first one is raised when what is under way has been kept
                    failure = failure or error
    finally:
        model.close()
    if failure:
        raise failure
    return rewritten


def _repair(cache: Path) -> None:
    """Cut off the half line that a kill may have left."""
    if cache.exists() and not (data := cache.read_bytes()).endswith(b"\n"):
        os.truncate(cache, data.rfind(b"\n") + 1)
