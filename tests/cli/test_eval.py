"""xomni eval: parsing and messages; the measuring has its own tests."""

import pytest

from xomni_jax.cli import eval as command
from xomni_jax.cli.main import main
from xomni_jax.cli.parser import Parser
from xomni_jax.core.shipped import shipped

MODEL = shipped("xomni_jax/assets/tiny_sft")


def parse(*arguments):
    """Arguments of `xomni eval`."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("sys.argv", ["xomni", "eval", *arguments])  # only what is asked for is imported
        parser = Parser()
        command.add_arguments(parser)
        return parser.parse_args(arguments)


def test_arguments(tmp_path):
    (tmp_path / "first").write_text("41.5\n")
    args = parse(
        *"effect --sft a --rl r/model --ocr http://o --out x --size 32x128 --lengths 12-16 --temperatures 1,0".split(),
        "--first-image", str(tmp_path / "first"),
    )  # fmt: skip
    assert args.size == (32, 128) and args.lengths == (12, 16) and args.temperatures == (1.0, 0.0) and args.first_image == 41.5
    assert args.prompts == 64 and args.samples == 16 and args.second is None


@pytest.mark.parametrize(
    "wrong, said",
    [
        ("--size=32", "write it like 32x64"),
        ("--lengths=a-b", "write it like 3-6"),
        ("--temperatures=x", "like 1,0.5,0"),
        ("--first-image=x", "neither a number"),
    ],
)
def test_wrong_values_say_how(wrong, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse("effect", "--sft=a", "--rl=b", "--ocr=c", "--out=d", wrong)
    assert stopped.value.code == 2 and said in capsys.readouterr().err


def test_a_silent_service_is_one_sentence(tmp_path, capsys):
    assert main(["eval", "effect", f"--sft={MODEL}", f"--rl={MODEL}", "--ocr=http://127.0.0.1:9", f"--out={tmp_path}"]) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("xomni eval: no reward service answers at http://127.0.0.1:9") and "xomni serve-reward ocr --port 9" in said
    assert "\n" not in said and not list(tmp_path.iterdir())


def test_help_ends_with_an_example(capsys):
    with pytest.raises(SystemExit):
        main(["eval", "effect", "--help"])
    said = capsys.readouterr().out
    assert "oracle" in said and said.rstrip().endswith("--out runs/demo")


# ---- suites ----
def test_help_of_a_suite_names_its_files_judge_and_switches(capsys):
    with pytest.raises(SystemExit):
        main(["eval", "longtext-en", "--help-all"])
    said = capsys.readouterr().out
    for words in (
        "text_prompts.jsonl from the GitHub repository X-Omni-Team/X-Omni",
        "pp-ocr (local, the default)",
        "clean-replies",
        "--phase score",
    ):
        assert words in said
    assert said.rstrip().endswith("xomni eval longtext-en --model MODEL --data DATA --out runs/longtext-en")
    with pytest.raises(SystemExit):
        main(["eval", "rendered-qa", "--help"])
    said = capsys.readouterr().out
    assert "--data" not in said and "--seed" not in said and "--judge" not in said  # no option that it does not read


@pytest.mark.parametrize(
    "wrong, said",
    [
        ("--shard=0/2", "write K/N with K from 1 to N"),
        ("--shard=3/2", "write K/N"),
        ("--mesh=fsdp", "write it like fsdp=4,tensor=2"),
        ("--batch=0", "'0' is no number from 1 on"),
        ("--seed=-1", "give a number from 0 to 4294967295"),
        ("--instruction=ocr=/no/file", "is not NAME=FILE with a file that exists"),
        ("--phase=answer", "invalid choice: 'answer'"),
    ],
)
def test_wrong_values_of_a_suite_say_how(wrong, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse("longtext-en", "--data=a", "--out=b", wrong)
    assert stopped.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["longtext-en", "--data=/no/data"], "the data directory /no/data does not exist; it must hold text_prompts.jsonl from the GitHub"),
        (["rendered-text", "--switch=x"], "rendered-text has no switch 'x'; it has clean-replies"),
        (["rendered-text", "--ids", "x"], "rendered-text has no item 'x'; ids are such as '0000'"),
        (["rendered-text", "--judge=what"], "a judge of kind 'ocr' is needed and --judge what was given"),
        (["rendered-text", "--judge=m@http://127.0.0.1:9/v1"], "no model answers at http://127.0.0.1:9/v1"),
        (["rendered-text", "--model=/no/model"], "/no/model: no such directory"),
        (["rendered-text", "--min-p=2"], "min_p"),
        (["all", "--data=/", "--judge=pp-ocr"], "write KIND=JUDGE"),
        (["rendered", "--model=/no/model"], "/no/model: no such directory"),
    ],
)
def test_a_suite_that_cannot_run_is_one_sentence_and_leaves_nothing(arguments, said, tmp_path, capsys):
    assert main(["eval", *arguments, f"--out={tmp_path / 'out'}"]) == 2
    captured = capsys.readouterr()
    assert said in captured.out + captured.err and "Traceback" not in captured.err and captured.err.count("\n") <= 1
    assert not (tmp_path / "out").exists()


def test_all_names_what_is_absent(tmp_path, capsys):
    assert main(["eval", "all", f"--data={tmp_path}", f"--out={tmp_path / 'out'}"]) == 2
    said = capsys.readouterr().out
    assert said.count("not run: ") == 12 and "not run: pope: " in said and "coco_pope" in said
