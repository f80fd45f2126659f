"""Judges: what reads or looks at images, so that a suite's rules can score them. Each is imported when it is opened."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from PIL import Image

from xomni_jax.evaluation.suite import Judge, SuiteError

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
}


def open_judge(kind: str, spec: str | None = None) -> Judge:
    """The judge of a kind ("ocr", "vqa", "detector", "contours"), as `HELP` says how to name it; None: the local one.

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
        from xomni_jax.evaluation.judges.local import ContoursJudge, PPOCRJudge

        return PPOCRJudge() if kind == "ocr" else ContoursJudge()
    model, at, url = (spec or "").rpartition("@")
    if kind in ("ocr", "vqa") and at and model and url.startswith(("http://", "https://")):
        from xomni_jax.evaluation.judges.chat import ChatEndpoint, ChatJudge

        return ChatJudge(ChatEndpoint(model, url))
    if kind == "detector" and spec and not at and spec.startswith(("http://", "https://")):
        from xomni_jax.evaluation.judges.services import DetectorJudge

        return DetectorJudge(spec.split(","))
    given = f"--judge {spec}" if spec else "no --judge"
    raise SuiteError(f"a judge of kind {kind!r} is needed and {given} was given; it can be {HELP[kind]}")


# ---- what judges do to an image before they look at it ----
def is_skipped(image: Image.Image, question: Mapping[str, Any]) -> bool:
    """Whether the question asks to leave out an image that is entirely black; its reply is None."""
    return question.get("black") == "skip" and image.convert("RGB").getextrema() == ((0, 0),) * 3


def format_of(question: Mapping[str, Any]) -> str:
    """The kind of file that the question wants the image to be: PNG, or JPEG with Pillow's defaults."""
    return question.get("format", "PNG")


def encoded(image: Image.Image, kind: str) -> bytes:
    """The image as a file."""
    out = io.BytesIO()
    image.convert("RGB").save(out, kind, **({"compress_level": 1} if kind == "PNG" else {}))
    return out.getvalue()


def as_shown(image: Image.Image, question: Mapping[str, Any]) -> Image.Image:
    """The image after the encoding that the question asks for."""
    kind = format_of(question)
    return image.convert("RGB") if kind == "PNG" else Image.open(io.BytesIO(encoded(image, kind))).convert("RGB")
