"""The commands behind the paper's tables: complete, accepted by the command line, and beside the runs that there are."""

import json
import shlex

import pytest

from tests.evaluation.made_runs import write_answer_run, write_generate_run
from xomni_jax.cli import eval as eval_command
from xomni_jax.cli.main import main
from xomni_jax.cli.parser import Parser
from xomni_jax.evaluation import paper
from xomni_jax.evaluation.paper import OPEN, PAPER, best_runs, command, find_runs, other_settings, suite_settings, table_text
from xomni_jax.evaluation.suites import PUBLISHED, get_suite


def parse(command):
    """The arguments that a printed command gives."""
    words = shlex.split(command)
    assert words[:2] == ["xomni", "eval"]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("sys.argv", words)
        parser = Parser()
        eval_command.add_arguments(parser)
    return parser.parse_args(words[2:])


def test_every_command_is_accepted_and_names_its_settings():
    assert set(paper.COLUMNS) == set(PUBLISHED)
    for name in paper.COLUMNS:
        args, suite = parse(command(name)), get_suite(name)
        settings = {s.name: s.value for s in suite_settings(name)}
        assert args.model == ("models/xomni-zh" if name.endswith("zh") else "models/xomni-en")
        assert settings["checkpoint"] == ("X-Omni-Zh" if name.endswith("zh") else "X-Omni-En")
        assert getattr(args, "rewrite", None) is not None if name == "geneval" else not getattr(args, "rewrite", None)
        if suite.task == "generate":
            assert (args.height, args.width, args.seed) == (1152, 1152, 1234) and settings["images per prompt"] == suite.repeats == 4
            for option in ("height", "width", "seed", "temperature", "top-k", "top-p", "min-p", "guidance"):
                assert settings[option] == getattr(args, option.replace("-", "_"))
        else:
            assert settings["max_new_tokens"] == suite.max_new_tokens
        assert any(s.source == OPEN for s in suite_settings(name))
    stated = {(name, s.name) for name in paper.COLUMNS for s in suite_settings(name) if s.source == PAPER}
    assert stated == {("geneval", "rewriting"), ("longtext-en", "images per prompt"), ("longtext-zh", "images per prompt")}


def test_the_printed_table_marks_what_is_not_stated(tmp_path, capsys):
    write_generate_run(tmp_path / "deep" / "lt", items=3, height=1152, width=1152, repeats=4)
    write_generate_run(tmp_path / "small", items=2)
    run = write_answer_run(tmp_path / "pope", items=9)
    assert main(["eval", "--paper-table", "--runs", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "paper: LongText EN 0.900" in said and "Position 0.71" in said and "temperature 1.0*" in said and "checkpoint X-Omni-En?" in said
    value = json.loads((tmp_path / "deep" / "lt" / "results.json").read_text())["headline"]["value"]
    assert f"ours: LongText EN {value:.3f} from 3 of 160 items, 95% interval " in said  # the run of more items
    assert f"{tmp_path / 'deep' / 'lt'}, model 0123abcd, judge by hand" in said
    share = json.loads((run / "results.json").read_text())["headline"]["value"]
    assert (
        f"ours: POPE {100 * share:.1f} from 9 of 9000 items, 95% interval {100 * share - 1.96:.4g} to" in said
        and said.count("not run") == 10
    )
    assert "the paper does not say: checkpoint, height, width" in said


def test_a_run_of_other_settings_is_not_passed_off_as_the_papers(tmp_path):
    make = lambda name, **how: write_generate_run(tmp_path / name, size=(8, 8), width=1152, **how)  # noqa: E731
    best = lambda: best_runs(find_runs(tmp_path))["longtext-en"]  # noqa: E731
    run = make("a", items=3, repeats=4, height=1152)
    assert other_settings(best()) == [] and "not comparable" not in table_text([best()])
    results = json.loads((run / "results.json").read_text())
    results["settings"]["data"]["rewritten"] = True
    (run / "results.json").write_text(json.dumps(results))
    assert other_settings(best()) == ["rewriting yes"]
    # A comparable run goes before one of more items; without one, the number is marked.
    make("b", items=9, repeats=1, height=32, guidance=2.0, objections=["9 of 160 items were evaluated", "images of 32 x 1152 pixels"])
    assert best().path == run
    (run / "results.json").unlink()
    assert other_settings(best()) == ["height 32", "guidance 2.0", "images per prompt 1"]
    said = table_text([best()])
    assert "ours, not comparable: LongText EN" in said and "not comparable: 9 of 160 items were evaluated" in said
    assert "not comparable: images of 32 x 1152 pixels" in said


def test_no_directory_of_runs(tmp_path, capsys):
    assert main(["eval", "--paper-table", "--runs", str(tmp_path / "none")]) == 2
    assert "is no directory; give the one that holds the run directories" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["eval", "--help"])
    assert "--paper-table" in capsys.readouterr().out
    assert main(["eval"]) == 2 and "say what to evaluate" in capsys.readouterr().err
