"""The page in Chromium: draw, compare, look at codes, ask, upload, an error, stop, history."""

import json
import shutil
import time

import numpy as np
import pytest
from PIL import Image

from tests.serving.running import image_of

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
sync_api = pytest.importorskip("playwright.sync_api")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
DONE = ".drawing:first-child .cell:enabled"


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as p:
        sync_api.expect.set_options(timeout=60_000)  # programs are compiled
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, running):
    page = browser.new_page()
    page.set_default_timeout(60_000)
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda line: errors.append(line.text) if "Content Security Policy" in line.text else None)
    page.goto(running[1])
    page.locator("#models input").first.wait_for()
    yield page
    page.close()
    assert errors == []


def draw(page, prompt="a", **fields):
    """Fills the form and draws; waits for nothing."""
    for name, value in ({"prompt": prompt, "seed": "3", "n": "2"} | fields).items():
        page.fill(f"#{name}", value)
    page.click("#go")


def test_models_are_compared_on_the_same_seeds(page):
    draw(page)
    sync_api.expect(page.locator(DONE)).to_have_count(4)
    assert page.locator(".drawing th").all_inner_texts() == ["sft", "rl"]
    sources = [image.get_attribute("src") for image in page.locator(".drawing img").all()]
    pixels = [np.asarray(image_of(s.split(",")[1])) for s in sources]
    np.testing.assert_array_equal(pixels[0], pixels[1])  # the two are one model here
    assert (pixels[0] != pixels[2]).any()
    # A link draws the same again, and stays in the history.
    link = page.locator(".drawing h2 a").get_attribute("href")
    assert "seed=3" in link and page.url.endswith(link)
    page.locator("#history a").first.click()
    page.goto("about:blank")
    page.go_back()
    sync_api.expect(page.locator(DONE)).to_have_count(4)
    assert page.locator(".drawing img").first.get_attribute("src") == sources[0]


def test_an_image_is_looked_at_and_asked_about(page):
    draw(page, n="1")
    page.locator(DONE).first.click()
    sync_api.expect(page.locator("#code")).to_contain_text("nats: mean")
    page.select_option("#shade", "entropy of the model")
    sync_api.expect(page.locator("#code")).to_contain_text("entropy in nats: mean")
    page.focus("#codes")
    page.keyboard.press("ArrowRight")
    sync_api.expect(page.locator("#code")).to_contain_text("row 1, column 2: code ")
    page.fill("#question", "what is it?")
    page.keyboard.press("Enter")
    sync_api.expect(page.locator("dt")).to_have_text("what is it?")
    sync_api.expect(page.locator("dd")).not_to_have_text("…")
    with page.expect_download() as download:
        page.click("#download")
    about = json.loads(Image.open(download.value.path()).text["xomni"])
    assert download.value.suggested_filename == "3_0.png" and (about["seed"], about["model"]) == (3, "sft")
    page.keyboard.press("Escape")
    sync_api.expect(page.locator("#image")).to_be_hidden()


def test_the_best_is_marked(page):
    page.select_option("#reward", "dark")
    draw(page, prompt='a sign "AB"', n="4")
    sync_api.expect(page.locator(".drawing .best")).to_have_count(2)
    shown = page.locator(".drawing td:first-child .soft").all_inner_texts()
    assert shown[2] == "dark not known: lost"
    values = [float(text.split()[1]) for i, text in enumerate(shown) if i != 2]
    assert float(page.locator(".drawing .best .soft").first.inner_text().split()[1]) == max(values)


def test_an_upload_is_encoded_and_reconstructed(page, tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 40, 3), np.uint8)).save(tmp_path / "mine.png")
    page.set_input_files("#upload", str(tmp_path / "mine.png"))
    sync_api.expect(page.locator("#about")).to_have_text("mine.png")
    sync_api.expect(page.locator("#again")).to_be_visible()
    page.click("#close")
    (tmp_path / "bad.png").write_bytes(b"no image")
    page.set_input_files("#upload", str(tmp_path / "bad.png"))
    sync_api.expect(page.locator("#message")).to_contain_text("the image cannot be read")


def test_errors_are_told_and_drawing_can_be_stopped(page, running, monkeypatch):
    draw(page, prompt="sign " * 40)
    sync_api.expect(page.locator("#message")).to_contain_text("this model's decoder takes 31; shorten it")
    scheduler, step = running[0].service.scheduler, running[0].service.scheduler._step
    monkeypatch.setattr(scheduler, "_step", lambda key, lane: (time.sleep(0.3), step(key, lane)))
    draw(page, n="8")
    sync_api.expect(page.locator(".drawing:first-child .soft", has_text="drawing …").first).to_be_visible()
    page.click("#stop")
    sync_api.expect(page.locator(".drawing:first-child .soft", has_text="stopped").first).to_be_visible()
    sync_api.expect(page.locator("#stop")).to_be_disabled()
    for _ in range(100):
        if not scheduler.waiting + scheduler.running:
            break
        page.wait_for_timeout(100)
    assert scheduler.waiting == scheduler.running == 0


def test_a_token_is_asked_for(page, running, monkeypatch):
    monkeypatch.setattr(running[0], "token", "secret")
    page.reload()
    sync_api.expect(page.locator("#message")).to_contain_text("the bearer token is missing or wrong")
    page.fill("#token", "secret")
    page.keyboard.press("Enter")
    sync_api.expect(page.locator("#models input")).to_have_count(2)


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_wider_than_the_screen_and_every_field_has_a_name(page, width):
    page.set_viewport_size({"width": width, "height": 800})
    draw(page, n="1")
    sync_api.expect(page.locator(DONE)).to_have_count(2)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    nameless = "[...document.querySelectorAll('input,select,textarea')].filter((x) => !x.labels.length).map((x) => x.id)"
    assert page.evaluate(nameless) == []
