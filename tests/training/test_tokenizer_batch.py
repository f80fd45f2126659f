"""What the training of the tokenizer starts from: labels of patches that have none of their own, and a state that keeps its types."""

import jax
import numpy as np
import pytest

from tests.miniature import stage_config
from xomni_jax.data.preprocess import to_pixels
from xomni_jax.sequence.tokenizer import MultimodalTokenizer
from xomni_jax.sharding.mesh import make_mesh
from xomni_jax.training.stage import STAGES
from xomni_jax.training.tokenizer import colour_labels, learning_batch


def test_a_patch_without_a_label_is_labelled_with_its_mean_colour():
    image = np.zeros((1, 4, 12, 3), np.uint8)
    image[:, :, 4:8] = 255
    image[:, :2, 8:], image[:, 2:, 8:] = (255, 0, 120), (255, 102, 132)  # on average (255, 51, 126): levels 4, 1, 2
    expected = [[[1, 125, 1 + 4 * 25 + 1 * 5 + 2]]]
    np.testing.assert_array_equal(colour_labels(to_pixels(image), 4), expected)
    asked = {"image": image, "question": ["what is it?"], "answer": ["a flag"]}
    text = MultimodalTokenizer.load()
    np.testing.assert_array_equal(learning_batch(text, 16, 4, asked)["columns"], expected)
    own = np.array([[[3, 2, 1]]], np.int32)
    np.testing.assert_array_equal(learning_batch(text, 16, 4, asked | {"columns": own})["columns"], own)


@pytest.mark.parametrize("file", ["tokenizer", "decoder", "pretrain_1"])
def test_no_array_of_a_new_state_is_weakly_typed(file):
    """One would become strongly typed by the first step, and the second step would be compiled again."""
    config = stage_config(file, "runs/none")
    stage, mesh = STAGES.get(config.stage), make_mesh(config.mesh.sizes())
    config_of = dict.fromkeys(stage.components)
    for name in stage.components:
        section = getattr(config, name)
        config_of[name] = section.config(section.presets["tiny"] if section.preset == "stored" else None, f"config.{name}")
    state = jax.eval_shape(stage.programs(config, config_of, mesh).create)
    assert [path for path, x in jax.tree_util.tree_leaves_with_path(state) if x.weak_type] == []
