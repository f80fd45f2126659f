"""Judges: what reads or looks at images, so that a suite's rules can score them. Each is imported when it is opened."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from xomni_jax.evaluation.judges.preparation import as_shown, is_skipped
from xomni_jax.evaluation.suite import Judge, JudgeUnavailable, SuiteError

if TYPE_CHECKING:
    from xomni_jax.rewards.client import RewardClient

LOCAL = {"ocr": "pp-ocr", "contours": "contours"}  # kind -> its judge in this process
# The judge that the benchmark's published numbers were made with; a result names it beside the one that was used.
OFFICIAL = {
    "ocr": "Qwen2.5-VL-7B-Instruct",
    "vqa": "mPLUG-large fine-tuned for VQA on COCO",
    "detector": "Mask2Former Swin-S (COCO instances) and CLIP ViT-L/14",
}
HELP = {
    "ocr": "pp-ocr (local, the default), or MODEL@URL of an OpenAI-compatible endpoint",
    "vqa": "MODEL@URL of an OpenAI-compatible endpoint, such as Qwen/Qwen2.5-VL-7B-Instruct@http://127.0.0.1:8000/v1",
    "detector": "URL of a detector, or several with commas; "
    "start one with: xomni serve-reward detector --detector DIR --clip DIR --port 8003",
    "contours": "contours (local, the default)",
    "chat": "MODEL@URL of an OpenAI-compatible endpoint",
    "measure": "NAME@URL of a scoring service of your own (xomni serve-reward FILE.py:Class); judges/measure.py says what it is asked",
}


def open_judge(kind: str, spec: str | None = None) -> Judge:
    """The judge of a kind, as `HELP` says how to name it; None: the local one.

    Raises:
      SuiteError: there is no local one, or `spec` names none of that kind.
      JudgeUnavailable: it does not answer.
    """
    if kind not in HELP:
        raise SuiteError(f"there is no judge of kind {kind!r}; kinds are {', '.join(HELP)}")
    judge = _open(kind, spec)
    if kind in OFFICIAL:
        judge.settings = judge.settings | {"official judge": OFFICIAL[kind]}
    return judge


def _open(kind: str, spec: str | None) -> Judge:
    if kind in LOCAL and spec in (None, LOCAL[kind]):
        return PPOCRJudge() if kind == "ocr" else ContoursJudge()
    model, at, url = (spec or "").rpartition("@")
    if kind == "measure" and at and model and url.startswith(("http://", "https://")):
        from xomni_jax.evaluation.judges.measure import MeasureJudge

        return MeasureJudge(model, url.split(","))
    if kind in ("ocr", "vqa", "chat") and at and model and url.startswith(("http://", "https://")):
        from xomni_jax.evaluation.judges.chat import ChatEndpoint, ChatJudge

        return ChatJudge(ChatEndpoint(model, url))
    if kind == "detector" and spec and not at and spec.startswith(("http://", "https://")):
        return DetectorJudge(spec.split(","))
    given = f"--judge {spec}" if spec else "no --judge"
    raise SuiteError(f"a judge of kind {kind!r} is needed and {given} was given; it can be {HELP[kind]}")


class PPOCRJudge(Judge):
    """The reader of the OCR reward. It needs no instruction and no limit of tokens."""

    name = "pp-ocr"

    def __init__(self) -> None:
        from xomni_jax.rewards.services.ocr import PPOCRReader

        self._reader = PPOCRReader()
        self.settings: dict[str, Any] = {"model": "pp-ocr-small", "mode": self._reader.mode, "rapidocr": version("rapidocr")}

    def ask(self, images: Sequence[Image.Image], questions: Sequence[Sequence[Any]]) -> list[list[Any]]:
        """See Judge; a reply is the text that was read, or None for an image that is left out."""
        return [[self._read(p, q) for q in asked] for p, asked in zip(images, questions, strict=True)]

    def _read(self, image: Image.Image, question: Mapping[str, Any]) -> str | None:
        return None if is_skipped(image, question) else self._reader.read(np.asarray(as_shown(image, question)))


class ContoursJudge(Judge):
    """GenEval's detector for flat images of shapes: contours are the objects, all of them certain."""

    name = "contours"

    def __init__(self) -> None:
        from xomni_jax.rewards.services.shapes import ShapesScorer

        self._scorer = ShapesScorer()
        self.settings: dict[str, Any] = {"version": self._scorer.version}

    def ask(self, images: Sequence[Image.Image], questions: Sequence[Sequence[Any]]) -> list[list[Any]]:
        """See Judge; a reply is {class: [{"box", "score", "color"}]}."""
        return [[self._detect(p, q) for q in asked] for p, asked in zip(images, questions, strict=True)]

    def _detect(self, image: Image.Image, question: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in question["classes"]}
        for kind, box in self._scorer.locate(np.asarray(image.convert("RGB"))):
            if kind.shape in found:
                found[kind.shape].append({"box": list(box), "score": 1.0, "color": kind.colour})
        return found


