"""The wire format between trainer and scorers: schema 1, as msgpack or as JSON with base64 images. What comes in is checked.

Request:  {"schema": 1, "id": str, "images": [PNG or JPEG bytes], "items": [{"prompt": str, "targets": {...}}]}
Response: {"schema": 1, "id": str, "scorer": str, "scores": [float | null], "errors": [str | null], "details": [{...}]}

A null score with an error could not be scored; a null score without one does not apply to its item. Neither is ever written as 0.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgpack
import numpy as np
from PIL import Image

SCHEMA = 1
MSGPACK = "application/msgpack"
JSON = "application/json"


class ProtocolError(ValueError):
    """A message is not what the schema says. One sentence; `status` is the HTTP status that answers it."""

    status = 400


class TooLarge(ProtocolError):
    """A message is well formed but over a limit."""

    status = 413


@dataclass(frozen=True)
class Limits:
    """What a service accepts. Pixels are judged from the file header, before any of them is decoded."""

    max_images: int = 256
    max_image_bytes: int = 8 << 20
    max_pixels: int = 2048 * 2048
    max_prompt_chars: int = 8192
    max_target_chars: int = 16384
    max_body_bytes: int = 128 << 20


@dataclass(frozen=True)
class Request:
    """Images (encoded files) and what each was asked to be; `items[i]` belongs to `images[i]`."""

    id: str
    images: list[bytes]
    items: list[dict[str, Any]]


@dataclass(frozen=True)
class Response:
    """One score, error and detail per image of the request, in its order."""

    id: str
    scorer: str
    scores: list[float | None]
    errors: list[str | None]
    details: list[dict[str, Any]] = field(default_factory=list)


def encode_request(request: Request, content_type: str = MSGPACK) -> bytes:
    """Bytes of a request in either form."""
    images = request.images if content_type == MSGPACK else [base64.b64encode(i).decode("ascii") for i in request.images]
    return _pack({"schema": SCHEMA, "id": request.id, "images": images, "items": request.items}, content_type)


def decode_request(body: bytes, content_type: str = MSGPACK, limits: Limits = Limits()) -> Request:
    """A checked request. ProtocolError (400) when malformed, TooLarge (413) when over `limits`."""
    if len(body) > limits.max_body_bytes:
        raise TooLarge(f"the request has {len(body)} bytes, the limit is {limits.max_body_bytes}; send fewer images at once")
    message = _unpack(body, content_type, ("id", "images", "items"))
    images, items = message["images"], message["items"]
    if not isinstance(images, list) or not isinstance(items, list):
        raise ProtocolError("'images' and 'items' must be lists")
    if len(images) != len(items):
        raise ProtocolError(f"there are {len(images)} images but {len(items)} items; send one item per image")
    if len(images) > limits.max_images:
        raise TooLarge(f"the request has {len(images)} images, the limit is {limits.max_images}; send smaller chunks")
    if content_type == JSON:
        images = [_from_base64(i, n) for n, i in enumerate(images)]
    for n, (image, item) in enumerate(zip(images, items)):
        _check_image(image, n, limits)
        _check_item(item, n, limits)
    return Request(message["id"], images, items)


def encode_response(response: Response, content_type: str = MSGPACK) -> bytes:
    """Bytes of a response in either form."""
    return _pack({"schema": SCHEMA, **vars(response)}, content_type)


def decode_response(body: bytes, content_type: str, expect_id: str, expect_count: int) -> Response:
    """A checked response to the request `expect_id` of `expect_count` images. ProtocolError for anything else."""
    message = _unpack(body, content_type, ("id", "scorer", "scores", "errors", "details"))
    if message["id"] != expect_id:
        raise ProtocolError(f"the answer belongs to request {message['id']!r}, not to {expect_id!r}")
    for key in ("scores", "errors", "details"):
        if not isinstance(message[key], list) or len(message[key]) != expect_count:
            count = len(message[key]) if isinstance(message[key], list) else "no list of"
            raise ProtocolError(f"the answer has {count} {key} for {expect_count} images")
    for n, (score, error, detail) in enumerate(zip(message["scores"], message["errors"], message["details"])):
        if not (score is None or (isinstance(score, (int, float)) and not isinstance(score, bool))):
            raise ProtocolError(f"scores[{n}] is {type(score).__name__}, not a number or null")
        if not (error is None or isinstance(error, str)):
            raise ProtocolError(f"errors[{n}] is {type(error).__name__}, not a string or null")
        if not isinstance(detail, dict):
            raise ProtocolError(f"details[{n}] is {type(detail).__name__}, not a map")
    if not isinstance(message["scorer"], str):
        raise ProtocolError("'scorer' must be a string")
    return Response(expect_id, message["scorer"], message["scores"], message["errors"], message["details"])


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
    """uint8 [Y, X, 3] of an image file; the header is judged first. ProtocolError when unreadable, TooLarge when too big."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is ours and stricter
            image = Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP"))
        width, height = image.size
        if width * height <= limits.max_pixels:
            return np.array(image.convert("RGB"))
    except Image.DecompressionBombError as error:  # Pillow's own limit, far above ours
        raise TooLarge(f"the image has too many pixels, the limit is {limits.max_pixels} in all") from error
    except (OSError, SyntaxError, ValueError, EOFError, MemoryError) as error:
        raise ProtocolError(f"the image cannot be read as PNG, JPEG or WebP ({type(error).__name__})") from error
    raise TooLarge(f"the image has {width} x {height} pixels, the limit is {limits.max_pixels} in all")


