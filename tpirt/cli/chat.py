"""``tpirt chat``."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from tpirt.cli.options import (
    Commands,
    add_engine_options,
    add_parser,
    add_sampling_options,
    engine_options,
    run_async,
    sampling_params,
    tell,
)

if TYPE_CHECKING:
    from tpirt.engine.engine import LoadPlan


def add_command(commands: Commands) -> None:
    """Add ``chat`` and its options."""
    parser = add_parser(
        commands,
        "chat",
        "talk to a model; /help inside lists what can be done",
        "tpirt chat --local 4\n  tpirt chat --model ~/llama --peers 192.168.1.7:50051",
    )
    add_engine_options(parser)
    add_sampling_options(parser)
    parser.add_argument("--system", metavar="TEXT", help="the system message")
    parser.add_argument("--prompt", metavar="TEXT", help="answer this once and exit")
    parser.set_defaults(run=lambda arguments: run_async(_run(arguments)))


async def _run(arguments: argparse.Namespace) -> None:
    from tpirt.chat.progress import ConsoleProgress
    from tpirt.chat.repl import ChatOptions, run_chat
    from tpirt.engine import Engine

    plans: list[LoadPlan] = []
    with ConsoleProgress(quiet=arguments.quiet) as progress:
        options = engine_options(arguments, progress, plans)
        async with Engine.connect(**options) as engine:
            tell(engine, arguments)
            chat = ChatOptions(
                params=sampling_params(arguments, engine.defaults.sampling),
                system=arguments.system,
                prompt=arguments.prompt,
                plan=plans[0],
                model_name=engine.name,
                progress=progress,
            )
            await run_chat(engine, chat)
