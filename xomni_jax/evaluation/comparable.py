"""Whether a result may stand beside published numbers, and if not, why not.

results.json says `"comparable": {"yes": bool, "because": [clause, ...]}`: "because" lists every departure from what the benchmark
publishes, so it is empty exactly when "yes" is true. `--official` refuses a run that would have any.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from xomni_jax.evaluation.judges import OFFICIAL
from xomni_jax.evaluation.suites import RENDERED, SUITES

if TYPE_CHECKING:
    from xomni_jax.evaluation.suite_run import SuiteRun

SIZE = (1152, 1152)  # height and width of the released command's images; the paper states no size
# Kind of judge -> what the name and version of the published judge match. The weights of Mask2Former that transformers reads are
# Facebook's, while GenEval's judge runs mmdetection's: only a service with those is the same judge.
_JUDGES = {"ocr": r"qwen2\.5-vl-7b-instruct", "vqa": "mplug", "detector": "mmdet"}
# Instruction -> `wording_hash` of its published wordings, which are not ours to print.
_WORDINGS = {
    "ocr": ("10c070ac876c07e1",),  # LongText-Bench and OneIG-Bench
    "yes-no": ("bf085a6e12c9d0e2",),  # DPG-Bench asks the bare question
    "word": ("cdbb29f560cb4e91",),  # lmms-eval
    "letter": ("47c8841afab3019f", "a103e332a608e14c"),  # lmms-eval, VLMEvalKit
}


def wording_hash(text: str) -> str:
    """A short hash of an instruction, the same however its white space is laid out."""
    return hashlib.sha256(" ".join(text.split()).encode()).hexdigest()[:16]


def departures(run: SuiteRun, judge: Mapping[str, Any] | None, settings: Mapping[str, Any], unscored: int = 0) -> list[str]:
    """A clause for everything in which a run departs from what is published; none when its result is comparable.

    Args:
      judge: {"name", "settings"} of the judge that is used; None for local rules.
      settings: what decides the outputs, as in settings.json; empty where another program made them.
      unscored: number of items that got no score.
    """
    suite, published = run.suite, run.suite.published or run.data["items"]
    if suite.name in RENDERED or suite.name not in SUITES.names():
        return ["no number is published for this suite"]
    found = [f"{len(run.items)} of {published} items"] if len(run.items) != published else []
    found += [f"{unscored} items without a score"] if unscored else []
    official = type(suite).repeats
    found += [f"{suite.repeats} images per prompt instead of {official}"] if suite.repeats != official else []
    height, width = settings.get("height", SIZE[0]), settings.get("width", SIZE[1])
    found += [f"images of {height} x {width} pixels instead of {SIZE[0]} x {SIZE[1]}"] if (height, width) != SIZE else []
    found += ["rewritten prompts, the published ones are not public"] if run.config.rewrite else []
    if judge:
        version = f"{judge['name']} {judge['settings'].get('version', '')}"
        published_judge = re.escape(suite.official_judge) or _JUDGES.get(suite.judge, "(?!)")
        if not re.search(published_judge, version, re.IGNORECASE):
            found.append(f"judge {judge['name']} instead of {suite.official_judge or OFFICIAL.get(suite.judge, 'a published one')}")
        if shown := judge["settings"].get("format"):
            found.append(f"images shown to the judge as {shown}")
    for name in sorted(suite.instructions.used):
        if wording_hash(suite.instructions[name]) not in _WORDINGS.get(name, ()) and name != "rewrite":
            found.append(f"instruction {name!r} in other words than the published ones, which --instruction {name}=FILE gives")
    return found + [f"switch {switch}, which departs from the official scorer" for switch in sorted(suite.on)]
