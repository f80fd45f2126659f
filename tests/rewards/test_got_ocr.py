"""GOT-OCR 2.0 with random weights in the published layout, against the computation composed from transformers."""

import numpy as np
import pytest
from PIL import Image

from tests.chat_models import tokenizer_of
from xomni_jax.rewards.scorer import ServiceError, build_scorer
from xomni_jax.rewards.text_metrics import compare_text

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
SIDE = 256  # the processor counts 256 tokens for an image, so the model must have 64 x 64 patches: of 4 pixels here, of 16 as published


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One layer of each kind; the vision layer attends inside its windows alone, which is cheap."""
    from transformers import GotOcr2Config, GotOcr2ForConditionalGeneration
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    torch.manual_seed(5)
    tokenizer, (pad, *_) = tokenizer_of("", "<imgpad>", "<img>", "</img>")
    tokenizer.chat_template = None
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4}
    text |= {"model_type": "qwen2", "vocab_size": len(tokenizer), "initializer_range": 0.4, "max_window_layers": 1}
    text |= {"bos_token_id": None, "eos_token_id": None, "tie_word_embeddings": True}
    vision = {"hidden_size": 8, "output_channels": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "mlp_dim": 8}
    vision |= {"image_size": SIDE, "patch_size": 4, "global_attn_indexes": [], "initializer_range": 0.5}
    model = GotOcr2ForConditionalGeneration(GotOcr2Config(vision_config=vision, text_config=text, image_token_index=pad))
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids("<|im_end|>")
    out = tmp_path_factory.mktemp("got") / "GOT-OCR-2.0-hf"
    pixels = GotOcr2ImageProcessorPil(size={"height": SIDE, "width": SIDE})
    for part in (model, tokenizer, pixels):
        part.save_pretrained(out)
    return out


@pytest.fixture
def images():
    rng = np.random.default_rng(2)
    return [rng.integers(0, 256, (y // 8, x // 8, 3), np.uint8).repeat(8, 0).repeat(8, 1) for y, x in ((96, 160), (256, 256), (80, 320))]


def composed(folder, image, tiles, suffix, tokens):
    """The text, by the classes of transformers put together by hand: pixels, ChatML, greedy decoding."""
    from transformers import AutoTokenizer, GotOcr2ForConditionalGeneration

    tokenizer, model = AutoTokenizer.from_pretrained(folder), GotOcr2ForConditionalGeneration.from_pretrained(folder).eval()
    mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    pixels = np.stack([(np.asarray(tile) / 255 - mean) / std for tile in tiles(Image.fromarray(image))]).transpose(0, 3, 1, 2)
    system = "You should follow the instructions carefully and explain your answers in detail."
    text = (
        f"<|im_start|>system\n{system}<|im_end|><|im_start|>user\n<img>{'<imgpad>' * 256 * len(pixels)}</img>\n"
        f" OCR{suffix}: <|im_end|><|im_start|>assistant\n"
    )
    inputs = tokenizer(text, return_tensors="pt")["input_ids"]
    pixels = torch.tensor(pixels, dtype=torch.float32)
    with torch.no_grad():
        made = model.generate(input_ids=inputs, pixel_values=pixels, max_new_tokens=tokens, do_sample=False, no_repeat_ngram_size=20)
    return tokenizer.decode(made[0, inputs.shape[1] :], skip_special_tokens=True).strip()


def whole(image):
    return [image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)]


def test_it_reads_as_transformers_does(folder, images):
    scorer = build_scorer("got_ocr", {"model": str(folder), "device": "cpu", "max_tokens": 6})
    scorer._model.generation_config.eos_token_id = None  # random weights do not end by themselves
    texts = scorer._generate(images)
    assert [text for text, _ in texts] == [composed(folder, image, whole, "", 6) for image in images]
    assert len({text for text, _ in texts}) == len(images)


def test_texts_do_not_depend_on_the_batch(folder, images):
    """In one batch, padded to the largest number of tiles, and alone; with tiles the question is another one."""

    def tiles(image):
        wide = image.resize((2 * SIDE, SIDE), Image.Resampling.BICUBIC)
        return [wide.crop((n * SIDE, 0, (n + 1) * SIDE, SIDE)) for n in range(2)] + whole(image)

    scorer = build_scorer("got_ocr", {"model": str(folder), "device": "cpu", "max_tokens": 6, "patches": 2})
    together = scorer._generate(images)
    assert together == [scorer._generate([image])[0] for image in images]
    assert together[0][0] == composed(folder, images[0], tiles, " upon the patch reference", 6)


def test_scores_and_what_does_not_apply(folder, images, monkeypatch):
    scorer = build_scorer("got_ocr", {"model": str(folder), "device": "cpu", "batch": 2})
    read = iter([[("OPEN DAILY", True), ("OPEN OPEN OPEN", False)]])
    monkeypatch.setattr(scorer, "_generate", lambda images: next(read))
    items = [{"prompt": "", "targets": targets} for targets in ({"text": ["OPEN 24"]}, {}, {"text": "OPEN"})]
    found, absent, endless = scorer.score(images, items)
    assert (found.value, dict(found.detail)) == compare_text(["OPEN 24"], "OPEN DAILY")
    assert (absent.value, absent.error) == (None, None) and endless.error == "the reading did not end within 512 tokens"
    assert scorer.version == f"got_ocr-{scorer.model_hash[:12]}/auto"


@pytest.mark.parametrize(
    ("options", "config", "words"),
    [
        ({}, None, "scorer 'got_ocr' needs --model DIR, a local copy of stepfun-ai/GOT-OCR-2.0-hf from Hugging Face; it was not given"),
        ({"model": "absent"}, None, "absent is no directory"),
        ({"patches": 0}, '{"model_type": "got_ocr2"}', "--patches and --max-tokens must be at least 1"),
        ({}, '{"model_type": "qwen2"}', "holds a model of type 'qwen2', not stepfun-ai/GOT-OCR-2.0-hf"),
        ({}, "not JSON", "holds no AutoConfig that transformers can read"),
        ({}, '{"model_type": "got_ocr2"}', "holds no GotOcr2Processor that transformers can read"),
    ],
)
def test_what_is_no_such_model_is_one_sentence(options, config, words, tmp_path):
    if config:
        (tmp_path / "config.json").write_text(config)
        (tmp_path / "model.safetensors").write_bytes(b"")
        options |= {"model": str(tmp_path)}
    with pytest.raises(ServiceError) as told:
        build_scorer("got_ocr", options)
    assert words in str(told.value) and "\n" not in str(told.value)
