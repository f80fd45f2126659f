"""Two studies over finished runs of any suite that draws: what guidance changes, and one RL sample against SFT's best of N.

Runs are made by `xomni eval SUITE`; a study reads their directories and draws nothing, so it takes seconds and is exact to repeat.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from xomni_jax.evaluation import suite as contract
from xomni_jax.evaluation.compare import labels
from xomni_jax.evaluation.eval_run import EvalRun, Item, command, image_refs, outputs, read_eval_run, same_items
from xomni_jax.evaluation.run_directory import RunDirectory
from xomni_jax.evaluation.statistics import best_of_weights, bootstrap_mean, paired_difference, weighted_rows, with_bounds
from xomni_jax.evaluation.suite import SuiteError
from xomni_jax.evaluation.suites import get_suite

if TYPE_CHECKING:
    from xomni_jax.rewards.client import RewardClient

REWARD_BATCH = 4  # items scored at a time
BEST_OF = (1, 2, 4, 8, 16)
OWN = "score"  # the reward that is the suite's own score of an output
# Settings that may differ between runs of one experiment: they change images by rounding at most.
INCIDENTAL = ("model.path", "data.path", "batch", "decode_batch", "mesh.", "device", "versions.")


def read_runs(directories: Sequence[str | Path], changes: Sequence[Mapping[str, Any]]) -> list[EvalRun]:
    """The runs of one suite that draws, on the same items.

    Args:
      changes: per directory, the options in which it is meant to differ, for the command that makes a missing one.

    Raises:
      SuiteError: runs are missing (with the commands that make them), of different suites or items, or hold answers.
    """
    missing = [i for i, directory in enumerate(directories) if not (Path(directory) / "results.json").is_file()]
    runs = [read_eval_run(directory) for i, directory in enumerate(directories) if i not in missing]
    if missing:
        suite, settings = (runs[0].suite, runs[0].settings) if runs else ("SUITE", {})
        lines = [command(suite, directories[i], settings, **changes[i]) for i in missing]
        many = f"{len(missing)} of {len(directories)} runs are not there or not finished"
        raise SuiteError("\n  ".join([f"{many}; make them with", *lines]))
    same_items(runs)
    if "answer" in runs[0].items[0]:
        raise SuiteError(f"{runs[0].suite} answers questions; this study is about suites that draw, such as longtext-en")
    return runs


def check_settings(runs: Sequence[EvalRun], varied: Iterable[str]) -> None:
    """SuiteError naming the first setting, apart from the varied ones, in which a run differs from the first."""
    free = (*varied, *INCIDENTAL)
    first = runs[0]
    for run in runs[1:]:
        for name in dict.fromkeys((*first.flat_settings, *run.flat_settings)):
            ours, theirs = first.flat_settings.get(name), run.flat_settings.get(name)
            if ours != theirs and not any(name == f or (f.endswith(".") and name.startswith(f)) for f in free):
                raise SuiteError(
                    f"{run.path}: {name} is {theirs}, in {first.path} it is {ours}; a difference would not come from what is studied"
                )


# ---- guidance ----
def guidance_study(runs: Sequence[EvalRun], seed: int = 0) -> dict[str, Any]:
    """The score over guidance values, each against guidance off (1).

    Raises:
      SuiteError: the runs differ in more than guidance, none is at 1, none at another value, or two are at the same.
    """
    check_settings(runs, ["sampling.guidance"])
    by_value: dict[float, EvalRun] = {}
    for run in runs:
        value = run.flat_settings.get("sampling.guidance")
        if value is None:
            raise SuiteError(f"{run.path}: its settings name no guidance; draw the images with xomni eval")
        if value in by_value:
            raise SuiteError(f"{by_value[value].path} and {run.path} both have guidance {value:g}; give one run per value")
        by_value[float(value)] = run
    if 1.0 not in by_value or len(by_value) < 2:
        made = command(runs[0].suite, "RUN", runs[0].settings, guidance="1.0" if 1.0 not in by_value else "2.0")
        raise SuiteError(f"a run with guidance off (1) and one with guidance on are needed; make the other with\n  {made}")
    off = by_value[1.0].scores
    rows = []
    for value, run in sorted(by_value.items()):
        categories = {name: c["score"] for name, c in run.results["categories"].items()}
        rows.append(
            {
                "guidance": value,
                "run": str(run.path),
                "headline": run.results["headline"]["value"],
                "score": with_bounds(bootstrap_mean(run.scores, seed)),
                "minus_off": None if value == 1.0 else with_bounds(paired_difference(run.scores, off, seed)),
                "categories": categories,
            }
        )
    return about(runs[0], seed) | {"rows": rows}


def about(run: EvalRun, seed: int) -> dict[str, Any]:
    """What a study is about."""
    head = run.results["headline"]["name"]
    return {"suite": run.suite, "title": run.results["title"], "headline": head, "items": len(run.items), "seed": seed}


# ---- best of N ----
def best_of_study(
    sft: Sequence[EvalRun], rl: Sequence[EvalRun], reward: str = OWN, selection_PR: np.ndarray | None = None, seed: int = 0
) -> dict[str, Any]:
    """One RL sample against the best of N SFT samples, picked by a reward.

    Args:
      sft, rl: runs of the two models. Several runs of one model differ in the seed alone: their samples are pooled.
      reward: name of what picks. selection_PR: its values of SFT's samples [P, R], runs side by side; without it the suite's own
        score picks, which knows the answer.

    Raises:
      SuiteError: runs that differ in more than model and seed, seeds used twice, or one SFT sample per item.
    """
    for runs in (sft, rl):
        check_settings(runs, ["seed"])
        seeds = [run.flat_settings.get("seed") for run in runs]
        if len(set(seeds)) < len(seeds):
            raise SuiteError(f"{', '.join(labels(runs))} have the seeds {seeds}; runs of one seed hold the same samples")
    check_settings([sft[0], rl[0]], ["seed", "model.sha256", "repeats"])
    if sft[0].flat_settings.get("model.sha256") == rl[0].flat_settings.get("model.sha256") is not None:
        raise SuiteError(f"{sft[0].path} and {rl[0].path} are runs of the same model; give runs of the SFT and of the RL model")
    score_PR, rl_PR = pooled_scores(sft), pooled_scores(rl)
    samples = score_PR.shape[1]
    if samples < 2:
        raise SuiteError(f"there is one SFT sample per item; add runs with other seeds: {more_samples(sft[0])}")
    selection_PR = score_PR if selection_PR is None else selection_PR
    suite = get_suite(sft[0].suite, sft[0].results.get("switches") or ())
    rl_P = weighted_rows(rl_PR, np.ones_like(rl_PR))
    rows = []
    for n in (n for n in BEST_OF if n <= samples):
        best_P = weighted_rows(score_PR, best_of_weights(selection_PR, n))
        rows.append(
            {
                "n": n,
                "score": with_bounds(bootstrap_mean(best_P, seed)),
                "rl_minus": with_bounds(paired_difference(rl_P, best_P, seed)),
                "headline_of_first_n": headline_of_picks(suite, sft, selection_PR[:, :n]),
            }
        )
    single = with_bounds(bootstrap_mean(rl_P, seed))
    return about(sft[0], seed) | {
        "reward": reward,
        "sft": {"runs": [str(run.path) for run in sft], "samples": samples},
        "rl": {
            "runs": [str(run.path) for run in rl],
            "samples": rl_PR.shape[1],
            "score": single,
            "headline": rl[0].results["headline"]["value"] if len(rl) == 1 else None,
        },
        "rows": rows,
        "left_out": [n for n in BEST_OF if n > samples],
        "rl_holds_up_to_best_of": held_up_to(single["value"], rows),
    }


def held_up_to(single: float | None, rows: Sequence[Mapping[str, Any]]) -> int:
    """The largest N such that one RL sample scores above the best of N and of every smaller N; 0: not even above one sample."""
    held = 0
    for row in rows:
        if single is None or row["score"]["value"] is None or not single > row["score"]["value"]:
            break
        held = row["n"]
    return held


def more_samples(run: EvalRun) -> str:
    """The command of a further run of the same model."""
    return command(run.suite, f"{run.path}-more", run.settings, seed=int(run.flat_settings.get("seed", 1234)) + 1)


def pooled_scores(runs: Sequence[EvalRun]) -> np.ndarray:
    """The suite's score of every single output [P, R], runs side by side; NaN where an output has none."""
    suite = get_suite(runs[0].suite, runs[0].results.get("switches") or ())
    rows = []
    for items in zip(*(run.items for run in runs)):
        rows.append([output_record(suite, item, r)["score"] for item in items for r in range(outputs(item))])
    if len({len(row) for row in rows}) > 1:
        raise SuiteError(f"{runs[0].path}: items have different numbers of outputs; draw them with one setting of repeats")
    return np.array([[np.nan if score is None else score for score in row] for row in rows], np.float64)


