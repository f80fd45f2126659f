"""Judges: what reads or looks at images, so that a suite's rules can score them. Each is imported when it is opened."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from xomni_jax.evaluation.judges.detections import check_detections
from xomni_jax.evaluation.judges.preparation import ChatOptions, as_shown, is_skipped
from xomni_jax.evaluation.suite import Judge, JudgeUnavailable, SuiteError
from xomni_jax.rewards import chat as chat_models
from xomni_jax.rewards.chat import is_endpoint
from xomni_jax.rewards.chat.messages import ChatUnavailable
from xomni_jax.rewards.scorer import ServiceError

if TYPE_CHECKING:
    from xomni_jax.rewards.chat.messages import ChatModel
    from xomni_jax.rewards.client import RewardClient

CHAT = ("ocr", "vqa", "chat", "letter")  # kinds that a chat model can be
LOCAL = {"ocr": "pp-ocr", "contours": "contours"}  # kind -> its judge in this process
# The judge that the benchmark's published numbers were made with; a result names it beside the one that was used.
OFFICIAL = {
    "ocr": "Qwen2.5-VL-7B-Instruct",
    "vqa": "mPLUG-large fine-tuned for VQA on COCO",
    "detector": "Mask2Former Swin-S (COCO instances) and CLIP ViT-L/14",
}
_CHAT = "MODEL@URL of an OpenAI-compatible endpoint, or a directory with a model that transformers reads, such as Qwen2.5-VL"
HELP = {
    "ocr": f"pp-ocr (local, the default), or {_CHAT}",
    "vqa": f"{_CHAT}; for example Qwen/Qwen2.5-VL-7B-Instruct@http://127.0.0.1:8000/v1",
    "letter": f"{_CHAT}; it is asked which option a reply means where the rules cannot tell, without it such a reply is wrong",
    "detector": "URL of a detector, or several with commas; "
    "start one with: xomni serve-reward detector --detector DIR --clip DIR --port 8003",
    "contours": "contours (local, the default)",
    "chat": _CHAT,
    "measure": "NAME@URL of a scoring service of your own (xomni serve-reward FILE.py:Class); judges/measure.py says what it is asked",
}


def open_judge(kind: str, spec: str | None = None, options: ChatOptions = ChatOptions()) -> Judge:
    """The judge of a kind, as `HELP` says how to name it; None: the local one.

    Args:
      options: how a chat model is asked.

    Raises:
      SuiteError: there is no local one, or `spec` names none of that kind.
      JudgeUnavailable: it does not answer.
    """
    if kind not in HELP:
        raise SuiteError(f"there is no judge of kind {kind!r}; kinds are {', '.join(HELP)}")
    if kind in LOCAL and spec in (None, LOCAL[kind]):
        judge: Judge = PPOCRJudge() if kind == "ocr" else ContoursJudge()
    elif kind in CHAT and spec and (is_endpoint(spec) or Path(spec).is_dir()):
        from xomni_jax.evaluation.judges.chat import ChatJudge

        judge = ChatJudge(open_model(spec), options)
    elif kind == "detector" and spec and spec.startswith(("http://", "https://")):
        judge = DetectorJudge(spec.split(","))
    elif kind == "measure" and spec and is_endpoint(spec):
        from xomni_jax.evaluation.judges.measure import MeasureJudge

        name, _, urls = spec.partition("@")
        judge = MeasureJudge(name, urls.split(","))
    else:
        given = f"--judge {spec}" if spec else "no --judge"
        raise SuiteError(f"a judge of kind {kind!r} is needed and {given} was given; it can be {HELP[kind]}")
    if kind in OFFICIAL:
        judge.settings = judge.settings | {"official judge": OFFICIAL[kind]}
    return judge


def open_model(spec: str) -> ChatModel:
    """The chat model MODEL@URL, or that in a directory in the layout of transformers.

    Raises:
      SuiteError: the directory holds no such model.
      JudgeUnavailable: the endpoint does not answer.
    """
    try:
        return chat_models.open_model(spec)
    except ChatUnavailable as error:
        raise JudgeUnavailable(str(error)) from error
    except ServiceError as error:
        raise SuiteError(str(error)) from error


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
        self.concurrency = 16 * len(urls)
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
        for (n, question), score in zip(asked, scores, strict=True):
            if score.failed:
                raise JudgeUnavailable(f"the detector did not judge an image: {score.error or 'it does not apply'}")
            found = score.detail.get("detections")
            try:
                check_detections(found, question)
            except ValueError as error:
                raise JudgeUnavailable(
                    f"the detector sent a malformed reply: {error}; mend the service, the same command goes on from there"
                ) from None
            replies[n].append(found)
        return replies

    def close(self) -> None:
        self._client.close()
