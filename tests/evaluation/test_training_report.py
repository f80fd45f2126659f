"""The page of training runs: what it holds, and its charts and sliders in Chromium."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from xomni_jax.cli.main import main
from xomni_jax.evaluation.suite import SuiteError
from xomni_jax.evaluation.training_report import MAX_GRIDS, MAX_POINTS, differences, images, run_names, thinned, write_training_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def a_run(path, steps=40, seed=0, grids=3):
    """A run directory as the loop leaves it."""
    (path / "images").mkdir(parents=True)
    (path / "tensorboard").mkdir()
    for n in range(2):
        (path / "tensorboard" / f"events.out.tfevents.{1_700_000_000 + n * 3600}.host").touch()
    rows = [
        {"step": s, "loss/total": 2.0**-s + seed, "perf/step_s": 0.5, "reward/ocr/fail_frac": 0.25 * (s == 7)} for s in range(1, steps + 1)
    ]
    rows[8]["loss/total"] = None
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "config.json").write_text(json.dumps({"stage": "sft", "seed": seed, "optimizer": {"learning_rate": 0.1}}))
    (path / "skipped.jsonl").write_text(json.dumps({"step": 5, "grad_norm": "inf", "ids": ["<a>", "b"]}) + "\n")
    for n in range(grids):
        Image.fromarray(np.full((8, 16, 3), 80 * n % 256, np.uint8)).save(path / "images" / f"step_{10 * n:06d}.png")
        (path / "images" / f"step_{10 * n:06d}.jsonl").write_text(json.dumps({"caption": f"caption {n} </script>"}) + "\n")
    return path


@pytest.fixture
def runs(tmp_path):
    return [a_run(tmp_path / "one" / "sft"), a_run(tmp_path / "two" / "sft", seed=3)]


def test_the_page_stands_alone_and_holds_everything(runs, tmp_path, capsys):
    assert main(["report", *map(str, runs), "--out", str(tmp_path / "page.html")]) == 0
    assert "2 runs, in " in capsys.readouterr().out
    page = (tmp_path / "page.html").read_text()
    for loads in ("<link", "<script src", "@import", "url(", 'src="http', "fetch("):
        assert loads not in page
    assert page.count("data:image/webp;base64,") == 6 and "caption 1 &lt;/script&gt;" in page
    data = json.loads(page.split('id="data">')[1].split("</script>")[0])
    assert data["runs"] == ["one/sft", "two/sft"] and list(data["curves"])[:2] == ["loss/total", "perf/step_s"]
    assert data["curves"]["loss/total"]["two/sft"][0] == [1, 3.5] and len(data["curves"]["loss/total"]["one/sft"]) == 39
    assert '<th scope="row">seed</th><td>0</td><td>3</td>' in page and "learning_rate" not in page
    for event in (
        "started again at ",
        "skipped: gradient norm inf; examples &lt;a&gt;, b",
        "ocr could not score 25.0% of the images",
        "loss/total was not finite",
    ):
        assert page.count(event) == 2


def test_long_runs_are_thinned_and_names_are_short(tmp_path):
    run = a_run(tmp_path / "long", steps=3 * MAX_POINTS, grids=MAX_GRIDS + 5)
    from xomni_jax.evaluation.grpo_run import read_run

    points = thinned(read_run(run), "perf/step_s")
    assert len(points) == MAX_POINTS and points[0] == [3, 0.5] and points[-1][0] == 3 * MAX_POINTS
    found = images(run)
    assert len(found) == MAX_GRIDS and (found[0][0], found[-1][0]) == (0, 10 * (MAX_GRIDS + 4))
    assert run_names([tmp_path / "a" / "x", tmp_path / "b" / "x", tmp_path / "b" / "y"]) == ["a/x", "b/x", "b/y"]
    assert differences({"one": {"a": {"b": 1}}}) == [] and differences({"one": {"a": 1}, "two": {}}) == [
        ("key", "one", "two"),
        ("a", "1", "–"),
    ]


def test_what_is_no_run_is_refused(runs, tmp_path, capsys):
    with pytest.raises(SuiteError, match="given twice"):
        write_training_report([runs[0], runs[0]], tmp_path / "page.html")
    assert main(["report", str(tmp_path)]) == 2 and "no metrics.jsonl here" in capsys.readouterr().err
    assert (
        main(["report", str(runs[0]), "--out", str(tmp_path / "none" / "page.html")]) == 2
        and "there is no folder" in capsys.readouterr().err
    )


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
def test_charts_are_zoomed_together_and_grids_turn(runs, tmp_path):
    sync_api = pytest.importorskip("playwright.sync_api")
    write_training_report(runs, tmp_path / "page.html")
    with sync_api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page, errors = browser.new_page(viewport={"width": 1280, "height": 800}), []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(f"file://{tmp_path}/page.html")
        charts = page.locator("#charts svg")
        sync_api.expect(charts).to_have_count(3)
        assert "one/sft ends at" in charts.first.get_attribute("aria-label")
        box = charts.first.bounding_box()
        page.mouse.move(box["x"] + box["width"] / 4, box["y"] + 50)
        page.mouse.down()
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 50)
        page.mouse.up()
        said = page.locator("#controls output")
        sync_api.expect(said).to_contain_text("3 of 3 metrics, steps ")
        page.keyboard.press("Escape")
        sync_api.expect(said).to_have_text("3 of 3 metrics")
        page.fill("#find", "loss")
        sync_api.expect(said).to_have_text("1 of 3 metrics")
        shown = page.locator(".grids").first.locator("figure:visible")
        assert shown.get_attribute("data-step") == "20"
        page.locator(".grids input").first.fill("0")
        assert shown.get_attribute("data-step") == "0"
        page.set_viewport_size({"width": 390, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= 390 and errors == []
        browser.close()
