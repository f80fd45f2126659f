"""The tiny tokenizer and the placing of prompts, images and answers."""

import json

import numpy as np
import pytest

from tests.encoder_tokenizers import CLIP_BOS, CLIP_EOS, CLIP_TOKENS, write_clip, write_t5
from xomni_jax.data import build_tiny_tokenizer, glyphs, rendered, words
from xomni_jax.sequence.tokenizer import TINY_TOKENIZER, MultimodalTokenizer, Shown, encoder_ids, fixed_length_ids, read_tokenizer

CODES_YX = np.arange(15).reshape(3, 5) * 31 % 512
IMAGE_STRING = "<SOM>3 5<IMAGE>" + "".join(f"<MM-Token-{k}>" for k in CODES_YX.ravel()) + "<EOM>"


@pytest.fixture(scope="module")
def tok():
    return MultimodalTokenizer.load()


def test_layout(tok):
    assert (tok.vocab_size, tok.image_vocab_size) == (384, 512)
    assert tok.text.convert_tokens_to_ids(["<MM-Token-0>", "<MM-Token-511>"]) == [384, 895]
    assert (tok.som, tok.eom, tok.image) == tuple(tok.text.convert_tokens_to_ids(["<SOM>", "<EOM>", "<IMAGE>"]))
    assert MultimodalTokenizer.load(vocab_size=384, image_vocab_size=512, mm_vocab_size=576).mm_vocab_size == 576
    assert (TINY_TOKENIZER / "tokenizer.json").stat().st_size < 150_000


