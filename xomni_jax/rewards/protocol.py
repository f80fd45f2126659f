"""The wire format between trainer and scorers: schema 2, as msgpack or as JSON with base64 images.

Request:  {"schema": 2, "id": str, "keys": [str], "images": [PNG, JPEG or WebP bytes], "items": [{"prompt": str, "targets": {...}}]}
Response: {"schema": 2, "id": str, "keys": [str], "scorer": str, "scores": [float | null], "errors": [str | null], "details": [{...}]}
Health:   the fields of `Health`, always as JSON.

A null score with an error is a failure; a null score without one means that the scorer does not apply to the item. Neither is ever
written as 0. The answer repeats the key of every image, so that no score can reach another image. Both sides validate whatever arrives:
sizes and counts before anything is built, then types. Unknown fields are ignored. Services also accept schema 1, which has no keys.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NotRequired, TypedDict, TypeVar

import msgspec
import numpy as np
from PIL import Image

from xomni_jax.data.images import TooManyPixels, UnreadableImage, read_image
from xomni_jax.data.png import png_bytes

SCHEMA = 2
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
    """What one image was asked to be: its prompt, and per kind of reward what to look for, such as {"text": ["OPEN"]}.

    `group` is the same for images that are compared with each other: the rollouts of one prompt.
    """

    prompt: str
    targets: dict[str, Any]
    group: NotRequired[str]


class Score(msgspec.Struct, frozen=True, omit_defaults=True):
    """The outcome for one image: a value, or an error, or neither when the scorer does not apply to the item.

    Attributes:
      value: the reward, always finite; None when there is none.
      error: why the image could not be scored; its rollout is left out of its group.
      detail: what explains the value in a report, as JSON types: recognised text, boxes, single checks.
      kind: of a failure that the client found: unanswered (nothing answered for as long as it may wait), refused, invalid (an answer that
        breaks the protocol, or a value out of range); "" where the scorer itself gives the error.
    """

    value: float | None
    error: str | None = None
    detail: dict[str, Any] = {}
    kind: str = ""

    @property
    def failed(self) -> bool:
        """The image could not be scored."""
        return self.error is not None

    @property
    def applies(self) -> bool:
        """False when the item holds nothing that this reward judges."""
        return self.value is not None or self.failed

    def checked(self, range: tuple[float, float] = (-math.inf, math.inf)) -> Score:
        """This score in Python's own types; a failure when the value is not finite or outside of the scorer's range.

        TypeError when the detail has no form in JSON.
        """
        detail = msgspec.to_builtins(self.detail, str_keys=True, enc_hook=_plain)
        if self.failed or self.value is None:
            return Score(None, self.error, detail)
        if not math.isfinite(self.value):
            return Score(None, f"the scorer gave {self.value}, which is not finite", detail, "invalid")
        if not range[0] <= self.value <= range[1]:
            return Score(None, f"the scorer gave {self.value:g}, outside of its range {range[0]:g} to {range[1]:g}", detail, "invalid")
        return Score(float(self.value), None, detail)


class Request(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Images (encoded files) and their items; `items[i]` belongs to `images[i]`.

    Attributes:
      id: of the request; the same again where it is repeated, so that its images are scored once.
      keys: of each image, repeated in the answer.
      scorer: which is asked.
      progress: share of the training that is done.
      state: of the answer to the request before, for a scorer of whole sets that remembers earlier ones; it starts anew without it.
    """

    schema: Literal[1, 2]
    id: Annotated[str, msgspec.Meta(max_length=256)]
    images: list[bytes]
    items: list[Item]
    keys: list[str] = []
    scorer: str = ""
    progress: float | None = None
    state: bytes = b""


class Response(msgspec.Struct, kw_only=True):
    """One score, error and detail per image of the request, by its key; without keys in the order of the request.

    Attributes:
      version, model_hash: what the values depend on, as in `Health`.
      state: what the scorer remembers, to be sent with the next request; only of a scorer of whole sets.
    """

    schema: Literal[1, 2]
    id: str
    scorer: str
    version: str = ""
    model_hash: str = ""
    keys: list[str] = []
    scores: list[float | None]
    errors: list[str | None]
    details: list[dict[str, Any]]
    state: bytes | msgspec.UnsetType = msgspec.UNSET


@dataclass(frozen=True)
class Limits:
    """What a service accepts. Pixels are counted from the file's header, before any of them is decoded."""

    max_images: int = 256
    max_image_bytes: int = 8 << 20
    max_pixels: int = 2048 * 2048
    max_side: int = 4096
    max_aspect_ratio: float = 16.0  # of an image's long side to its short one: scorers enlarge low images
    max_prompt_chars: int = 8192
    max_target_chars: int = 16384
    max_target_depth: int = 32  # far from the depth at which Python's own recursion ends
    max_items_bytes: int = 4 << 20  # of all prompts and targets: what they become in memory is many times as large
    max_body_bytes: int = 128 << 20


