"""Whether a running service can be trusted with a training run: a built-in set of images, asked in several ways."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import httpx
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from xomni_jax.rewards import protocol
from xomni_jax.rewards.client import RewardClient
from xomni_jax.rewards.protocol import Item, Score
from xomni_jax.rewards.replicas import RewardServiceError

READERS = ("ocr", "tesseract", "got_ocr", "paddle_ocr")
PROMPTED = ("hpsv2", "hpsv3", "pickscore", "clip", "imagereward", "unified_reward", "alignment")
COLOURS = {"red": (215, 40, 40), "blue": (45, 75, 215), "green": (45, 160, 60), "yellow": (240, 210, 50)}
_SIDE, _BATCH = 256, 32
_TOLERANCE = 0.01  # of a scorer's spread: batches of other sizes and GPUs round differently


class Pair(NamedTuple):
    """An image, an item that it fits better, and one that it fits worse; or the other way round, two images and one item."""

    better: tuple[np.ndarray, Item]
    worse: tuple[np.ndarray, Item]


class Finding(NamedTuple):
    """One thing that was checked; `ok` is None for a mere measurement."""

    what: str
    ok: bool | None
    told: str


def check(urls: Sequence[str], **options: Any) -> tuple[str, list[Finding]]:
    """The scorer's name and what was found about the replicas at `urls`. RewardServiceError when none answers."""
    name = scorer_at(urls[0])
    with RewardClient(name, urls, **options) as client:
        health = client.connect()
        findings = [Finding("it answers", True, f"{name}, version {health.version or '?'}, model {health.model_hash[:12] or '-'}")]
        findings += list(_findings(client, name, health))
    return name, findings


def scorer_at(url: str) -> str:
    """What a service calls itself."""
    try:
        answer = httpx.get(url.rstrip("/") + "/health", trust_env=False, timeout=10, verify=url.startswith("https"))
        return protocol.decode(answer.content, protocol.JSON, protocol.Health).scorer
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        raise RewardServiceError(
            f"no reward service answers at {url} ({type(error).__name__}); start it, or correct the address"
        ) from error


def pairs(scorer: str) -> list[Pair]:
    """Cases whose order is known, for a scorer of the package; none for others."""
    if scorer in READERS:
        words = ("OPEN", "GARDEN", "TICKETS", "EXIT")
        asked = lambda word: {"prompt": f'a sign that says "{word}"', "targets": {"text": [word]}}
        return [Pair((sign(word), asked(word)), (sign(word), asked(other))) for word, other in zip(words, words[1:] + words[:1])]
    if scorer == "shapes":
        grounds = {colour: np.full((64, 64, 3), rgb, np.uint8) for colour, rgb in COLOURS.items() if colour != "yellow"}
        asked = lambda colour: {"prompt": "", "targets": {"background": colour}}
        return [Pair((image, asked(c)), (image, asked("red" if c != "red" else "blue"))) for c, image in grounds.items()]
    if scorer == "quality":
        noise = np.random.default_rng(0).normal(0, 25, (_SIDE, _SIDE, 3))
        clean = [disc(colour) for colour in COLOURS]
        empty: Item = {"prompt": "", "targets": {}}
        return [Pair((image, empty), (np.clip(image + noise, 0, 255).astype(np.uint8), empty)) for image in clean]
    if scorer in PROMPTED:
        names = list(COLOURS)
        asked = lambda c: {"prompt": f"a large {c} disc on a white background", "targets": {}, "group": c}
        return [Pair((disc(c), asked(c)), (disc(other), asked(c))) for c, other in zip(names, names[1:] + names[:1])]
    return []


def sign(text: str) -> np.ndarray:
    """Dark text on a light ground."""
    image = Image.new("RGB", (_SIDE, _SIDE // 2), (245, 240, 225))
    ImageDraw.Draw(image).text((_SIDE / 2, _SIDE / 4), text, (30, 30, 40), ImageFont.load_default(44), anchor="mm")
    return np.asarray(image)


def disc(colour: str) -> np.ndarray:
    """A disc on white."""
    image = Image.new("RGB", (_SIDE, _SIDE), "white")
    ImageDraw.Draw(image).ellipse((48, 48, 208, 208), COLOURS[colour])
    return np.asarray(image)


def _findings(client: RewardClient, name: str, health: protocol.Health) -> Iterator[Finding]:
    cases = pairs(name)
    asked = [case for pair in cases for case in pair] or [(disc(c), {"prompt": f"a {c} disc", "targets": {}, "group": c}) for c in COLOURS]
    images, items = [image for image, _ in asked], [item for _, item in asked]
    first = client.score(images, items)
    bad = [score.error for score in first if score.failed]
    yield Finding("every image is scored", not bad, bad[0] if bad else f"{len(first)} images")
    if not bad:
        yield from _repetition(client, images, items, first, health.scope)
    if cases and not bad:
        better, worse = first[::2], first[1::2]
        right = sum(b.value is not None and w.value is not None and b.value > w.value for b, w in zip(better, worse))
        yield Finding("known outcomes", right >= len(cases) - (name in PROMPTED), f"{right} of {len(cases)} pairs in the right order")
    elif not cases:
        yield Finding("known outcomes", None, f"none are built in for {name}")
    if health.scope == "image":
        broken, whole = client.score([b"no image", images[0]], items[:1] * 2)
        told = f"failed: {broken.error}" if broken.failed else f"it got {broken.value}"
        yield Finding("a file that is no image fails alone", broken.failed and not whole.failed, told)
    yield from _speed(client, images, items)


def _repetition(client: RewardClient, images: list[Any], items: list[Item], first: list[Score], scope: str) -> Iterator[Finding]:
    """The same images in another order and one by one, and by every replica alone."""
    turned = client.score(images[::-1], items[::-1])[::-1]
    yield _same("the order does not matter", first, turned)
    if scope == "image":
        yield _same("one by one as in a batch", first, [client.score([image], [item])[0] for image, item in zip(images, items)])
    if len(client.urls) > 1:
        for url in client.urls:
            with RewardClient(client.name, url) as alone:
                yield _same(f"replica {url} agrees", first, alone.score(images, items))


def _same(what: str, first: Sequence[Score], second: Sequence[Score]) -> Finding:
    values = [np.array([np.nan if s.value is None else s.value for s in scores]) for scores in (first, second)]
    if any(s.failed for s in second) or (np.isnan(values[0]) != np.isnan(values[1])).any():
        return Finding(what, False, next((s.error for s in second if s.failed), "it applies to other images"))
    gap = float(np.nanmax(np.abs(values[0] - values[1]), initial=0.0))
    spread = float(np.nanmax(values[0], initial=0.0) - np.nanmin(values[0], initial=0.0))
    return Finding(what, gap <= _TOLERANCE * max(spread, 1e-3), f"largest difference {gap:.2g}")


def _speed(client: RewardClient, images: list[Any], items: list[Item]) -> Iterator[Finding]:
    def seconds(count: int) -> float:
        began = time.perf_counter()
        client.score((images * count)[:count], (items * count)[:count])
        return time.perf_counter() - began

    yield Finding("latency", None, f"{statistics.median(seconds(1) for _ in range(3)) * 1e3:.0f} ms for one image")
    yield Finding("throughput", None, f"{_BATCH / seconds(_BATCH):.3g} images/s in a batch of {_BATCH}")
