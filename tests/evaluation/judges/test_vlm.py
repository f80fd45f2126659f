"""A judge in this process: a Qwen2.5-VL of random weights, read from a directory in the layout of transformers."""

import pytest
from PIL import Image

from tests.evaluation.judges.test_chat import ASK, PICTURE
from xomni_jax.evaluation.judges import open_judge
from xomni_jax.evaluation.suite import SuiteError, is_unreadable
from xomni_jax.sequence.tokenizer import TINY_TOKENIZER

pytestmark = pytest.mark.parity
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}{% if c['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VISION = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One layer of each kind."""
    pytest.importorskip("torch")
    pytest.importorskip("torchvision")
    import torch
    from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessor

    torch.manual_seed(0)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(TINY_TOKENIZER)
    tokenizer.add_special_tokens({"additional_special_tokens": list(VISION)})
    tokenizer.chat_template = TEMPLATE
    start, end, image, video = tokenizer.convert_tokens_to_ids(list(VISION))
    text = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    text |= {"num_key_value_heads": 2, "max_window_layers": 1, "bos_token_id": None, "eos_token_id": None}
    text["rope_parameters"] = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 32}
    vision |= {"fullatt_block_indexes": [0], "window_size": 112}
    ids = {"image_token_id": image, "video_token_id": video, "vision_start_token_id": start, "vision_end_token_id": end}
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids))
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids("<|im_end|>")
    out = tmp_path_factory.mktemp("models") / "Tiny-VL"
    for part in (model, tokenizer, Qwen2VLImageProcessor(size={"shortest_edge": 56 * 56, "longest_edge": 112 * 112})):
        part.save_pretrained(out)
    return out


def test_it_sees_the_image_and_answers_greedily(folder):
    judge = open_judge("ocr", str(folder))
    question = ASK | {"max_tokens": 6}
    blue = Image.new("RGB", PICTURE.size, (0, 0, 255))
    big = [image.resize((120, 90)) for image in (PICTURE, PICTURE, blue)]
    (first,), (again,), (other,) = judge.ask(big, [[question]] * 3)
    assert isinstance(first, str) and first == again != other
    ((chosen,),) = judge.ask(big[:1], [[question | {"answers": ["yes", "no"]}]])
    assert is_unreadable(chosen)  # random weights say neither
    assert judge.name == "Tiny-VL" and judge.settings["dtype"] == "float32" and len(judge.settings["version"]) == 16
    judge.close()


def test_a_folder_without_a_model_is_one_sentence(folder, tmp_path):
    with pytest.raises(SuiteError, match=f"{tmp_path} holds no model for images and text that transformers reads"):
        open_judge("vqa", str(tmp_path))
