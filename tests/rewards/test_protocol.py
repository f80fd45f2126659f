"""The wire format: both forms say the same, and nothing malformed or oversized gets through."""

import base64
import io
import json
import tracemalloc

import msgpack
import msgspec
import numpy as np
import pytest
from PIL import Image

from tests.rewards.images import ocr_item, sign
from xomni_jax.rewards import protocol as p

FORMS = (p.MSGPACK, p.JSON)


def request(n=2) -> p.Request:
    keys = [f"k{i}" for i in range(n)]
    return p.Request(schema=2, id="r1", images=[p.encode_image(sign("HI"))] * n, items=[ocr_item("HI")] * n, keys=keys)


def message(**changes) -> dict:
    return {"schema": 1, "id": "r1", "images": [b"x"], "items": [ocr_item("HI")], **changes}


@pytest.mark.parametrize("form", FORMS)
def test_round_trip(form):
    assert p.read_request(p.encode(request(), form), form) == request()
    scores = [p.Score(0.5, None, {"text": "你"}), p.Score(None, "why"), p.Score(None)]
    answer = p.write_response(request(3), "ocr", scores, form, version="v", model_hash="h")
    told, response = p.read_response(answer, form, request(3), "ocr")
    assert told == scores and (response.version, response.model_hash) == ("v", "h")


def test_bytes_are_those_of_schema_2():
    """What any client or server of the schema writes and reads, by an independent msgpack."""
    keys = {"schema": 2, "id": "r1", "keys": ["k0", "k1"]}
    assert msgpack.unpackb(p.encode(request())) == {**keys, "images": request().images, "items": request().items}
    answer = msgpack.unpackb(p.write_response(request(), "ocr", [p.Score(0.5, None, {"a": 1}), p.Score(None, "why")]))
    columns = {"scores": [0.5, None], "errors": [None, "why"], "details": [{"a": 1}, {}]}
    assert answer == {**keys, "scorer": "ocr", "version": "", "model_hash": "", **columns}


@pytest.mark.parametrize("form", FORMS)
def test_older_clients_are_understood(form):
    """Schema 1 has no keys: its order counts."""
    old = p.Request(schema=1, id="r1", images=request().images, items=request().items)
    read = p.read_request(p.encode(old, form), form)
    assert read == old and p.decode(p.write_response(read, "ocr", [p.Score(0.5)] * 2, form), form, p.Response).schema == 1


def test_scores_find_their_images_by_key():
    answer = {
        "schema": 2,
        "id": "r1",
        "scorer": "ocr",
        "keys": ["k1", "k0"],
        "scores": [0.1, 0.2],
        "errors": [None] * 2,
        "details": [{}] * 2,
    }
    assert [s.value for s in p.read_response(msgpack.packb(answer), p.MSGPACK, request(), "ocr")[0]] == [0.2, 0.1]
    assert json.loads(p.encode(request(1), p.JSON))["images"] == [base64.b64encode(request().images[0]).decode()]


def test_a_message_must_name_its_schema():
    with pytest.raises(p.ProtocolError, match="missing required field `schema`"):
        p.read_request(msgpack.packb({k: v for k, v in message().items() if k != "schema"}))


def test_fields_of_later_versions_are_ignored():
    assert p.read_request(msgpack.packb(message(progress=0.5))).images == [b"x"]


def test_numpy_numbers_in_a_detail_are_sent():
    scores = [p.Score(np.float32(0.5), None, {"a": np.float64(0.25), "b": np.arange(2), 3: True}).checked()]
    told, _ = p.read_response(p.write_response(request(1), "ocr", scores), p.MSGPACK, request(1), "ocr")
    assert told == [p.Score(0.5, None, {"a": 0.25, "b": [0, 1], "3": True})]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), np.float32("nan")])
def test_a_value_that_is_not_finite_is_a_failure(value):
    score = p.Score(value, None, {"a": 1}).checked()
    assert score.value is None and score.failed and "not finite" in score.error and score.detail == {"a": 1}


