"""Tables as text."""

import csv
import io

from xomni_jax.core.tables import aligned, csv_text, format_estimate, format_interval, format_number, markdown

ROWS = [("", "score", "items"), ("a long name", ("0.50", "0.25 to 0.75"), "12"), ("b", ("–", ""), "3")]


def test_columns_are_aligned():
    assert aligned(ROWS).splitlines() == [
        "                           score  items",
        "-----------  -------------------  -----",
        "a long name  0.50 [0.25 to 0.75]     12",
        "b                              –      3",
    ]


def test_markdown():
    assert markdown([("stage", "steps"), ("sft", "100")]) == "| stage | steps |\n| --- | --- |\n| sft | 100 |"


def test_csv_returns_every_text_as_it_was():
    rows = [["id", "text", "score"], ["0", 'a "b",\nc', None], ["1", "ä", 0.1]]
    assert list(csv.reader(io.StringIO(csv_text(rows)))) == [["id", "text", "score"], ["0", 'a "b",\nc', ""], ["1", "ä", "0.1"]]


def test_numbers_and_intervals():
    assert format_number(0.12345) == "0.1235" and format_number(0.256, "+.0f", 100) == "+26" and format_number(None) == "–"
    assert format_interval((0.5, None), ".2f") == "0.50 to ∞" and format_interval(None) == ""
    assert format_estimate({"value": 0.5, "ci95": [0.25, 0.75]}, ".2f") == ("0.50", "0.25 to 0.75")
    assert format_estimate({"value": None, "ci95": None}) == ("–", "")
