"""ImageReward with a small random model equals the authors' computation, written here with torch alone (parity marker: torch)."""

import json
import string

import numpy as np
import pytest
from PIL import Image

from tests.rewards.torch_models import PROMPTS, check_independent, images, values
from xomni_jax.rewards.scorer import ServiceError, build_scorer

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
F = torch.nn.functional
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "sign", "the", "end", *string.ascii_lowercase, *string.digits, *"&;{}"]
V, T, HEADS = 128, 32, 2  # widths of the image and the text tower
MED = {"vocab_size": len(WORDS) + 2, "hidden_size": T, "num_hidden_layers": 2, "num_attention_heads": HEADS,
       "intermediate_size": 48, "max_position_embeddings": 40, "layer_norm_eps": 1e-12, "add_cross_attention": True,
       "encoder_width": 768, "model_type": "bert"}  # fmt: skip


def shapes():
    """Names and shapes of the released file, small."""
    out = {"visual_encoder.cls_token": (1, 1, V), "visual_encoder.pos_embed": (1, 5, V), "vision_proj.weight": (8, V)}

    def linear(name, o, i):
        out.update({f"{name}.weight": (o, i), f"{name}.bias": (o,)})

    def norm(name, d):
        out.update({f"{name}.weight": (d,), f"{name}.bias": (d,)})

    out |= {"visual_encoder.patch_embed.proj.weight": (V, 3, 16, 16), "visual_encoder.patch_embed.proj.bias": (V,)}
    for n in range(2):
        for name, o, i in (("attn.qkv", 3 * V, V), ("attn.proj", V, V), ("mlp.fc1", 96, V), ("mlp.fc2", V, 96)):
            linear(f"visual_encoder.blocks.{n}.{name}", o, i)
        for name in ("norm1", "norm2"):
            norm(f"visual_encoder.blocks.{n}.{name}", V)
        for attention, memory in (("attention", T), ("crossattention", V)):
            for name, i in (("query", T), ("key", memory), ("value", memory)):
                linear(f"text_encoder.encoder.layer.{n}.{attention}.self.{name}", T, i)
            linear(f"text_encoder.encoder.layer.{n}.{attention}.output.dense", T, T)
            norm(f"text_encoder.encoder.layer.{n}.{attention}.output.LayerNorm", T)
        linear(f"text_encoder.encoder.layer.{n}.intermediate.dense", 48, T)
        linear(f"text_encoder.encoder.layer.{n}.output.dense", T, 48)
        norm(f"text_encoder.encoder.layer.{n}.output.LayerNorm", T)
    norm("visual_encoder.norm", V)
    norm("text_encoder.embeddings.LayerNorm", T)
    out |= {"text_encoder.embeddings.word_embeddings.weight": (MED["vocab_size"], T)}
    out |= {"text_encoder.embeddings.position_embeddings.weight": (40, T)}
    out = {f"blip.{name}": shape for name, shape in out.items()}
    for n, (i, o) in zip((0, 2, 4, 6, 7), ((T, 24), (24, 16), (16, 12), (12, 8), (8, 1))):
        linear(f"mlp.layers.{n}", o, i)
    return out


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """(folder in the released layout, state dict)."""
    folder = tmp_path_factory.mktemp("imagereward")
    torch.manual_seed(5)
    state = {k: torch.randn(s) * 0.2 + (len(s) == 1 and k.endswith("weight")) for k, s in shapes().items()}
    state["blip.text_encoder.embeddings.position_ids"] = torch.arange(40)[None]
    torch.save(state, folder / "ImageReward.pt")
    (folder / "med_config.json").write_text(json.dumps(MED))
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return folder, state


def attend(q, k, v, heads, mask=None):
    """Multi-head attention; mask is added to the logits."""
    q, k, v = (x.reshape(len(x), x.shape[1], heads, -1).transpose(1, 2) for x in (q, k, v))
    logits = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    return ((logits if mask is None else logits + mask).softmax(-1) @ v).transpose(1, 2).flatten(2)


