"""The protocols of scoring services: ours, and those of other people's trainers, on the client's and on the service's side.

flow_grpo  pickled dictionaries of JPEG files, also of reward-server, deepgen_rl and verl-omni. Nothing in a pickle is ever called.
unirl      UniRL's JSON, POST /score with base64 images.

Neither can say that a scorer does not apply to an item.
"""

from __future__ import annotations

import base64
import io
import math
import pickle
import pickletools
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from PIL import Image

from xomni_jax.rewards import protocol
from xomni_jax.rewards.protocol import JSON, MSGPACK, SCHEMA, Health, Item, Limits, ProtocolError, Request, Response, Score

PICKLE = "application/octet-stream"


class Wire:
    """Schema 2. Subclasses speak another protocol.

    Attributes:
      path, probe: of the URL, to which images are posted and which tells the state.
    """

    path, probe = "/score", "/health"

    # ---- client ----
    def read_health(self, status: int, body: bytes, scorer: str) -> Health:
        """What a service says about itself. ProtocolError when it cannot score."""
        if status != 200:
            raise ProtocolError(f"HTTP {status}")
        health = protocol.decode(body, JSON, Health)
        if health.status == "loading":
            raise ProtocolError("it is still loading")
        return health

    def write_request(self, request: Request, health: Health) -> tuple[bytes, str]:
        """Body and content type; JSON for a service that does not say that it reads msgpack."""
        content_type = MSGPACK if MSGPACK in health.accepts else JSON
        return protocol.encode(request, content_type), content_type

    def read_response(self, body: bytes, content_type: str, request: Request, scorer: str) -> tuple[list[Score], Response]:
        """Scores in the order of the request. ProtocolError."""
        return protocol.read_response(body, content_type, request, scorer)

    # ---- service ----
    def read_request(self, body: bytes, content_type: str, limits: Limits) -> Request:
        """A validated request. ProtocolError."""
        return protocol.read_request(body, content_type, limits)

    def write_response(self, request: Request, scorer: str, scores: Sequence[Score], content_type: str, **about: Any) -> tuple[bytes, str]:
        """Body and content type of the answer. ProtocolError where the protocol cannot express a failure."""
        return protocol.write_response(request, scorer, scores, content_type, **about), content_type


class _Foreign(Wire):
    """A protocol without request ids, keys and versions: the order of the answer is believed."""

    def response(self, request: Request, scorer: str, scores: list[Score]) -> tuple[list[Score], Response]:
        if len(scores) != len(request.images):
            raise ProtocolError(f"the answer has {len(scores)} scores for {len(request.images)} images")
        values = [score.value for score in scores]
        about = Response(schema=SCHEMA, id=request.id, scorer=scorer, scores=values, errors=[], details=[])
        return [score.checked() for score in scores], about


