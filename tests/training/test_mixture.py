"""Sequences of every kind, packed together: their loss is that of each alone, in all and by source; and runs of a mixture."""

import dataclasses
import json
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.miniature import configs, random_params, stage_config
from tests.test_metrics import documented
from xomni_jax.core.config import ConfigError
from xomni_jax.models.transformer import ARTransformer
from xomni_jax.sequence.tokenizer import MultimodalTokenizer
from xomni_jax.training import pretrain
from xomni_jax.training.next_token import NextTokenConfig, build_sequences, next_token_loss, pack_batch
from xomni_jax.training.run import run_stage

CFG = NextTokenConfig(rows=3, row_length=96, generation=0.5, understanding=0.5, text=0.0)
NAMES = ("captions", "talk", "texts")
TALK = (
    ("user", "<image 0>\n<image 1>\nwhich is it?"),
    ("assistant", "star"),
    ("user", "<image 1>another one"),
    ("assistant", "<image 2> so"),
)


@pytest.fixture(scope="module")
def tok():
    return MultimodalTokenizer.load()


def examples(rng):
    """(columns, codes, number of the source) of examples of every kind, in no order."""
    grid = lambda: rng.integers(0, 64, (2, 2))  # noqa: E731
    rows = [({"caption": f"a {c} sign", "question": "what?", "answer": c}, [grid()], 0) for c in ("red", "blue", "green", "red", "cyan")]
    rows += [({"turns": TALK, "system": "see"}, [grid(), rng.integers(0, 64, (1, 3)), grid()], 1)]
    rows += [({"turns": (("user", "hello"), ("assistant", "good day")), "caption": "unused"}, [], 1)]
    rows += [({"caption": text}, [], 2) for text in ("a text alone", "a sign")]
    rows = [rows[i] for i in rng.permutation(len(rows))]
    keys = ("caption", "question", "answer", "turns", "system")
    return {key: [row.get(key) for row, _, _ in rows] for key in keys}, [c for _, c, _ in rows], [s for _, _, s in rows]


def test_packed_loss_is_that_of_each_sequence_alone(tok, rng):
    columns, codes, source_of = examples(rng)
    sequences = build_sequences(columns, codes, tok, CFG, rng)
    cfg = configs()["transformer"]
    net, params = ARTransformer(cfg), random_params("transformer", cfg, 0)
    loss = jax.jit(lambda batch: next_token_loss(net, params, batch, batch, CFG, NAMES)[1])
    packed, counts = pack_batch(sequences, tok, CFG, NAMES, source_of)
    assert counts["data/left_out"] == 0 and counts["data/filled"] > 0.5 and packed.segments_BL.max() > 2
    found = loss(packed)

    sums, by_kind = np.zeros((len(NAMES), 2)), np.zeros((2, 2))
    for sequence, source in zip(sequences, source_of, strict=True):
        alone, _ = pack_batch([sequence], tok, CFG, NAMES, [source])
        metrics = loss(alone)
        for kind, (name, mask) in enumerate((("text", alone.text_mask_BM), ("image", alone.image_mask_BM))):
            part = np.array([float(metrics[f"loss/{name}"]) * mask.sum(), mask.sum()])
            by_kind[kind] += part
            sums[source] += part
    np.testing.assert_allclose([found["loss/text"], found["loss/image"]], by_kind[:, 0] / by_kind[:, 1], rtol=2e-5)
    np.testing.assert_allclose([found[f"loss/source/{name}"] for name in NAMES], sums[:, 0] / sums[:, 1], rtol=2e-5)
    assert [counts[f"data/targets/{name}"] for name in NAMES] == sums[:, 1].tolist()
    assert [counts[f"data/examples/{name}"] for name in NAMES] == [5, 2, 2]


def test_sequences_of_every_kind(tok, rng):
    codes = [np.array([[k, k + 1]]) for k in range(3)]

    def sequence(images, share="generation", **example):
        shares = dict.fromkeys(("generation", "understanding", "text"), 0.0) | {share: 1.0}
        return build_sequences(
            {"id": ["x"]} | {k: [v] for k, v in example.items()}, [images], tok, dataclasses.replace(CFG, drop_prompt=0.0, **shares), rng
        )[0]

    def same(a, b):
        return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))

    assert same(sequence(codes[:1], caption="a sign"), tok.generation_sequence("a sign", codes[0]))
    assert same(sequence(codes[:1], "understanding", caption="a", question="q", answer="b"), tok.understanding_sequence(codes[0], "q", "b"))
    assert same(sequence([], caption="a sign"), tok.text_sequence("a sign"))  # the only kind that it can be, whatever the shares
    talk = sequence(codes, caption="a", turns=TALK, system="see")
    content = [
        ("system", ["see"]),
        ("user", [codes[0], "\n", codes[1], "\nwhich is it?"]),
        ("assistant", ["star"]),
        ("user", [codes[1], "\nanother one"]),
        ("assistant", [codes[2], "\nso"]),
    ]
    assert same(talk, tok.conversation_sequence(content))
    one = dict(caption="a", question="q", answer="b", turns=(("user", "<image 0>\nq"), ("assistant", "b")))
    assert same(sequence(codes[:1], **one), tok.generation_sequence("a", codes[0]))
    assert same(sequence(codes[:1], "understanding", **one), tok.understanding_sequence(codes[0], "q", "b"))
    assert same(sequence(codes[:1], **one | dict(caption="")), tok.understanding_sequence(codes[0], "q", "b"))
    shown = tok.conversation_sequence([("user", ["draw it"]), ("assistant", [codes[0]])])
    assert same(sequence(codes[:1], **one | dict(turns=(("user", "draw it"), ("assistant", "<image 0>")))), shown)
    with pytest.raises(
        ConfigError, match="the example x has nothing that this stage learns from: its fields are caption, id; set the share"
    ):
        sequence(codes[:1], "understanding", caption="a sign")


