"""clip, pickscore and hpsv2 with small random models equal what their authors' code computes (parity marker: torch)."""

import html

import numpy as np
import pytest
from PIL import Image

from tests.encoder_tokenizers import write_clip
from tests.rewards.torch_models import PROMPTS, check_independent, files_of_every_kind, images, items, randomise, values, write_clip_model
from xomni_jax.core.config import ConfigError
from xomni_jax.rewards.protocol import Limits
from xomni_jax.rewards.scorer import ServiceError, build_scorer
from xomni_jax.rewards.services import hpsv2
from xomni_jax.rewards.workers import score_files

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
pytest.importorskip("ftfy")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A small CLIP in the layout of transformers."""
    return write_clip_model(tmp_path_factory.mktemp("clip") / "model")


@pytest.fixture(scope="module")
def hps(tmp_path_factory):
    """HPSv2's files with a small model: half precision under `state_dict`; the tokenizer beside them. (folder, model)."""
    from tests.rewards.open_clip_reference import OpenClip

    folder = tmp_path_factory.mktemp("hps") / "model"
    tokens = write_clip(folder)
    torch.manual_seed(3)
    model = OpenClip(tokens).eval()
    randomise(model)
    model.half().float()
    state = {key: p.half() for key, p in model.state_dict().items()}
    torch.save({"state_dict": state}, folder / "HPS_v2.1_compressed.pt")
    torch.save({"state_dict": state}, folder / "HPS_v2_compressed.pt", _use_new_zipfile_serialization=False)  # torch before 1.6
    return folder, model


def logits(folder, prompts=PROMPTS):
    """As the model cards compute it: the diagonal of logits_per_image."""
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    pixels = CLIPImageProcessorPil.from_pretrained(folder)([Image.fromarray(i) for i in images()], return_tensors="pt")
    tokens = CLIPTokenizer.from_pretrained(folder)(prompts, padding=True, truncation=True, max_length=77, return_tensors="pt")
    with torch.no_grad():
        model = CLIPModel.from_pretrained(folder).eval()
        return model(**pixels, **tokens).logits_per_image.diagonal().numpy(), model.logit_scale.exp().item()


def test_clip_in_every_published_scale(clip):
    expected, scale = logits(clip)
    cosine = expected / scale
    assert np.ptp(cosine) > 0.1 and scale == pytest.approx(np.exp(3.0))
    published = {"cosine": cosine, "logit": expected, "logit/30": expected / 30, "torchmetrics": np.maximum(100 * cosine, 0)}
    published["clipscore"] = 2.5 * np.maximum(cosine, 0)
    assert (cosine < 0).any() and (cosine > 0).any()
    for formula, wanted in published.items():
        scorer = build_scorer("clip", {"model": str(clip), "formula": formula})
        np.testing.assert_allclose(values(scorer), wanted, atol=1e-4)
        assert scorer.version == f"clip-{scorer.model_hash[:12]}/{formula}"
    named = build_scorer("clip", {"model": str(clip), "template": "a photo of a {prompt}"})
    expected, scale = logits(clip, [f"a photo of a {prompt}" for prompt in PROMPTS])
    np.testing.assert_allclose(values(named), expected / scale, atol=1e-4)
    with pytest.raises(ConfigError, match="template='a photo' must contain {prompt}"):
        build_scorer("clip", {"model": str(clip), "template": "a photo"})


def test_pickscore_raw_and_by_26(clip):
    expected, _ = logits(clip)
    np.testing.assert_allclose(values(build_scorer("pickscore", {"model": str(clip)})), expected, atol=1e-4)
    by_26 = build_scorer("pickscore", {"model": str(clip), "formula": "logit/26"})
    np.testing.assert_allclose(values(by_26), expected / 26, atol=1e-4)
    assert by_26.version.endswith("/logit/26") and by_26.scope == "image"


