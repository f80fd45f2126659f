"""The wire format between trainer and scorers: schema 1, as msgpack or as JSON with base64 images.

Request:  {"schema": 1, "id": str, "images": [PNG, JPEG or WebP bytes], "items": [{"prompt": str, "targets": {...}}]}
Response: {"schema": 1, "id": str, "scorer": str, "scores": [float | null], "errors": [str | null], "details": [{...}]}
Health:   the fields of `Health`, always as JSON.

A null score with an error is a failure; a null score without one means that the scorer does not apply to the item. Neither is ever
written as 0. Both sides validate whatever arrives: types while decoding, sizes and counts afterwards. Unknown fields are ignored.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypedDict, TypeVar

import msgspec
import numpy as np
from PIL import Image

from xomni_jax.data.images import TooManyPixels, UnreadableImage, read_image

SCHEMA = 1
MSGPACK = "application/msgpack"
JSON = "application/json"
_CODECS = {MSGPACK: msgspec.msgpack, JSON: msgspec.json}
T = TypeVar("T")


class ProtocolError(ValueError):
    """A message does not follow the schema. One sentence; `status` is the HTTP status that answers it."""

    status = 400


class TooLarge(ProtocolError):
    """A message is well formed but over a limit."""

    status = 413


class Item(TypedDict):
    """What one image was asked to be: its prompt, and per kind of reward what to look for, such as {"text": ["OPEN"]}."""

    prompt: str
    targets: dict[str, Any]


class Score(msgspec.Struct, frozen=True, omit_defaults=True):
    """The outcome for one image: a value, or an error, or neither when the scorer does not apply to the item.

    Attributes:
      value: the reward, always finite; None when there is none.
      error: why the image could not be scored; its rollout is left out of its group.
      detail: what explains the value in a report, as JSON types: recognised text, boxes, single checks.
    """

    value: float | None
    error: str | None = None
    detail: dict[str, Any] = {}

    @property
    def failed(self) -> bool:
        """The image could not be scored."""
        return self.error is not None

    @property
    def applies(self) -> bool:
        """False when the item holds nothing that this reward judges."""
        return self.value is not None or self.failed

    def checked(self) -> Score:
        """This score in Python's own types; a failure when the value is not finite. TypeError when the detail has no form in JSON."""
        detail = msgspec.to_builtins(self.detail, str_keys=True, enc_hook=_plain)
        if self.failed or self.value is None:
            return Score(None, self.error, detail)
        if not math.isfinite(self.value):
            return Score(None, f"the scorer gave {self.value}, which is not finite", detail)
        return Score(float(self.value), None, detail)


class Request(msgspec.Struct, kw_only=True):
    """Images (encoded files) and their items; `items[i]` belongs to `images[i]`."""

    schema: Literal[1]
    id: Annotated[str, msgspec.Meta(max_length=256)]
    images: list[bytes]
    items: list[Item]


class Response(msgspec.Struct, kw_only=True):
    """One score, error and detail per image of the request, in its order."""

    schema: Literal[1]
    id: str
    scorer: str
    scores: list[float | None]
    errors: list[str | None]
    details: list[dict[str, Any]]


@dataclass(frozen=True)
class Limits:
    """What a service accepts. Pixels are counted from the file's header, before any of them is decoded."""

    max_images: int = 256
    max_image_bytes: int = 8 << 20
    max_pixels: int = 2048 * 2048
    max_aspect_ratio: float = 16.0  # of an image's long side to its short one: scorers enlarge low images
    max_prompt_chars: int = 8192
    max_target_chars: int = 16384
    max_target_depth: int = 32  # far from the depth at which Python's own recursion ends
    max_body_bytes: int = 128 << 20


class Health(msgspec.Struct, kw_only=True):
    """State of a service. Counts are of images since the start, except `requests` and `rejected`, which are of requests.

    Attributes:
      scorer, version: which scorer answers, and what its values depend on (model, formula).
      queue: images accepted and not yet scored.
      busy_seconds: summed durations of the requests.
    """

    status: str = "ok"
    schema: int
    scorer: str
    version: str = ""
    workers: int = 0
    uptime_seconds: float = 0.0
    requests: int = 0
    scored: int = 0
    not_applicable: int = 0
    failed: int = 0
    rejected: int = 0
    queue: int = 0
    busy_seconds: float = 0.0
    limits: Limits = Limits()


def encode(message: msgspec.Struct, content_type: str = MSGPACK) -> bytes:
    """Bytes of a message in either form."""
    return _CODECS[content_type].encode(message)


def decode(body: bytes | bytearray, content_type: str, kind: type[T]) -> T:
    """A message of type `kind`. ProtocolError when the body is anything else."""
    if content_type not in _CODECS:
        raise ProtocolError(f"content type {content_type[:80]!r} is not supported; send {MSGPACK} or {JSON}")
    try:
        return _CODECS[content_type].decode(body, type=kind)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        name = f"{kind.__name__.lower()} of schema {SCHEMA} in {content_type}"
        raise ProtocolError(f"the body is not a valid {name}: {error}") from error