class Health(msgspec.Struct, kw_only=True):
    """State of a service. Counts are of images since the start, except `requests` and `rejected`, which are of requests.

    Attributes:
      status: ok, loading, or stuck: a worker has been busy with one slice for longer than it may.
      schema: the newest that it speaks. accepts: content types of requests.
      scorer, version, model_hash: which scorer answers, and what its values depend on (formula, weights).
      scale, range: what a value means, and the smallest and largest one.
      scope: image, group (the images of a group must be in one request) or set (all of them).
      token: requests need the bearer token.
      queue: images accepted and not yet scored.
      busy_seconds: summed durations of the requests.
      slowest_seconds: how long the longest running slice has been with its worker.
    """

    status: str = "ok"
    schema: int
    accepts: tuple[str, ...] = (JSON,)
    scorer: str
    version: str = ""
    model_hash: str = ""
    scale: str = ""
    range: tuple[float, float] = (-1e4, 1e4)
    scope: str = "image"
    token: bool = False
    workers: int = 0
    uptime_seconds: float = 0.0
    requests: int = 0
    repeated: int = 0
    abandoned: int = 0
    scored: int = 0
    not_applicable: int = 0
    failed: int = 0
    rejected: int = 0
    queue: int = 0
    busy_seconds: float = 0.0
    slowest_seconds: float = 0.0
    limits: Limits = Limits()


class _Parts(msgspec.Struct):
    """A request whose long parts are not parsed yet."""

    schema: Literal[1, 2]
    id: Annotated[str, msgspec.Meta(max_length=256)]
    images: msgspec.Raw
    items: msgspec.Raw
    keys: msgspec.Raw = msgspec.Raw(b"")
    scorer: str = ""
    progress: float | None = None
    state: bytes = b""


class _ItemParts(msgspec.Struct):
    prompt: str
    targets: msgspec.Raw
    group: str = ""


def encode(message: msgspec.Struct, content_type: str = MSGPACK) -> bytes:
    """Bytes of a message in either form."""
    return _CODECS[content_type].encode(message)


def decode(body: bytes | bytearray | msgspec.Raw, content_type: str, kind: Any, where: str = "") -> Any:
    """A message of type `kind`, or the part `where` of a request. ProtocolError when the body is anything else."""
    if content_type not in _CODECS:
        raise ProtocolError(f"content type {content_type[:80]!r} is not supported; send {MSGPACK} or {JSON}")
    try:
        return _CODECS[content_type].decode(body, type=kind)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        told, name = str(error), "request" if where or kind is _Parts else kind.__name__.lower()
        if where:
            told = told.replace("`$", f"`$.{where}") if "`$" in told else f"{told} - at `$.{where}`"
        raise ProtocolError(f"the body is not a valid {name} of schema {SCHEMA} in {content_type}: {told}") from error


def slices(items: Sequence[Item], size: int, scope: str = "image") -> list[slice]:
    """Parts of about `size` neighbouring items that a scorer of that scope can judge apart: groups stay whole, and sets."""
    groups = [item.get("group") for item in items]
    apart = lambda n: scope == "image" or scope == "group" and (groups[n] is None or groups[n] != groups[n - 1])
    out, first, last = [], 0, 0
    for end in [*filter(apart, range(1, len(items))), len(items)]:
        if end - first > size and last > first:
            out.append(slice(first, last))
            first = last
        last = end
    return [*out, slice(first, last)] if last > first else out


def media_type(headers: Mapping[str, str]) -> str:
    """The content type of a request or an answer, without its parameters."""
    return headers.get("content-type", "").partition(";")[0].strip().lower()


def read_request(body: bytes | bytearray, content_type: str = MSGPACK, limits: Limits = Limits()) -> Request:
    """A validated request. ProtocolError (400) when malformed, TooLarge (413) when over `limits`.

    Nothing is parsed before its size is known to be allowed: a short body can hold millions of empty lists.
    """
    _limit("the request", len(body), limits.max_body_bytes, "bytes; send fewer images at once")
    parts = decode(body, content_type, _Parts)
    _limit("items", len(parts.items), limits.max_items_bytes, "bytes; send fewer images at once")
    _limit("keys", len(parts.keys), limits.max_items_bytes, "bytes")
    for raw in (parts.images, parts.keys):
        _limit("the request", _count(raw, content_type), limits.max_images, "images; send smaller chunks")
    images = decode(parts.images, content_type, list[bytes], "images")
    items = [_read_item(n, p, content_type, limits) for n, p in enumerate(decode(parts.items, content_type, list[_ItemParts], "items"))]
    keys = decode(parts.keys, content_type, list[str], "keys") if len(parts.keys) else []
    about = {name: getattr(parts, name) for name in ("schema", "id", "scorer", "progress", "state")}
    return checked_request(Request(images=images, items=items, keys=keys, **about), limits)


