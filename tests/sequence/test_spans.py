"""Spans: round trips, and an error that names the position for every way to break the format."""

import numpy as np
import pytest

from xomni_jax.sequence.spans import ImageSpan, SpanError, TextSpan, parse, unparse
from xomni_jax.sequence.tokenizer import MultimodalTokenizer


@pytest.fixture(scope="module")
def tok():
    return MultimodalTokenizer.load(mm_vocab_size=576)


def test_round_trip_of_random_sequences(tok, rng):
    for _ in range(50):
        spans = []
        for _ in range(rng.integers(0, 6)):
            if rng.random() < 0.5 and not (spans and isinstance(spans[-1], TextSpan)):
                spans.append(TextSpan(rng.integers(0, 384, rng.integers(1, 9)).astype(np.int32)))
            else:
                spans.append(ImageSpan(rng.integers(0, 512, rng.integers(1, 13, 2)).astype(np.int32)))
        ids_L = unparse(spans, tok)
        found = parse(ids_L, tok)
        assert [type(s) for s in found] == [type(s) for s in spans]
        for a, b in zip(found, spans, strict=True):
            pair = (a.ids_L, b.ids_L) if isinstance(a, TextSpan) else (a.codes_YX, b.codes_YX)
            np.testing.assert_array_equal(*pair)
        np.testing.assert_array_equal(unparse(found, tok), ids_L)


def test_parses_what_the_tokenizer_makes(tok):
    codes_YX = np.arange(12).reshape(2, 6)
    text, image, rest = parse(tok.understanding_prompt(codes_YX, "what is it?"), tok)
    np.testing.assert_array_equal(image.codes_YX, codes_YX)
    assert tok.decode_text(text.ids_L) == "user\n" and "what is it?" in tok.decode_text(rest.ids_L)
    assert parse(np.zeros(0, int), tok) == []


SOM, EOM, IMAGE, CODE, TWO, THREE, SPACE = 896, 897, 898, 384, 17, 18, 220  # ids of the tiny tokenizer, checked below
HEAD = [SOM, TWO, SPACE, THREE, IMAGE]
CODES = [CODE + k for k in range(6)]


def test_ids_of_the_cases(tok):
    assert tok.image_prefix(2, 3).tolist() == HEAD and tok.eom == EOM


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([5, 960], "Position 1: id 960 is outside 0..959."),
        ([5, -1], "Position 1: id -1 is outside 0..959."),
        ([5, 6, CODE + 9], "Position 2: image code 9 stands outside an image; an image starts with <SOM>."),
        ([5, EOM], "Position 1: <EOM> stands outside an image; an image starts with <SOM>."),
        ([5, 940], "Position 1: the unused id 940 stands outside an image; an image starts with <SOM>."),
        ([5, SOM, TWO], "Position 3: the end of the sequence follows <SOM> at 1 where <IMAGE> is due."),
        ([SOM, TWO, SPACE, SOM], "Position 3: <SOM> follows <SOM> at 0 where <IMAGE> is due."),
        ([SOM, TWO, THREE, IMAGE, *CODES, EOM], "Position 1: the image size '23' is not 'ROWS COLUMNS'."),
        ([SOM, IMAGE, *CODES, EOM], "Position 1: the image size '' is not 'ROWS COLUMNS'."),
        ([5, *HEAD, *CODES], "Position 12: the sequence ends before the <EOM> of the image at 1 (6 of 6 codes)."),
        ([*HEAD, *CODES[:4], EOM], "Position 9: the image at 0 holds 4 codes, but its size 2 x 3 needs 6."),
        ([*HEAD, *CODES, CODE, EOM], "Position 12: the image at 0 holds 7 codes, but its size 2 x 3 needs 6."),
        ([*HEAD, *CODES[:2], SOM], "Position 7: <SOM> inside the image at 0; only codes may stand before its <EOM>."),
        (
            [*HEAD, *CODES[:2], 9, *CODES[2:], EOM],
            "Position 7: text id 9 inside the image at 0; only codes may stand before its <EOM>.",
        ),
        ([*HEAD, 940, EOM], "Position 5: the unused id 940 inside the image at 0; only codes may stand before its <EOM>."),
    ],
)
def test_errors_name_the_position(tok, ids, message):
    with pytest.raises(SpanError) as error:
        parse(np.array(ids), tok)
    assert str(error.value) == message