class RewardsJudge(Judge):
    """Asks every client about every image. A service that fails on an image leaves "value" None: it is for the study to judge how many may.

    Args:
      clients: role -> client; they are not closed. versions: role -> version of the service, part of the result.
    """

    name = "reward services"
    batch = 16  # items in one call

    def __init__(self, clients: Mapping[str, RewardClient], versions: Mapping[str, str]):
        self._clients = clients
        self.settings: dict[str, Any] = {"versions": {role: versions.get(role, "") for role in sorted(clients)}}

    def ask(self, images: Sequence[Image.Image], questions: Sequence[Sequence[Any]]) -> list[list[Any]]:
        """See Judge; a question is {"prompt", "targets"}, a reply role -> {"value", "error", "detail"}."""
        arrays, items = [np.asarray(image) for image in images], [item for (item,) in questions]
        futures = {role: client.score_async(arrays, items) for role, client in self._clients.items()}
        scores = {role: self._clients[role].wait(future) for role, future in futures.items()}
        told = lambda score: {"value": score.value, "error": score.error, "detail": dict(score.detail)}  # noqa: E731
        return [[{role: told(of_role[i]) for role, of_role in scores.items()}] for i in range(len(images))]


class DetectorJudge(Judge):
    """GenEval's judge: one or several replicas of the service `detector` (rewards/services/detector.py); one request per image."""

    name = "detector"

    def __init__(self, urls: Sequence[str]):
        from xomni_jax.rewards.client import RewardClient, RewardServiceError

        self._client = RewardClient("detector", list(urls), chunk=2, timeout=300.0, max_wait=1200.0)
        try:
            versions = self._client.versions()
        except RewardServiceError as error:
            self._client.close()
            raise JudgeUnavailable(str(error)) from error
        if ", " in versions:
            self._client.close()
            raise JudgeUnavailable(f"the replicas of the detector run different models ({versions}); start them alike")
        self.settings: dict[str, Any] = {"version": versions}

    def ask(self, images: Sequence[Image.Image], questions: Sequence[Sequence[Any]]) -> list[list[Any]]:
        """See Judge; a reply is {class: [{"box", "score", "color"}]}."""
        asked = [(n, q) for n, of_image in enumerate(questions) for q in of_image]
        items = [{"prompt": "", "targets": {"detect": question}} for _, question in asked]
        scores = self._client.score([images[n] for n, _ in asked], items)
        replies: list[list[Any]] = [[] for _ in images]
        for (n, _), score in zip(asked, scores, strict=True):
            if score.failed or "detections" not in score.detail:
                raise JudgeUnavailable(f"the detector did not judge an image: {score.error or 'it sent no detections'}")
            replies[n].append(score.detail["detections"])
        return replies

    def close(self) -> None:
        self._client.close()
