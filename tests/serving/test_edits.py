"""A part of an image is drawn again: as the pipeline does it, by OpenAI's client, also through a front, by models of either order."""

import io

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from tests.serving.running import image_of, listening, served
from xomni_jax.pipeline import XOmni
from xomni_jax.serving.front import Front
from xomni_jax.serving.options import FrontOptions

PROMPT = 'a red sign that says "AB"'


def png(image):
    file = io.BytesIO()
    image.save(file, "png")
    return file.getvalue()


@pytest.fixture(scope="module", params=["raster", "spanning_tree"])
def editor(request, model_dir):
    """(model, URL)."""
    model = XOmni(model_dir)
    model.description["components"]["transformer"]["config"]["order"] = request.param
    with served({"sft": model}) as (_, url):
        yield model, url


@pytest.fixture(scope="module")
def drawn(editor):
    return editor[0].generate(PROMPT, seed=9)[0]


def half():
    """A mask of the right half."""
    mask = Image.new("L", (32, 16))
    mask.paste(255, (16, 0, 32, 16))
    return mask


def edit(url, **fields):
    files = {name: (f"{name}.png", fields.pop(name), "image/png") for name in ("image", "mask") if name in fields}
    return httpx.post(url + "/v1/images/edits", data={"prompt": PROMPT} | fields, files=files, timeout=60, trust_env=False)


def test_the_official_client_edits_as_the_pipeline_does(editor, drawn):
    model, url = editor
    known = model.known_codes(drawn, half())
    own = model.generate([PROMPT] * 2, seed=3, known=known)
    transparent = Image.merge("LA", (Image.new("L", (32, 16), 255), half().point(lambda x: 255 - x)))
    with listening(Front([url], FrontOptions(), True, None)) as front:
        for base, mask in ((url, half()), (front, transparent)):
            client = openai.OpenAI(base_url=base + "/v1", api_key="none", max_retries=0)
            asked = dict(prompt=PROMPT, image=png(drawn), mask=png(mask), n=2, extra_body={"seed": 3, "return_codes": True})
            answer = client.images.edit(**asked)
            for image, want in zip(answer.data, own, strict=True):
                # The pipeline decodes both at once: float32 sums in another order, which may round to the next of 256 levels.
                np.testing.assert_allclose(np.int16(image_of(image.b64_json)), np.int16(want), atol=1)
                np.testing.assert_array_equal(np.array(image.codes)[known >= 0], known[known >= 0])
                np.testing.assert_array_equal(np.array(image.logp)[known >= 0], 0)
            events = list(client.images.edit(**asked | {"n": 1}, stream=True, partial_images=1))
            assert [event.type for event in events] == ["image_edit.partial_image", "image_edit.completed"]
            assert events[1].b64_json == answer.data[0].b64_json
    grey = np.all(np.asarray(image_of(events[0].b64_json)) == 128, axis=-1)
    assert not grey[:, :16].any() or (~grey[:, :16]).mean() > 0.9


def test_edited_and_drawn_images_share_a_batch(editor, drawn):
    """Those that know nothing are what they are without."""
    model, url = editor
    made = httpx.post(url + "/v1/images/generations", json={"prompt": PROMPT, "seed": 4, "n": 3}, timeout=60, trust_env=False).json()
    for entry, want in zip(made["data"], model.generate([PROMPT] * 3, seed=4), strict=True):
        np.testing.assert_array_equal(image_of(entry["b64_json"]), want)


def test_refusals(editor, drawn):
    model, url = editor
    codes = model.encode([drawn])[0].tolist()
    told = httpx.post(url + "/v1/xomni/entropy", json={"prompt": PROMPT, "codes": codes}, timeout=60, trust_env=False)
    assert told.status_code == (200 if model.config("transformer").order == "raster" else 400)
    image, mask = png(drawn), png(half())
    opaque, black = png(half().resize((16, 16))), png(Image.new("L", (32, 16)))
    for fields, told in [
        ({"image": image}, "neither a mask nor an image with transparent parts"),
        ({"image": image, "mask": opaque}, "the mask has 16x16 pixels and the image 32x16; make them alike"),
        ({"image": image, "mask": black}, "the mask has no white pixel"),
        ({"image": b"text", "mask": mask}, "the image or its mask cannot be read"),
        ({"image": image, "mask": mask, "n": "0"}, ">= 1"),
        ({"image": image, "mask": mask, "n": "x"}, "`int | null`"),
        ({"image": image, "mask": mask, "size": "7x7"}, "size 7x7 is not served by sft"),
        ({"image": image, "mask": mask, "colour": "1"}, "unknown field `colour`"),
        ({"mask": mask}, "missing required field `image`"),
    ]:
        answer = edit(url, **fields)
        assert answer.status_code == 400 and told in answer.json()["error"]["message"], (fields, answer.text)
    ask = lambda body, kind: httpx.post(url + "/v1/images/edits", content=body, headers={"Content-Type": kind}, trust_env=False)
    for body, kind, status in [
        (b"{}", "application/json", 415), (b"x", "multipart/form-data", 400), (b"x", "multipart/form-data; boundary=a", 400),
        (b"--a\r\nno head", "multipart/form-data; boundary=a", 400), (b"", "multipart/form-data; boundary=a", 400),
    ]:  # fmt: skip
        assert ask(body, kind).status_code == status, (body, kind)
