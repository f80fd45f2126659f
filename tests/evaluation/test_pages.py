"""What all pages have in common: whole, escaped, charts that follow the theme."""

import dataclasses
import json
import re
from html.parser import HTMLParser
from importlib import resources

import numpy as np
import pytest

from tests.evaluation.made_runs import write_answer_run, write_generate_run
from tests.evaluation.test_report import SECONDS, made_up_effect
from xomni_jax.evaluation.charts import Dot, Line, bar_chart, dot_chart, line_chart, moving_average
from xomni_jax.evaluation.compare import compare, read_runs, write_comparison
from xomni_jax.evaluation.effect_page import write_report
from xomni_jax.evaluation.effect_summary import summarise
from xomni_jax.evaluation.eval_run import read_eval_run
from xomni_jax.evaluation.run_report import write_run_report
from xomni_jax.evaluation.studies import guidance_study, write_study

EVIL = """<script>alert("1")</script> 'single' "double" {{ 1 + 1 }} </article> &amp;"""
VOID = ("meta", "img", "br", "input")


class Page(HTMLParser):
    """Parses a page; `text` is what a reader sees, `scripts` what runs."""

    def __init__(self, page):
        super().__init__()
        self.open, self.text, self.scripts, self.attributes, self.ids = [], "", [], [], []
        self.feed(page)
        self.close()
        assert not self.open, self.open
        assert len(set(self.ids)) == len(self.ids)

    def handle_starttag(self, tag, attributes):
        self.attributes += attributes
        self.ids += [value for name, value in attributes if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.ids += [value for name, value in attributes if name == "id"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data):
        if self.open[-1:] == ["script"]:
            self.scripts.append(data)
        elif self.open[-1:] != ["style"]:
            self.text += data


def with_evil_texts(run):
    """The run with markup in the first item's texts and in its title."""
    first, *rest = (run / "items.jsonl").read_text().splitlines()
    item = json.loads(first)
    item |= {"prompt": EVIL, "verdicts": [EVIL] * len(item["verdicts"])}
    item["fields"]["category"] = EVIL
    if "replies" in item:
        item["replies"] = [[EVIL]] * len(item["replies"])
    (run / "items.jsonl").write_text("\n".join([json.dumps(item), *rest]) + "\n")
    results = json.loads((run / "results.json").read_text())
    results |= {"title": EVIL, "notes": [EVIL], "categories": {EVIL: {"score": 0.5, "items": 1}}}
    (run / "results.json").write_text(json.dumps(results))
    return run


@pytest.fixture(params=["run", "answers", "comparison", "guidance", "effect"])
def page(request, tmp_path):
    """Every page, with markup in its texts."""
    make = lambda name, **how: with_evil_texts(write_generate_run(tmp_path / name, items=4, repeats=1, **how))  # noqa: E731
    if request.param == "run":
        path = write_run_report(make("a"))
    elif request.param == "answers":
        path = write_run_report(with_evil_texts(write_answer_run(tmp_path / "a")))
    elif request.param == "comparison":
        runs = read_runs([make("a", right=0.0), make("b", right=1.0)])
        path = write_comparison(runs, compare(runs), tmp_path)
    elif request.param == "guidance":
        path = write_study(guidance_study([read_eval_run(make("a")), read_eval_run(make("b", guidance=2.0))]), "guidance", tmp_path)
    else:
        effect = made_up_effect(tmp_path, prompts=3, samples=2)
        effect = dataclasses.replace(effect, signs=dataclasses.replace(effect.signs, captions=(EVIL, *effect.signs.captions[1:])))
        effect.real.texts["ocr"][0, 0] = effect.settings["guidance_off"].rl.texts["ocr"][0, 0] = EVIL
        path = write_report(effect, summarise(effect, SECONDS), tmp_path / "report.html")
    return path.read_text()


def test_pages_are_whole_and_texts_are_escaped(page):
    read = Page(page)
    assert EVIL in read.text
    assert all("alert" not in script for script in read.scripts)
    assert not any(name.startswith("on") or "alert" in name for name, _ in read.attributes)
    assert "<script>alert" not in page


def test_long_texts_are_folded_without_loss(tmp_path):
    run = write_generate_run(tmp_path / "run", items=1, repeats=1)
    item = json.loads((run / "items.jsonl").read_text())
    prompt = "a long prompt with <tags> " * 30
    (run / "items.jsonl").write_text(json.dumps(item | {"prompt": prompt}) + "\n")
    page = write_run_report(run).read_text()
    assert page.count("<details>") == 2 and prompt in Page(page).text.replace(" …", "")


def luminance(colour):
    """Relative luminance of #rgb or #rrggbb (WCAG 2)."""
    digits = colour.lstrip("#") if len(colour) == 7 else "".join(2 * c for c in colour.lstrip("#"))
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4))]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear))


def contrast(a, b):
    """From 1 to 21."""
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def test_colours_can_be_told_apart_in_light_and_dark():
    """WCAG 2 AA: 4.5 for text, 3 for what charts and boxes draw."""
    css = (resources.files("xomni_jax") / "assets" / "templates" / "page.css").read_text()
    schemes = [dict(re.findall(r"--(\w+):(#\w+)", block)) for block in re.findall(r":root\{(.*?)\}", css)]
    assert len(schemes) == 2 and set(schemes[0]) == set(schemes[1])
    for colours in schemes:
        for ground in ("paper", "ground"):
            for text in ("ink", "soft", "s1", "s2", "s3", "good", "missing", "extra"):
                assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
            assert contrast(colours["s0"], colours[ground]) >= 3


def test_charts_use_the_colours_of_the_page():
    lines = [Line("first", range(9), np.arange(9) / 9, smooth=3), Line("<b>", range(9), np.ones(9), np.zeros(9), np.ones(9), dots=True)]
    for chart in (
        line_chart("a & b", lines, "step", level=("level", 0.5)),
        dot_chart("a & b", [Dot("x", 0.25, 0.1, 0.5), Dot("y", None, None, None)]),
    ):
        assert 'aria-label="a &amp; b"' in chart and "var(--s0)" in chart
        assert not re.search(r"#[0-9a-f]{6}\b(?!\")", chart) and "url(" not in chart and "<image" not in chart
        Page(chart)
    texts = Page(bar_chart("", {"program": 1.5, "others": 2.0}, 4.0, "GiB")).text
    assert "program 1.50" in texts and "others 2.00" in texts and "limit 4.00" in texts
    texts = Page(dot_chart("", [Dot("x", 0.25, 0.1, 0.5), Dot("y", None, None, None)])).text
    assert "0.25" in texts and "not measured" in texts
    assert "&lt;b&gt;" in line_chart("", lines, "step") and line_chart("", [Line("none", [], [])], "step") == ""
    assert line_chart("a", lines, "step") == line_chart("a", lines, "step")


def test_powers_of_two_have_their_own_ticks():
    assert {"1", "2", "4"} <= set(Page(line_chart("", [Line("", [1, 2, 4], [0, 1, 2])], "N", powers_of_two=True)).text.split())


def test_moving_average_shrinks_at_the_ends():
    np.testing.assert_allclose(moving_average([0, 3, 6, 3], 3), [1.5, 3, 4, 4.5])