def reference(state, pixels, ids, keep):
    """The score as the authors' code computes it."""

    def lin(name, x):
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(name, x, eps):
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)

    p = "blip.visual_encoder."
    x = F.conv2d(pixels, state[p + "patch_embed.proj.weight"], state[p + "patch_embed.proj.bias"], stride=16).flatten(2).transpose(1, 2)
    x = torch.cat([state[p + "cls_token"].expand(len(x), 1, V), x], 1) + state[p + "pos_embed"]
    for n in range(2):
        b = f"{p}blocks.{n}."
        q, k, v = lin(b + "attn.qkv", norm(b + "norm1", x, 1e-6)).chunk(3, -1)
        x = x + lin(b + "attn.proj", attend(q, k, v, V // 64))
        x = x + lin(b + "mlp.fc2", F.gelu(lin(b + "mlp.fc1", norm(b + "norm2", x, 1e-6))))
    memory = norm(p + "norm", x, 1e-6)
    p = "blip.text_encoder."
    h = state[p + "embeddings.word_embeddings.weight"][ids] + state[p + "embeddings.position_embeddings.weight"][: ids.shape[1]]
    h = norm(p + "embeddings.LayerNorm", h, 1e-12)
    mask = (1.0 - keep[:, None, None].float()) * -1e9
    for n in range(2):
        b = f"{p}encoder.layer.{n}."
        for part, source, m in (("attention", None, mask), ("crossattention", memory, None)):
            kv = h if source is None else source
            y = attend(lin(f"{b}{part}.self.query", h), lin(f"{b}{part}.self.key", kv), lin(f"{b}{part}.self.value", kv), HEADS, m)
            h = norm(f"{b}{part}.output.LayerNorm", lin(f"{b}{part}.output.dense", y) + h, 1e-12)
        h = norm(b + "output.LayerNorm", lin(b + "output.dense", F.gelu(lin(b + "intermediate.dense", h))) + h, 1e-12)
    x = h[:, 0]
    for n in (0, 2, 4, 6, 7):
        x = lin(f"mlp.layers.{n}", x)
    return (x[:, 0] - 0.16717362830052426) / 1.0333394966054072


def test_it_is_the_authors_computation(released):
    from transformers import BertTokenizer

    folder, state = released
    squares = []
    for image in map(Image.fromarray, images()):
        short, long = min(image.size), max(image.size)
        new = (32, int(32 * long / short)) if image.width < image.height else (int(32 * long / short), 32)
        left, top = int(round((new[0] - 32) / 2.0)), int(round((new[1] - 32) / 2.0))
        squares.append(np.asarray(image.resize(new, Image.Resampling.BICUBIC).crop((left, top, left + 32, top + 32))))
    mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    pixels = ((torch.tensor(np.stack(squares)) / 255 - mean) / std).permute(0, 3, 1, 2)
    tokens = BertTokenizer.from_pretrained(folder)(PROMPTS, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
    assert tokens.input_ids.shape[1] == 35 and tokens.attention_mask[3].all() and not tokens.attention_mask[0].all()
    with torch.no_grad():
        expected = reference(state, pixels, tokens.input_ids, tokens.attention_mask).numpy()
    scorer = build_scorer("imagereward", {"model": str(folder), "any_weights": True})
    np.testing.assert_allclose(values(scorer), expected, atol=1e-4)
    assert np.ptp(expected) > 0.1 and scorer.version == f"imagereward-{scorer.model_hash[:12]}"


def test_scores_depend_on_nothing_else(released):
    check_independent("imagereward", {"model": str(released[0]), "any_weights": True}, build_scorer)


@pytest.mark.parametrize(
    "key, missing",
    [("blip.visual_encoder.norm.weight", "post_layernorm"), ("mlp.layers.7.bias", "7.bias"),
     ("blip.text_encoder.encoder.layer.1.crossattention.self.key.weight", "layer.1.crossattention.self.key")],
)  # fmt: skip
def test_every_weight_is_needed(released, tmp_path, key, missing):
    """The authors' loader ignores missing weights; a file that is not complete scores at random."""
    folder, state = released
    for name in ("med_config.json", "vocab.txt"):
        (tmp_path / name).write_text((folder / name).read_text())
    options = {"model": str(tmp_path), "any_weights": True}
    torch.save({k: v for k, v in state.items() if k != key}, tmp_path / "ImageReward.pt")
    with pytest.raises(ServiceError, match=f"1 weights are missing .*{missing}"):
        build_scorer("imagereward", options)
    torch.save(state | {key + "2": torch.zeros(1)}, tmp_path / "ImageReward.pt")
    with pytest.raises(ServiceError, match="1 weights are unexpected"):
        build_scorer("imagereward", options)


def test_bad_folders(released, tmp_path):
    folder, _ = released
    with pytest.raises(ServiceError, match="ImageReward.pt is not the published file"):
        build_scorer("imagereward", {"model": str(folder)})
    with pytest.raises(ServiceError, match="holds no ImageReward.pt; it has no files"):
        build_scorer("imagereward", {"model": str(tmp_path)})
    (tmp_path / "ImageReward.pt").write_bytes((folder / "ImageReward.pt").read_bytes())
    options = {"model": str(tmp_path), "any_weights": True, "tokenizer": str(folder)}
    with pytest.raises(ServiceError, match="holds no med_config.json"):
        build_scorer("imagereward", options)
    (tmp_path / "med_config.json").write_text((folder / "med_config.json").read_text())
    (tmp_path / "vocab.txt").write_text((folder / "vocab.txt").read_text() + "more\n")
    with pytest.raises(ServiceError, match=f"has {len(WORDS) + 3} tokens, not {len(WORDS) + 2}; .* of bert-base-uncased"):
        build_scorer("imagereward", options | {"tokenizer": str(tmp_path)})
    (tmp_path / "med_config.json").write_text("{}")
    with pytest.raises(ServiceError, match="are not those of ImageReward"):
        build_scorer("imagereward", options)