def test_what_is_longer_than_a_row_is_counted_by_source(tok, rng):
    texts = ["a" * 50, "Z" * 200, "b", "Y" * 300]
    sequences = build_sequences({"caption": texts}, [[]] * 4, tok, CFG, rng)
    _, counts = pack_batch(sequences, tok, CFG, NAMES, [0, 1, 1, 2])
    assert [counts[f"data/too_long/{name}"] for name in NAMES] == [0, 1, 1] == [counts[f"data/left_out/{name}"] for name in NAMES]
    assert [counts[f"data/targets/{name}"] for name in NAMES] == [len(sequences[0].ids_L) - 1, len(sequences[2].ids_L) - 1, 0]
    with pytest.raises(ConfigError, match="config.next_token.row_length=96: a batch has no sequence below 201 tokens; raise it"):
        pack_batch([sequences[1], sequences[3]], tok, CFG)


@pytest.mark.parametrize("processes", [1, 2])
def test_images_of_any_number_and_size_are_encoded_at_their_places(rng, monkeypatch, processes):
    """Every process fills its own slots of calls that all of them make; a code here is the image's first pixel."""
    images = [
        [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes] for sizes in ([(2, 4)] * 5, [], [(4, 2), (2, 4)], [(2, 4)])
    ]
    images += [[rng.integers(0, 99, (2, 2)).astype(np.uint16)], [], [(images[0][0])], []]
    count = len(images)

    def rows_of(mesh, n):
        return {p: list(range(p * n // processes, (p + 1) * n // processes)) for p in range(processes)}

    def encoded(index, sent):
        """What process `index` gets, when in each call the others send what they sent before."""
        calls = []

        def spread(mesh, pixels, n):
            calls.append(pixels)
            parts = [pixels if p == index or not sent else sent[p][len(calls) - 1] for p in range(processes)]
            return np.concatenate(parts)

        monkeypatch.setattr(pretrain, "rows_of", rows_of)
        monkeypatch.setattr(pretrain, "spread", spread)
        monkeypatch.setattr(pretrain, "share", lambda columns, rows, n: {"shapes": [[list(x.shape) for x in own] for own in images]})
        monkeypatch.setattr(jax, "process_index", lambda: index)
        model = SimpleNamespace(mesh=None, num_data_shards=processes, encode_pixels=lambda x: jnp.asarray(x)[:, :1, :1, 0])
        rows = rows_of(None, count)[index]
        return pretrain.encode_images(model, [images[r] for r in rows], None if processes == 1 else rows, count), calls

    sent = [encoded(p, None)[1] for p in range(processes)]
    for index in range(processes):
        codes, calls = encoded(index, sent)
        assert [len(own) for own in codes] == [len(own) for own in images]
        for own, found in zip(images, codes, strict=True):
            for image, code in zip(own, found, strict=True):
                np.testing.assert_allclose(code, image if image.ndim == 2 else pretrain.to_pixels(image[:1, :1, 0]))
        assert len(calls) == (0 if processes == 1 else len(sent[0])) and all(len(c) <= count // processes for c in calls)


def test_a_run_of_a_mixture_writes_what_is_documented(model_dir, tmp_path, capsys):
    turns = [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "good day"}]
    (tmp_path / "talk.jsonl").write_text(json.dumps({"conversations": turns}))
    (tmp_path / "talk.txt").write_text("a text alone\n")
    signs = ("source=rendered", "sizes=((16,32),)", "weights=(1.0,)", "text_lengths=((2,3),)", "shapes=0.0")
    talk = ("source=files", f"path={tmp_path}/talk.*", "sizes=((16,32),)", "imageless=True", "weight=0.6")
    parts = [f"data.parts.{name}.{option}" for name, options in (("signs", signs), ("talk", talk)) for option in options]
    few = ("steps=2", "batch_size=8", "grid_every=0", "next_token.rows=8")
    cfg = stage_config("sft", tmp_path / "run", f"init_from={model_dir}", "data.source=mixture", *parts, *few)
    run_stage(cfg)
    told = capsys.readouterr().out
    assert "config.data.parts.talk: 37.50% of the examples, 6 in 2 steps, from 2 records; the source is shorter than the run" in told
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    written = {re.sub("/(signs|talk)$", "/SOURCE", name) for line in lines for name in line if name.endswith(("/signs", "/talk"))}
    assert written == {name for name in documented("sft") if name.endswith("/SOURCE")}
    assert all(line["data/examples/signs"] == 5 and line["data/examples/talk"] == 3 for line in lines)
    weights = [line[f"data/targets/{name}"] for line in lines[:1] for name in ("signs", "talk")]
    sums = [line[f"loss/source/{name}"] * w for line in lines[:1] for name, w in zip(("signs", "talk"), weights)]
    assert np.isfinite(sums).all() and min(weights) > 0
