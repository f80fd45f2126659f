"""GenEval's detector with small random models: geometry, choice of boxes, colours, and the way over HTTP (parity marker: torch)."""

import numpy as np
import pytest
from PIL import Image

from tests.encoder_tokenizers import write_clip
from tests.rewards.running import service
from xomni_jax.evaluation.judges import open_judge
from xomni_jax.rewards import Score
from xomni_jax.rewards.scorer import ServiceError, build_scorer
from xomni_jax.rewards.services.detector import COCO, COLOURS, Instance, choose_instances, crop, fitted

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Checkpoints in the released layout: Mask2Former with three classes, CLIP of width 16."""
    from transformers import CLIPConfig, CLIPModel, Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("detector")
    swin = SwinConfig(
        image_size=64, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    sizes = dict.fromkeys(("feature_size", "mask_feature_size", "hidden_dim"), 32)
    config = Mask2FormerConfig(
        backbone_config=swin, num_queries=6, num_attention_heads=2, encoder_layers=1, decoder_layers=2, dim_feedforward=16,
        encoder_feedforward_dim=16, id2label={0: "cat", 1: "dog", 2: "bus"}, **sizes,
    )  # fmt: skip
    Mask2FormerForUniversalSegmentation(config).save_pretrained(root / "mask2former")
    tokens = write_clip(root / "clip")
    text = {"vocab_size": tokens, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "bos_token_id": tokens - 2, "eos_token_id": tokens - 1}  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 32, "patch_size": 16}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(root / "clip")
    return str(root / "mask2former"), str(root / "clip")


def asking(**changes):
    return {"classes": ["bus", "cat"], "coloured": ["bus"], "min_score": 0.0, "at_most": 3} | changes


def scored(scorer, **changes):
    noise = np.random.default_rng(0).integers(0, 255, (48, 80, 3), np.uint8)
    score = scorer.score_image(noise, {"prompt": "", "targets": {"detect": asking(**changes)}})
    return score.value, score.detail


def test_what_it_reports(folders):
    scorer = build_scorer("detector", {"detector": folders[0], "clip": folders[1], "short_side": 64})
    share, detail = scored(scorer)
    found = detail["detections"]
    assert set(found) == {"bus", "cat"} and share == sum(map(bool, found.values())) / 2 > 0
    for name, boxes in found.items():
        scores = [b["score"] for b in boxes]
        assert len(boxes) <= 3 and scores == sorted(scores, reverse=True)
        for b in boxes:
            left, top, right, bottom = b["box"]
            assert 0 <= left < right <= 80 and 0 <= top < bottom <= 48
            assert b.get("color") in (COLOURS if name == "bus" else (None,))
    again = scored(scorer)
    assert again == (share, detail)
    best = max(b["score"] for boxes in found.values() for b in boxes)
    assert scored(scorer, min_score=best) == (0.0, {"detections": {"bus": [], "cat": []}})  # strictly above
    with pytest.raises(ValueError, match="knows no unicorn; its 3 classes"):
        scored(scorer, classes=["unicorn"])
    assert scorer.score_image(np.zeros((8, 8, 3), np.uint8), {"prompt": "", "targets": {}}) == Score(None)


def test_instances_are_pairs_of_query_and_class():
    classes = torch.full((2, 4), -9.0)  # three classes and "nothing"
    classes[0, 1], classes[1, 3] = 9.0, 9.0
    masks = torch.full((2, 6, 8), -20.0)
    masks[0, 1:3, 2:7] = 20.0
    label, score, box, mask = choose_instances(torch, classes, masks)[0]
    assert (label, box) == (1, (2.0, 1.0, 7.0, 3.0)) and score == pytest.approx(1.0, abs=1e-4) and mask.sum() == 10
    assert all(label == 1 or score < 1e-3 for label, score, *_ in choose_instances(torch, classes, masks))
    masks[0, 1:3, 2:7] = 0.5  # a doubtful mask lowers the confidence
    assert choose_instances(torch, classes, masks)[0][1] == pytest.approx(1 / (1 + np.exp(-0.5)), abs=1e-4)
    assert choose_instances(torch, classes, torch.full((2, 6, 8), -1.0)) == []


def test_geometry_of_the_official_detector():
    assert fitted((1152, 1152)) == (800, 800) and fitted((1152, 896)) == (1029, 800)
    assert fitted((2000, 500)) == (1333, 333) and fitted((64, 32)) == (1333, 667)
    assert len(COCO) == 80 == len(set(COCO)) and COCO[64:67] == ("computer mouse", "tv remote", "computer keyboard")


def test_background_is_painted_grey():
    mask = np.zeros((10, 12), bool)
    mask[2:5, 3:6] = True
    mask[4, 5] = False
    cut = crop(Image.new("RGB", (12, 10), (9, 200, 30)), Instance("bus", 1.0, (3.0, 2.0, 6.0, 5.0), mask))
    assert cut.size == (3, 3) and cut.getpixel((0, 0)) == (9, 200, 30) and cut.getpixel((2, 2)) == (0x99,) * 3


def test_over_http_as_a_judge(folders):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 80, 3), np.uint8))
    with service("detector", "--detector", folders[0], "--clip", folders[1], "--workers", "1", "--short-side", "64") as (_, url):
        judge = open_judge("detector", url)
        (reply,), (other,) = judge.ask([image, image], [[asking()], [asking(classes=["dog"], coloured=[])]])
        here = build_scorer("detector", {"detector": folders[0], "clip": folders[1], "short_side": 64})
        assert reply == scored(here)[1]["detections"] and set(other) == {"dog"}
        assert judge.settings["version"].endswith("/short-side-64") and "Mask2Former" in judge.settings["official judge"]
        judge.close()


def test_missing_models_are_named(tmp_path, folders):
    with pytest.raises(ServiceError, match="needs --detector DIR, a local copy of facebook/mask2former.*it was not given"):
        build_scorer("detector")
    with pytest.raises(ServiceError, match="needs --clip DIR"):
        build_scorer("detector", {"detector": folders[0], "clip": str(tmp_path / "none")})
    with pytest.raises(ServiceError, match="holds no Mask2FormerForUniversalSegmentation"):
        build_scorer("detector", {"detector": str(tmp_path), "clip": folders[1]})
