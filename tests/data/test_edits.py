"""Edits of signs: what changes is what the caption says, and nothing else."""

import numpy as np
import pytest

from xomni_jax.data.edits import TASKS, EditsConfig, EditsSource
from xomni_jax.data.rendered import COLOURS, render_sign


def pairs(task, n=20):
    source = EditsSource(EditsConfig(tasks=(task,)), seed=3, batch_size=4)
    return [source[i] for i in range(n)]


@pytest.mark.parametrize("task", TASKS)
def test_inputs_and_outputs(task):
    for pair in pairs(task):
        before, after = pair["images"]
        assert pair["roles"] == ("input", "output") and pair["image"] is after and before.shape == after.shape == (*pair["size"], 3)
        (text,), ground = pair["targets"]["text"], pair["targets"].get("background")
        letters = {"segment": after, "from_segmentation": before}.get(task)
        if letters is not None:
            assert set(np.unique(letters)) == {0, 255}
            sign = before if task == "segment" else after
            np.testing.assert_array_equal((sign == sign[0, 0]).all(-1), letters[..., 0] == 0)
        if task != "segment":
            np.testing.assert_array_equal(after, render_sign(text, ground, pair["size"])[0])
        if task == "recolour":
            assert pair["caption"] == f"make the sign {ground}" and not np.array_equal(before[0, 0], after[0, 0])
            np.testing.assert_array_equal(
                before, render_sign(text, next(c for c in COLOURS if tuple(before[0, 0]) == COLOURS[c]), pair["size"])[0]
            )
        if task == "replace":
            assert f'by "{text}"' in pair["caption"] and f'replace "{text}"' not in pair["caption"]
            np.testing.assert_array_equal(before[0, 0], after[0, 0])


def test_an_example_depends_on_its_number_alone():
    every = EditsSource(EditsConfig(), seed=3, batch_size=4)
    one, again = every[7], EditsSource(EditsConfig(), seed=3, batch_size=4)[7]
    assert one["caption"] == again["caption"] and np.array_equal(one["image"], again["image"])
    assert len({every[i]["id"].split("-")[0] for i in range(30)}) == len(TASKS)


def test_unknown_tasks_are_refused():
    with pytest.raises(ValueError, match=r"tasks=\('paint',\): choose some of recolour, replace, segment, from_segmentation"):
        EditsConfig(tasks=("paint",))
