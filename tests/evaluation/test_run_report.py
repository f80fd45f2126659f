"""The page and the CSV of a run, from runs written by hand; filter and order in Chromium where there is one."""

import csv
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from markupsafe import escape
from PIL import Image

from tests.evaluation.made_runs import CATEGORIES, write_answer_run, write_generate_run
from xomni_jax.evaluation import paper
from xomni_jax.evaluation.eval_run import image_refs, read_eval_run
from xomni_jax.evaluation.item_cards import embed, image_order, spread
from xomni_jax.evaluation.run_report import write_run_report
from xomni_jax.evaluation.suite import SuiteError
from xomni_jax.evaluation.suites import get_suite

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def lines_of(run):
    """Items as the run stored them."""
    return [json.loads(line) for line in (run / "items.jsonl").read_text().splitlines()]


def test_page_stands_alone_and_says_what_was_measured(tmp_path):
    run = write_generate_run(tmp_path / "run")
    page = write_run_report(run).read_text()
    for loads in ("<link", "<script src", "@import", "url(", 'src="http', "<iframe", "fetch("):
        assert loads not in page
    assert page.count("data:image/png;base64,") == 12 * 4 and page.count("<article") == 12
    items = lines_of(run)
    value = np.mean([item["score"] for item in items])
    assert f"<strong>{value:.4f}</strong>" in page
    # Beside the paper: table 1, its own value and a peer's, this run at the paper's digits.
    assert "Table 1 of the paper" in page and "<td>0.900</td>" in page and '<th scope="row">GPT-4o</th><td>0.956</td>' in page
    assert f'<th scope="row">This run</th><td>{value:.3f}</td>' in page
    places = [page.index(text) for text in (f"{value:.4f}", "By category", "Beside the paper", "All scores", "models/tiny", "<article")]
    assert places == sorted(places)  # results, then settings, then items
    assert all(fact in page for fact in ("0123abcd", "sampling.min_p", "judge.name"))
    for item in items:
        assert escape(item["prompt"]) in page and f"<b>Wanted:</b> {' '.join(item['fields']['text'])}" in page
        assert all(escape(reply) in re.sub("<del>.*?</del>|</?ins>", "", page) for (reply,) in item["replies"])
    for category in CATEGORIES:
        scores = [item["score"] for item in items if item["fields"]["category"] == category]
        assert f'<div>{category}</div><div class="track"><i style="width:{100 * np.mean(scores):.1f}%">' in page


def test_csv_has_one_line_per_output(tmp_path):
    run = write_generate_run(tmp_path / "run", items=5, repeats=2)
    write_run_report(run)
    rows = list(csv.DictReader((run / "results.csv").open(encoding="utf-8")))
    expected = [
        (item["id"], str(r), item["prompt"], item["images"][r], item["replies"][r][0], item["verdicts"][r], str(item["score"]))
        for item in lines_of(run)
        for r in range(2)
    ]
    assert [tuple(row[k] for k in ("id", "repeat", "prompt", "image", "text", "verdict", "item_score")) for row in rows] == expected


def test_csv_keeps_every_sign_of_an_answer(tmp_path):
    run = write_answer_run(tmp_path / "run", items=2)
    first, second = lines_of(run)
    first["answer"] = 'a\rb\r\n"c", \u2028d'
    (run / "items.jsonl").write_text(json.dumps(first) + "\n" + json.dumps(second) + "\n")
    write_run_report(run)
    with (run / "results.csv").open(newline="", encoding="utf-8") as file:
        assert [row["text"] for row in csv.DictReader(file)] == [first["answer"], second["answer"]]


def test_the_page_is_bounded_and_says_what_it_leaves_out(tmp_path):
    run = write_generate_run(tmp_path / "run", items=6, repeats=3)
    read = read_eval_run(run)
    order = image_order([read], spread(6))
    assert len(order) == 18 and {int(ref.path.stem[:4]) for ref in order[:6]} == set(range(6))
    assert all(ref.path.stem.endswith(f"_{n // 6}") for n, ref in enumerate(order))  # first images first
    sizes = [len(small.data) for small in embed(order).values()]
    limit = sum(sizes[:7])
    page = write_run_report(run, limit=limit).read_text()
    assert page.count("data:image/") == 7 and "7 of 18 images are on this page" in page and "The other 11 are linked" in page
    assert page.count('class="file"') == 11
    (run / "images" / "0000_0.png").unlink()
    assert "1 images are no longer in the folder" in write_run_report(run).read_text()


