"""xomni eval judge-check: judges that know the answers pass, the others do not."""

import pytest

from tests.evaluation.judges.fake_endpoint import fake_endpoint
from xomni_jax.cli.main import main
from xomni_jax.evaluation.judge_check import KNOWN, LEAST, check
from xomni_jax.evaluation.suite import unreadable

BOX = {"box": [1, 2, 3, 4], "score": 0.9}
RIGHT = {
    "ocr": lambda one: {"no text": "No text recognized"}.get(one.wanted, one.wanted),
    "vqa": lambda one: one.wanted,
    "detector": lambda one: {name: [BOX | {"color": "red"}] for name in one.question["classes"] if name != "giraffe"},
}
WRONG = {
    "ocr": [lambda one: "", lambda one: one.wanted + " and more", lambda one: unreadable("?")],
    "vqa": [lambda one: "yes", lambda one: {"yes": "no", "no": "yes"}[one.wanted], lambda one: unreadable("?")],
    "detector": [
        lambda one: {},
        lambda one: {name: [BOX | {"color": "red"}] for name in one.question["classes"]},  # sees giraffes everywhere
        lambda one: {name: [BOX | {"score": 0.2}] for name in one.question["classes"]},
    ],
}


class Says:
    """A judge that is told the answers."""

    def __init__(self, kind, answer):
        self.replies = iter([answer(one) for one in KNOWN[kind]()])

    def ask(self, images, questions):
        """One reply per image."""
        return [[next(self.replies)] for _ in images]


@pytest.mark.parametrize("kind", KNOWN)
def test_who_knows_the_answers_agrees(kind):
    assert all(one.right for one in check(kind, Says(kind, RIGHT[kind])))


@pytest.mark.parametrize("kind, wrong", [(kind, n) for kind in KNOWN for n in range(3)])
def test_who_guesses_does_not(kind, wrong):
    checked = check(kind, Says(kind, WRONG[kind][wrong]))
    assert sum(one.right for one in checked) < LEAST * len(checked)


def test_images_differ_and_questions_are_balanced():
    assert len({one.image.tobytes() for one in KNOWN["vqa"]()}) == 4 and len({one.image.tobytes() for one in KNOWN["detector"]()}) == 3
    wanted = [one.wanted for one in KNOWN["vqa"]()]
    assert wanted.count("yes") == wanted.count("no") == len(wanted) / 2


def test_the_command_says_who_does_not_agree(capsys):
    with fake_endpoint("say yes") as endpoint:
        assert main(["eval", "judge-check", "vqa", "--judge", f"tiny-vlm@{endpoint.url}"]) == 1
        said = capsys.readouterr().out.splitlines()
        assert said[-1] == "tiny-vlm does not agree with the known answers: 8 of 16 are right"
        assert sum(line.startswith("WRONG: wanted 'no', the judge says 'yes'") for line in said) == 8
        assert main(["eval", "judge-check", "detector", "--judge", endpoint.url]) == 2  # no detector
    assert main(["eval", "judge-check", "vqa"]) == 2
    assert "a judge of kind 'vqa' is needed and no --judge was given" in capsys.readouterr().err