def test_image_round_trip():
    noise = np.random.default_rng(0).integers(0, 256, (24, 72, 3), np.uint8)
    for image in (sign("HELLO", 24, 72), noise, noise[:1, :9], noise[:9, :1], noise[::2, ::3]):  # the last is not contiguous
        np.testing.assert_array_equal(p.decode_image(p.encode_image(image)), image)
    image = sign("HELLO", 24, 72)
    np.testing.assert_array_equal(p.decode_image(p.encode_image(Image.fromarray(image))), image)
    np.testing.assert_array_equal(p.decode_image(p.encode_image(Image.fromarray(image).convert("RGBA"))), image)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"schema": None}, r"Expected `int`, got .* - at `\$.schema`"),
        ({"schema": 3}, r"Invalid enum value 3 - at `\$.schema`"),
        ({"keys": ["a", "b"]}, "2 different keys for 1 images"),
        ({"keys": [1]}, r"Expected `str`, got `int` - at `\$.keys\[0\]`"),
        ({"id": 7}, r"Expected `str`, got `int` - at `\$.id`"),
        ({"scorer": {}}, r"Expected `str`, got `object` - at `\$.scorer`"),
        ({"images": "no"}, r"Expected `array`, got `str` - at `\$.images`"),
        ({"items": []}, "1 images but 0 items"),
        ({"images": [3]}, r"Expected `bytes`, got `int` - at `\$.images\[0\]`"),
        ({"items": [{"prompt": "x"}]}, r"missing required field `targets` - at `\$.items\[0\]`"),
        ({"items": [{"prompt": 3, "targets": {}}]}, r"Expected `str`, got `int` - at `\$.items\[0\].prompt`"),
        ({"items": [{"prompt": "x", "targets": {"a": b"bytes"}}]}, "JSON cannot express"),
    ],
)
def test_malformed(changes, words):
    with pytest.raises(p.ProtocolError, match=words) as caught:
        p.read_request(msgpack.packb(message(**changes)), p.MSGPACK)
    assert caught.value.status == 400


@pytest.mark.parametrize(
    "body, form", [(b"\xc1", p.MSGPACK), (b"[1]", p.JSON), (b"{", p.JSON), (b"\xff\xfe", p.JSON), (b"{}", "text/html")]
)
def test_garbage(body, form):
    with pytest.raises(p.ProtocolError):
        p.read_request(body, form)


def test_missing_field_and_bad_base64():
    with pytest.raises(
        p.ProtocolError, match="not a valid request of schema 2 in application/json: Object missing required field `images`"
    ):
        p.read_request(json.dumps({"schema": 1, "id": "a"}).encode(), p.JSON)
    with pytest.raises(p.ProtocolError, match=r"Invalid base64 encoded string - at `\$.images\[0\]`"):
        p.read_request(json.dumps(message(images=["!!"])).encode(), p.JSON)


@pytest.mark.parametrize(
    "limit, words",
    [
        ({"max_images": 1}, "has 2, over the limit of 1 images"),
        ({"max_image_bytes": 10}, r"images\[0\] has .*, over the limit of 10 bytes"),
        ({"max_prompt_chars": 3}, r"the prompt of items\[0\] has 6, over the limit of 3 characters"),
        ({"max_target_chars": 5}, r"the targets of items\[0\] has"),
        ({"max_body_bytes": 50}, "the request has .* over the limit of 50 bytes"),
        ({"max_items_bytes": 50}, "items has .* over the limit of 50 bytes"),
    ],
)
def test_limits(limit, words):
    with pytest.raises(p.TooLarge, match=words) as caught:
        p.read_request(p.encode(request()), p.MSGPACK, p.Limits(**limit))
    assert caught.value.status == 413


def test_image_bomb_is_refused_from_its_header():
    """Many megapixels in a few kilobytes; the limit is judged before pixels are decoded."""
    out = io.BytesIO()
    Image.new("1", (9000, 7000)).save(out, "PNG")
    with pytest.raises(p.TooLarge, match="9000 x 7000 pixels"):
        p.decode_image(out.getvalue())