def _pack(message: dict[str, Any], content_type: str) -> bytes:
    if content_type == MSGPACK:
        return msgpack.packb(message, use_bin_type=True)
    return json.dumps(message).encode("utf-8")


def _unpack(body: bytes, content_type: str, keys: Sequence[str]) -> dict[str, Any]:
    if content_type not in (MSGPACK, JSON):
        raise ProtocolError(f"content type {content_type!r} is not spoken here; send {MSGPACK} or {JSON}")
    try:
        message = msgpack.unpackb(body, raw=False) if content_type == MSGPACK else json.loads(body)
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
        raise ProtocolError(f"the body is not valid {content_type} ({type(error).__name__})") from error
    if not isinstance(message, dict):
        raise ProtocolError(f"the body is a {type(message).__name__}, not a map")
    if message.get("schema") != SCHEMA:
        raise ProtocolError(f"schema {message.get('schema')!r} is not supported; this side speaks schema {SCHEMA}")
    missing = [k for k in keys if k not in message]
    if missing:
        raise ProtocolError(f"the message lacks {', '.join(missing)}")
    if not isinstance(message["id"], str) or len(message["id"]) > 256:
        raise ProtocolError("'id' must be a string of at most 256 characters")
    return message


def _from_base64(text: Any, n: int) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, TypeError, ValueError) as error:
        raise ProtocolError(f"images[{n}] is not base64") from error


def _check_image(image: Any, n: int, limits: Limits) -> None:
    if not isinstance(image, bytes):
        raise ProtocolError(f"images[{n}] is {type(image).__name__}, not the bytes of an image")
    if len(image) > limits.max_image_bytes:
        raise TooLarge(f"images[{n}] has {len(image)} bytes, the limit is {limits.max_image_bytes}")


def _check_item(item: Any, n: int, limits: Limits) -> None:
    if not isinstance(item, dict) or not isinstance(item.get("prompt"), str) or not isinstance(item.get("targets"), dict):
        raise ProtocolError(f"items[{n}] must be a map with a string 'prompt' and a map 'targets'")
    if len(item["prompt"]) > limits.max_prompt_chars:
        raise TooLarge(f"items[{n}] has a prompt of {len(item['prompt'])} characters, the limit is {limits.max_prompt_chars}")
    try:
        length = len(json.dumps(item["targets"]))
    except (TypeError, ValueError, RecursionError) as error:
        raise ProtocolError(f"items[{n}] has targets that JSON cannot express") from error
    if length > limits.max_target_chars:
        raise TooLarge(f"items[{n}] has targets of {length} characters, the limit is {limits.max_target_chars}")
