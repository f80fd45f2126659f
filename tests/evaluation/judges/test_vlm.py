"""A judge in this process: models of random weights, read from a directory in the layout of transformers."""

import pytest
from PIL import Image

from tests.chat_models import llava, qwen, write
from tests.evaluation.judges.test_chat import ASK, PICTURE
from xomni_jax.evaluation.judges import open_judge
from xomni_jax.evaluation.judges.preparation import ChatOptions
from xomni_jax.evaluation.suite import SuiteError, is_unreadable

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module", params=[qwen, llava])
def folder(request, tmp_path_factory):
    """A model with one layer of each kind."""
    pytest.importorskip("torch")
    return write(request.param, tmp_path_factory.mktemp("models") / "Tiny-VL")


def test_it_sees_the_image_and_answers_greedily(folder):
    judge = open_judge("ocr", str(folder), ChatOptions(thinking_tokens=2))  # random weights do not end by themselves
    question = ASK | {"max_tokens": 6}
    blue = Image.new("RGB", PICTURE.size, (0, 0, 255))
    big = [image.resize((120, 90)) for image in (PICTURE, PICTURE, blue)]
    (first,), (again,), (other,) = judge.ask(big, [[question]] * 3)
    assert isinstance(first, str) and first == again != other
    ((chosen,),) = judge.ask(big[:1], [[question | {"answers": ["yes", "no"]}]])
    assert is_unreadable(chosen)  # random weights say neither
    assert judge.name == "Tiny-VL" and judge.settings["dtype"] == "float32" and len(judge.settings["version"]) == 16
    judge.close()


def test_a_folder_without_a_model_is_one_sentence(tmp_path):
    pytest.importorskip("torch")
    with pytest.raises(SuiteError, match=f"{tmp_path} (holds no AutoConfig that transformers can read|holds a model of type)"):
        open_judge("vqa", str(tmp_path))
