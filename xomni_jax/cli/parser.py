"""The parser of all commands: help that fits one screen, the rest behind --help-all, and one sentence for a mistake."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from typing import Any


class Parser(argparse.ArgumentParser):
    """Parses a command or subcommand. Unknown options are answered with the nearest known one; `--config.KEY=VALUE` is left to commands
    that take a --config.

    Attributes:
      details: a text that only --help-all shows, before the epilog.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(add_help=False, formatter_class=argparse.RawDescriptionHelpFormatter, **settings)
        self.details, self._rare = "", list[argparse._ArgumentGroup]()
        self.add_argument("-h", "--help", action=_Help, nargs=0, help="explain the command")
        self.add_argument("--help-all", action=_Help, nargs=0, help="explain every option, and more of what the command does")

    def add_rare_group(self, title: str) -> argparse._ArgumentGroup:
        """A group of options that only --help-all shows."""
        self._rare.append(self.add_argument_group(title))
        return self._rare[-1]

    def format_usage(self) -> str:
        """What a call must hold."""
        formatter = argparse.HelpFormatter(f"{self.prog} [OPTION ...]")
        formatter.add_usage(None, [a for a in self._actions if a.required or not a.option_strings], [])
        return formatter.format_help()

    def format_help(self, everything: bool = False) -> str:
        """The help: usage, description, options by groups, examples."""
        formatter = self._get_formatter()
        formatter.add_text(self.description)
        for group in self._action_groups:
            if everything or group not in self._rare:
                formatter.start_section(group.title)
                formatter.add_text(group.description)
                formatter.add_arguments(a for a in group._group_actions if a.dest != "help_all" or self._rare or self.details)
                formatter.end_section()
        if self._rare and not everything:
            formatter.add_text(f"--help-all also explains: {', '.join(group.title for group in self._rare)}")
        formatter.add_text(self.details if everything else "")
        formatter.add_text(self.epilog)
        return f"{self.format_usage()}\n{formatter.format_help()}"

    def error(self, message: str) -> Any:
        """Ends the program with code 2: the sentence, then how the command is called."""
        self.exit(2, f"{self.prog}: {message}\n{self.format_usage()}{self.prog} --help lists the options\n")

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:  # type: ignore[override]
        """As argparse's; the arguments that are left over are all `--config.KEY=VALUE`."""
        namespace, rest = super().parse_known_args(args, namespace)
        for word in rest:
            if not (word.startswith("--config.") and "config" in namespace):
                self.error(self._unknown(word, "config" in namespace))
        return namespace, rest

    def _unknown(self, word: str, has_config: bool) -> str:
        if not word.startswith("-"):
            return f"unexpected argument {word!r}; a text with spaces needs quotation marks"
        option = word.partition("=")[0]
        near = difflib.get_close_matches(option, self._option_string_actions, 1, 0.7)
        keys = "; keys of the configuration are written --config.KEY=VALUE" * has_config
        return f"unknown option {option}" + (f"; did you mean {near[0]}?" if near else keys)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            near = difflib.get_close_matches(str(value), map(str, action.choices), 1)
            what = f"did you mean {near[0]}?" if near else f"use one of {', '.join(map(str, action.choices))}"
            raise argparse.ArgumentError(action, f"invalid choice: {value!r}; {what}")


class _Help(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        print(parser.format_help(everything=self.dest == "help_all"), end="")
        parser.exit()