def checked_request(request: Request, limits: Limits) -> Request:
    """The request. ProtocolError when its parts do not fit together, TooLarge when it is over a limit."""
    images, items, keys = request.images, request.items, request.keys
    if len(images) != len(items):
        raise ProtocolError(f"there are {len(images)} images but {len(items)} items; send one item per image")
    if keys and len(keys) != len(images) or len(set(keys)) != len(keys):
        raise ProtocolError(f"there are {len(set(keys))} different keys for {len(images)} images; send one key per image")
    _limit("the request", len(images), limits.max_images, "images; send smaller chunks")
    for n, (image, item) in enumerate(zip(images, items)):
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


def _count(raw: msgspec.Raw, content_type: str) -> int:
    """How many strings an encoded list holds."""
    if content_type == JSON:
        return bytes(raw).count(b'"') // 2
    head = bytes(memoryview(raw)[:5])
    long = {0xDC: 3, 0xDD: 5}.get(head[0] if head else 0)  # a 16 or 32 bit length follows
    return int.from_bytes(head[1:long]) if long else 0


def _read_item(n: int, parts: _ItemParts, content_type: str, limits: Limits) -> Item:
    _limit(f"the targets of items[{n}]", len(parts.targets), 2 * limits.max_target_chars, "bytes")
    targets = decode(parts.targets, content_type, dict[str, Any], f"items[{n}].targets")
    return {"prompt": parts.prompt, "targets": targets} | ({"group": parts.group} if parts.group else {})


def write_response(request: Request, scorer: str, scores: Sequence[Score], content_type: str = MSGPACK, **about: Any) -> bytes:
    """Bytes of the answer to a request; `about`: the version and model_hash, and the state where there is one."""
    values, errors, details = ([getattr(s, name) for s in scores] for name in ("value", "error", "detail"))
    response = Response(
        schema=request.schema, id=request.id, keys=request.keys, scorer=scorer, scores=values, errors=errors, details=details, **about
    )
    return encode(response, content_type)


def read_response(body: bytes, content_type: str, request: Request, scorer: str) -> tuple[list[Score], Response]:
    """The scores of `scorer` for the images of a request, in its order. ProtocolError when the body is anything else."""
    response, count = decode(body, content_type, Response), len(request.images)
    if response.id != request.id:
        raise ProtocolError(f"the answer belongs to request {response.id[:256]!r}, not to {request.id!r}")
    if response.scorer != scorer:
        raise ProtocolError(f"scorer {response.scorer[:256]!r} answered instead of {scorer!r}")
    for name in ("scores", "errors", "details"):
        if len(getattr(response, name)) != count:
            raise ProtocolError(f"the answer has {len(getattr(response, name))} {name} for {count} images")
    if sorted(response.keys) != sorted(request.keys):
        raise ProtocolError("the answer does not repeat the keys of the images, so its scores may belong to others")
    if odd := next((value for value in response.scores if value is not None and not math.isfinite(value)), None):
        raise ProtocolError(f"the answer holds the score {odd}, which is not finite")
    scores = [Score(*row).checked() for row in zip(response.scores, response.errors, response.details)]
    by_key = dict(zip(response.keys, scores))
    return [by_key[key] for key in request.keys] or scores, response


def encode_image(image: np.ndarray | Image.Image) -> bytes:
    """PNG bytes of a uint8 [Y, X, 3] image. ValueError for other arrays."""
    if not isinstance(image, Image.Image):
        image = np.asarray(image)
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3 or not image.size:
            raise ValueError(f"an image to score must be a non-empty uint8 array [Y, X, 3], got {image.dtype} {list(image.shape)}")
    return png_bytes(image)


def decode_image(data: bytes, limits: Limits = Limits()) -> np.ndarray:
    """uint8 [Y, X, 3] of an image file; the size in its header is checked first. ProtocolError when unreadable, TooLarge when too big."""
    try:
        # As stored: a scorer sees the pixels that were sent, as the published scorers do.
        image = read_image(data, as_stored=True, max_pixels=limits.max_pixels, formats=("PNG", "JPEG", "WEBP"))
    except UnreadableImage as error:
        kind = TooLarge if isinstance(error, TooManyPixels) else ProtocolError
        raise kind(f"the image cannot be read: {error}") from error
    if max(image.size) > limits.max_side:
        raise TooLarge(f"the image has {image.width} x {image.height} pixels, the limit is {limits.max_side} a side")
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