class FlowGRPO(_Foreign):
    """One dictionary for all services of this family; each reads the keys that it knows."""

    path, probe = "/", "/"

    def read_health(self, status: int, body: bytes, scorer: str) -> Health:
        """These services tell nothing; that something answers must do."""
        if status >= 500:
            raise ProtocolError(f"HTTP {status}")
        return Health(schema=SCHEMA, scorer=scorer)

    def write_request(self, request: Request, health: Health) -> tuple[bytes, str]:
        """JPEG files: some of these services open no others."""
        targets = [item["targets"] for item in request.items]
        prompts = [item["prompt"] for item in request.items]
        message = {"images": [*map(_jpeg, request.images)], "prompts": prompts, "metadata": {}, "meta_datas": targets, "only_strict": False}
        return pickle.dumps(message, protocol=4), PICKLE

    def read_response(self, body: bytes, content_type: str, request: Request, scorer: str) -> tuple[list[Score], Response]:
        """The first of "scores" and "outputs"."""
        answer = read_pickle(body)
        if isinstance(answer, dict) and "error" in answer:
            raise ProtocolError(f"the service failed: {str(answer['error'])[:300]}")
        values = next((answer[k] for k in ("scores", "outputs") if k in answer), None) if isinstance(answer, dict) else None
        if not isinstance(values, list) or not all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values):
            raise ProtocolError('the answer holds no list of numbers under "scores" or "outputs"')
        return self.response(request, scorer, [Score(float(v)) for v in values])

    def read_request(self, body: bytes, content_type: str, limits: Limits) -> Request:
        """Images with "prompts" (one, or one per image) and, for GenEval, "meta_datas" (their targets)."""
        message = read_pickle(body)
        if not isinstance(message, dict):
            raise ProtocolError("the request is no dictionary")
        images, prompts = message.get("images"), message.get("prompts", [""])
        count = len(images) if isinstance(images, list) else 0
        targets = message.get("meta_datas") or [{}] * count
        prompts = prompts * count if isinstance(prompts, list) and len(prompts) == 1 else prompts
        items = [{"prompt": p, "targets": t} for p, t in zip(prompts, targets)] if isinstance(prompts, list) else None
        return _checked({"images": images, "items": items}, limits)

    def write_response(self, request: Request, scorer: str, scores: Sequence[Score], content_type: str, **about: Any) -> tuple[bytes, str]:
        """A status other than 200 where an image has no value: the protocol has no word for it, and 0 would be a lie."""
        if bad := next((score for score in scores if score.value is None), None):
            raise Unanswerable(bad.error or f"{scorer} does not apply to an image")
        values = [score.value for score in scores]
        return pickle.dumps({"scores": values, "outputs": values}, protocol=4), PICKLE


class UniRL(_Foreign):
    """Requests of one turn each, for one reward."""

    def read_health(self, status: int, body: bytes, scorer: str) -> Health:
        """The service's list of rewards must name this one."""
        if status != 200:
            raise ProtocolError(f"HTTP {status}")
        told = protocol.decode(body, JSON, dict[str, Any])
        if (rewards := told.get("rewards")) and scorer not in rewards:
            raise ProtocolError(f"it serves {', '.join(rewards)}, not {scorer}")
        return Health(schema=SCHEMA, scorer=scorer)

    def write_request(self, request: Request, health: Health) -> tuple[bytes, str]:
        """The targets travel as metadata."""
        turns = [
            {
                "history": [{"text": item["prompt"], "image_b64": base64.b64encode(image).decode()}],
                "required_rewards": [request.scorer],
                "metadata": item["targets"],
            }
            for image, item in zip(request.images, request.items)
        ]
        return msgspec.json.encode({"requests": turns}), JSON

    def read_response(self, body: bytes, content_type: str, request: Request, scorer: str) -> tuple[list[Score], Response]:
        """Of the parts of a reward the one of its name, or the first."""
        answer = protocol.decode(body, JSON, _UniRLResponse)
        if len(answer.errors) != len(answer.results):
            raise ProtocolError(f"the answer has {len(answer.errors)} errors for {len(answer.results)} results")
        scores = []
        for parts, errors in zip(answer.results, answer.errors):
            values = parts.get(scorer) or {}
            value = values.get(scorer, next(iter(values.values()), None))
            known = value is not None and math.isfinite(value)
            scores.append(Score(value) if known else Score(None, errors.get(scorer) or "the service gave no value"))
        return self.response(request, scorer, scores)

    def read_request(self, body: bytes, content_type: str, limits: Limits) -> Request:
        """The last turn of each history; its image must be in the request, not in a file or a video."""
        turns = protocol.decode(body, JSON, _UniRLRequest).requests
        try:
            images = [base64.b64decode(turn.history[-1].image_b64, validate=True) for turn in turns]
        except (IndexError, ValueError) as error:
            raise ProtocolError("the last turn of a history has no image in base64") from error
        items = [{"prompt": turn.history[-1].text, "targets": turn.metadata or {}} for turn in turns]
        return _checked({"images": images, "items": items}, limits)

    def write_response(self, request: Request, scorer: str, scores: Sequence[Score], content_type: str, **about: Any) -> tuple[bytes, str]:
        """A score that is missing is named among the errors."""
        results = [{} if s.value is None else {scorer: {scorer: s.value}} for s in scores]
        errors = [{scorer: s.error or "the scorer does not apply"} if s.value is None else {} for s in scores]
        return msgspec.json.encode({"results": results, "errors": errors}), JSON


