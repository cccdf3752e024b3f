"""``tpirt chat``."""

from __future__ import annotations

import argparse

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
from tpirt.errors import RequestError


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
    add_target_options(parser.add_argument_group("targets", "/stats says how many met them"))
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
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    import tpirt.chat  # noqa: F401  # before the event loop: see run_async

    if arguments.prompt == "":
        raise RequestError("the prompt is empty: give at least one character of text")
    run_async(_chat(arguments))


async def _chat(arguments: argparse.Namespace) -> None:
    from tpirt.chat.progress import ConsoleProgress
    from tpirt.chat.repl import ChatOptions, run_chat

    with ConsoleProgress(quiet=arguments.quiet) as progress:
        async with connected(arguments, progress, arguments.context) as engine:
            defaults = engine.defaults
            answers = engine.tokenizer.has_chat_template  # a base model would not end by itself
            chat = ChatOptions(
                params=sampling_params(arguments, defaults.chat if answers else defaults.sampling),
                system=arguments.system,
                prompt=arguments.prompt,
                each_line=arguments.each_line,
                parse_special=arguments.special_tokens,
                model_name=engine.name,
                progress=progress,
            )
            await run_chat(engine, chat)
