"""OCR formulas against worked examples: FlowGRPO's scorer, a plain edit distance, and LongText-Bench's scorer."""

import numpy as np
import pytest

from xomni_jax.rewards import text_metrics as tm

# target, recognised, substring-or-edit, 1 - normalised edit distance, matched words, wanted words
EXAMPLES = {
    "ocr-01": ("Hello World", "HELLO WORLD", 1.0, 1.0, 2, 2),
    "ocr-02": ("Hello", "Helo", 0.8, 0.8, 0, 1),
    "ocr-03": ("Hello", "xxHelloyy", 1.0, 0.5555555555555556, 0, 1),
    "ocr-04": ("Hello", "", 0.0, 0.0, 0, 1),
    "ocr-05": ("Hello", "Hello Hello", 1.0, 0.5, 1, 1),
    "ocr-06": ("OPEN 24 HOURS", "OPEN 2A HOUR5", 0.8181818181818181, 0.8181818181818181, 1, 3),
    "ocr-07": ("Hi", "A long unrelated caption", 0.0, 0.04761904761904767, 0, 1),
    "ocr-08": ("Hello", "olleH", 0.2, 0.2, 0, 1),
    "ocr-09": ("Summer Sale", "SALE SUMMER", 0.2, 0.2, 2, 2),
    "ocr-10": ("New York", "new  york!", 1.0, 0.875, 2, 2),
}
CHINESE = {
    "ocr-11": ("你好世界", "你世好吗", 3, 4),
    "ocr-12": ("开业大吉", "开业大吉!", 4, 4),
    "ocr-13": ("花艺坊开业", "花艺开业", 4, 5),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_worked_examples(name):
    target, text, substring, edit, matched, wanted = EXAMPLES[name]
    assert tm.substring_or_edit(target, text) == pytest.approx(substring, abs=1e-9)
    assert tm.edit_similarity(target, text) == pytest.approx(edit, abs=1e-9)
    assert tm.recall(target, text) == (matched, wanted)


@pytest.mark.parametrize("name", CHINESE)
def test_worked_chinese_examples(name):
    target, text, matched, wanted = CHINESE[name]
    assert tm.recall(target, text) == (matched, wanted)


def test_recall_with_length_penalty_by_hand():
    """4 wanted words, 3 matched, 6 read: 3/4 * 4/6. Order is free, repeating does not pay."""
    assert tm.recall_with_length_penalty("one two three four", "four one two x y z") == pytest.approx(0.5)
    assert tm.recall_with_length_penalty("one two", "two one") == 1
    assert tm.recall_with_length_penalty("one two", "one two one two") == 0.5


def test_automatic_changes_formula_with_length():
    short, long = "x" * 20, "the quick brown fox jumps"
    assert tm.text_score(short, short[:-1]) == tm.edit_similarity(short, short[:-1])
    assert tm.text_score(long, "jumps fox brown quick the") == 1
    assert tm.edit_similarity(long, "jumps fox brown quick the") < 0.6


def test_several_targets():
    """Both words beat one word, junk costs, order is free, a single list entry is the plain formula."""
    both = tm.text_score(["HELLO", "WORLD"], "world HELLO")
    one = tm.text_score(["HELLO", "WORLD"], "HELLO")
    junk = tm.text_score(["HELLO", "WORLD"], "HELLO WORLD HELLO WORLD")
    assert both == 1 and one == junk == 0.5
    assert tm.text_score(["HELLO", "WORLD"], "HELLO WORLB") == pytest.approx(0.9)
    assert tm.text_score(["HELLO"], "xxHELLOyy") == tm.edit_similarity("HELLO", "xxHELLOyy")
    assert tm.text_score(["HELLO", "WORLD"], "HELLO WORLD", "edit") == 1


ALIKE = {
    "full width": ("Ｃａｆｅ　１２％", "CAFE 12%"),
    "half-width kana": ("ｶﾌｪ", "カフェ"),
    "accents": ("Cafe\u0301 A\u030angstro\u0308m", "café Ångström"),
    "ligature": ("oﬃce", "office"),
    "ellipsis": ("soon…", "soon..."),
    "dashes": ("a–b—c‑d−e", "a-b-c-d-e"),
    "quotes": ("‘it’s’ “big” „low“ «far»", '\'it\'s\' "big" "low" "far"'),
    "primes": ("6′ 2″", "6' 2\""),
    "sharp s": ("Straße", "STRASSE"),
    "final sigma": ("ΟΔΟΣ", "οδος"),
    "dotted I": ("İzmir", "i\u0307zmir"),
    "without a glyph": ("zero\u200bwidth so\u00adft", "zerowidth soft"),
}


@pytest.mark.parametrize("name", ALIKE)
@pytest.mark.parametrize("formula", tm.FORMULAS)
def test_texts_that_look_alike_are_equal(name, formula):
    one, other = ALIKE[name]
    assert tm.text_score(one, other, formula) == tm.text_score(other, one, formula) == 1
    assert tm.is_exact(one, other) and tm.text_score([one, "42"], f"42 {other}", formula) == 1


def test_texts_that_differ_stay_different():
    for one, other in (("café", "cafe"), ("10:00", "10.00"), ("ー", "-"), ("ONE", "0NE")):
        assert tm.text_score(one, other) < 1 and not tm.is_exact(one, other)


@pytest.mark.parametrize("formula", tm.FORMULAS)
@pytest.mark.parametrize(
    "targets, once, all_of_them",
    [
        (["SALE", "SALE"], "SALE", "SALESALE"),
        (["ON", "NO"], "ONO", "NOON"),
        (["OPEN", "PEN"], "OPEN", "PENOPEN"),
        (["A", "A", "A"], "AA", "AAA"),
    ],
)
def test_one_place_serves_one_target(targets, once, all_of_them, formula):
    apart = " ".join(targets[::-1])
    assert tm.text_score(targets, once, formula) < 1 and not tm.is_exact(targets, once)
    assert not tm.is_exact(targets, once + "X" * (len(all_of_them) - len(once)))
    assert tm.text_score(targets, apart, formula) == 1 and tm.is_exact(targets, all_of_them)


def test_places_by_hand():
    assert tm.text_score(["AA", "AA"], "AABB") == 0.5
    assert tm.text_score(["ON", "NO"], "ONOX") == 0.75  # ON has its place; NO is left with OX
    assert tm.text_score(["OFF", "ON"], "ON OFF") == 1
    assert tm.text_score(["aba", "ab"], "ababa") == 1 and tm.is_exact(["aba", "ab"], "ababa")  # where the first match would spoil it


def test_best_place_against_all_stretches():
    rng = np.random.default_rng(3)
    for _ in range(100):
        target, text = ("".join(rng.choice(list("abc"), n)) for n in rng.integers(1, 8, 2))
        stretches = {text[i:j] for i in range(len(text) + 1) for j in range(i, len(text) + 1)}
        distance, start, end = tm.best_place(target, text)
        assert distance == min(tm.Levenshtein.distance(target, s) for s in stretches)
        assert distance == tm.Levenshtein.distance(target, text[start:end])


def test_every_formula_stays_in_the_unit_interval_and_is_one_on_a_match():
    rng = np.random.default_rng(0)
    for _ in range(200):
        target, text = ("".join(rng.choice(list("ab c"), n)) for n in rng.integers(1, 30, 2))
        target = target.strip() or "a"
        for formula in tm.FORMULAS:
            assert 0 <= tm.text_score(target, text, formula) <= 1
            assert tm.text_score(target, target.upper(), formula) == 1
            assert tm.text_score(target, "", formula) == 0
            assert 0 <= tm.text_score([target, "cc"], text, formula) <= 1


def test_exact():
    assert tm.is_exact("New York", "NEWYORK") and not tm.is_exact("New York", "New Yorkk")
    assert tm.is_exact(["HELLO", "WORLD"], "world hello") and not tm.is_exact(["HELLO", "WORLD"], "hello hello")


@pytest.mark.parametrize(
    "targets, formula, words",
    [("  ", "auto", "is empty"), ([], "auto", "one or more strings"), ([3], "auto", "strings")],
)
def test_errors(targets, formula, words):
    with pytest.raises(ValueError, match=words):
        tm.text_score(targets, "text", formula)


@pytest.mark.parametrize(
    ("targets", "text", "exact"),
    [
        (["A" * n for n in range(1, 60)] + ["BAB"], "A" * 1771 + "BB", False),  # seen at the end of each of very many orders
        (list("AB" * 2000), "AB" * 2000, True),
        (["AB", "A", "B"], "ABAB", True),
        (["A", "AB", "BA"], "ABABA", True),
        (["AB", "AB", "A"], "AABBA", False),
    ],
)
def test_any_number_of_targets_is_arranged_or_given_up(targets, text, exact):
    assert tm.is_exact(targets, text) == exact
