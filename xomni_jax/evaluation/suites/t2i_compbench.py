"""T2I-CompBench (Karine-Huang/T2I-CompBench): attributes, relations and complex compositions; ten images for each of 300 prompts.

color, shape, texture   "yes": the product over the noun phrases of the probability that "{phrase}?" is answered yes, to four decimals
spatial                 "objects": confidence in the first and last noun and the position of their boxes; below one half it is 0
non-spatial             "similarity" of image and prompt
complex                 the mean of those of the three that apply to the prompt, with the similarity to the prompt without adjectives

The score is the mean over images. spaCy finds phrases and nouns, as officially; see `t2i_rules`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from xomni_jax.evaluation.suite import Item, Record, check_id, read_drawn, write_image
from xomni_jax.evaluation.suites import t2i_rules
from xomni_jax.evaluation.suites.downloads import GITHUB, Download
from xomni_jax.evaluation.suites.reading import PublishedSuite, read_rows, unique_items
from xomni_jax.evaluation.suites.scoring import group_by, mean

_ORIGIN = f"{GITHUB} Karine-Huang/T2I-CompBench, folder examples/dataset"
_JUDGES = {"yes": "BLIP-VQA (yes)", "objects": "UniDet RS200 (objects)", "similarity": "CLIP ViT-B/32 (similarity)"}
_MEASURES = {"spatial": ["objects"], "non-spatial": ["similarity"], "complex": list(_JUDGES)}
_FILES = {
    "color": {"color_val.txt": "11871 sha256:1634259756dbc77d13093d907d414480080ec9790a8c97ad09efaea7b2534f2d"},
    "shape": {"shape_val.txt": "15935 sha256:37e1a276906c7ea9516cbd7ac8501be896006c0c17ca7344f260562834455bae"},
    "texture": {"texture_val.txt": "14211 sha256:fbb5363515b4a28009e360afaaaf389d2dd2289e50dbb0c6ef4ea0c7fe4f3d4f"},
    "spatial": {"spatial_val.txt": "9213 sha256:8707a1d7e42ce3002d95363cf55f74bd043c843ae27108f5125aaaa7840ca988"},
    "non-spatial": {"non_spatial_val.txt": "17750 sha256:04c56cc9ac441dc9ea6c5157652058bd1635b5308526dd31bb29a1caab9a758d"},
    "complex": {
        "complex_val.txt": "22724 sha256:1b808018b8d9916db3d47d5aa2ef18377a3549a56901a474156f799824cdf3b4",
        "complex_val_spatial.txt": "2898 sha256:6c7ac0ab75c7c9080cfc7b421fb059b9b0febb98471707aeedf58771088abc02",
        "complex_val_action.txt": "17698 sha256:d49ee4c7f99e3f3379fb8704a54ff5288b83bb412971edf616a4721c2473308e",
    },
}


class T2ICompBench(PublishedSuite):
    """t2i-compbench-KIND. Images lie as samples/{prompt}_{n}.png, where n counts the images of all prompts."""

    repeats = 10
    judge = "measure"
    published = 300
    folders = ("examples/dataset", "t2i_compbench")

    def __init__(self, name: str = "", *how: Any):
        self.kind = name.removeprefix("t2i-compbench-") or "color"
        self.measures = _MEASURES.get(self.kind, ["yes"])
        self.title = f"T2I-CompBench {self.kind}"
        self.official_judge = ", ".join(_JUDGES[m] for m in self.measures) + ", behind one service" * (len(self.measures) > 1)
        self.downloads = ((Download(_ORIGIN, _FILES[self.kind]),),)
        super().__init__(name, *how)

    def load(self, data: Path) -> list[Item]:
        """Items of the file of prompts; the id is the row with four digits."""
        prompts, *lists = [list(read_rows(self.find(data, name))) for name in _FILES[self.kind]]
        known = [{_plain(row.text("text")) for row in rows} for rows in lists]
        parse, items = t2i_rules.language(), []
        for n, row in enumerate(prompts):
            prompt = row.text("text").split("\t")[0]
            check_id(prompt, row.where)  # its images are named after it
            category, measures = self._measures(prompt, *known)
            fields = t2i_rules.read_prompt(prompt, parse(prompt), measures, self.kind == "complex")
            items.append((Item(f"{n:04d}", prompt, {"category": category, "measures": measures, **fields}), row.where))
        return unique_items(items)

    def questions(self, item: Item) -> Sequence[Any]:
        asked = {"yes": [f"{phrase}?" for phrase in item.fields["phrases"]], "objects": [""], "similarity": [item.fields["text"]]}
        return tuple({"measure": kind, "prompt": prompt} for kind in item.fields["measures"] for prompt in asked[kind])

    def score(self, item: Item, outputs: Sequence[Any]) -> Record:
        """score: the mean over the item's images."""
        values = [self._image_score(item, list(replies)) for replies in outputs]
        return {"score": sum(values) / len(values), "verdicts": [f"{value:.4f}" for value in values], "unparsed": 0}

    def aggregate(self, records: Sequence[Record]) -> dict[str, Any]:
        """The mean over images."""
        groups = group_by(records, "category").items()
        categories = {name: {"score": mean(rows, "score"), "items": len(rows)} for name, rows in groups}
        return {"headline": "score", "scores": {"score": mean(records, "score")}, "categories": categories}

    def save(self, directory: Path, item: Item, images: Sequence[Image.Image]) -> None:
        for path, image in zip(self._paths(directory, item), images, strict=True):
            write_image(path, image)

    def open(self, directory: Path, item: Item) -> list[Image.Image]:
        return [read_drawn(path) for path in self._paths(directory, item)]

    def _paths(self, directory: Path, item: Item) -> list[Path]:
        first = int(item.id) * self.repeats
        return [directory / "samples" / f"{item.prompt}_{first + k:06d}.png" for k in range(self.repeats)]

    def _measures(self, prompt: str, spatial: set[str] = frozenset(), action: set[str] = frozenset()) -> tuple[str, list[str]]:
        """The category of a prompt and what is measured of its images."""
        if _plain(prompt) in spatial:
            return "spatial", ["yes", "objects"]
        return ("action", ["yes", "similarity"]) if _plain(prompt) in action else (self.kind, self.measures)

    def _image_score(self, item: Item, replies: list[Any]) -> float:
        number = len(item.fields["phrases"])
        values = {"yes": float(f"{math.prod(replies[:number]):.4f}")} if "yes" in item.fields["measures"] else {}
        rest = [kind for kind in item.fields["measures"] if kind != "yes"]
        for kind, reply in zip(rest, replies[number:], strict=True):
            values[kind] = reply if kind == "similarity" else t2i_rules.placed(item.fields["locality"], item.fields["nouns"], reply)
        return sum(values.values()) / len(values)


def _plain(prompt: str) -> str:
    """How the lists of the complex prompts are compared: up to the first full stop, in lower case."""
    return prompt.split(".")[0].lower()
