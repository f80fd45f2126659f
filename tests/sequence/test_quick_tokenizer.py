"""The tokenizer that needs no transformers gives what transformers gives, and is used where a folder's tokenizer.json is complete."""

import json
import shutil
import subprocess
import sys

import pytest

from tests.miniature import ROOT
from xomni_jax.sequence.quick_tokenizer import QuickTokenizer
from xomni_jax.sequence.tokenizer import TINY_TOKENIZER, MultimodalTokenizer, read_tokenizer

TEXTS = ["", 'a red sign that says "HELLO"', "  two  spaces\n", "Zoë 漢字 🙂", "<|im_start|>user\n<MM-Token-3>x<SOM>4 8<IMAGE>"]


@pytest.fixture(scope="module")
def pair():
    """The quick one and that of transformers."""
    return read_tokenizer(TINY_TOKENIZER, quick=True), read_tokenizer(TINY_TOKENIZER)


@pytest.mark.parametrize("text", TEXTS)
def test_texts_become_the_same_ids(text, pair):
    quick, whole = pair
    assert quick.encode(text, add_special_tokens=False) == whole.encode(text, add_special_tokens=False)
    assert quick.encode(text) == whole.encode(text)


@pytest.mark.parametrize("name", ["pad_token_id", "eos_token_id", "model_max_length"])
def test_attributes_are_the_same(name, pair):
    quick, whole = pair
    assert isinstance(quick, QuickTokenizer) and getattr(quick, name) == getattr(whole, name)


def test_tables_and_what_only_transformers_has(pair):
    quick, whole = pair
    assert quick.get_vocab() == whole.get_vocab() and quick.get_added_vocab() == whole.get_added_vocab()
    turns = [{"role": "user", "content": "x"}]
    assert quick.apply_chat_template(turns, tokenize=False) == whole.apply_chat_template(turns, tokenize=False)


def test_tokens_that_only_the_config_names(tmp_path):
    """Then tokenizer.json alone would split them; transformers adds them."""
    folder = shutil.copytree(TINY_TOKENIZER, tmp_path / "tokenizer")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    size = len(read_tokenizer(folder))
    config["added_tokens_decoder"] = {str(size): {"content": "<late>", "special": True}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert not isinstance(read_tokenizer(folder, quick=True), QuickTokenizer)
    assert MultimodalTokenizer.load(folder).text.encode("a<late>b", add_special_tokens=False)[1] == size


def test_a_damaged_file_is_named(tmp_path):
    folder = shutil.copytree(TINY_TOKENIZER, tmp_path / "tokenizer")
    (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text()[:500])
    with pytest.raises(ValueError, match="tokenizer' holds no readable tokenizer"):
        MultimodalTokenizer.load(folder)


def test_an_image_is_drawn_without_what_takes_long_to_import():
    code = (
        "import sys, xomni_jax.cli.generate, xomni_jax.inference\n"
        "from xomni_jax.sequence.tokenizer import MultimodalTokenizer\n"
        "MultimodalTokenizer.load().generation_prompt('a sign', 4, 8)\n"
        "print([name for name in ('torch', 'transformers', 'xomni_jax.training', 'xomni_jax.rl') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout == "[]\n"