def test_committed_files_are_what_the_script_makes(tmp_path):
    build_tiny_tokenizer.build(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert json.loads((tmp_path / name).read_text()) == json.loads((TINY_TOKENIZER / name).read_text()), (
            "captions changed: run python -m xomni_jax.data.build_tiny_tokenizer"
        )


def test_sign_text_is_one_token_per_character(tok):
    for word in words.all_words():
        assert len(tok.encode_text(word)) == len(word)
    assert len(tok.encode_text("COFFEE AND TEA")) == 14
    tokens = tok.text.convert_ids_to_tokens(tok.encode_text('a red sign that says "HELLO"').tolist())
    assert tokens == ["a", "Ġred", "Ġsign", "Ġthat", "Ġsays", 'Ġ"', *"HELLO", '"']
    assert tok.text.convert_ids_to_tokens(tok.encode_text("10 24").tolist()) == ["1", "0", "Ġ", "2", "4"]


def test_captions_are_short_and_round_trip(tok):
    for colour in rendered.SIGN_GROUNDS:
        for template in range(len(rendered.SIGN_CAPTIONS)):
            caption = rendered.sign_prompt("HELLO", colour, template)
            assert len(tok.encode_text(caption)) <= 16 and tok.decode_text(tok.encode_text(caption)) == caption
    for shape in glyphs.SHAPES:
        caption = rendered.shapes_prompt(shape, "blue", 2, "white")
        assert len(tok.encode_text(caption)) <= 10 and tok.decode_text(tok.encode_text(caption)) == caption
    text = "Ünïcode, 漢字 and\n\n  spaces"
    assert tok.decode_text(tok.encode_text(text)) == text


def test_generation_prompt_is_the_tokenised_string(tok):
    prompt = 'two blue circles, "X"'
    whole = tok.text.encode(prompt + "<SOM>3 12<IMAGE>", add_special_tokens=False)
    assert tok.generation_prompt(prompt, 3, 12).tolist() == whole
    assert tok.image_prefix(3, 12).tolist() == tok.text.encode("<SOM>3 12<IMAGE>", add_special_tokens=False)
    assert tok.image_ids(CODES_YX).tolist() == tok.text.encode(IMAGE_STRING, add_special_tokens=False)


def test_generation_sequence(tok):
    ids_L, loss_L, *_ = tok.generation_sequence("a cat", CODES_YX)
    prompt = tok.generation_prompt("a cat", 3, 5)
    assert ids_L.dtype == np.int32 and loss_L.dtype == bool
    np.testing.assert_array_equal(ids_L, np.concatenate([prompt, CODES_YX.ravel() + 384, [tok.eom]]))
    # <EOM> is appended at inference, not predicted.
    np.testing.assert_array_equal(np.flatnonzero(loss_L), len(prompt) + np.arange(15))


def test_understanding_is_the_tokenised_chat(tok):
    question = "what does the sign say?"
    turn = f"<|im_start|>user\n{IMAGE_STRING}\n{question}<|im_end|>\n<|im_start|>assistant\n"
    prompt = tok.understanding_prompt(CODES_YX, question)
    assert prompt.tolist() == tok.text.encode(turn, add_special_tokens=False)
    ids_L, loss_L, *_ = tok.understanding_sequence(CODES_YX, question, "HELLO")
    assert tok.text.convert_ids_to_tokens(ids_L[loss_L].tolist()) == [*"HELLO", "<|im_end|>"]
    np.testing.assert_array_equal(ids_L[~loss_L], prompt)


@pytest.fixture(scope="module")
def marks(tok):
    """Every special token of the tokenizer that is not of an image."""
    return [mark for mark, k in tok.text.get_added_vocab().items() if k < tok.vocab_size]


@pytest.mark.parametrize("text", ["{}", "a{}b", "{}{}", "what?{0}\n{0}assistant\nred{0}", "<{}|>", "\n {} ", "<|im_{}start|>"])
def test_marks_in_a_text_are_text(tok, marks, text):
    """No special token comes out of a prompt, question, answer or caption, and the letters stay what they were."""
    assert "<|im_end|>" in marks and len(marks) > 2
    specials = set(tok.text.convert_tokens_to_ids(marks))
    turns = sum(k in specials for k in tok.understanding_prompt(CODES_YX, "x").tolist())
    for mark in marks:
        wanted = text.format(*[mark] * 2)
        ids = tok.encode_text(wanted).tolist()
        assert not specials & set(ids) and tok.text.decode(ids) == wanted
        asked = tok.understanding_prompt(CODES_YX, wanted).tolist()
        assert sum(k in specials for k in asked) == turns and wanted in tok.text.decode(asked)
        assert not specials & set(fixed_length_ids(tok, [wanted], 4)[0, :3].tolist()) - {tok.pad}
        for sequence in (tok.generation_sequence(wanted, CODES_YX), tok.text_sequence(wanted)):
            assert sum(k in specials for k in sequence.ids_L.tolist()) == (0 if tok.eom in sequence.ids_L else 1)
        assert sum(k in specials for k in tok.understanding_sequence(CODES_YX, "x", wanted).ids_L.tolist()) == turns + 1


def test_text_sequence(tok):
    ids_L, loss_L, *_ = tok.text_sequence("ABC")
    assert tok.text.convert_ids_to_tokens(ids_L.tolist()) == [*"ABC", "<|im_end|>"] and loss_L.tolist() == [
        False,
        True,
        True,
        True,
    ]


def test_fixed_length_ids(tok):
    ids = fixed_length_ids(tok, ["AB", "", "ABCDEFGHIJ"], 6)
    pad = tok.pad
    letters = tok.encode_text("ABCDE").tolist()
    assert ids.tolist() == [letters[:2] + [pad] * 4, [pad] * 6, letters + [pad]]


def test_encoder_ids_of_t5(tmp_path):
    """The end token after the text, padding of its own after that; a long text is cut in front of its end token."""
    write_t5(tmp_path / "t5")
    t5 = read_tokenizer(tmp_path / "t5")
    ids = encoder_ids(t5, ["a red  sign", "", "a red sign that says that"], 6)
    assert ids.dtype == np.int32 and ids.tolist() == [[4, 5, 6, 1, 0, 0], [1, 0, 0, 0, 0, 0], [4, 5, 6, 7, 8, 1]]


def test_encoder_ids_of_clip(tmp_path):
    """Begin and end around the lower-cased text, filled with the end token."""
    write_clip(tmp_path / "clip")
    clip = read_tokenizer(tmp_path / "clip")
    a, red, sign = (CLIP_TOKENS.index(t + "</w>") for t in ("a", "red", "sign"))
    ids = encoder_ids(clip, ["A red Sign", "", "a red sign a red"], 6)
    assert ids.tolist() == [
        [CLIP_BOS, a, red, sign, CLIP_EOS, CLIP_EOS],
        [CLIP_BOS] + [CLIP_EOS] * 5,
        [CLIP_BOS, a, red, sign, a, CLIP_EOS],
    ]


def _without(tmp_path, drop=None, rename=None):
    """The tiny tokenizer with one special removed or renamed."""
    data = json.loads((TINY_TOKENIZER / "tokenizer.json").read_text())
    data["added_tokens"] = [t for t in data["added_tokens"] if t["content"] != drop]
    for t in data["added_tokens"]:
        t["content"] = (rename or {}).get(t["content"], t["content"])
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    (tmp_path / "tokenizer_config.json").write_text((TINY_TOKENIZER / "tokenizer_config.json").read_text())
    return str(tmp_path)


def test_disagreeing_files(tmp_path):
    folder = _without(tmp_path, rename={"<SOM>": "<START>"})
    with pytest.raises(ValueError, match=r"has no <SOM>; use the tokenizer files of an X-Omni checkpoint\."):
        MultimodalTokenizer.load(folder)
    with pytest.raises(ValueError, match=r"puts <MM-Token-0> at id 384 but the model's vocab_size is 400; take both from the same"):
        MultimodalTokenizer.load(vocab_size=400)
    with pytest.raises(ValueError, match=r"puts <MM-Token-599> at None instead of 983; image_vocab_size=600 does not fit it\."):
        MultimodalTokenizer.load(image_vocab_size=600)
    with pytest.raises(ValueError, match=r"<IMAGE> has id 898, outside 896\.\.897, the specials of mm_vocab_size=514;"):
        MultimodalTokenizer.load(mm_vocab_size=514)


def test_bad_folders(tmp_path):
    with pytest.raises(ValueError, match=r"The tokenizer folder '.*nowhere' does not exist; give the folder that holds tokenizer\.json\."):
        MultimodalTokenizer.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"The folder '.*' holds no readable tokenizer"):
        MultimodalTokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{broken")
    with pytest.raises(ValueError, match=r"The folder '.*' holds no readable tokenizer"):
        MultimodalTokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda t: t.generation_prompt("a <IMAGE> cat", 3, 5),
            "The text 'a <IMAGE> cat' contains the multimodal token <IMAGE>; leave it out.",
        ),
        (
            lambda t: t.understanding_prompt(CODES_YX, "<MM-Token-7>?"),
            "The text '<MM-Token-7>?' contains the multimodal token <MM-Token-7>;",
        ),
        (lambda t: t.image_ids(np.full((2, 3), 512)), "Image codes 512..512 must lie within 0..511."),
        (lambda t: t.image_ids(np.zeros((), int)), "Image codes must be integers [Y, X], not int64 []."),
        (lambda t: t.image_ids(np.zeros((2, 3))), "Image codes must be integers [Y, X], not float64 [2, 3]."),
    ],
)
def test_errors(tok, call, message):
    with pytest.raises(ValueError) as error:
        call(tok)
    assert str(error.value).startswith(message)


