"""Objects and their colours, by Mask2Former and CLIP: GenEval's judge (xomni eval geneval --judge URL). Needs torch.

Both models are read from local directories in the layout of transformers. Image size, padding and selection of boxes follow
mmdetection's Mask2Former, which the official judge runs; the weights published for transformers are Facebook's, not mmdetection's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from xomni_jax.rewards.model_files import model_directory, model_hash
from xomni_jax.rewards.protocol import Item, Score
from xomni_jax.rewards.scorer import Scorer
from xomni_jax.rewards.services.clip_towers import ClipTowers
from xomni_jax.rewards.services.torch_scorer import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    centre_square,
    normalised,
    pretrained,
    pretrained_model,
    torch_and_device,
    unit,
)

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
# The detector's 80 classes in its order, under the names that GenEval's prompts use.
COCO = tuple(
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,parking meter,bench,bird,cat,dog,"
    "horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,tie,suitcase,frisbee,skis,snowboard,sports ball,kite,"
    "baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,cup,fork,knife,spoon,bowl,banana,apple,sandwich,"
    "orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,potted plant,bed,dining table,toilet,tv,laptop,computer mouse,tv remote,"
    "computer keyboard,cell phone,microwave,oven,toaster,sink,refrigerator,book,clock,vase,scissors,teddy bear,hair drier,"
    "toothbrush".split(",")
)
_TEMPLATES = ("a photo of a {c} {name}", "a photo of a {c}-colored {name}", "a photo of a {c} object")
SHORT_SIDE = 800  # pixels of the resized image
_LONGEST, _DIVISOR = 5 / 3, 32  # the long side is at most 1333 to 800; padded to whole 32s
_BACKGROUND = "#999"
_MOST_INSTANCES = 100


class Instance(NamedTuple):
    """One detection: class name, confidence, box (left, top, right, bottom) and mask, bool [Y, X]."""

    name: str
    score: float
    box: tuple[float, float, float, float]
    mask: np.ndarray


class DetectorScorer(Scorer):
    """The share of the asked classes that are found. Applies to items with targets["detect"]; the rules are the benchmark's.

    targets["detect"] = {"classes": [...], "coloured": [...], "min_score": float, "at_most": int}. Detail: "detections" = {class:
    [{"box", "score", "color"}]}, most confident first, at most `at_most` above `min_score`, with colours of the "coloured" classes only.
    """

    name = "detector"
    range = (0.0, 1.0)

    @dataclass(frozen=True)
    class Options:
        """The models and where they run.

        Attributes:
          detector: local copy of facebook/mask2former-swin-small-coco-instance; required.
          clip: local copy of openai/clip-vit-large-patch14; required.
          device: where torch runs, such as cuda:0; without one a GPU when there is one, else the CPU.
          short_side: pixels of the shorter side of the image that is searched; the official judge uses 800, less is faster.
        """

        detector: str | None = None
        clip: str | None = None
        device: str | None = None
        short_side: int = SHORT_SIDE

    def __init__(self, **options: Any):
        super().__init__(**options)
        o, (torch, device) = self.options, torch_and_device(self.name, self.options.device)
        detector = model_directory(self.name, "--detector", o.detector, "facebook/mask2former-swin-small-coco-instance from Hugging Face")
        clip = model_directory(self.name, "--clip", o.clip, "openai/clip-vit-large-patch14 from Hugging Face")
        self._detector, self._colours = Mask2Former(torch, detector, device, o.short_side), ClipColours(torch, clip, device)
        self.version = f"mask2former-{model_hash(detector)[:12]}/clip-{model_hash(clip)[:12]}"
        self.version += f"/short-side-{o.short_side}" if o.short_side != SHORT_SIDE else ""

    def score_image(self, image: np.ndarray, item: Item) -> Score:
        """See Scorer. ValueError when a class is asked for that the detector does not know."""
        request = item["targets"].get("detect")
        if not request:
            return Score(None)
        pil_image, wanted = Image.fromarray(image), request["classes"]
        unknown = set(wanted) - set(self._detector.names)
        if unknown:
            raise ValueError(f"the detector knows no {', '.join(sorted(unknown))}; its {len(self._detector.names)} classes are fixed")
        found: dict[str, list[Instance]] = {name: [] for name in wanted}
        for instance in sorted(self._detector.find(pil_image), key=lambda i: -i.score):
            if instance.name in found and instance.score > request["min_score"] and len(found[instance.name]) < request["at_most"]:
                found[instance.name].append(instance)
        detections = {name: self._described(pil_image, name, of, name in request["coloured"]) for name, of in found.items()}
        return Score(sum(map(bool, found.values())) / len(found), None, {"detections": detections})

    def _described(self, image: Image.Image, name: str, instances: Sequence[Instance], coloured: bool) -> list[dict[str, Any]]:
        colours = self._colours.name_of(image, instances, name) if coloured and instances else [None] * len(instances)
        return [{"box": list(i.box), "score": i.score} | ({"color": c} if c else {}) for i, c in zip(instances, colours)]


class Mask2Former:
    """Instance segmentation with a transformers checkpoint."""

    def __init__(self, torch: Any, folder: Path, device: str, short_side: int = SHORT_SIDE):
        self._torch, self._device, self._short_side = torch, device, short_side
        self._model = pretrained_model("detector", "Mask2FormerForUniversalSegmentation", folder).to(device)
        labels = self._model.config.id2label
        self.names = COCO if len(labels) == len(COCO) else tuple(labels[n] for n in range(len(labels)))

    def find(self, image: Image.Image) -> list[Instance]:
        """Every instance that the model proposes, confident or not."""
        torch = self._torch
        width, height = fitted(image.size, self._short_side)
        pixels = normalised(torch, [image.resize((width, height), Image.Resampling.BILINEAR)], IMAGENET_MEAN, IMAGENET_STD)
        padded = [-(-side // _DIVISOR) * _DIVISOR for side in (height, width)]
        pixels = torch.nn.functional.pad(pixels, (0, padded[1] - width, 0, padded[0] - height))
        with torch.inference_mode():
            outputs = self._model(pixel_values=pixels.to(self._device))
            masks = torch.nn.functional.interpolate(outputs.masks_queries_logits, padded, mode="bilinear", align_corners=False)
            masks = masks[..., :height, :width]
            masks = torch.nn.functional.interpolate(masks, image.size[::-1], mode="bilinear", align_corners=False)
            chosen = choose_instances(torch, outputs.class_queries_logits[0], masks[0])
        return [Instance(self.names[label], score, box, mask) for label, score, box, mask in chosen]


def fitted(size: tuple[int, int], short_side: int = SHORT_SIDE) -> tuple[int, int]:
    """Width and height to which an image of `size` (width, height) is resized for the detector."""
    scale = min(short_side / min(size), int(short_side * _LONGEST) / max(size))
    return int(size[0] * scale + 0.5), int(size[1] * scale + 0.5)


def choose_instances(torch: Any, classes_QC: Any, masks_QYX: Any) -> list[tuple[int, float, tuple[float, ...], np.ndarray]]:
    """(class, confidence, box, mask) of the 100 likeliest (query, class) pairs; the last class is "nothing".

    Confidence is the class's probability times the mean mask probability inside the mask; a box ends one pixel after its mask.
    """
    chances_QC = classes_QC.float().softmax(-1)[:, :-1]
    best, index = chances_QC.flatten().topk(min(_MOST_INSTANCES, chances_QC.numel()))
    found = []
    for chance, pair in zip(best.tolist(), index.tolist()):
        query, label = divmod(pair, chances_QC.shape[1])
        inside = masks_QYX[query] > 0
        area = inside.sum().item()
        if not area:
            continue
        sure = (masks_QYX[query].float().sigmoid() * inside).sum().item() / (area + 1e-6)
        rows, columns = (inside.any(axis).nonzero().flatten() for axis in (1, 0))
        box = (float(columns[0]), float(rows[0]), float(columns[-1]) + 1, float(rows[-1]) + 1)
        found.append((label, chance * sure, box, inside.cpu().numpy()))
    return found


class ClipColours:
    """Zero-shot colour of objects: three templates averaged per colour, the likeliest colour wins."""

    def __init__(self, torch: Any, folder: Path, device: str):
        self._torch = torch
        self._towers = ClipTowers(
            pretrained_model("detector", "CLIPModel", folder), pretrained("detector", "CLIPTokenizer", folder), device
        )
        self._texts: dict[str, Any] = {}

    def name_of(self, image: Image.Image, instances: Sequence[Instance], name: str) -> list[str]:
        """The colour of each instance of the class `name`, everything outside its mask painted grey."""
        squares = [centre_square(crop(image, i), self._towers.size) for i in instances]
        with self._torch.inference_mode():
            images_BD = self._towers.image_features(normalised(self._torch, squares))
            best = (images_BD @ self._text_features(name).T).argmax(-1)
        return [COLOURS[n] for n in best.tolist()]

    def _text_features(self, name: str) -> Any:
        """[colours, D], unit length."""
        if name not in self._texts:
            each = self._towers.text_features([t.format(c=c, name=name) for c in COLOURS for t in _TEMPLATES])
            self._texts[name] = unit(each.reshape(len(COLOURS), len(_TEMPLATES), -1).mean(1))
        return self._texts[name]


def crop(image: Image.Image, instance: Instance) -> Image.Image:
    """The instance's box with its background painted grey."""
    blank = Image.new("RGB", image.size, _BACKGROUND)
    return Image.composite(image, blank, Image.fromarray(instance.mask)).crop(instance.box)