def test_a_number_that_is_not_comparable_stands_apart_from_the_papers(tmp_path):
    run = write_generate_run(tmp_path / "run", items=3, objections=["3 of 160 items were evaluated", "the judge is another one"])
    page = write_run_report(run).read_text()
    warning = page[page.index('<aside class="warning">') :]
    assert "Not comparable with published numbers" in warning and "<li>3 of 160 items were evaluated</li>" in warning
    apart, published = re.search(r"<h3>This run, not comparable.*?</table>", page, re.S), page.index("<h3>As published</h3>")
    assert apart.end() < published < page.index("GPT-4o") and "3 of 160 items" in apart[0] and "This run" not in page[published:]
    assert ", not comparable</small>" in page[: page.index('<aside class="warning">')]  # also where the headline stands
    results = json.loads((run / "results.json").read_text())
    results["comparable"] = {"yes": True, "because": []}
    (run / "results.json").write_text(json.dumps(results))
    assert "ot comparable" not in write_run_report(run).read_text()
    del results["comparable"]  # what an older version left
    (run / "results.json").write_text(json.dumps(results))
    assert "the run does not record how it was judged" in write_run_report(run).read_text()


def test_the_headline_has_its_interval_and_sample(tmp_path):
    run = write_generate_run(tmp_path / "run", items=3)
    low, high = json.loads((run / "results.json").read_text())["headline"]["interval"]
    (card,) = re.findall(r'<section class="headline chief">\s*<div class="card">(.*?)</div>', write_run_report(run).read_text(), re.S)
    assert f"95% interval {low:.4g} to {high:.4g}; 3 of 160 items" in card


