"""The wire format: both forms say the same, and nothing malformed or oversized gets through."""

import io
import json

import msgpack
import numpy as np
import pytest
from PIL import Image

from tests.rewards.images import ocr_item, sign
from xomni_jax.rewards import protocol as p

FORMS = (p.MSGPACK, p.JSON)


def request(n=2) -> p.Request:
    return p.Request("r1", [p.encode_image(sign("HI"))] * n, [ocr_item("HI")] * n)


def message(**changes) -> dict:
    return {"schema": 1, "id": "r1", "images": [b"x"], "items": [ocr_item("HI")], **changes}


@pytest.mark.parametrize("form", FORMS)
def test_round_trip(form):
    assert p.decode_request(p.encode_request(request(), form), form) == request()
    answer = p.Response("r1", "ocr", [0.5, None, None], [None, "why", None], [{"text": "你"}, {}, {}])
    assert p.decode_response(p.encode_response(answer, form), form, "r1", 3) == answer


def test_image_round_trip():
    image = sign("HELLO", 24, 72)
    np.testing.assert_array_equal(p.decode_image(p.encode_image(image)), image)
    np.testing.assert_array_equal(p.decode_image(p.encode_image(Image.fromarray(image))), image)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"schema": 2}, "schema 2 is not supported"),
        ({"id": 7}, "'id' must be a string"),
        ({"images": "no"}, "must be lists"),
        ({"items": []}, "1 images but 0 items"),
        ({"images": [3]}, r"images\[0\] is int"),
        ({"items": [{"prompt": "x"}]}, r"items\[0\] must be a map"),
        ({"items": [{"prompt": 3, "targets": {}}]}, r"items\[0\] must be a map"),
        ({"items": [{"prompt": "x", "targets": {"a": b"bytes"}}]}, "JSON cannot express"),
    ],
)
def test_malformed(changes, words):
    with pytest.raises(p.ProtocolError, match=words) as caught:
        p.decode_request(msgpack.packb(message(**changes)), p.MSGPACK)
    assert caught.value.status == 400


@pytest.mark.parametrize(
    "body, form", [(b"\xc1", p.MSGPACK), (b"[1]", p.JSON), (b"{", p.JSON), (b"\xff\xfe", p.JSON), (b"{}", "text/html")]
)
def test_garbage(body, form):
    with pytest.raises(p.ProtocolError):
        p.decode_request(body, form)


def test_missing_field_and_bad_base64():
    with pytest.raises(p.ProtocolError, match="lacks images, items"):
        p.decode_request(json.dumps({"schema": 1, "id": "a"}).encode(), p.JSON)
    with pytest.raises(p.ProtocolError, match=r"images\[0\] is not base64"):
        p.decode_request(json.dumps(message(images=["!!"])).encode(), p.JSON)


@pytest.mark.parametrize(
    "limit, words",
    [
        ({"max_images": 1}, "2 images, the limit is 1"),
        ({"max_image_bytes": 10}, "bytes, the limit is 10"),
        ({"max_prompt_chars": 3}, "prompt of 6 characters"),
        ({"max_target_chars": 5}, "targets of"),
        ({"max_body_bytes": 50}, "the limit is 50"),
    ],
)
def test_limits(limit, words):
    with pytest.raises(p.TooLarge, match=words) as caught:
        p.decode_request(p.encode_request(request()), p.MSGPACK, p.Limits(**limit))
    assert caught.value.status == 413


def test_image_bomb_is_refused_from_its_header():
    """Many megapixels in a few kilobytes; the limit is judged before pixels are decoded."""
    out = io.BytesIO()
    Image.new("1", (9000, 7000)).save(out, "PNG")
    with pytest.raises(p.TooLarge, match="9000 x 7000 pixels"):
        p.decode_image(out.getvalue())


@pytest.mark.parametrize("data", [b"", b"not an image", p.encode_image(sign("HI"))[:60], b"GIF89a" + bytes(40)])
def test_unreadable_image(data):
    with pytest.raises(p.ProtocolError, match="cannot be read"):
        p.decode_image(data)


@pytest.mark.parametrize("image", [np.zeros((4, 4, 3)), np.zeros((4, 4), np.uint8), np.zeros((0, 4, 3), np.uint8)])
def test_encode_refuses_other_arrays(image):
    with pytest.raises(ValueError, match="uint8 array"):
        p.encode_image(image)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"id": "other"}, "belongs to request 'other'"),
        ({"scores": [0.5]}, "1 scores for 2 images"),
        ({"scores": ["0.5", None]}, "not a number"),
        ({"scores": [True, None]}, "not a number"),
        ({"errors": [3, None]}, "not a string"),
        ({"details": [3, {}]}, "not a map"),
        ({"details": None}, "no list of details"),
        ({"scorer": 3}, "'scorer'"),
    ],
)
def test_malformed_response(changes, words):
    good = {"schema": 1, "id": "r1", "scorer": "ocr", "scores": [1, None], "errors": [None, None], "details": [{}, {}]}
    with pytest.raises(p.ProtocolError, match=words):
        p.decode_response(msgpack.packb(good | changes), p.MSGPACK, "r1", 2)