@pytest.mark.parametrize(
    "form, many", [(p.MSGPACK, b"\xdd\x00\x98\x96\x80" + b"\xa0" * 10_000_000), (p.JSON, b'["' + b'","' * 5_000_000 + b'"]')]
)
@pytest.mark.parametrize("field", ["images", "keys"])
def test_lists_are_counted_before_they_are_built(form, many, field):
    """Millions of empty strings in a few megabytes."""
    body = p.encode(request(), form)
    short = msgspec.Raw(p._CODECS[form].encode(p.decode(body, form, dict)[field]))
    body = body.replace(bytes(short), many)
    tracemalloc.start()
    with pytest.raises(p.TooLarge):
        p.read_request(body, form)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(body) > 10_000_000 and peak < 3 * len(body)


def test_an_image_too_elongated_for_scorers():
    assert p.decode_image(p.encode_image(Image.new("RGB", (160, 10)))).shape == (10, 160, 3)
    with pytest.raises(p.TooLarge, match="4200 x 300 pixels, the limit is 4096 a side"):
        p.decode_image(p.encode_image(Image.new("RGB", (4200, 300))))
    for size in ((161, 10), (1, 17)):
        with pytest.raises(p.TooLarge, match=f"{size[0]} x {size[1]} pixels, the limit is 16 to 1"):
            p.decode_image(p.encode_image(Image.new("RGB", size)))


@pytest.mark.parametrize("depth", [40, 500, 900, 5000, 200_000])
@pytest.mark.parametrize("pair", ["[]", ('{"a":', "}")])
def test_deeply_nested_targets_are_malformed(depth, pair):
    opened, closed = pair
    targets = '{"text":' + opened * depth + '"x"' + closed * depth + "}"
    body = f'{{"schema":1,"id":"a","images":["aaaa"],"items":[{{"prompt":"","targets":{targets}}}]}}'
    with pytest.raises(p.ProtocolError, match="nested more than 32 deep|recursion") as caught:
        p.read_request(body.encode(), p.JSON)
    assert caught.value.status == 400 and len(str(caught.value)) < 200


@pytest.mark.parametrize("key", ["schema", "id", "images", "items", "x" * 100_000])
def test_a_refusal_does_not_repeat_the_body(key):
    body = {"schema": 1, "id": "a", "images": [], "items": []} | {key: "y" * 100_000}
    for content, kind in ((json.dumps(body).encode(), p.JSON), (msgpack.packb(body), p.MSGPACK), (b"{}", "t" * 100_000)):
        try:
            p.read_request(content, kind)
        except p.ProtocolError as error:
            assert len(str(error)) < 300


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
        ({"scores": ["0.5", None]}, r"Expected `float .*, got .* - at `\$.scores\[0\]`"),
        ({"scores": [True, None]}, r"Expected `float .*, got .* - at `\$.scores\[0\]`"),
        ({"errors": [3, None]}, r"Expected `str .*, got `int` - at `\$.errors\[0\]`"),
        ({"details": [3, {}]}, r"Expected `object`, got `int` - at `\$.details\[0\]`"),
        ({"details": None}, r"Expected `array`, got .* - at `\$.details`"),
        ({"scorer": 3}, r"Expected `str`, got `int` - at `\$.scorer`"),
        ({"scorer": "shapes"}, "'shapes' answered instead of 'ocr'"),
        ({"keys": []}, "does not repeat the keys"),
        ({"keys": ["k0", "k0"]}, "does not repeat the keys"),
    ],
)
def test_malformed_response(changes, words):
    columns = {"keys": ["k0", "k1"], "scores": [1, None], "errors": [None, None], "details": [{}, {}]}
    with pytest.raises(p.ProtocolError, match=words):
        p.read_response(msgpack.packb({"schema": 2, "id": "r1", "scorer": "ocr", **columns, **changes}), p.MSGPACK, request(), "ocr")