def test_rows_are_in_the_published_order(tmp_path):
    """POPE's ids and splits sort otherwise; GenEval's tags are those of the paper's columns."""
    run = write_answer_run(tmp_path / "run", items=9)
    lines = lines_of(run)
    place = {"poster": 0, "slide": 1, "sign": 2}
    lines = [line | {"position": 10 * place[line["fields"]["category"]] + n} for n, line in enumerate(lines)]
    (run / "items.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = write_run_report(run).read_text()
    assert re.findall(r'<article data-category="(\w+)"', page) == 3 * ["poster"] + 3 * ["slide"] + 3 * ["sign"]
    assert re.findall(r'<div>(\w+)</div><div class="track">', page) == ["poster", "slide", "sign"]
    read = read_eval_run(run)
    tags = sorted(paper.COLUMNS["geneval"].categories.values())
    read.results.update(suite="geneval", categories=dict.fromkeys(["other", *tags]))
    assert paper.category_order(read) == ["single_object", "two_object", "counting", "colors", "position", "color_attr", "other"]


def test_any_beginning_of_the_order_is_spread_over_the_run():
    for count in (10, 553):
        order = spread(count)
        assert sorted(order) == list(range(count))
        for k in (4, count // 2):
            gaps = np.diff([-1, *sorted(order[:k]), count])
            assert gaps.max() <= 3 * count / k


def test_tiles_of_a_grid_are_its_images(tmp_path, rng):
    run = write_generate_run(tmp_path / "run", items=1, repeats=4, size=(20, 30))
    tiles = rng.integers(0, 256, (4, 20, 30, 3)).astype(np.uint8)
    whole = np.concatenate([np.concatenate(tiles[:2], 1), np.concatenate(tiles[2:], 1)])
    Image.fromarray(whole).save(run / "images" / "grid.png")
    item = lines_of(run)[0] | {"images": ["images/grid.png"]}
    (run / "items.jsonl").write_text(json.dumps(item) + "\n")
    read = read_eval_run(run)
    for ref, tile in zip(image_refs(read, read.items[0]), tiles, strict=True):
        np.testing.assert_array_equal(np.asarray(ref.open()), tile)
    assert write_run_report(run).read_text().count("data:image/png;base64,") == 4


def test_answers_show_question_answer_and_verdict(tmp_path):
    run = write_answer_run(tmp_path / "run")
    page = write_run_report(run).read_text()
    assert page.count("data:image/webp;base64,") == 5  # those that the run kept
    for item in lines_of(run):
        card = re.search(rf"<span>{item['id']}</span>.*?</article>", page, re.S)[0]
        assert item["prompt"] in card and item["answer"] in card and item["verdicts"][0] in card
    asked = {item["id"]: lambda n=n: Image.new("RGB", (64, 32), (n, 0, 0)) for n, item in enumerate(lines_of(run))}
    page = write_run_report(run, asked).read_text()
    assert page.count("data:image/png;base64,") == 9 and page.count("<a ") == 0
    # The paper prints percent, the scorer a share.
    share = json.loads((run / "results.json").read_text())["headline"]["value"]
    assert f'<th scope="row">This run</th><td>{100 * share:.1f}</td>' in page and '<th scope="row">X-Omni</th><td>89.3</td>' in page


def test_a_suite_that_is_not_in_the_paper_has_no_such_table(tmp_path):
    page = write_run_report(write_generate_run(tmp_path / "run", items=3, suite="rendered-text")).read_text()
    assert "Beside the paper" not in page and "<article" in page


def test_what_is_no_finished_run_is_said(tmp_path):
    with pytest.raises(SuiteError, match="no results.json here; make a run first: xomni eval SUITE"):
        write_run_report(tmp_path)
    (tmp_path / "parts").mkdir()
    with pytest.raises(SuiteError, match="the run is not finished; give the command that began it again"):
        write_run_report(tmp_path)
    run = write_generate_run(tmp_path / "run", items=2)
    with (run / "items.jsonl").open("a") as file:
        file.write('{"id": "x"}\n')
    with pytest.raises(SuiteError, match="items.jsonl, line 3: no complete item"):
        write_run_report(run)
    (run / "results.json").write_text('{"suite": "x"}')
    with pytest.raises(SuiteError, match="has no 'categories'"):
        write_run_report(run)


def test_paper_tables_are_complete():
    for table in paper.tables().values():
        assert all(len(row) == len(table["columns"]) for row in table["rows"].values()) and list(table["rows"])[-1] == paper.OURS
        for row in table["rows"].values():
            assert all(v is None or float(v) >= 0 for v in row)
    assert [len(table["rows"]) for table in paper.tables().values()] == [11, 16, 15, 10]
    # Every column of every table belongs to one suite.
    placed = [(p.table, column) for p in paper.COLUMNS.values() for column in p.all]
    assert sorted(placed) == sorted((n, column) for n, table in paper.tables().items() for column in table["columns"])
    assert paper.values("geneval")["BAGEL"] == {
        "Single": "0.98", "Two": "0.95", "Counting": "0.84", "Colours": "0.95", "Position": "0.78", "Colour attr.": "0.77",
        "Overall": "0.88",
    }  # fmt: skip
    assert paper.values("docvqa")["MiniCPM-Llama3-V 2.5"] == {"DocVQA": "84.8"} and "VILA" not in paper.values("docvqa")


def test_columns_of_the_paper_find_their_categories():
    """What the suites call their categories is what the paper's columns look for."""
    item = {"yes": 3, "asked": 4, "dropped": 0, "unparsed": 0, "fields": {}}
    tile = {"global": [1, 2], "entity - whole": [3, 4], "attribute - color": [1, 1], "relation - spatial": [0, 1], "other - count": [1, 5]}
    suite = get_suite("dpg")
    found = suite.aggregate([item | {"id": "x", "last_tile": tile, "all_tiles": tile}])
    results = {"suite": "dpg", "headline": {"value": found["scores"][found["headline"]]}, "categories": found["categories"]}
    expected = {"Global": "50.00", "Entity": "75.00", "Attribute": "100.00", "Relation": "0.00", "Other": "20.00", "Overall": "75.00"}
    assert paper.ours(results) == expected
    tags = paper.COLUMNS["geneval"].categories.values()
    records = [{"id": t, "fields": {"category": t}, "correct": n, "images": 6, "any": 1, "one": 1} for n, t in enumerate(tags)]
    found = get_suite("geneval").aggregate(records)
    results = {"suite": "geneval", "headline": {"value": found["scores"][found["headline"]]}, "categories": found["categories"]}
    assert list(paper.ours(results).values()) == ["0.00", "0.17", "0.33", "0.50", "0.67", "0.83", "0.42"]


def dom(page, fragment, profile):
    """The page's items as Chromium shows them, in order, and what the counter says."""
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += " --disable-component-update --disable-sync"
    command = [CHROMIUM, *flags.split(), f"--user-data-dir={profile}", "--dump-dom", f"{page.absolute().as_uri()}#{fragment}"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    items = re.findall(r'<article data-category="(\w+)" data-score="([^"]*)">.*?<span>(\d+)</span>', shown, re.S)
    return items, re.search(r"<output[^>]*>([^<]*)</output>", shown)[1]


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_filter_and_order_in_a_browser(tmp_path):
    run = write_generate_run(tmp_path / "run", items=9, repeats=2)
    lines = lines_of(run)
    lines[4]["score"] = None  # stands last in either order
    (run / "items.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = write_run_report(run)
    score = {line["id"]: line["score"] for line in lines}
    all_, said = dom(page, "", tmp_path / "a")
    assert [name for *_, name in all_] == [line["id"] for line in lines] and said == "9 of 9 items"
    low, _ = dom(page, "sort=low", tmp_path / "b")
    assert [name for *_, name in low] == sorted(score, key=lambda n: (score[n] is None, score[n] or 0))
    kept, said = dom(page, "category=poster&sort=high", tmp_path / "c")
    posters = [line["id"] for line in lines if line["fields"]["category"] == "poster"]
    assert [name for *_, name in kept] == sorted(posters, key=lambda n: (score[n] is None, -(score[n] or 0)))
    assert said == "3 of 9 items" and {category for category, *_ in kept} == {"poster"}
    found, said = dom(page, "find=WORD7", tmp_path / "d")
    assert [name for *_, name in found] == ["0007"] and said == "1 of 9 items"
