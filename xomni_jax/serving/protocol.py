"""What requests may hold: the forms of OpenAI's images and chat API, with our own fields beside them, and its errors."""

from __future__ import annotations

import base64
import binascii
import dataclasses
import io
import re
import secrets
from collections.abc import AsyncIterator, Mapping
from typing import Annotated, Any, Literal, TypeVar

import msgspec
import numpy as np
from msgspec import Meta
from PIL import Image

from xomni_jax.core.http import Refusal
from xomni_jax.data.images import UnreadableImage, read_image
from xomni_jax.sampling.logits import SamplingConfig

Seed = Annotated[int, Meta(ge=0, le=2**32 - 1)]
Prompt = Annotated[str, Meta(min_length=1, max_length=32_000)]
DataURI = Annotated[str, Meta(pattern="^data:image/[a-zA-Z0-9.+-]+;base64,")]
T = TypeVar("T")

# Status -> OpenAI's type of error.
_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class _Strict(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    pass


class _Sampling(_Strict, kw_only=True):
    """How codes are sampled. Default: as the service was started."""

    temperature: Annotated[float, Meta(ge=0, le=100)] | None = None
    top_k: Annotated[int, Meta(ge=0, le=1 << 20)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    guidance: Annotated[float, Meta(ge=0, le=1e4)] | None = None

    def sampling(self, default: SamplingConfig) -> SamplingConfig:
        """The settings of this request. ValueError where they are none."""
        given = {name: getattr(self, name) for name in SETTINGS}
        return dataclasses.replace(default, **{name: value for name, value in given.items() if value is not None})


SETTINGS = _Sampling.__struct_fields__  # of a SamplingConfig, those that a request may set


class ImagesRequest(_Sampling, kw_only=True):
    """POST /v1/images/generations. `size` is WIDTHxHEIGHT; image i depends on (seed, index + i), the prompt and the settings alone."""

    prompt: Prompt
    model: str | None = None
    n: Annotated[int, Meta(ge=1, le=1024)] | None = 1
    size: Annotated[str, Meta(max_length=32)] | None = "auto"
    response_format: Literal["b64_json", "url"] | None = None
    stream: bool | None = False
    partial_images: Annotated[int, Meta(ge=0, le=8)] | None = 0
    seed: Seed | None = None
    index: Annotated[int, Meta(ge=0, le=2**31 - 1)] = 0
    best_of: Annotated[int, Meta(ge=1, le=1024)] | None = None
    reward: str | None = None
    return_codes: bool = False
    # Of OpenAI's models; accepted where they ask for nothing that is not done.
    background: Literal["auto", "opaque"] | None = None
    moderation: Literal["auto", "low"] | None = None
    output_format: Literal["png"] | None = None
    output_compression: Literal[100] | None = None
    quality: Literal["auto", "standard", "low", "medium", "high", "hd"] | None = None
    style: Literal["vivid", "natural"] | None = None
    user: str | None = None


class EditRequest(ImagesRequest, kw_only=True):
    """POST /v1/images/edits, a multipart form: what is transparent in the mask, or white in one that is opaque, is drawn again."""

    image: bytes
    mask: bytes | None = None
    input_fidelity: Literal["low", "high"] | None = None


class _URL(_Strict):
    url: DataURI
    detail: Literal["auto", "low", "high"] | None = None


class ImagePart(_Strict, tag="image_url", tag_field="type"):
    """An image of a message, as a data: URI; no other URL is opened."""

    image_url: _URL


class TextPart(_Strict, tag="text", tag_field="type"):
    """A text of a message."""

    text: str


class Message(_Strict):
    """A turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str | Annotated[list[TextPart | ImagePart], Meta(min_length=1, max_length=64)]
    name: str | None = None


class _StreamOptions(_Strict):
    include_usage: bool = False


class ChatRequest(_Strict, kw_only=True):
    """POST /v1/chat/completions. Greedy unless a temperature is given."""

    messages: Annotated[list[Message], Meta(min_length=1, max_length=64)]
    model: str | None = None
    max_tokens: Annotated[int, Meta(ge=1, le=1 << 20)] | None = None
    max_completion_tokens: Annotated[int, Meta(ge=1, le=1 << 20)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=100)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    seed: Seed | None = None
    stream: bool | None = False
    stream_options: _StreamOptions | None = None
    n: Literal[1] | None = None
    user: str | None = None


class EncodeRequest(_Strict, kw_only=True):
    """POST /v1/xomni/encode: an image's codes, and with `reconstruct` what they look like, at the nearest served size."""

    image: DataURI
    model: str | None = None
    reconstruct: bool = False
    prompt: Annotated[str, Meta(max_length=32_000)] = ""
    seed: Seed = 0


class EntropyRequest(_Strict, kw_only=True):
    """POST /v1/xomni/entropy: how sure the model was of each code of an image of a served size."""

    prompt: Prompt
    codes: Annotated[list[Annotated[list[int], Meta(min_length=1, max_length=1024)]], Meta(min_length=1, max_length=1024)]
    model: str | None = None


def decode(body: bytes, kind: type[T]) -> T:
    """A JSON body as a request. Refusal (400) that names the field and what is wrong with it."""
    try:
        body.decode()
        return msgspec.json.decode(body, type=kind)
    except UnicodeDecodeError:
        raise Refusal(400, "the body is not valid UTF-8; send JSON", 0) from None
    except msgspec.ValidationError as error:
        raise Refusal(400, f"{str(error).replace(' - at `$', ' - at `request')}; see /openapi.json", 0) from None
    except (msgspec.DecodeError, RecursionError) as error:
        raise Refusal(400, f"the body is no JSON ({error}); send an object", 0) from None


async def read_form(body: bytes, headers: Any) -> dict[str, Any]:
    """The fields of a multipart form, text as str and files as bytes. Refusal (400)."""
    from python_multipart.exceptions import FormParserError
    from starlette.formparsers import MultiPartException, MultiPartParser

    async def stream() -> AsyncIterator[bytes]:
        yield body

    try:
        form = await MultiPartParser(headers, stream(), max_files=2, max_fields=64).parse()
        return {name.removesuffix("[]"): x if isinstance(x, str) else await x.read() for name, x in form.items()}
    except (MultiPartException, FormParserError, LookupError, UnicodeDecodeError) as error:
        raise Refusal(400, f"the body is no multipart form of at most two files ({error}); see OpenAI's images.edit", 0) from None


def decode_form(fields: Mapping[str, Any], kind: type[T]) -> T:
    """The fields of a form as a request. Refusal (400) that names the field and what is wrong with it."""
    try:
        return msgspec.convert(fields, kind, strict=False)
    except msgspec.ValidationError as error:
        raise Refusal(400, f"{str(error).replace(' - at `$', ' - at `request')}; see OpenAI's images.edit", 0) from None


def parse_edit(asked: EditRequest, max_pixels: int) -> tuple[Image.Image, Image.Image]:
    """(the image of a request, its mask with white where it is drawn again). Refusal (400) when one cannot be read."""
    try:
        image = read_image(asked.image, max_pixels=max_pixels)
        mask = read_image(asked.mask or asked.image, max_pixels=max_pixels)
        raw = Image.open(io.BytesIO(asked.mask or asked.image))  # readable, as the line above has found
    except UnreadableImage as error:
        raise Refusal(400, f"the image or its mask cannot be read: {error}; send another one", 0) from None
    if raw.has_transparency_data:
        return image, Image.eval(raw.convert("RGBA").getchannel("A"), lambda alpha: 255 * (alpha == 0))
    if asked.mask is None:
        raise Refusal(400, "neither a mask nor an image with transparent parts; send a mask that says what to draw again", 0)
    return image, mask


def parse_size(text: str | None) -> tuple[int, int] | None:
    """(height, width) of "WIDTHxHEIGHT"; None of "auto"."""
    if text in (None, "auto"):
        return None
    found = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", text, re.ASCII)
    if not found:
        raise Refusal(400, f"size {text[:32]!r} is no size; write WIDTHxHEIGHT, such as 64x32, or auto", 0)
    return int(found[2]), int(found[1])


def shown_size(size: tuple[int, int]) -> str:
    """(height, width) -> "WIDTHxHEIGHT"."""
    return f"{size[1]}x{size[0]}"


def parse_image(uri: str, max_pixels: int) -> Image.Image:
    """The image of a data: URI. Refusal (400) when it cannot be read."""
    try:
        data = base64.b64decode(uri.partition(",")[2], validate=True)
        return read_image(data, max_pixels=max_pixels)
    except binascii.Error:
        raise Refusal(400, "the image is not valid base64; send data:image/png;base64,... of the file", 0) from None
    except UnreadableImage as error:
        raise Refusal(400, f"the image cannot be read: {error}; send another one", 0) from None


def parse_codes(codes: list[list[int]], codebook: int) -> np.ndarray:
    """Codes [Y, X]. Refusal (400) where they are none of a model with so many."""
    if len({len(row) for row in codes}) != 1 or not all(0 <= code < codebook for row in codes for code in row):
        raise Refusal(400, f"codes must be rows of one length of whole numbers from 0 to {codebook - 1}; take them from encode", 0)
    return np.array(codes, np.int32)


def error_body(status: int, sentence: str, code: str | None = None) -> dict[str, Any]:
    """An error in OpenAI's form; what clients sent may stand in the sentence, and stays within one line."""
    sentence = " ".join(sentence.split())[:500]
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": sentence, "type": kind, "param": None, "code": code}}


def new_id(prefix: str) -> str:
    """An identifier that nobody can guess."""
    return f"{prefix}-{secrets.token_urlsafe(18)}"


def openapi() -> dict[str, Any]:
    """The service as an OpenAPI description."""
    kinds = (ImagesRequest, ChatRequest, EncodeRequest, EntropyRequest)
    (images, chat, encode, entropy), schemas = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")
    content = lambda schema, *types: {"content": {t: {"schema": schema} for t in types}}
    any_object = content({"type": "object"}, "application/json")
    of = lambda **properties: {"type": "object", "required": list(properties), "properties": properties}
    schemas["Error"] = of(error=of(message={"type": "string"}, type={"type": "string"}))
    error = content({"$ref": "#/components/schemas/Error"}, "application/json")
    refusals = {"400": "malformed", "401": "no token", "404": "no such model", "408": "too slow", "413": "over a limit",
                "415": "not JSON", "429": "busy", "503": "not ready", "504": "not done in time"}  # fmt: skip

    def post(summary: str, request: Any, streams: bool) -> dict[str, Any]:
        types = ("application/json", "text/event-stream") if streams else ("application/json",)
        answers = {"200": {"description": summary} | content({}, *types)} | {c: {"description": why} | error for c, why in refusals.items()}
        return {
            "post": {"summary": summary, "requestBody": {"required": True} | content(request, "application/json"), "responses": answers}
        }

    get = lambda summary, body: {"get": {"summary": summary, "responses": {"200": {"description": summary} | body}}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "xomni serve", "version": "1", "description": __doc__},
        "paths": {
            "/v1/images/generations": post("Images of a prompt", images, True),
            "/v1/chat/completions": post("An answer, also about images", chat, True),
            "/v1/xomni/encode": post("Codes of an image", encode, False),
            "/v1/xomni/entropy": post("Entropy of codes", entropy, False),
            "/v1/models": get("The models", any_object),
            "/health": get("State of the service", any_object),
            "/metrics": get("Counts for Prometheus", content({"type": "string"}, "text/plain")),
        },
        "components": {"schemas": schemas},
    }