@pytest.mark.parametrize("resize", ["antialias", "plain", "pil"])
def test_hpsv2_is_the_authors_computation(hps, resize):
    from transformers import CLIPTokenizer

    folder, model = hps
    scorer = build_scorer("hpsv2", {"model": str(folder), "resize": resize, "any_weights": True})
    ids = torch.zeros(len(PROMPTS), 77, dtype=torch.long)
    for row, prompt in zip(ids, PROMPTS):
        cleaned = " ".join(html.unescape(html.unescape(prompt)).lower().split())
        tokens = CLIPTokenizer.from_pretrained(folder)(cleaned).input_ids
        if len(tokens) > 77:
            tokens = tokens[:76] + tokens[-1:]
        row[: len(tokens)] = torch.tensor(tokens)
    pixels = torch.stack([authors_pixels(image, resize) for image in images()])
    with torch.no_grad():
        expected = (model.images(pixels) @ model.texts(ids).T).diagonal().numpy()
    np.testing.assert_allclose(values(scorer), expected, atol=1e-4)
    assert np.ptp(expected) > 0.1


def authors_pixels(image, resize, size=28):
    """Tensor first, then the long side to `size` and zeros around; normalised at the end."""
    height, width = image.shape[:2]
    new = [round(side * (size / max(height, width))) or 1 for side in (height, width)]
    if resize == "pil":
        image = np.asarray(Image.fromarray(image).resize(new[::-1], Image.Resampling.BICUBIC))
    x = torch.tensor(image).permute(2, 0, 1)[None].float() / 255
    if resize != "pil" and new != [height, width]:
        x = torch.nn.functional.interpolate(x, size=new, mode="bicubic", align_corners=False, antialias=resize == "antialias")
    frame = torch.zeros(3, size, size)
    top, left = (size - new[0]) // 2, (size - new[1]) // 2
    frame[:, top : top + new[0], left : left + new[1]] = x[0]
    mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    return (frame - mean[:, None, None]) / std[:, None, None]


def test_prompts_are_cleaned_as_by_open_clip():
    assert hpsv2.clean("  A&amp;amp;B \n ＨＩ — schÃ¶n “so” ") == 'a&b hi — schön "so"'


def test_scores_depend_on_nothing_else(clip, hps):
    for name, options in (("clip", {"model": str(clip)}), ("hpsv2", {"model": str(hps[0]), "any_weights": True})):
        check_independent(name, options, build_scorer)
        scorer = build_scorer(name, options)
        files, pixels = zip(*files_of_every_kind())
        prompts = items(["a red sign"] * len(files))
        assert score_files(scorer, files, prompts, Limits()) == scorer.score(pixels, prompts)


def test_versions_are_told_apart_by_their_contents(hps):
    folder, _ = hps
    with pytest.raises(ServiceError, match="HPS_v2_compressed.pt is not the published file: its sha256 begins with .* --any-weights"):
        build_scorer("hpsv2", {"model": str(folder), "version": "v2.0"})
    scorer = build_scorer("hpsv2", {"model": str(folder), "version": "v2.0", "any_weights": True})
    assert scorer.version == f"hpsv2-{scorer.model_hash[:12]}/v2.0/antialias"


def test_the_tokenizer_must_be_a_clips(hps, tmp_path):
    import json

    (tmp_path / "other").mkdir()
    for file in hps[0].glob("*[nt]"):  # json and txt
        (tmp_path / "other" / file.name).write_bytes(file.read_bytes())
    vocabulary = json.loads((hps[0] / "vocab.json").read_text())
    vocabulary["<|endoftext|>"] += 5
    (tmp_path / "other" / "vocab.json").write_text(json.dumps(vocabulary))
    with pytest.raises(ServiceError, match="other is not the model's tokenizer: it ends texts with token .*, not"):
        build_scorer("hpsv2", {"model": str(hps[0]), "any_weights": True, "tokenizer": str(tmp_path / "other")})
    with pytest.raises(ServiceError, match="it must hold vocab.json and merges.txt, or tokenizer.json, of a CLIP"):  # there is none
        build_scorer("hpsv2", {"model": str(hps[0]), "any_weights": True, "tokenizer": str(tmp_path)})


def changed(folder, to, change):
    """A copy of the HPSv2 folder whose state dict `change` has edited."""
    to.mkdir()
    for file in folder.iterdir():
        if file.suffix != ".pt":
            (to / file.name).write_bytes(file.read_bytes())
    state = torch.load(folder / "HPS_v2.1_compressed.pt", weights_only=True)
    change(state["state_dict"])
    torch.save(state, to / "HPS_v2.1_compressed.pt")
    return {"model": str(to), "any_weights": True}


