"""What `xomni serve` answers: OpenAI's images and chat API, what the page needs beside it, and the page."""

from __future__ import annotations

import asyncio
import base64
import secrets
import sys
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import aclosing
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from xomni_jax.core.http import Refusal
from xomni_jax.data.png import png_bytes
from xomni_jax.rewards.best import best_first, score_prompt
from xomni_jax.rewards.client import RewardClient
from xomni_jax.sampling.logits import GREEDY, SamplingConfig
from xomni_jax.serving import protocol
from xomni_jax.serving.app import Site, sse, until_gone
from xomni_jax.serving.protocol import (
    ChatRequest,
    EditRequest,
    EncodeRequest,
    EntropyRequest,
    ImagesRequest,
    error_body,
    new_id,
    shown_size,
)
from xomni_jax.serving.service import Drawn, ServedModel, Service

T = TypeVar("T")


class App(Site):
    """A service that holds its models.

    Args:
      rewards: clients of running reward services by name, for best_of.
      sampling: what requests that set nothing are drawn with.
      local, log: see `Site`.
    """

    def __init__(self, service: Service, rewards: Mapping[str, RewardClient], sampling: SamplingConfig, local: bool, log: Any = sys.stderr):
        super().__init__(service.options, local, log)
        self.service, self.rewards, self.sampling = service, rewards, sampling
        self.kept: OrderedDict[str, bytes] = OrderedDict()  # images for response_format url
        self.posts |= {
            "/v1/images/generations": self.generate, "/v1/chat/completions": self.chat, "/v1/xomni/encode": self.encode,
            "/v1/xomni/entropy": self.entropy, "/v1/images/edits": self.edit,
        }  # fmt: skip
        self.gets["/v1/xomni/images/{name}.png"] = self.image

    async def load(self) -> None:
        """Loads the models and compiles their first programs."""
        await asyncio.to_thread(self.service.warm)

    async def close(self) -> None:
        """Ends the scheduler's thread."""
        await asyncio.to_thread(self.service.scheduler.close)

    # ---- what a request names ----
    def model(self, name: str | None) -> ServedModel:
        """The model of a request. Refusal (404) naming those there are."""
        return self.service.models[self.known(name)]

    def size(self, served: ServedModel, text: str | None) -> tuple[int, int]:
        """(height, width) of a request. Refusal (400) naming the nearest that are served."""
        size = protocol.parse_size(text) or served.default
        if size not in served.sizes:
            near = ", ".join(map(shown_size, served.nearest(*size)[:3]))
            raise Refusal(400, f"size {shown_size(size)} is not served by {served.name}; the nearest ones: {near}", 0)
        return size

    async def asked(self, request: Any, kind: type[protocol.T]) -> protocol.T:
        """The request of a body."""
        return protocol.decode(await self.body(request), kind)

    # ---- images ----
    async def generate(self, request: Any, responses: Any) -> Any:
        """POST /v1/images/generations."""
        asked = await self.asked(request, ImagesRequest)
        return await self._draw(request, asked, self.size(self.model(asked.model), asked.size), None, responses)

    async def edit(self, request: Any, responses: Any) -> Any:
        """POST /v1/images/edits."""
        fields = await protocol.read_form(await self.body(request, "multipart/form-data"), request.headers)
        asked = protocol.decode_form(fields, EditRequest)
        served = self.model(asked.model)
        image, mask = await asyncio.to_thread(protocol.parse_edit, asked, self.service.options.max_upload_pixels)
        if mask.size != image.size:
            raise Refusal(
                400, f"the mask has {mask.width}x{mask.height} pixels and the image {image.width}x{image.height}; make them alike", 0
            )
        near = served.nearest(image.height, image.width)[0]
        size = near if protocol.parse_size(asked.size) is None else self.size(served, asked.size)
        known_YX = await self.service.known_codes(
            served, image.resize(size[::-1], Image.Resampling.BICUBIC), mask.resize(size[::-1], Image.Resampling.BOX)
        )
        return await self._draw(request, asked, size, known_YX, responses)

    async def _draw(self, request: Any, asked: ImagesRequest, size: tuple[int, int], known_YX: np.ndarray | None, responses: Any) -> Any:
        served, limit = self.model(asked.model), self.service.options.max_images
        sampling, n = asked.sampling(self.sampling), asked.n or 1
        count = max(n, asked.best_of or n)
        if count > limit:
            raise Refusal(400, f"{count} images are more than the {limit} of one request; ask several times, with another index", 0)
        if asked.best_of and asked.reward not in self.rewards:
            have = ", ".join(self.rewards) or "none: start it with --reward NAME=URL"
            raise Refusal(400, f"best_of needs a reward of this service ({have}); name it in reward", 0)
        served.check_prompt(asked.prompt)
        seed = secrets.randbits(32) if asked.seed is None else asked.seed
        about = {
            "model": served.name,
            "hash": served.hash,
            "seed": seed,
            "size": shown_size(size),
            **{name: getattr(sampling, name) for name in protocol.SETTINGS},
        }
        numbers = range(asked.index, asked.index + count)
        partials = (asked.partial_images or 0) if asked.stream else 0
        images = self.service.draw(served, asked.prompt, size, seed, numbers, sampling, partials, known_YX)
        usage = self._usage(served, asked.prompt, count * (size[0] // served.model.patch) * (size[1] // served.model.patch))
        events = self._images(asked, images, about, usage, _base_url(request), n)
        if asked.stream:
            return await self._stream(request, events, responses)
        data = [fields for _, fields in await until_gone(request, _all(events))]
        data.sort(key=lambda fields: fields.pop("order"))
        entries = [{k: v for k, v in fields.items() if k not in ("type", "created_at", "usage", "size", *_FIXED)} for fields in data]
        return responses.JSONResponse({"created": int(time.time()), "data": entries, "size": about["size"], **_FIXED, "usage": usage})

    async def _images(
        self, asked: ImagesRequest, images: AsyncIterator[Drawn], about: dict[str, Any], usage: dict[str, Any], base: str, n: int
    ) -> AsyncIterator[tuple[str, dict[str, Any]]]:
        """Events of OpenAI's streams, (type, fields): partial images, and those that are complete; with best_of the best at the end."""
        done: list[Drawn] = []
        async with aclosing(images):
            async for drawn in images:
                if drawn.partial < 0 and asked.best_of:
                    done.append(drawn)
                if drawn.partial >= 0 or not asked.best_of:
                    yield await self._event(asked, drawn, about, usage, base, drawn.index)
        if asked.best_of:
            done.sort(key=lambda drawn: drawn.index)
            client = self.rewards[asked.reward]
            scores = await asyncio.to_thread(score_prompt, client, [drawn.image for drawn in done], asked.prompt)
            for place, i in enumerate(best_first(scores)[:n]):
                kind, fields = await self._event(asked, done[i], about, usage, base, place)
                yield kind, fields | {"reward": {"name": asked.reward, "value": scores[i].value, "error": scores[i].error or None}}

    async def _event(
        self, asked: ImagesRequest, drawn: Drawn, about: dict[str, Any], usage: dict[str, Any], base: str, order: int
    ) -> tuple[str, dict[str, Any]]:
        complete, index = drawn.partial < 0, asked.index + drawn.index
        file = await asyncio.to_thread(png_bytes, drawn.image, asked.prompt, about | {"index": index} if complete else None)
        fields: dict[str, Any] = {"created_at": int(time.time()), "size": about["size"], **_FIXED, "seed": about["seed"], "index": index}
        if complete and asked.response_format == "url":
            name = new_id("image")
            self.kept[name] = file
            while len(self.kept) > self.service.options.keep_images:
                self.kept.popitem(last=False)
            fields["url"] = f"{base}v1/xomni/images/{name}.png"
        else:
            fields["b64_json"] = base64.b64encode(file).decode()
        kind = "image_edit" if isinstance(asked, EditRequest) else "image_generation"
        if not complete:
            return f"{kind}.partial_image", fields | {"partial_image_index": drawn.partial}
        self.counts["images"] += 1
        if asked.return_codes:
            fields |= {"codes": drawn.codes_YX.tolist(), "logp": [[round(x, 4) for x in row] for row in drawn.logp_YX.tolist()]}
        return f"{kind}.completed", fields | {"usage": usage, "order": order}

    def _usage(self, served: ServedModel, prompt: str, output: int) -> dict[str, Any]:
        text = len(served.model.tokenizer.encode_text(prompt))
        details = {"image_tokens": 0, "text_tokens": text}
        return {"input_tokens": text, "output_tokens": output, "total_tokens": text + output, "input_tokens_details": details}

    async def _stream(self, request: Any, events: AsyncIterator[tuple[str, dict[str, Any]]], responses: Any) -> Any:
        """Server-sent events. What is refused before the first one is an answer of its own status."""
        first = await until_gone(request, anext(events))

        async def lines() -> AsyncIterator[str]:
            async with aclosing(events):
                try:
                    yield _line(*first)
                    async for event in events:
                        yield _line(*event)
                except Refusal as refusal:
                    yield sse("error", error_body(*refusal.args[:2]))

        return responses.StreamingResponse(lines(), media_type="text/event-stream")

    # ---- answers ----
    async def chat(self, request: Any, responses: Any) -> Any:
        """POST /v1/chat/completions."""
        asked = await self.asked(request, ChatRequest)
        served, limit = self.model(asked.model), self.service.options.max_answer_tokens
        most = asked.max_completion_tokens or asked.max_tokens or limit
        if most > limit:
            raise Refusal(400, f"an answer of {most} tokens is more than the {limit} of this service; set max_tokens lower", 0)
        if asked.messages[-1].role != "user":
            raise Refusal(400, "the last message must be the user's; add a question", 0)
        turns = await asyncio.to_thread(self._turns, asked)
        sampling = GREEDY
        if asked.temperature:
            sampling = SamplingConfig(asked.temperature, 0, 1.0 if asked.top_p is None else asked.top_p, 0.0)
        seed = secrets.randbits(32) if asked.seed is None else asked.seed
        answer = self.service.answer(served, turns, most, seed, sampling)
        shared = {"id": new_id("chatcmpl"), "created": int(time.time()), "model": served.name}
        prompt_tokens = sum(len(served.model.tokenizer.encode_text(p)) for _, content in turns for p in content if isinstance(p, str))
        if asked.stream:
            usage = bool(asked.stream_options and asked.stream_options.include_usage)
            return await self._stream(request, self._chunks(answer, shared, prompt_tokens, usage), responses)
        parts = await until_gone(request, _all(answer))
        text, tokens, ended = "".join(new for new, *_ in parts), *parts[-1][1:]
        self.counts["answers"] += 1
        choice = {"index": 0, "message": {"role": "assistant", "content": text, "refusal": None}, "logprobs": None}
        choice["finish_reason"] = "stop" if ended else "length"
        return responses.JSONResponse(
            shared | {"object": "chat.completion", "choices": [choice], "usage": _chat_usage(prompt_tokens, tokens)}
        )

    def _turns(self, asked: ChatRequest) -> list[tuple[str, list[Any]]]:
        """Roles with their texts and images. A text behind an image begins on a new line, as the model learned it."""
        turns, images, limit = [], 0, self.service.options.max_upload_pixels
        for message in asked.messages:
            parts = [protocol.TextPart(message.content)] if isinstance(message.content, str) else message.content
            content: list[Any] = []
            for part in parts:
                if isinstance(part, protocol.TextPart):
                    content.append("\n" * bool(content and isinstance(content[-1], Image.Image)) + part.text)
                else:
                    if message.role != "user":
                        raise Refusal(400, f"an image in a message of the {message.role}; only the user may show images", 0)
                    images += 1
                    content.append(protocol.parse_image(part.image_url.url, limit))
            turns.append((message.role, content))
        if images > 4:
            raise Refusal(400, f"{images} images in one conversation, at most 4 are taken; leave some out", 0)
        if not "".join(part for part in turns[-1][1] if isinstance(part, str)).strip():
            raise Refusal(400, "the last message holds no question; ask something", 0)
        return turns

    async def _chunks(
        self, answer: AsyncIterator[tuple[str, int, bool]], shared: dict[str, Any], prompt_tokens: int, usage: bool
    ) -> AsyncIterator[tuple[str, dict[str, Any]]]:
        shared = shared | {"object": "chat.completion.chunk"}
        chunk = lambda delta, why=None: ("", shared | {"choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": why}]})
        last, role = ("", 0, False), {"role": "assistant"}
        async with aclosing(answer):
            async for last in answer:
                yield chunk(role | {"content": last[0]})
                role = {}
        _, tokens, ended = last
        self.counts["answers"] += 1
        yield chunk({}, "stop" if ended else "length")
        if usage:
            yield "", shared | {"choices": [], "usage": _chat_usage(prompt_tokens, tokens)}
        yield "", {}

    # ---- what the page needs beside OpenAI's API ----
    async def encode(self, request: Any, responses: Any) -> Any:
        """POST /v1/xomni/encode."""
        asked = await self.asked(request, EncodeRequest)
        served = self.model(asked.model)
        image = await asyncio.to_thread(protocol.parse_image, asked.image, self.service.options.max_upload_pixels)
        size = served.nearest(image.height, image.width)[0] if asked.reconstruct else None
        codes_YX = await self.service.encode(served, image, size)
        told: dict[str, Any] = {"model": served.name, "codes": codes_YX.tolist()}
        if asked.reconstruct:
            if asked.prompt:
                served.check_prompt(asked.prompt)
            drawn = await self.service.decode(served, codes_YX, asked.prompt, asked.seed)
            told |= {"size": shown_size(size), "b64_json": base64.b64encode(png_bytes(drawn)).decode()}
        return responses.JSONResponse(told)

    async def entropy(self, request: Any, responses: Any) -> Any:
        """POST /v1/xomni/entropy."""
        asked = await self.asked(request, EntropyRequest)
        served = self.model(asked.model)
        if (order := served.model.config("transformer").order) != "raster":
            raise Refusal(
                400, f"{served.name} draws codes in the order {order}, of which an image does not tell which it was; use another", 0
            )
        served.check_prompt(asked.prompt)
        codes_YX = protocol.parse_codes(asked.codes, served.model.config("siglip_vq").codebook_size)
        patch = served.model.patch
        self.size(served, f"{codes_YX.shape[1] * patch}x{codes_YX.shape[0] * patch}")
        entropy_YX = await self.service.entropy(served, asked.prompt, codes_YX)
        return responses.JSONResponse({"model": served.name, "entropy": [[round(x, 4) for x in row] for row in entropy_YX.tolist()]})

    def about_models(self) -> dict[str, dict[str, Any]]:
        """See `Site`."""
        return {name: self._about(served) for name, served in self.service.models.items()}

    def _about(self, served: ServedModel) -> dict[str, Any]:
        o = self.service.options
        own = {
            "sizes": [shown_size(size) for size in served.sizes], "size": shown_size(served.default), "patch": served.model.patch,
            "hash": served.hash if self.status == "ok" else None, "prompt_tokens": served.prompt_tokens, "max_images": o.max_images,
            "rewards": list(self.rewards), "sampling": {name: getattr(self.sampling, name) for name in protocol.SETTINGS},
        }  # fmt: skip
        return {
            "id": served.name,
            "object": "model",
            "created": int(time.time() - time.monotonic() + self.started),
            "owned_by": "xomni",
            "xomni": own,
        }

    async def image(self, request: Any, responses: Any) -> Any:
        """GET /v1/xomni/images/{name}.png; whoever knows the name may have it."""
        file = self.kept.get(request.path_params["name"])
        if file is None:
            raise Refusal(404, "this image is not kept any more; ask for b64_json to have it at once", 0)
        return responses.Response(file, media_type="image/png")

    def condition(self) -> dict[str, Any]:
        """See `Site`; with what waits and runs."""
        return super().condition() | {"queue": self.service.scheduler.waiting, "running": self.service.scheduler.running}

    def numbers(self) -> Iterable[tuple[str, str, float]]:
        """See `Site`."""
        s = self.service.scheduler
        yield from ((f"{name}_total", "counter", self.counts[name]) for name in ("images", "answers"))
        yield from (("tokens_total", "counter", s.tokens), ("busy_seconds_total", "counter", round(s.seconds_busy, 3)))
        yield from (("queue", "gauge", s.waiting), ("running", "gauge", s.running))


_FIXED = {"quality": "auto", "background": "opaque", "output_format": "png"}


def _chat_usage(prompt: int, answer: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


def _line(kind: str, fields: dict[str, Any]) -> str:
    """An event of a stream; that of an image holds its type, too."""
    if kind.startswith("image"):
        fields = {"type": kind} | {name: value for name, value in fields.items() if name != "order"}
    return sse(kind, fields)


def _base_url(request: Any) -> str:
    """The address that the client knows, which a front tells."""
    host = request.headers.get("x-forwarded-host")
    return f"{request.headers.get('x-forwarded-proto', 'http')}://{host}/" if host else str(request.base_url)


async def _all(events: AsyncIterator[T]) -> list[T]:
    async with aclosing(events):
        return [event async for event in events]