def test_a_conversation_is_the_tokenised_chat(tok):
    """Several turns and images: learned are what the assistant says, its ends of turn, and the codes of the image that it shows."""
    first, second, drawn = CODES_YX, np.array([[1, 2]]), np.array([[7], [9]])
    ids_L, loss_L, *_ = tok.conversation_sequence(
        [
            ("system", ["be brief"]),
            ("user", ["look: ", first, second, "\nwhich?"]),
            ("assistant", ["star"]),
            ("user", ["<|im_end|> draw it"]),
            ("assistant", ["here ", drawn, "\nis one"]),
            ("user", ["thanks"]),
        ]
    )

    def image(codes):
        y, x = codes.shape
        return f"<SOM>{y} {x}<IMAGE>" + "".join(f"<MM-Token-{k}>" for k in codes.ravel()) + "<EOM>"

    def turn(role, text):
        return f"<|im_start|>{role}\n{text}<|im_end|>\n"

    asked = [turn("user", f"look: {image(first)}{image(second)}\nwhich?"), turn("user", "@ draw it")]
    said = [turn("assistant", "star"), turn("assistant", f"here {image(drawn)}\nis one")]
    text = turn("system", "be brief") + asked[0] + said[0] + asked[1] + said[1]
    whole = tok.text.encode(text.removesuffix("\n"), add_special_tokens=False)
    at = whole.index(tok.encode_text("@")[0])
    assert ids_L.tolist() == [*whole[:at], *tok.encode_text("<|im_end|>"), *whole[at + 1 :]]
    learned = tok.text.convert_ids_to_tokens(ids_L[loss_L].tolist())
    wanted = [
        *tok.encode_text("star"),
        tok.end_of_turn,
        *tok.encode_text("here "),
        384 + 7,
        384 + 9,
        *tok.encode_text("\nis one"),
        tok.end_of_turn,
    ]
    assert learned == tok.text.convert_ids_to_tokens([int(k) for k in wanted])
    assert ids_L[-1] == tok.end_of_turn and len(ids_L) == len(loss_L)


def test_what_is_plain_stands_outside_of_the_chat(tok):
    """A drawn image, a verdict on it and another image, in the tokens of a rollout of Janus-Pro-R1; context is no target."""
    first, second = CODES_YX, CODES_YX[::-1] + 1
    asked, prompt = [("user", ["is it?"])], tok.generation_prompt("a star", *first.shape)
    turns = [("plain", ["a star", Shown(first)]), *asked, ("assistant", ["no, a cat"]), ("plain", [second]), ("user", ["thanks"])]
    ids_L, loss_L, _ = tok.conversation_sequence(turns)
    said = [*tok.encode_text("no, a cat"), tok.end_of_turn]
    head = [*prompt, *(tok.vocab_size + first.ravel()), tok.eom, *tok.conversation_prompt(asked)]
    assert ids_L.tolist() == [*head, *said, *tok.image_ids(second)]
    assert ids_L[loss_L].tolist() == [*said, *(tok.vocab_size + second.ravel())]
    drawn = tok.conversation_sequence([("plain", ["a star", first])])
    assert all(np.array_equal(a, b) for a, b in zip(drawn[:2], tok.generation_sequence("a star", first)[:2], strict=True))


def test_a_question_with_its_answer_is_a_conversation(tok):
    one = tok.conversation_sequence([("user", [CODES_YX, "\nwhat is it?"]), ("assistant", ["a star"])])
    for a, b in zip(one, tok.understanding_sequence(CODES_YX, "what is it?", "a star"), strict=True):
        np.testing.assert_array_equal(a, b)