def output_record(suite: contract.Suite, item: Item, repeat: int) -> contract.Record:
    """The record of an item as if it had this output alone."""
    asked = contract.Item(item["id"], item["prompt"], item["fields"])
    return suite.score(asked, [item["replies"][repeat]])


def headline_of_picks(suite: contract.Suite, runs: Sequence[EvalRun], selection_PR: np.ndarray) -> float | None:
    """The suite's own number over one output per item, the one that the reward likes best; of equals the first."""
    if np.isnan(selection_PR).all(1).any():
        return None
    picks = np.nanargmax(selection_PR, 1)
    records = []
    for i, pick in enumerate(picks):
        places = [(run.items[i], r) for run in runs for r in range(outputs(run.items[i]))]
        item, repeat = places[pick]
        records.append(output_record(suite, item, repeat) | {"id": item["id"], "fields": item["fields"]})
    found = suite.aggregate(records)
    return found["scores"][found["headline"]]


# ---- values of a reward service ----
def reward_scores(runs: Sequence[EvalRun], client: RewardClient, version: str, stored: Path) -> np.ndarray:
    """Values [P, R] that a reward service gives to all images, the runs' side by side. An item's fields are told to it as its targets.

    Args:
      version: of the service; values of another version are not mixed in.
      stored: directory in which finished items are kept, so that an interruption loses little.

    Raises:
      SuiteError: an image is gone, or the service could not score one or says that it does not apply to the item.
    """
    directory, kind = RunDirectory(stored), hashlib.sha256(f"{client.name} {version}".encode()).hexdigest()[:16]
    done = {name: record["values"] for name, record in directory.lines(kind).items()}
    name_of = lambda run, item: f"{run.path.resolve()}#{item['id']}"
    pairs = [(run, item) for items in zip(*(run.items for run in runs)) for run, item in zip(runs, items)]
    left = [pair for pair in pairs if name_of(*pair) not in done]
    with directory.writer(kind, "values") as lines, tqdm(total=len(left), desc=f"scored by {client.name}", unit="item") as bar:
        for start in range(0, len(left), REWARD_BATCH):
            group = left[start : start + REWARD_BATCH]
            for (run, item), values in zip(group, _reward_values(client, group)):
                done[name_of(run, item)] = values
                lines.append({"id": name_of(run, item), "values": values})
                bar.update()
    return np.array([[v for run in runs for v in done[name_of(run, run.items[i])]] for i in range(len(runs[0].items))], np.float64)


def _reward_values(client: RewardClient, group: Sequence[tuple[EvalRun, Item]]) -> list[list[float]]:
    """Values of the images of some items."""
    images, told = [], []
    for run, item in group:
        if len(image_refs(run, item)) != outputs(item):
            raise SuiteError(f"{run.path}: item {item['id']} lists no images, another program drew them; draw with xomni eval")
        for ref in image_refs(run, item):
            if not ref.path.is_file():
                raise SuiteError(f"{ref.path} of item {item['id']} is gone, so {client.name} cannot score it; draw it again")
            images.append(np.asarray(ref.open()))
            told.append({"prompt": item["prompt"], "targets": dict(item["fields"])})
    scores, rows = iter(client.score(images, told)), []
    for run, item in group:
        row = [next(scores) for _ in range(outputs(item))]
        if bad := next((score for score in row if score.value is None), None):
            reason = bad.error or "it says that it does not apply"
            raise SuiteError(f"{client.name} gave item {item['id']} of {run.path} no value ({reason}); what is scored is kept")
        rows.append([float(score.value) for score in row])
    return rows