def test_incomplete_hpsv2(tmp_path, hps):
    lacking = changed(hps[0], tmp_path / "a", lambda s: s.pop("visual.transformer.resblocks.1.attn.in_proj_bias"))
    with pytest.raises(ServiceError, match="not a complete copy of the published model: 3 weights are missing"):
        build_scorer("hpsv2", lacking)
    more = changed(hps[0], tmp_path / "b", lambda s: s.update(score_predictor=torch.zeros(3)))
    with pytest.raises(ServiceError, match=r"1 weights are unexpected \(score_predictor\)"):
        build_scorer("hpsv2", more)
    other = changed(hps[0], tmp_path / "c", lambda s: s.pop("visual.conv1.weight"))
    with pytest.raises(ServiceError, match="does not hold the weights of HPSv2 in open_clip's layout"):
        build_scorer("hpsv2", other)
    file = tmp_path / "c" / "HPS_v2.1_compressed.pt"
    file.write_bytes((hps[0] / file.name).read_bytes()[:5000])
    with pytest.raises(ServiceError, match="cannot be read as a file of weights"):
        build_scorer("hpsv2", other)
    torch.save({"weights": {}}, file)
    with pytest.raises(ServiceError, match="has no 'state_dict'; take the file of that name from xswu/HPSv2"):
        build_scorer("hpsv2", other)
    file.unlink()
    with pytest.raises(ServiceError, match=r"holds no HPS_v2.1_compressed.pt; it has"):
        build_scorer("hpsv2", other)


def test_incomplete_clip(tmp_path, clip):
    from safetensors.torch import load_file, save_file

    weights = load_file(clip / "model.safetensors")
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in clip.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    for change, said in (
        ({"text_projection.weight": None}, r"1 weights are missing \(text_projection.weight\)"),
        ({"extra": torch.zeros(2)}, r"1 weights are unexpected \(extra\)"),
        ({"text_projection.weight": torch.zeros(9, 9)}, "holds no CLIPModel that transformers can read"),
    ):
        save_file({k: v for k, v in (weights | change).items() if v is not None}, copy / "model.safetensors", {"format": "pt"})
        with pytest.raises(ServiceError, match=said):
            build_scorer("clip", {"model": str(copy)})
    save_file(weights | {"text_model.embeddings.position_ids": torch.arange(77)}, copy / "model.safetensors", {"format": "pt"})
    build_scorer("clip", {"model": str(copy)})  # the released file has these indices
    (copy / "model.safetensors").write_bytes((clip / "model.safetensors").read_bytes()[:3000])
    with pytest.raises(ServiceError, match="holds no CLIPModel that transformers can read"):
        build_scorer("clip", {"model": str(copy)})
    (copy / "model.safetensors").unlink()
    with pytest.raises(ServiceError, match="holds no CLIPModel .*Error no file named model.safetensors"):
        build_scorer("clip", {"model": str(copy)})


def test_what_is_missing_on_the_machine(clip, monkeypatch):
    with pytest.raises(ServiceError, match="torch cannot use --device cuda:99"):
        build_scorer("clip", {"model": str(clip), "device": "cuda:99"})
    with pytest.raises(ConfigError, match="batch=0 must be at least 1"):
        build_scorer("clip", {"model": str(clip), "batch": 0})
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    with pytest.raises(ServiceError, match=r"scorer 'pickscore' needs the package 'torch': pip install 'xomni_jax\[pickscore\]'"):
        build_scorer("pickscore", {"model": str(clip)})


def test_loo_fid_in_the_features_of_a_clip(clip, tmp_path):
    from transformers import CLIPImageProcessorPil, CLIPModel

    for n, image in enumerate(images()):
        Image.fromarray(image).save(tmp_path / f"{n}.png")
    scorer = build_scorer("loo_fid", {"references": str(tmp_path), "features": "clip", "model": str(clip), "decay": 0.0})
    pixels = CLIPImageProcessorPil.from_pretrained(clip)([Image.fromarray(i) for i in images()], return_tensors="pt")
    with torch.no_grad():
        x = torch.nn.functional.normalize(CLIPModel.from_pretrained(clip).get_image_features(**pixels).pooler_output, dim=-1).numpy()

    def fid(y):
        return ((x.mean(0) - y.mean(0)) ** 2).sum() + ((x.std(0, ddof=1) - y.std(0)) ** 2).sum()

    expected = [fid(np.delete(x[:4], n, 0)) - fid(x[:4]) for n in range(4)]
    np.testing.assert_allclose([s.value for s in scorer.score(images()[:4], items()[:4])], expected, atol=1e-4)