WIRES: Mapping[str, type[Wire]] = {"xomni": Wire, "flow_grpo": FlowGRPO, "unirl": UniRL}


class Unanswerable(ProtocolError):
    """The protocol has no way to express a failure other than that of the whole request."""

    status = 500


class _Turn(msgspec.Struct):
    text: str = ""
    image_b64: str = ""


class _UniRLItem(msgspec.Struct):
    history: list[_Turn]
    required_rewards: list[str] = []
    metadata: dict[str, Any] | None = None


class _UniRLRequest(msgspec.Struct):
    requests: list[_UniRLItem]


class _UniRLResponse(msgspec.Struct):
    results: list[dict[str, dict[str, float | None]]]
    errors: list[dict[str, str]]


def _checked(message: Mapping[str, Any], limits: Limits) -> Request:
    """A foreign request in our own form, under the same limits."""
    try:
        items = msgspec.convert(message["items"], list[Item])
        images = msgspec.convert(message["images"], list[bytes])
    except msgspec.ValidationError as error:
        raise ProtocolError(f"the request does not hold images and their prompts: {error}") from error
    return protocol.checked_request(Request(schema=SCHEMA, id="", images=images, items=items), limits)


def _jpeg(file: bytes) -> bytes:
    out = io.BytesIO()
    Image.fromarray(protocol.decode_image(file)).save(out, "JPEG", quality=95)
    return out.getvalue()


# ---- pickles ----
_MAX_OPCODES = 200_000
_PLAIN = (
    "PROTO FRAME STOP MARK MEMOIZE BINGET LONG_BINGET BINPUT LONG_BINPUT NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT "
    "SHORT_BINUNICODE BINUNICODE SHORT_BINBYTES BINBYTES EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS EMPTY_TUPLE TUPLE TUPLE1 "
    "TUPLE2 TUPLE3"
).split()
_NUMPY = "GLOBAL STACK_GLOBAL REDUCE BUILD".split()  # of numpy's numbers, which are read by functions of our own


def read_pickle(data: bytes) -> Any:
    """A pickle of plain values and of numpy's numbers. ProtocolError for anything else; nothing that it names is imported or called."""
    try:
        for n, (opcode, _, _) in enumerate(pickletools.genops(data)):
            if n > _MAX_OPCODES:
                raise ProtocolError(f"the pickle has more than {_MAX_OPCODES} parts")
            if opcode.name not in _PLAIN and opcode.name not in _NUMPY:
                raise ProtocolError(f"the pickle holds {opcode.name}, which plain values do not need")
        return _Unpickler(io.BytesIO(data)).load()
    except ProtocolError:
        raise
    except Exception as error:  # noqa: BLE001 - a damaged pickle raises whatever it meets
        raise ProtocolError(f"the body is no pickle that can be read ({type(error).__name__})") from error


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy._core.multiarray", "numpy.core.multiarray") and name == "scalar":
            return _scalar
        if (module, name) == ("numpy", "dtype"):
            return _Dtype
        raise ProtocolError(f"the pickle names {module[:60]}.{name[:60]}; only plain values are read")


class _Dtype:
    """Stands for numpy.dtype: the format of a little-endian float."""

    def __init__(self, code: str, *_: Any):
        self.format = {"f2": "<e", "f4": "<f", "f8": "<d"}[code]

    def __setstate__(self, state: Any) -> None:
        if state[1] != "<":
            raise ValueError("only little-endian numbers are read")


def _scalar(dtype: _Dtype, data: bytes) -> float:
    return struct.unpack(dtype.format, data)[0]
