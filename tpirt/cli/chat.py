"""``tpirt chat``."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tpirt.cli import last_run
from tpirt.cli.options import (
    Commands,
    add_context_option,
    add_draft_option,
    add_engine_options,
    add_parser,
    add_sampling_options,
    add_special_tokens_option,
    add_target_options,
    connected,
    run_async,
    sampling_params,
)
from tpirt.errors import IdentityError, RequestError
from tpirt.terminal import table, width
from tpirt.types import SamplingParams

if TYPE_CHECKING:
    from tpirt.chat.journal import Journal
    from tpirt.chat.progress import ConsoleProgress
    from tpirt.chat.saved import SavedConversation

_MOST_LISTED, _MOST_SHOWN = 20, 40  # conversations, and characters of the first message


def add_command(commands: Commands) -> None:
    """Add ``chat`` and its options."""
    parser = add_parser(
        commands,
        "chat",
        "talk to a model; /help lists the commands of a chat",
        "tpirt chat --local 4\n  tpirt chat --model ~/llama --peers 192.168.1.7:50051\n"
        "  cat letter.txt | tpirt chat",
    )
    add_engine_options(parser)
    add_context_option(parser)
    add_draft_option(parser)
    add_target_options(
        parser.add_argument_group("targets", "/stats says how many answers were in time")
    )
    add_sampling_options(parser)
    parser.add_argument("--system", metavar="TEXT", help="the system message")
    parser.add_argument("--prompt", metavar="TEXT", help="answer this prompt once and exit")
    parser.add_argument(
        "--each-line",
        action="store_true",
        help="take each line of piped input as a message or command (default: all of it is one "
        "message, unless its writer pauses for an answer)",
    )
    add_special_tokens_option(parser)
    parser.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="ID",
        help="go on with a conversation of an earlier chat, the latest by default",
    )
    parser.add_argument(
        "--list", action="store_true", help="list the conversations of earlier chats, and exit"
    )
    parser.add_argument(
        "--no-journal",
        action="store_true",
        help="write nothing of what is typed and answered to this device's disk",
    )
    parser.add_argument(
        "--fresh",
        action="store_true",
        help="neither take up nor change the model and options of the last chat, which one "
        "without --model repeats",
    )
    last_run.mark(parser)
    parser.set_defaults(run=partial(_run, parser))


def _run(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    import tpirt.chat  # noqa: F401  # before the event loop: see run_async

    if arguments.list:
        _list_conversations()
        return
    if arguments.prompt == "":
        raise RequestError("the prompt is empty: give at least one character of text")
    named = last_run.names_model(arguments)
    if (last := last_run.take_up(parser, arguments)) and not arguments.quiet:
        print(f"tpirt: as last time: {last}; --fresh starts without these options", file=sys.stderr)
    sampling_params(arguments, SamplingParams())  # fail before loading
    began = partial(last_run.remember, parser, arguments)
    run_async(_chat(arguments, began, any_model=named))


async def _chat(
    arguments: argparse.Namespace, began: Callable[[], None], *, any_model: bool
) -> None:
    from tpirt.chat.progress import ConsoleProgress
    from tpirt.chat.repl import ChatOptions, run_chat

    with ConsoleProgress(quiet=arguments.quiet) as progress, ExitStack() as stack:
        journal = _journal(arguments, progress)
        if journal is not None:
            stack.callback(journal.close)
        resumed = _resumed(arguments.resume, journal)  # before a model is loaded for nothing
        if resumed is not None and not any_model:
            _check_model(*resumed, arguments.model)
        async with connected(arguments, progress, arguments.context) as engine:
            try:
                began()
            except IdentityError as exc:
                progress.note(f"tpirt: this run is not remembered: {exc}")
            system, talk = arguments.system, None
            if resumed is not None:
                path, talk = resumed
                system = talk.system if system is None else system
                for line in resumption(path, talk, engine.name, arguments.resume):
                    progress.note(f"tpirt: {line}")
            if journal is not None:
                journal.model = engine.name
            defaults = engine.defaults
            answers = engine.tokenizer.has_chat_template  # a base model would not end by itself
            chat = ChatOptions(
                params=sampling_params(arguments, defaults.chat if answers else defaults.sampling),
                system=system,
                prompt=arguments.prompt,
                each_line=arguments.each_line,
                parse_special=arguments.special_tokens,
                model_name=engine.name,
                progress=progress,
                journal=journal,
                resumed=talk,
            )
            await run_chat(engine, chat)


def _list_conversations() -> None:
    """Print the latest conversations: when, with which model, and how they begin."""
    from tpirt.chat.journal import changed_s, journal_folder, journals
    from tpirt.chat.saved import outline

    folder = journal_folder()
    if folder is None:
        print("conversations are not kept: there is no home directory; set XDG_STATE_HOME")
        return
    found = journals(folder)
    rows = [("conversation", "last written", "model", "begins with")]
    for path in found[:_MOST_LISTED]:
        model, text = outline(path)
        written = time.strftime("%Y-%m-%d %H:%M", time.localtime(changed_s(path)))
        rows.append((path.stem, written, model, _first_words(text)))
    if not found:
        print(f"there is no conversation in {folder}")
        return
    print("\n".join(table(rows, left=4, columns=width(sys.stdout))))
    if len(found) > _MOST_LISTED:
        print(f"and {len(found) - _MOST_LISTED} more in {folder}")


def _first_words(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _MOST_SHOWN else text[: _MOST_SHOWN - 3] + "..."


def _journal(arguments: argparse.Namespace, progress: ConsoleProgress) -> Journal | None:
    from tpirt.chat.journal import Journal, journal_folder

    folder = journal_folder()
    once = arguments.prompt is not None and arguments.resume is None
    if arguments.no_journal or once or folder is None:
        return None
    return Journal(folder, progress.note)


def _resumed(name: str | None, journal: Journal | None) -> tuple[Path, SavedConversation] | None:
    """The conversation to go on with, which the journal holds from now on."""
    from tpirt.chat.journal import find, journal_folder
    from tpirt.chat.saved import load

    if name is None:
        return None
    path = find(journal_folder(), name)
    return path, load(path) if journal is None else journal.resume(path)


def _check_model(path: Path, talk: SavedConversation, model: str | None) -> None:
    """Refuse to go on with a model that nobody named."""
    from tpirt.engine.model import BUNDLED_MODEL
    from tpirt.weights.hub import find_model, model_name

    name = model_name(BUNDLED_MODEL if model is None else find_model(model))
    if talk.model and talk.model != name:
        raise RequestError(
            f"conversation {path.stem} was with {talk.model}, and this chat is with {name}: give "
            "--model, for either to go on with it"
        )


def resumption(path: Path, talk: SavedConversation, model: str, asked: str) -> Iterator[str]:
    """What a user should know of a conversation that goes on; ``asked`` is the name given."""
    from tpirt.chat.journal import LISTED, journals

    others = "" if asked or len(journals(path.parent)) == 1 else f", the latest one; {LISTED}"
    yield f"resuming conversation {path.stem}: {len(talk.messages)} messages{others}"
    if talk.model and talk.model != model:
        yield f"it was with {talk.model}; {model} goes on with it"
    if talk.unanswered:
        yield f"the last message was not answered: {talk.unanswered}"
    if talk.cut:
        yield "the last answer was cut short; what there is of it is kept"