def media_type(headers: Mapping[str, str]) -> str:
    """The content type of a request or an answer, without its parameters."""
    return headers.get("content-type", "").partition(";")[0].strip().lower()


def read_request(body: bytes | bytearray, content_type: str = MSGPACK, limits: Limits = Limits()) -> Request:
    """A validated request. ProtocolError (400) when malformed, TooLarge (413) when over `limits`."""
    _limit("the request", len(body), limits.max_body_bytes, "bytes; send fewer images at once")
    request = decode(body, content_type, Request)
    if len(request.images) != len(request.items):
        raise ProtocolError(f"there are {len(request.images)} images but {len(request.items)} items; send one item per image")
    _limit("the request", len(request.images), limits.max_images, "images; send smaller chunks")
    for n, (image, item) in enumerate(zip(request.images, request.items)):
        _limit(f"images[{n}]", len(image), limits.max_image_bytes, "bytes")
        _limit(f"the prompt of items[{n}]", len(item["prompt"]), limits.max_prompt_chars, "characters")
        if _deeper(item["targets"], limits.max_target_depth):
            raise ProtocolError(f"items[{n}] has targets that are nested more than {limits.max_target_depth} deep")
        try:
            size = len(json.dumps(item["targets"]))
        except (TypeError, ValueError) as error:
            raise ProtocolError(f"items[{n}] has targets that JSON cannot express") from error
        _limit(f"the targets of items[{n}]", size, limits.max_target_chars, "characters")
    return request


def write_response(id: str, scorer: str, scores: Sequence[Score], content_type: str = MSGPACK) -> bytes:
    """Bytes of the answer to the request `id`."""
    values, errors, details = ([getattr(s, name) for s in scores] for name in ("value", "error", "detail"))
    return encode(Response(schema=SCHEMA, id=id, scorer=scorer, scores=values, errors=errors, details=details), content_type)


def read_response(body: bytes, content_type: str, id: str, scorer: str, count: int) -> list[Score]:
    """The scores of `scorer` for the `count` images of request `id`. ProtocolError when the body is anything else."""
    response = decode(body, content_type, Response)
    if response.id != id:
        raise ProtocolError(f"the answer belongs to request {response.id[:256]!r}, not to {id!r}")
    if response.scorer != scorer:
        raise ProtocolError(f"scorer {response.scorer[:256]!r} answered instead of {scorer!r}")
    for name in ("scores", "errors", "details"):
        if len(getattr(response, name)) != count:
            raise ProtocolError(f"the answer has {len(getattr(response, name))} {name} for {count} images")
    return [Score(*row).checked() for row in zip(response.scores, response.errors, response.details)]


def encode_image(image: np.ndarray | Image.Image) -> bytes:
    """PNG bytes of a uint8 [Y, X, 3] image, fast rather than small. ValueError for other arrays."""
    if not isinstance(image, Image.Image):
        image = np.asarray(image)
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3 or not image.size:
            raise ValueError(f"an image to score must be a non-empty uint8 array [Y, X, 3], got {image.dtype} {list(image.shape)}")
        image = Image.fromarray(image)
    out = io.BytesIO()
    image.convert("RGB").save(out, "PNG", compress_level=1)
    return out.getvalue()


def decode_image(data: bytes, limits: Limits = Limits()) -> np.ndarray:
    """uint8 [Y, X, 3] of an image file; the size in its header is checked first. ProtocolError when unreadable, TooLarge when too big."""
    try:
        # As stored: a scorer sees the pixels that were sent, as the published scorers do.
        image = read_image(data, as_stored=True, max_pixels=limits.max_pixels, formats=("PNG", "JPEG", "WEBP"))
    except UnreadableImage as error:
        kind = TooLarge if isinstance(error, TooManyPixels) else ProtocolError
        raise kind(f"the image cannot be read: {error}") from error
    if max(image.size) > limits.max_aspect_ratio * min(image.size):
        raise TooLarge(f"the image has {image.width} x {image.height} pixels, the limit is {limits.max_aspect_ratio:g} to 1")
    return np.array(image)


def _limit(what: str, size: int, limit: int, unit: str) -> None:
    if size > limit:
        raise TooLarge(f"{what} has {size}, over the limit of {limit} {unit}")


def _deeper(value: Any, depth: int) -> bool:
    """Whether lists and objects are nested more than `depth` deep."""
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return depth < 0 or any(_deeper(v, depth - 1) for v in inside)


def _plain(value: Any) -> Any:
    """A numpy number or array as Python numbers."""
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    raise TypeError(f"the detail holds a {type(value).__name__}, which has no form in JSON")
