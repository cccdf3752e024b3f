"""The parser of the command line, and its help."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from tpirt.terminal import fill, wrap
from tpirt.version import __version__

_NO_COMMAND = re.compile(r"argument (COMMAND|ACTION): invalid choice: '(.*?)'.*from (.*)\)")
_NO_CHOICE = re.compile(r"argument .*: invalid choice: '(.*?)'.*from (.*)\)")

_NARROW, _SHORT_INDENT = 60, 8  # columns


class Parser(argparse.ArgumentParser):
    """An ArgumentParser with our help; what it does not know is answered with the nearest."""

    def __init__(self, **options: Any):
        super().__init__(**{"formatter_class": HelpFormatter, **options})
        self.color = False  # Python 3.14 would send colours, which our streams drop

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Refuse what is unknown here, where the command's options are known."""
        parsed, unknown = super().parse_known_args(args, namespace)
        if unknown:
            name = next((each for each in unknown if each.startswith("-")), "").partition("=")[0]
            near = _nearest(name, list(self._option_string_actions))
            if not name and "--listen" in self._option_string_actions:  # an address, as of others
                near = f"did you mean --listen {unknown[0]}?"
            text = f"unrecognized arguments: {' '.join(unknown)}"
            self.error(f"{text}: {near}" if near else text)
        return parsed, unknown

    def error(self, message: str) -> NoReturn:
        """Print usage and message, and exit with 2."""
        if found := _NO_COMMAND.match(message):
            what, name, choices = found.groups()
            known = re.findall(r"\w+", choices)
            hint = _nearest(name, known) or f"expected one of {', '.join(known)}"
            message = f"no {what.lower()} '{name}': {hint}"
        elif found := _NO_CHOICE.match(message):
            near = _nearest(found[1], re.findall(r"[\w-]+", found[2]))
            message += f": {near}" if near else ""
        super().error(message)

    def _print_message(self, message: str, file: Any = None) -> None:
        (file or sys.stderr).write(message)  # argparse would hide that it cannot be written


def _nearest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, [each for each in known if each != "-h"], 1, 0.5)
    return f"did you mean {near[0]}?" if near else ""


class HelpFormatter(argparse.HelpFormatter):
    """Shows a short usage and whole words; where it is narrow, examples continue after a \\."""

    def __init__(self, prog: str, **options: Any):
        super().__init__(prog, **options)
        if self._width < _NARROW:  # what an option means gets most of the line
            self._max_help_position = _SHORT_INDENT

    def _format_usage(self, usage: Any, actions: Any, groups: Any, prefix: Any) -> str:
        groups = [group for group in groups if group.required]
        grouped = [action for group in groups for action in group._group_actions]
        needed = [each for each in actions if each.required or each in grouped]
        commands = [each for each in actions if each.nargs == argparse.PARSER]
        text = super()._format_usage(usage, needed or commands, groups, prefix)
        if actions and not commands:
            text += "[options]"
        return wrap(" ".join(text.split()), self._width, "    ") + "\n\n"

    def _format_action(self, action: argparse.Action) -> str:
        if action.nargs == argparse.PARSER:  # its commands, without a line for their placeholder
            return "".join(map(self._format_action, self._iter_indented_subactions(action)))
        return super()._format_action(action)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return wrap(text, width).splitlines()

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n".join(
            fill(re.split(" (?=-)", line), " ", width - 2, "      ").replace("\n", " \\\n")
            if line.startswith("  tpirt ")
            else wrap(line, width)
            for line in text.splitlines()
        )


def build_parser() -> argparse.ArgumentParser:
    """Create the parser with all commands."""
    from tpirt.cli import chat, cluster, evaluate, generate, info, peer, peers, split, store, synth

    parser = Parser(
        prog="tpirt",
        description="Run a large language model over several small machines.",
        epilog="example:\n  tpirt chat --local 4\n\ntpirt COMMAND --help shows a command's options",
    )
    parser.add_argument("--version", action="version", version=f"tpirt {__version__}")
    parser.set_defaults(run=lambda _: _no_command(parser))
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for module in (chat, generate, peer, peers, cluster, split, synth, info, evaluate, store):
        module.add_command(commands)
    return parser


def _no_command(parser: argparse.ArgumentParser) -> NoReturn:
    parser.print_help(sys.stderr)
    sys.exit(2)
